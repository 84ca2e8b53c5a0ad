"""Random layers of int8 codes for the kernel tests, and what is true of them in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from fragment_weights import DEVICE
from torch import Tensor

# What float32, rounded to nearest, may be away from the truth, relative to it.
HALF_STEP = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


@dataclasses.dataclass
class Case:
    """Random activations and weight on the device under test."""

    x: Tensor
    codes: Tensor
    scales: Tensor
    bias: Tensor


def case(
    m: int, n: int, k: int, seed: int, dtype: torch.dtype = torch.float32,
    scale_dtype: torch.dtype = torch.float32,
) -> Case:  # fmt: skip
    """Rows of x differ in size by orders of magnitude; all codes from -128 to 127 occur."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * torch.exp(
        torch.randn(m, 1, generator=generator) * 2
    )
    codes = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    scales = torch.exp(torch.randn(n, generator=generator) - 6)
    bias = torch.randn(n, generator=generator)
    return Case(
        x.to(dtype).to(DEVICE),
        codes.to(DEVICE),
        scales.to(scale_dtype).to(DEVICE),
        bias.to(scale_dtype).to(DEVICE),
    )


def quantized(x: Tensor, activation_scale: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns codes and scales of finite x by NumPy's IEEE float32, as documented."""
    rows = x.detach().float().cpu().numpy().reshape(-1, x.shape[-1])
    if activation_scale is not None:
        scales = np.full(len(rows), activation_scale, np.float32)
        return np.clip(np.rint(rows / scales[:, None]), -127, 127), scales
    scales = np.maximum(np.abs(rows).max(1) / np.float32(127), np.float32(2.0**-126))
    return np.rint(rows / scales[:, None]), scales


def assert_exact(
    result: Tensor, given: Case, bias: Tensor | None, activation_scale: float | None
) -> None:
    """Compares with float64: four roundings in float32, one to the dtype of the result."""
    codes, x_scales = quantized(given.x, activation_scale)
    sums = codes.astype(np.float64) @ given.codes.cpu().double().numpy().T
    product = sums * x_scales[:, None].astype(np.float64) * given.scales.cpu().double().numpy()
    exact = product + (0.0 if bias is None else bias.cpu().double().numpy())
    room = 2.0**-22 * (np.abs(product) + np.abs(exact)) + HALF_STEP[result.dtype] * np.abs(exact)
    error = np.abs(result.cpu().double().numpy().reshape(exact.shape) - exact)
    assert (error <= room + 2.0**-25).all()  # half of the smallest float16
