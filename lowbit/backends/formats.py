"""Schemes as the kernels call them. Codes of a scheme are signed, those of kernels unsigned."""

from __future__ import annotations

import torch
from lowbit_kernels.format import Format
from torch import Tensor

from lowbit.scheme import Scheme


def format_of(scheme: Scheme) -> Format:
    """Returns what the kernels call `scheme`."""
    return Format(
        bits=scheme.bits,
        group_size=scheme.group_size or 0,
        codebook=scheme.levels,
        symmetric=scheme.symmetric,
        scale_dtype=scheme.scale_dtype.lower(),
        signed_scales=scheme.signed_scales,
    )


def unsigned(codes: Tensor, scheme: Scheme) -> Tensor:
    """Returns int8 `codes`, which it overwrites, as the kernels count them, uint8."""
    return codes.view(torch.uint8).add_(1 << (scheme.bits - 1))  # wraps, as it must


def signed(codes: Tensor, scheme: Scheme) -> Tensor:
    """Returns uint8 `codes`, which it overwrites, as the scheme counts them, int8."""
    return codes.sub_(1 << (scheme.bits - 1)).view(torch.int8)
