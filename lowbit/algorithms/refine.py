"""Refinement: codes column by column again, then scales in closed form, both under the whole H.

The recursion visits each column once and never reconsiders it. Here every column is visited again
with all others known (cyclic coordinate descent: Behdin et al. 2023, "QuantEase", algorithm 1; Nair
and Suggala 2024, "CDQuant"). With the error d = w - q of a row, column k is best at

    target_k = w_k + sum_{j != k} d_j H_jk / H_kk,    q_k = nearest(target_k),

and then the scale of each group g in turn, its levels l_g frozen, at

    s_g + (d H_:g l_g) / (l_g H_gg l_g),

rounded to a value that can be stored, and taken if that still lowers d H d^T. Neither step can
raise it, so nothing has to be undone. H is the damped one, as in the recursion. Under double
quantization a scale moves among the values that the offset and the step of its block allow; these
two stay, so rows remain independent.

The column step has the form of the recursion in `ldlq.py`, with what is known of the columns ahead
as a constant, and runs through its solvers. Shapes as there: K in_features in *reversed* order of
visiting, R output rows, B columns of a block, W columns of a group, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.algorithms.ldlq import (
    Factor,
    Solution,
    block_solver,
    row_chunks,
    usable_block_size,
)
from lowbit.quant import Grid, decode


@dataclass(frozen=True)
class Coupling:
    """The damped H in the order of a factor.

    Args:
        factor: where the order is from.
        per_column: float32 `[K, K]`, H_jk / H_kk.
        diagonal: float32 `[K]`, H_kk.
    """

    factor: Factor
    per_column: Tensor
    diagonal: Tensor

    @staticmethod
    def of(hessian: Tensor, factor: Factor) -> Coupling:
        """Returns the coupling of `hessian` `[K, K]`, damped as `factor` is."""
        order = factor.order
        coupling = hessian[order[:, None], order]
        # A dead feature couples with none; 1 keeps its column at its weight, which is zero.
        coupling.diagonal().add_(factor.damp).masked_fill_(factor.dead[order], 1.0)
        diagonal = coupling.diagonal().clone()
        return Coupling(factor, coupling.div_(diagonal), diagonal)


def refine(
    weight: Tensor, start: Solution, hessian: Tensor, factor: Factor, sweeps: int, block_size: int
) -> Solution:
    """Returns `start` after `sweeps` rounds of refinement; no row's loss is higher than before.

    Args:
        weight: float32 `[N, K]`, what the codes approximate, zero at dead features.
        start: codes and grid to begin with.
        hessian: float32 `[K, K]`, not damped.
        factor: of that Hessian; gives the order of visiting and the damping.
        sweeps: visits of each column, and of each scale.
        block_size: columns whose sums over other blocks are computed together.
    """
    coupling, grid = Coupling.of(hessian, factor), start.grid
    codes, scales = start.codes.clone(), grid.scales.clone()
    row_losses = start.row_losses.clone()
    stored = grid.double_quantized
    scale_codes = None if stored is None else stored.codes.clone()
    block_size = usable_block_size(block_size, weight.device)
    for rows in row_chunks(weight):
        state = _Rows(weight[rows], start.codes[rows], grid, rows, coupling)
        for _ in range(sweeps):
            state.sweep_codes(block_size)
            state.sweep_scales()
        part = state.codes()
        losses = _row_losses(weight[rows], part, state.grid, hessian)
        # The damped loss fell; where the one that is reported did not, the row stays as it was.
        kept = losses < row_losses[rows]
        better = rows[kept]
        codes[better], scales[better] = part[kept], state.grid.scales[kept]
        row_losses[better] = losses[kept]
        if scale_codes is not None and state.scale_codes is not None:
            scale_codes[better] = state.scale_codes[kept]
    if stored is not None and scale_codes is not None:
        stored = replace(stored, codes=scale_codes)
    return Solution(
        codes, replace(grid, scales=scales, double_quantized=stored), start.targets, row_losses
    )


def _row_losses(weight: Tensor, codes: Tensor, grid: Grid, hessian: Tensor) -> Tensor:
    """Returns d H d^T of each row, float64 `[R]`."""
    error = weight - grid.dequantize(codes)
    return ((error @ hessian) * error).sum(1, dtype=torch.float64).clamp_min_(0)


class _Rows:
    """A chunk of rows while it is refined.

    Args:
        weight: float32 `[R, K]`, in the original order of columns as all arguments are.
        codes: int8 `[R, K]`.
        grid: of all rows, which says what scales can be stored.
        rows: int64 `[R]`, the indices of these rows.
        coupling: see `Coupling`.
    """

    def __init__(
        self, weight: Tensor, codes: Tensor, grid: Grid, rows: Tensor, coupling: Coupling
    ) -> None:
        order = coupling.factor.order
        self.whole, self.rows, self.coupling = grid, rows, coupling
        self.grid = grid.rows(rows)
        stored = grid.double_quantized
        self.scale_codes = None if stored is None else stored.codes[rows].clone()
        self.weight_KR = weight.T[order].contiguous()
        self.codes_KR = codes.T[order].contiguous()
        self.residual_KR = (weight - self.grid.dequantize(codes)).T[order].contiguous()
        group_of = grid.group_of_column(weight.device)[order]
        self.columns_of_group = [
            (group_of == group).nonzero().squeeze(1) for group in range(grid.scales.shape[1])
        ]

    def codes(self) -> Tensor:
        """Returns int8 `[R, K]`, in the original order of columns."""
        codes_KR = torch.empty_like(self.codes_KR)
        codes_KR[self.coupling.factor.order] = self.codes_KR
        return codes_KR.T

    def sweep_codes(self, block_size: int) -> None:
        """Gives every column in turn the codes that are best with all others as they are."""
        coupling_KK, residual_KR = self.coupling.per_column, self.residual_KR
        solve_block = block_solver(self.grid, self.coupling.factor)
        for stop in range(residual_KR.shape[0], 0, -block_size):
            start = max(0, stop - block_size)
            residual_BR = residual_KR[start:stop]
            # Row i holds what the other columns of the block do to column i.
            inner_BB = coupling_KK[start:stop, start:stop].T.contiguous()
            target_BR = self.weight_KR[start:stop].clone()
            target_BR.addmm_(coupling_KK[stop:, start:stop].T, residual_KR[stop:])
            target_BR.addmm_(coupling_KK[:start, start:stop].T, residual_KR[:start])
            # Columns still to be visited in this block count as they are; the solver adds the
            # visited ones, whose residual it makes from the weight.
            target_BR.addmm_(inner_BB.tril(-1), residual_BR)
            residual_BR.copy_(self.weight_KR[start:stop])
            solve_block(start, target_BR, residual_BR, self.codes_KR[start:stop], inner_BB)

    def sweep_scales(self) -> None:
        """Gives every group in turn the scale that is best for its levels."""
        scheme, scales_RG = self.grid.scheme, self.grid.scales
        coupling_KK, diagonal_K = self.coupling.per_column, self.coupling.diagonal
        one = torch.ones((), device=scales_RG.device)
        for group, columns in enumerate(self.columns_of_group):
            zeros = None if self.grid.zeros is None else self.grid.zeros[:, group]
            levels_WR = decode(self.codes_KR[columns], one, zeros, scheme)
            hessian_KW = coupling_KK[:, columns] * diagonal_K[columns]
            pull_R = (hessian_KW.T @ self.residual_KR).mul_(levels_WR).sum(0)
            stiffness_R = (hessian_KW[columns].T @ levels_WR).mul_(levels_WR).sum(0)
            old_R = scales_RG[:, group]
            # All levels zero: the scale means nothing and stays.
            step_R = torch.where(stiffness_R > 0, pull_R / stiffness_R, 0.0)
            new_R, codes_R = self._storable(old_R + step_R, group)
            step_R = new_R - old_R
            better_R = (2 * pull_R - step_R * stiffness_R) * step_R > 0
            # Through zero lies a scale that no code was chosen for.
            better_R &= (new_R > 0) == (old_R > 0)
            step_R = torch.where(better_R, step_R, 0.0)
            self.residual_KR[columns] -= levels_WR * step_R
            scales_RG[:, group] = torch.where(better_R, new_R, old_R)
            if self.scale_codes is not None and codes_R is not None:
                codes_R = torch.where(better_R, codes_R, self.scale_codes[:, group])
                self.scale_codes[:, group] = codes_R

    def _storable(self, wanted: Tensor, group: int) -> tuple[Tensor, Tensor | None]:
        """Returns the nearest scales that can be stored, and their 8-bit codes if they have any."""
        scheme, stored = self.grid.scheme, self.whole.double_quantized
        if stored is not None:
            codes_R, new_R = stored.nearest(wanted, scheme.torch_scale_dtype, self.rows, group)
            return new_R, codes_R
        return Grid.storable(scheme, 1, wanted[:, None], None).scales[:, 0], None
