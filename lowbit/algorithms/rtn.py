"""Round to nearest: fit a grid to each group, then take the nearest code. Needs no data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.algorithms.base import Quantized, Statistics
from lowbit.algorithms.scales import CHUNK_ELEMENTS, fit_grid
from lowbit.quant import Grid
from lowbit.scheme import Scheme


@dataclass(frozen=True)
class RTN:
    """Rounds every weight to the nearest value of its group's grid.

    Args:
        search: search each group's scale (and zero point) for the least squared error, weighted
            by the mean square of each input feature where statistics are given. False takes the
            grid that covers the extremes (absmax).
    """

    name: ClassVar[str] = "rtn"
    search: bool = True

    @property
    def needs_statistics(self) -> bool:
        """False: statistics only sharpen the search."""
        return False

    def quantize(self, weight: Tensor, scheme: Scheme, statistics: Statistics | None) -> Quantized:
        """Returns the nearest codes; see `Algorithm.quantize`."""
        weight = weight.detach()
        hessian = None if statistics is None else statistics.hessian
        importance = None if hessian is None else hessian.diagonal()
        grid = fit_grid(weight, scheme, importance, self.search)
        codes, loss = round_rows(weight, grid, hessian)
        return Quantized(codes, grid, {"loss": loss})


def round_rows(weight: Tensor, grid: Grid, hessian: Tensor | None) -> tuple[Tensor, float]:
    """Returns the int8 codes `[N, K]` nearest to `weight` `[N, K]` and their mean squared error.

    The error is that of the outputs, tr(dW H dW^T) / N, or without a Hessian that of the weights.
    """
    out_features, in_features = weight.shape
    codes = torch.empty(out_features, in_features, dtype=torch.int8, device=weight.device)
    # A product with H reads all of it, so it is worth more rows than an elementwise pass.
    elements = CHUNK_ELEMENTS if hessian is None else 16 * CHUNK_ELEMENTS
    total = 0.0
    for rows in torch.arange(out_features, device=weight.device).split(
        max(1, elements // in_features)
    ):
        w_RK, part = weight[rows].float(), grid.rows(rows)
        codes[rows] = part.round(w_RK)
        error = w_RK - part.dequantize(codes[rows])
        outputs = error if hessian is None else error @ hessian
        total += float((error * outputs).sum())
    elements = out_features if hessian is not None else out_features * in_features
    return codes, max(total, 0.0) / elements
