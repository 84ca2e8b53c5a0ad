"""The best approximation of a matrix by one of low rank, plain or weighted by a Hessian.

Minimises ||(E - B A) L||_F, where L L^T = H is a damped mean of x x^T; without H, L is 1. With
E L = U S V^T the solution is B A = U_r S_r V_r^T L^-1 (Eckart, Young; the weighted form as in
Zhang et al. 2024, LQER, section 3.3, there with a diagonal).

Shapes: `error_NK`, `b_NR`, `a_RK`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import LowbitError

# Up to here all singular values are computed; beyond, only the wanted ones.
_EXACT_SIDE = 1024
# Blocks of the Krylov space and columns beyond the rank. What quantization lost has a flat
# spectrum, where plain power iterations find little.
_BLOCKS = 6
_MORE_COLUMNS = 16


def hessian_factor(hessian: Tensor, damp: float) -> Tensor:
    """Returns the lower L with L L^T = H + damp mean(diag H), fp32 `[K, K]`.

    Damping grows tenfold until the factorisation succeeds.

    Raises:
        LowbitError: if it never does.
    """
    mean = float(hessian.diagonal().mean())
    for _ in range(8):
        damped = hessian.float().clone()
        damped.diagonal().add_(max(damp * mean, torch.finfo(torch.float32).tiny))
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex(damped)
        if not int(info) and bool(factor.diagonal().isfinite().all()):
            return factor
        damp *= 10
    raise LowbitError("statistics: the Hessian of a layer holds NaN or Inf; calibrate again")


def best_low_rank(error: Tensor, rank: int, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns (B `[N, r]`, A `[r, K]`), fp32, of equal norms component by component.

    Args:
        error: float `[N, K]`.
        rank: r, at most min(N, K).
        factor: L `[K, K]`, lower triangular, or None.
    """
    matrix = error.float() if factor is None else error.float() @ factor
    u, s, vh = top_singular(matrix, rank)
    a_RK = (
        vh if factor is None else torch.linalg.solve_triangular(factor, vh, upper=False, left=False)
    )
    b_NR = u * s
    tiny = torch.finfo(torch.float32).tiny
    ratio = (b_NR.norm(dim=0) / a_RK.norm(dim=1).clamp_min(tiny)).sqrt()
    return b_NR / ratio.clamp_min(tiny), a_RK * ratio[:, None]


def top_singular(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the first `rank` of U `[N, r]`, S `[r]` and V^T `[r, K]`.

    Of matrices with more than `_EXACT_SIDE` rows and columns, by a block Krylov space (Musco and
    Musco 2015, algorithm 2), from the same random numbers every time.
    """
    if min(matrix.shape) <= max(_EXACT_SIDE, _BLOCKS * (rank + _MORE_COLUMNS)):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], rank + _MORE_COLUMNS, generator=generator)
    block = torch.linalg.qr(matrix @ start.to(matrix.device))[0]
    blocks = [block]
    for _ in range(_BLOCKS - 1):
        block = torch.linalg.qr(matrix @ (matrix.T @ block))[0]
        blocks.append(block)
    basis = torch.linalg.qr(torch.cat(blocks, dim=1))[0]
    u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u[:, :rank], s[:rank], vh[:rank]


def weighted_norm(error: Tensor, factor: Tensor | None) -> float:
    """Returns ||E L||_F."""
    return float((error if factor is None else error @ factor).norm())
