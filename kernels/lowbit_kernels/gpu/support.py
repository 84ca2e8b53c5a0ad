"""What the GPU kernels can run, and the reason where they cannot."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_GROUP_SIZE = 8


def refusal(
    device: torch.device,
    dtype: torch.dtype,
    *,
    bits: int,
    codebook: Sequence[float] | None,
    group_size: int,
) -> str | None:
    """Returns why these activations and this weight cannot run, or None.

    Args:
        device: of activations and weight.
        dtype: of the activations.
        bits: of a code.
        codebook: 16 values, or None for integers.
        group_size: input features per scale, 0 for one scale per row.
    """
    if device.type != "cuda":
        return f"runs on CUDA and ROCm devices, these tensors are on {device.type}"
    if dtype not in FLOAT_DTYPES:
        return f"activations are {dtype}; float16, bfloat16 or float32 are needed"
    if bits not in (2, 3, 4, 8):
        return f"codes have {bits} bits; 2, 3, 4 and 8 are supported"
    if codebook is not None and (bits != 4 or len(codebook) != 16):
        return f"a codebook of {len(codebook)} values; 16 values of 4-bit codes are supported"
    if group_size % MIN_GROUP_SIZE:
        return f"groups of {group_size}; the group size must be a multiple of {MIN_GROUP_SIZE}"
    return _device_refusal(device.index or 0)


@functools.cache
def _device_refusal(index: int) -> str | None:
    if torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        name = torch.cuda.get_device_name(index)
        return (
            f"{name} has compute capability {major}.{minor}; 8.0 (Ampere) is needed for bfloat16 "
            "tensor cores"
        )
    return None


def on_device_of_first(operator: Callable[..., Result]) -> Callable[..., Result]:
    """Returns `operator`, run with the device of its first argument, a tensor, as the current one.

    Triton launches on the current device, and a model that is spread over several GPUs calls layers
    of all of them without changing it.
    """

    @functools.wraps(operator)
    def run(first: Tensor, *rest: Any) -> Result:
        if first.device.type == "cpu":
            return operator(first, *rest)
        with torch.cuda.device(first.device):
            return operator(first, *rest)

    return run
