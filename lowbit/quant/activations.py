"""Activations as signed bytes: what `W8A8` and `W8A8_STATIC` mean, whichever kernel computes it.

    s = max |x| / 127 per token (dynamic), or the calibrated input_scale (static)
    q = clamp(round(x / s), -127, 127), ties to the even code
    y = (q codes^T) s scales + bias

The sum over codes is exact; only then is it scaled, per token and per output channel. A token of
zeros gives zeros. A token with a NaN gives NaN; one with an infinity gives NaN where the scale is
its own, and saturates where the scale is given.

Reference: Yao et al. 2022, ZeroQuant, section 4.1 (a scale per token); Jacob et al. 2018, section
2.2 (integer products, scaled afterwards). Shapes: `x_MK` tokens, `w_NK` the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import LowbitError

MAX_CODE = 127
# Of 1024 products of two signed bytes every partial sum stays below 2^24, so float32 is exact, and
# so are the formats that matmuls may silently narrow it to: TF32 and bf16 hold bytes.
_EXACT_COLUMNS = 1024
# Sums of that many products fit int32, here and in every integer kernel.
MAX_IN_FEATURES = 2**17


def quantize_activations(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns codes of x and the scale of every token.

    Args:
        x: float `[..., K]`; float64 is computed in float64, everything else in float32.
        input_scale: float32 `[1]`, positive; None takes a scale per token.

    Returns:
        Integer values in -127 ... 127 `[..., K]`, and scales `[..., 1]`, both in the dtype of the
        computation. Not finite tokens have codes of zero where there is no number, and a NaN scale.
    """
    x = x if x.dtype == torch.float64 else x.float()
    if input_scale is None:
        largest = x.abs().amax(-1, keepdim=True)
        # A subnormal scale could be zero on hardware that flushes; tokens of zeros need a scale.
        scale = (largest / MAX_CODE).clamp_min(torch.finfo(torch.float32).tiny)
        divisor, broken = scale, ~largest.isfinite()
    else:
        divisor = input_scale.to(x.dtype)
        scale, broken = divisor.expand(*x.shape[:-1], 1), x.isnan().any(-1, keepdim=True)
    codes = (x / divisor).round_().clamp_(-MAX_CODE, MAX_CODE)
    return codes.nan_to_num_(0.0), scale.masked_fill(broken, torch.nan)


def integer_product(x_codes: Tensor, codes: Tensor) -> Tensor:
    """Returns `x_codes codes^T`, summed exactly, int32 `[..., N]`.

    Args:
        x_codes: integer values in -127 ... 127, float `[..., K]`.
        codes: int8 `[N, K]`.

    Raises:
        LowbitError: for more columns than an int32 can sum.
    """
    if codes.shape[1] > MAX_IN_FEATURES:
        raise LowbitError(
            f"int8 activations: {codes.shape[1]} input features overflow 32-bit sums, up to "
            f"{MAX_IN_FEATURES} are supported; use W8A16_CHANNEL for this layer"
        )
    total = torch.zeros(*x_codes.shape[:-1], codes.shape[0], dtype=torch.int32, device=codes.device)
    for x_part, part in zip(
        x_codes.float().split(_EXACT_COLUMNS, -1), codes.split(_EXACT_COLUMNS, -1), strict=True
    ):
        total += (x_part @ part.float().T).to(torch.int32)
    return total
