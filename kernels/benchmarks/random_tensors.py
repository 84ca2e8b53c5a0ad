"""Random tensors from generators of our own.

A capture that fails may leave torch's default CUDA generator waiting for a graph that never comes;
whoever draws from it later fails too. Generators that no graph knows are not concerned.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def generator(device: str) -> torch.Generator:
    """Returns the generator of a device."""
    return torch.Generator(device).manual_seed(0)


def normal(
    size: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32, deviation: float = 1.0
) -> Tensor:
    """Returns values of N(0, deviation^2)."""
    empty = torch.empty(size, device=device, dtype=dtype)
    return empty.normal_(0, deviation, generator=generator(device))


def uniform(size: tuple[int, ...], device: str) -> Tensor:
    """Returns float32 values in [0, 1)."""
    return torch.rand(size, device=device, generator=generator(device))


def integers(
    low: int, high: int, size: tuple[int, ...], device: str, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Returns integers from `low` up to `high`, which is not among them."""
    own = generator(device)
    return torch.randint(low, high, size, device=device, dtype=dtype, generator=own)
