"""The weight to aim for where a layer's inputs are no longer those of the full-precision model.

By the time a layer is quantized its input x carries the errors of all layers before it. What is
wanted is not W x but W x_ref, with x_ref the input in the full-precision model, so

    min_Q  E |W x_ref - Q x|^2 = min_Q  tr((W* - Q) H (W* - Q)^T) + const,
    W* = W C H^-1,    H = E x x^T,    C = E x_ref x^T:

the same problem as before, with the regression of the wanted outputs on x in the place of W (Zhang
et al. 2025, "Qronos", whose first step this is; Li et al. 2025, "GPTAQ", adds the same correction
term by term to the recursion). Written as W* = W + W (C - H) (H + damp)^-1 it is W itself where
nothing has drifted, whatever the damping, and the damping keeps directions that calibration hardly
saw from being corrected by noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.algorithms.base import Statistics
from lowbit.algorithms.ldlq import Factor, row_chunks
from lowbit.errors import LowbitError


def corrected_weight(
    weight: Tensor, statistics: Statistics, factor: Factor, share: float
) -> Tensor:
    """Returns W + share * W (C - H) (H + damp)^-1, float32 `[N, K]`, zero at dead features.

    Args:
        weight: float32 `[N, K]`; of features that are dead in x but not in x_ref it is used.
        statistics: with `cross`.
        factor: of the Hessian in `statistics`.
        share: 1 for the whole correction, 0 for none.

    Raises:
        LowbitError: if `cross` has another shape than the Hessian, or is not finite.
    """
    cross, hessian = statistics.cross, statistics.hessian
    assert cross is not None
    if cross.shape != hessian.shape or not bool(cross.isfinite().all()):
        raise LowbitError(
            f"gptq: statistics.cross is {list(cross.shape)}, needed finite values of the shape of "
            f"the Hessian {list(hessian.shape)}; measure it with the full-precision model's inputs "
            "or leave it None"
        )
    drift = (cross - hessian)[:, factor.order]
    variance = factor.diagonal.square()
    corrected = torch.empty_like(weight)
    for rows in row_chunks(weight):
        step = weight[rows] @ drift
        # H + damp = L L^T = U D U^T with U = unit_lower, rows and columns in factor's order.
        step = torch.linalg.solve_triangular(
            factor.unit_lower.T, step, upper=True, left=False, unitriangular=True
        ).div_(variance)
        step = torch.linalg.solve_triangular(
            factor.unit_lower, step, upper=False, left=False, unitriangular=True
        )
        part = torch.empty_like(step)
        part[:, factor.order] = step
        corrected[rows] = part.mul_(share).add_(weight[rows])
    return corrected.masked_fill_(factor.dead, 0.0)
