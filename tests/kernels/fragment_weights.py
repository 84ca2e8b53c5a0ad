"""Weights for the kernel tests: random ones as a checkpoint stores them, and in fragment order.

The tests run on the GPU where there is one, and in Triton's interpreter on CPU tensors elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import pytest
import torch
from lowbit_kernels.format import Format
from lowbit_kernels.gpu.weight import FragmentWeight

from lowbit.quant import Grid, QuantizedWeight
from lowbit.scheme import Scheme

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The fused kernel multiplies float32 only where Triton interprets.
needs_interpreter = pytest.mark.skipif(DEVICE != "cpu", reason="needs Triton's interpreter")

Test = TypeVar("Test", bound=Callable[..., None])


def needs_gpu(test: Test) -> Test:
    """Marks a test that runs on CUDA only."""
    skip = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
    return cast(Test, pytest.mark.gpu(skip(test)))


def random_qweight(scheme: Scheme | str, shape: tuple[int, int], seed: int) -> QuantizedWeight:
    """Returns a weight with random codes, scales of both signs where allowed, and zero points."""
    scheme = Scheme.parse(scheme)
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.groups(shape[1])
    scales = torch.exp(torch.randn(shape[0], groups, generator=generator) * 0.5 - 4)
    if scheme.signed_scales:
        scales *= torch.randint(0, 2, scales.shape, generator=generator) * 2 - 1
    low, high = scheme.code_min, scheme.code_max + 1
    zeros = None
    if not scheme.symmetric:
        zeros = torch.randint(low, high, scales.shape, generator=generator).float()
    codes = torch.randint(low, high, shape, generator=generator, dtype=torch.int8)
    return QuantizedWeight.from_codes(codes, Grid.storable(scheme, shape[1], scales, zeros))


def format_of(scheme: Scheme) -> Format:
    """Returns what the kernels are told about `scheme`."""
    return Format(
        bits=scheme.bits,
        group_size=scheme.group_size or 0,
        codebook=scheme.levels,
        symmetric=scheme.symmetric,
        scale_dtype=scheme.scale_dtype.lower(),
        signed_scales=scheme.signed_scales,
    )


def unsigned(signed: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns signed codes or zero points as the kernels count them, uint8 from zero on."""
    return (signed.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)


def fragment(qweight: QuantizedWeight, device: str = DEVICE) -> FragmentWeight:
    """Returns `qweight` in fragment order."""
    scheme = qweight.scheme
    zeros = qweight.grid().zeros
    arguments = (
        unsigned(qweight.codes(), scheme.bits),
        qweight.scale,
        None if zeros is None else unsigned(zeros, scheme.bits),
        qweight.scale_offset,
        qweight.scale_step,
    )
    moved = [None if tensor is None else tensor.to(device) for tensor in arguments]
    codes, scale, *rest = moved
    assert codes is not None
    assert scale is not None
    return FragmentWeight.from_codes(format_of(scheme), codes, scale, *rest)


def random_fragment(scheme: Scheme | str, shape: tuple[int, int], seed: int) -> FragmentWeight:
    """Returns a random weight in fragment order on the device under test."""
    return fragment(random_qweight(scheme, shape, seed))
