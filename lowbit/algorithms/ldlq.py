"""Rounding with error feedback: the columns to come make up for the error of those behind.

Reference: Frantar et al. 2022, "GPTQ". The solver is written in the equivalent form of Chee et al.
2023, "QuIP", theorem 6 (LDLQ): with H = A A^T, A upper triangular, and w, q the original and the
quantized columns in the order of visiting,

    target_k = w_k + sum_{j<k} (w_j - q_j) A_jk / A_kk,    q_k = nearest(target_k),
    loss = sum_k A_kk^2 (target_k - q_k)^2.

GPTQ's U (upper Cholesky factor of H^-1) is A^-1. This form needs one Cholesky factorisation and no
inverse: half the memory, and no rounding from inverting an ill-conditioned H. A is upper triangular
from the last column upwards, which is the ordinary lower factor of H with rows and columns
reversed; so here the *last* row of every array is visited first.

Shapes: K in_features in reversed order of visiting, R output rows, B columns of a block.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.quant import Grid, decode, nearest_code, sorted_codebook
from lowbit.scheme import Scheme

# Rows solved together on a CPU: the block's target and residual (2 x 128 x 4096 fp32) stay near the
# cache. A GPU takes all rows at once.
ROWS_PER_CHUNK = 4096
# Columns that the kernel visits in one launch, at most.
KERNEL_BLOCK = 128
# Dampings tried in turn, as multiples of `damp_percent`, until the factorisation succeeds.
DAMP_FACTORS = (1, 3, 10, 30)


@dataclass(frozen=True)
class Factor:
    """The factorisation of a damped, reordered H.

    Args:
        order: int64 `[K]`, the column in each row of `unit_lower`; the last one is visited first.
        unit_lower: float32 `[K, K]`, lower triangular with ones on the diagonal.
        diagonal: float32 `[K]`: H + damp = L L^T with L = unit_lower * diagonal (per column).
        damp: what was added to diag(H).
        damp_percent: `damp` as a share of the mean of diag(H).
        dead: bool `[K]` in the original order, features that were never active.
    """

    order: Tensor
    unit_lower: Tensor
    diagonal: Tensor
    damp: float
    damp_percent: float
    dead: Tensor

    def importance(self) -> Tensor:
        """Returns the weight of each target's squared error in the loss, `[K]`, original order."""
        weights = torch.empty_like(self.diagonal)
        weights[self.order] = self.diagonal.square()
        return weights


def factorise(hessian: Tensor, damp_percent: float, act_order: bool) -> Factor | None:
    """Returns the factor of `hessian` `[K, K]`, or None if no tried damping makes it factorise.

    Each damping is tried in fp32 and, where rounding spoils that, in fp64.
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    live = diagonal[~dead]
    if live.numel() == 0 or not bool(hessian.isfinite().all()):
        return None
    mean = float(live.double().mean())
    order = torch.arange(hessian.shape[0], device=hessian.device)
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    order = order.flip(0)
    for percent in (damp_percent * factor for factor in DAMP_FACTORS):
        for dtype in (torch.float32, torch.float64):
            damped = hessian[order[:, None], order].to(dtype)
            # The paper's 1 on the diagonal of a dead feature, in the units of H. Such a feature
            # couples with no other; its value only has to be positive.
            damped.diagonal().add_(percent * mean).add_(dead[order], alpha=mean)
            lower, info = torch.linalg.cholesky_ex(damped)
            del damped
            if int(info) == 0 and bool(lower.diagonal().isfinite().all()):
                scale = lower.diagonal().clone()
                return Factor(
                    order, lower.div_(scale).float(), scale.float(), percent * mean, percent, dead
                )
    return None


@dataclass(frozen=True)
class Solution:
    """The codes of one matrix.

    Args:
        codes: int8 `[N, K]`.
        grid: the grid they are on.
        targets: float32 `[N, K]`, weights plus feedback: the values that were rounded.
        row_losses: float64 `[N]`, squared output error of each row, dw H dw^T, without the damping.
    """

    codes: Tensor
    grid: Grid
    targets: Tensor
    row_losses: Tensor

    @property
    def loss(self) -> float:
        """The mean of `row_losses`, tr(dW H dW^T) / N."""
        return float(self.row_losses.mean())


def better_rows(first: Solution, second: Solution) -> Solution:
    """Returns, row by row, the solution with the lower loss; `first` where they are equal.

    Under double quantization scales of many rows are stored together, so all come from one.
    """
    if first.grid.double_quantized is not None:
        return second if second.loss < first.loss else first
    better_N = second.row_losses < first.row_losses
    better_N1 = better_N[:, None]
    zeros = first.grid.zeros
    if zeros is not None and second.grid.zeros is not None:
        zeros = torch.where(better_N1, second.grid.zeros, zeros)
    scales = torch.where(better_N1, second.grid.scales, first.grid.scales)
    return Solution(
        torch.where(better_N1, second.codes, first.codes),
        Grid(first.grid.scheme, first.grid.in_features, scales, zeros),
        torch.where(better_N1, second.targets, first.targets),
        torch.where(better_N, second.row_losses, first.row_losses),
    )


def solve(weight: Tensor, grid: Grid, factor: Factor, block_size: int) -> Solution:
    """Returns the codes that the recursion chooses.

    Args:
        weight: float32 `[N, K]`, zero at dead features.
        grid: the grid of every group, in the original order of columns.
        factor: see `Factor`.
        block_size: columns per block.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    targets = torch.empty_like(weight)
    row_losses = torch.empty(weight.shape[0], dtype=torch.float64, device=weight.device)
    block_size = usable_block_size(block_size, weight.device)
    for rows in row_chunks(weight):
        codes_KR, targets_KR, losses = _solve_rows(
            weight[rows], grid.rows(rows), factor, block_size
        )
        codes[rows[:, None], factor.order] = codes_KR.T
        targets[rows[:, None], factor.order] = targets_KR.T
        row_losses[rows] = losses
    return Solution(codes, grid, targets, row_losses)


def row_chunks(weight: Tensor) -> list[Tensor]:
    """Returns the indices of the rows that are solved together, int64 `[R]` each."""
    rows_per_chunk = ROWS_PER_CHUNK if weight.device.type == "cpu" else weight.shape[0]
    return list(torch.arange(weight.shape[0], device=weight.device).split(rows_per_chunk))


def usable_block_size(block_size: int, device: torch.device) -> int:
    """Returns the columns per block that `block_solver` takes, `block_size` at most."""
    return min(block_size, KERNEL_BLOCK) if _has_kernel(device) else block_size


def _solve_rows(
    weight: Tensor, grid: Grid, factor: Factor, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns int8 codes and float32 targets `[K, R]`, ordered as `factor`, and losses `[R]`.

    `residual_KR` starts as the weights; a visited row becomes w - q. A block's feedback from all
    blocks before it is one matrix product, and inside the block one product per column: nothing
    ahead is ever updated, so each weight is read once and written once.
    """
    residual_KR = weight.T[factor.order].contiguous()
    targets_KR = residual_KR.clone()
    codes_KR = torch.empty(residual_KR.shape, dtype=torch.int8, device=weight.device)
    solve_block = block_solver(grid, factor)
    losses = torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device)
    for stop in range(residual_KR.shape[0], 0, -block_size):
        start = max(0, stop - block_size)
        target_BR = targets_KR[start:stop]
        target_BR.addmm_(factor.unit_lower[stop:, start:stop].T, residual_KR[stop:])
        # Contiguous by visited column, because each column's feedback is a product with one row.
        inner_BB = factor.unit_lower[start:stop, start:stop].T.contiguous()
        errors_BR = solve_block(
            start, target_BR, residual_KR[start:stop], codes_KR[start:stop], inner_BB
        )
        losses += (errors_BR * factor.diagonal[start:stop, None]).square_().sum(0)
    # The recursion's loss is that of the damped H.
    losses -= factor.damp * residual_KR.square().sum(0, dtype=torch.float64)
    return codes_KR, targets_KR, losses.clamp_min_(0)


# Visits the columns of a block that begins at `start`: (start, target [B, R], residual [B, R],
# codes [B, R], inner [B, B]) -> errors [B, R]; writes target, residual and codes.
BlockSolver = Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]


def block_solver(grid: Grid, factor: Factor) -> BlockSolver:
    """Returns the solver of blocks on the device of `factor`."""
    make_solver = _kernel_solver if _has_kernel(factor.diagonal.device) else _eager_solver
    return make_solver(grid, factor)


def _eager_solver(grid: Grid, factor: Factor) -> BlockSolver:
    """Returns the solver that takes a handful of operations per column."""
    device = factor.diagonal.device
    group_of = grid.group_of_column(device)[factor.order].tolist()
    scales_GR = grid.scales.T.contiguous()
    zeros_GR = None if grid.zeros is None else grid.zeros.T.contiguous()

    nearest = _nearest_value(grid.scheme, device)

    def solve_block(
        start: int, targets: Tensor, residual: Tensor, codes: Tensor, inner: Tensor
    ) -> Tensor:
        errors = torch.empty_like(targets)
        for i in reversed(range(targets.shape[0])):
            group = group_of[start + i]
            scale, zero = scales_GR[group], None if zeros_GR is None else zeros_GR[group]
            target = targets[i].addmv_(residual[i + 1 :].T, inner[i, i + 1 :])
            codes[i], value = nearest(target, scale, zero)
            residual[i] -= value
            torch.sub(target, value, out=errors[i])
        return errors

    return solve_block


def _nearest_value(
    scheme: Scheme, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]:
    """Returns what maps (target, scale, zero) to (code, value): `nearest_code`, then `decode`.

    One search finds both the code and the level of a codebook, and its tables are made once for
    all columns.
    """
    if scheme.codebook is None:

        def nearest(target: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
            code = nearest_code(target, scale, zero, scheme)
            return code, decode(code, scale, zero, scheme)

        return nearest
    levels, boundaries, codes = (
        torch.tensor(values, device=device) for values in sorted_codebook(scheme)
    )
    codes = codes.to(torch.int8)

    def nearest_of_table(target: Tensor, scale: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor]:
        index = torch.bucketize(target / scale, boundaries, out_int32=True)
        return codes.index_select(0, index), levels.index_select(0, index).mul_(scale)

    return nearest_of_table


def _kernel_solver(grid: Grid, factor: Factor) -> BlockSolver:
    """Returns the solver that takes one launch per block; only sums differ in their order."""
    from lowbit_kernels.gpu import ldlq

    scheme, device = grid.scheme, factor.diagonal.device
    group_of = grid.group_of_column(device)[factor.order].to(torch.int32)
    scales_GR = grid.scales.T.contiguous()
    zeros_GR = None if grid.zeros is None else grid.zeros.T.contiguous()
    table = None
    if scheme.codebook is not None:
        levels, boundaries, level_codes = sorted_codebook(scheme)
        padding = 16 - len(levels)
        table = (
            torch.tensor([*levels, *levels[-1:] * padding], device=device),
            torch.tensor([*boundaries, *[math.inf] * (padding + 1)], device=device),
            torch.tensor(
                [float(code) for code in (*level_codes, *level_codes[-1:] * padding)], device=device
            ),
        )

    def solve_block(
        start: int, targets: Tensor, residual: Tensor, codes: Tensor, inner: Tensor
    ) -> Tensor:
        errors = torch.empty_like(targets)
        ldlq.solve_block(
            targets,
            residual,
            codes,
            errors,
            inner,
            group_of[start : start + targets.shape[0]],
            scales_GR,
            zeros_GR,
            table,
            (scheme.code_min, scheme.code_max),
        )
        return errors

    return solve_block


def _has_kernel(device: torch.device) -> bool:
    """Returns True where blocks are solved by the Triton kernel."""
    if device.type != "cuda":
        return False
    if importlib.util.find_spec("triton") is None:
        _warn_without_triton()
        return False
    return True


@functools.cache
def _warn_without_triton() -> None:
    warnings.warn(
        "GPTQ solves its columns one by one on this GPU, which is many times slower: triton is not "
        "installed; run `pip install triton`",
        stacklevel=2,
    )
