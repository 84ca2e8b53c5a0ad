"""GPTQ: round column by column, each time letting the columns to come make up for the error.

Reference: Frantar et al. 2022, "GPTQ". The solver is written in the equivalent form of Chee et al.
2023, "QuIP", theorem 6 (LDLQ): with H = A A^T, A upper triangular, and w, q the original and the
quantized columns in the order of visiting,

    target_k = w_k + sum_{j<k} (w_j - q_j) A_jk / A_kk,    q_k = nearest(target_k),
    loss = sum_k A_kk^2 (target_k - q_k)^2.

GPTQ's U (upper Cholesky factor of H^-1) is A^-1. This form needs one Cholesky factorisation and no
inverse: half the memory, and no rounding from inverting an ill-conditioned H. A is upper triangular
from the last column upwards, which is the ordinary lower factor of H with rows and columns
reversed; so here the *last* row of every array is visited first.

The order of visiting is by falling H_kk (`act_order`), while scales belong to fixed groups of
neighbouring columns and are fitted to the original weights before anything is rounded ("static
groups"): the stored layout needs no index of groups.

Shapes: K in_features in reversed order of visiting, R output rows, B columns of a block.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.algorithms.base import Quantized, Statistics
from lowbit.algorithms.rtn import RTN
from lowbit.algorithms.scales import fit_grid
from lowbit.errors import LowbitError
from lowbit.quant import Grid, decode, nearest_code
from lowbit.scheme import Scheme

# Rows solved together: the block's target and residual (2 x 128 x 4096 fp32) stay near the cache.
ROWS_PER_CHUNK = 4096
# Dampings tried in turn, as multiples of `damp_percent`, until the factorisation succeeds.
DAMP_FACTORS = (1, 3, 10, 30)


@dataclass(frozen=True)
class GPTQ:
    """Quantizes columns in sequence with error feedback.

    Args:
        damp_percent: share of the mean of diag(H) that is added to diag(H), above 0, at most 1.
        act_order: visit columns by falling diag(H); False visits them as stored.
        block_size: columns whose feedback is computed together. It changes speed, not results.
        search: search scales by weighted squared error; False takes absmax.
    """

    name: ClassVar[str] = "gptq"
    damp_percent: float = 0.01
    act_order: bool = True
    block_size: int = 128
    search: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.damp_percent <= 1:
            raise LowbitError(
                f"gptq: damp_percent {self.damp_percent} is out of range; use a value above 0 and "
                "at most 1, for example 0.01"
            )
        if self.block_size < 1:
            raise LowbitError(f"gptq: block_size {self.block_size} is not positive; use 128")

    @property
    def needs_statistics(self) -> bool:
        """True: there is no GPTQ without H."""
        return True

    def quantize(self, weight: Tensor, scheme: Scheme, statistics: Statistics | None) -> Quantized:
        """Returns codes that minimise the output error greedily; see `Algorithm.quantize`.

        Raises:
            LowbitError: without statistics, or with statistics of another width.
        """
        if statistics is None:
            raise LowbitError(
                "gptq needs calibration statistics; give calibration text, or use rtn"
            )
        size = statistics.hessian.shape[0]
        if size != weight.shape[1]:
            raise LowbitError(
                f"gptq: statistics are of {size} input features, but the weight has "
                f"{weight.shape[1]}"
            )
        factor = shared_factor(statistics, self)
        if factor is None:
            usable = statistics if bool(statistics.hessian.isfinite().all()) else None
            fallback = RTN(self.search).quantize(weight, scheme, usable)
            return Quantized(fallback.codes, fallback.grid, {**fallback.report, "fallback": "rtn"})
        # A feature that was never active says nothing about its weights: they become zero, here,
        # so that the scales are not fitted to them either.
        weight = weight.detach().float().masked_fill(factor.dead, 0.0)
        grid = fit_grid(weight, scheme, statistics.hessian.diagonal(), self.search)
        codes, loss = solve(weight, grid, factor, self.block_size)
        report: dict[str, float | int | str] = {"loss": loss}
        if factor.damp_percent != self.damp_percent:
            report["damp_percent"] = factor.damp_percent
        if factor.dead.any():
            report["dead_features"] = int(factor.dead.sum())
        return Quantized(codes, grid, report)


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


_last_factor: tuple[weakref.ref[Statistics], GPTQ, Factor | None] | None = None


def shared_factor(statistics: Statistics, options: GPTQ) -> Factor | None:
    """Returns `factorise(...)`, computed once for consecutive layers with the same statistics.

    q, k and v get the same `Statistics` object one after the other, so remembering one factor is
    enough; it is dropped together with the statistics (it is as large as H).
    """
    global _last_factor
    if _last_factor is not None:
        known, known_options, factor = _last_factor
        if known() is statistics and known_options == options:
            return factor
    _last_factor = None
    factor = factorise(statistics.hessian, options.damp_percent, options.act_order)
    _last_factor = (weakref.ref(statistics, _forget_factor), options, factor)
    return factor


def _forget_factor(dead_reference: weakref.ref[Statistics]) -> None:
    global _last_factor
    if _last_factor is not None and _last_factor[0] is dead_reference:
        _last_factor = None


def factorise(hessian: Tensor, damp_percent: float, act_order: bool) -> Factor | None:
    """Returns the factor of `hessian` `[K, K]`, or None if no tried damping makes it factorise.

    Each damping is tried in fp32 and, where rounding spoils that, in fp64.
    """
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
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


def solve(weight: Tensor, grid: Grid, factor: Factor, block_size: int) -> tuple[Tensor, float]:
    """Returns the int8 codes `[N, K]` and the mean squared output error, tr(dW H dW^T) / N.

    Args:
        weight: float32 `[N, K]`, zero at dead features.
        grid: the grid of every group, in the original order of columns.
        factor: see `Factor`.
        block_size: columns per block.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    total = 0.0
    for rows in torch.arange(weight.shape[0], device=weight.device).split(ROWS_PER_CHUNK):
        codes_KR, loss = _solve_rows(weight[rows], grid.rows(rows), factor, block_size)
        codes[rows[:, None], factor.order] = codes_KR.T
        total += loss
    return codes, total / weight.shape[0]


def _solve_rows(
    weight: Tensor, grid: Grid, factor: Factor, block_size: int
) -> tuple[Tensor, float]:
    """Returns int8 codes `[K, R]` in the order of `factor` and the summed loss of the rows.

    `residual_KR` starts as the weights; a visited row becomes w - q. A block's feedback from all
    blocks before it is one matrix product, and inside the block one product per column: nothing
    ahead is ever updated, so each weight is read once and written once.
    """
    residual_KR = weight.T[factor.order].contiguous()
    codes_KR = torch.empty(residual_KR.shape, dtype=torch.int8, device=weight.device)
    group_of = grid.group_of_column(weight.device)[factor.order].tolist()
    scales_GR = grid.scales.T.contiguous()
    zeros_GR = None if grid.zeros is None else grid.zeros.T.contiguous()
    loss = torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device)
    for stop in range(residual_KR.shape[0], 0, -block_size):
        start = max(0, stop - block_size)
        feedback = factor.unit_lower[stop:, start:stop].T @ residual_KR[stop:]
        target_BR = residual_KR[start:stop] + feedback
        # Contiguous by visited column, because each column's feedback is a product with one row.
        inner_BB = factor.unit_lower[start:stop, start:stop].T.contiguous()
        for i in reversed(range(stop - start)):
            k, group = start + i, group_of[start + i]
            scale, zero = scales_GR[group], None if zeros_GR is None else zeros_GR[group]
            visited = residual_KR[k + 1 : stop]
            target = torch.addmv(target_BR[i], visited.T, inner_BB[i, i + 1 :])
            code = nearest_code(target, scale, zero, grid.scheme)
            value = decode(code, scale, zero, grid.scheme)
            codes_KR[k] = code
            residual_KR[k] -= value
            target_BR[i] = target - value
        loss += (target_BR * factor.diagonal[start:stop, None]).square_().sum(0)
    # The recursion's loss is that of the damped H.
    undamped = float(loss.sum()) - factor.damp * float(
        residual_KR.square().sum(dtype=torch.float64)
    )
    return codes_KR, max(undamped, 0.0)
