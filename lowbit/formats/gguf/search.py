"""Choosing what blocks of a type of ggml store, by rounding or by GPTQ.

A type is a grid like those of our schemes (`grids.py`), but for its free minimum. GPTQ asks for a
scale and a zero of each group and for no more, so

    scale * (code - zero) = scale * code - minimum,    zero = minimum / scale

runs through the solver that all schemes run through. Errors of the fit are weighed as in GPTQ's
loss; see `lowbit.algorithms.gptq`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.algorithms import make_algorithm
from lowbit.algorithms.base import Statistics
from lowbit.algorithms.gptq import GPTQ, damping, shared_factor
from lowbit.algorithms.ldlq import Factor, Solution, solve
from lowbit.errors import LowbitError
from lowbit.formats.gguf.blocks import unpack_blocks
from lowbit.formats.gguf.grids import GgmlGrid, fit
from lowbit.formats.gguf.packing import pack_q4_0, pack_q8_0
from lowbit.formats.gguf.types import GgmlType

# Types that are chosen by a search, and those of them that are plain schemes.
SEARCHED = ("Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
_PLAIN = {"Q4_0": pack_q4_0, "Q8_0": pack_q8_0}


def quantize_rows(
    weight: Tensor, kind: GgmlType, statistics: Statistics | None
) -> tuple[Tensor, dict[str, Any]]:
    """Returns a weight in blocks of a type.

    Args:
        weight: float `[rows, columns]`, finite; `kind.block` divides columns.
        kind: one of `SEARCHED`.
        statistics: of the layer's inputs, for GPTQ; None rounds to nearest.

    Returns:
        uint8 `[rows, bytes]`, and `relative_error` with what the algorithm reports.

    Raises:
        LowbitError: for statistics of another width.
    """
    weight = weight.float()
    algorithm = "rtn" if statistics is None else "gptq"
    if kind.name in _PLAIN:
        assert kind.scheme is not None
        result = make_algorithm(algorithm).quantize(weight, kind.scheme, statistics)
        raw = _PLAIN[kind.name](result.codes.short(), result.grid.scales)
        report = dict(result.report)
    elif statistics is None:
        grid = fit(weight, kind.name, None)
        raw = grid.pack(grid.as_grid(weight.shape[1]).round(weight))
        report = {}
    else:
        raw, report = _gptq(weight, kind.name, statistics)
    error = torch.linalg.vector_norm(unpack_blocks(raw, kind).values() - weight)
    relative = float(error / torch.linalg.vector_norm(weight).clamp_min(1e-30))
    return raw, {"algorithm": algorithm, **report, "relative_error": relative}


def _gptq(weight: Tensor, kind: str, statistics: Statistics) -> tuple[Tensor, dict[str, Any]]:
    """Returns blocks by GPTQ: fitted, solved, fitted to what was rounded, solved again."""
    options, columns = GPTQ(), weight.shape[1]
    if statistics.hessian.shape[0] != columns:
        raise LowbitError(
            f"statistics are of {statistics.hessian.shape[0]} input features, but the weight has "
            f"{columns}"
        )
    factor = shared_factor(statistics, damping(options.damp_percent, statistics), True)
    if factor is None:
        grid = fit(weight, kind, None)
        return grid.pack(grid.as_grid(columns).round(weight)), {"fallback": "rtn"}
    weight = weight.masked_fill(factor.dead, 0.0)
    first, found = _solved(weight, weight, kind, factor, options.block_size)
    second, other = _solved(weight, found.targets, kind, factor, options.block_size)
    better = other.row_losses < found.row_losses
    grid = first.better_rows(better, second)
    codes = torch.where(better[:, None], other.codes, found.codes)
    losses = torch.where(better, other.row_losses, found.row_losses)
    return grid.pack(codes), {"loss": float(losses.mean())}


def _solved(
    weight: Tensor, aims: Tensor, kind: str, factor: Factor, block_size: int
) -> tuple[GgmlGrid, Solution]:
    """Returns the grid fitted to `aims`, and the solution of `weight` on it."""
    grid = fit(aims, kind, factor.importance())
    return grid, solve(weight, grid.as_grid(weight.shape[1]), factor, block_size)
