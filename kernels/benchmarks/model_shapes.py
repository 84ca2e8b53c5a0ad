"""The shapes that are measured, and random weights of them made on the device.

Random codes are as good as a model's for timing: no kernel looks at them before it multiplies.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from lowbit_kernels.format import SCALE_BLOCK, Format
from lowbit_kernels.gpu.ptx import codebook_table
from lowbit_kernels.gpu.weight import (
    CHUNK,
    COLUMN_PADDING,
    LANES,
    ROW_PADDING,
    STRIP,
    FragmentWeight,
    lane_words,
)
from random_tensors import integers, uniform
from torch import Tensor

from lowbit.backends.formats import format_of
from lowbit.scheme import Scheme

SCHEMES = ("W4A16_G128", "W4A16_ASYM_G64", "W3A16_G64", "W2A16_G64", "W8A16", "NF4_DQ")
MS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
BACKWARD_TOKENS = 4096


@dataclass(frozen=True)
class Shape:
    """One linear layer: rows N (out_features) and columns K (in_features)."""

    name: str
    rows: int
    columns: int

    @property
    def key(self) -> str:
        """The name in results."""
        return f"{self.rows}x{self.columns}"


# In the order of worth, should the time run out: large layers of the 8B model first.
SHAPES = (
    Shape("8B gate, up", 14336, 4096),
    Shape("8B down", 4096, 14336),
    Shape("8B q, o", 4096, 4096),
    Shape("8B gate+up", 28672, 4096),
    Shape("70B gate, up", 28672, 8192),
    Shape("70B down", 8192, 28672),
    Shape("8B q+k+v", 6144, 4096),
    Shape("70B q, o", 8192, 8192),
    Shape("8B k, v", 1024, 4096),
    Shape("70B q+k+v", 10240, 8192),
    Shape("70B k, v", 1024, 8192),
    Shape("70B gate+up", 57344, 8192),
)
SMOKE_SHAPES = (Shape("smoke", 128, 256), Shape("smoke, ragged", 192, 384))
SMOKE_MS = (1, 16, 40)


def shapes(smoke: bool) -> tuple[Shape, ...]:
    """Returns the shapes of a run."""
    return SMOKE_SHAPES if smoke else SHAPES


def token_counts(smoke: bool) -> tuple[int, ...]:
    """Returns the numbers of tokens M of a run."""
    return SMOKE_MS if smoke else MS


def activation_dtype(smoke: bool) -> torch.dtype:
    """Returns bf16; fp16 for Triton's interpreter, in which bf16 is wrong."""
    return torch.float16 if smoke else torch.bfloat16


def bytes_of(weight: FragmentWeight) -> int:
    """Returns the bytes that a product has to read of `weight`."""
    tensors = (weight.words, weight.plane, weight.scale, weight.zero)
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def random_weight(scheme: str | Scheme, rows: int, columns: int, device: str) -> FragmentWeight:
    """Returns a weight of random codes and scales in fragment order, for inference.

    Args:
        scheme: its scheme; double-quantized scales are decoded, and kept beside as codes.
        rows: out_features.
        columns: in_features.
        device: where it is made; no 16-bit weight is.
    """
    scheme = Scheme.parse(scheme)
    form = format_of(scheme)
    padded = math.ceil(rows / ROW_PADDING) * ROW_PADDING
    chunks = math.ceil(columns / COLUMN_PADDING) * (COLUMN_PADDING // CHUNK)
    groups, lanes = form.groups(columns), (padded // STRIP, chunks, STRIP, LANES)
    words = integers(-(2**31), 2**31, (*lanes, lane_words(form)), device, torch.int32)
    plane = None
    if form.bits == 3:
        plane = integers(-(2**15), 2**15, lanes, device, torch.int16)
    zero = None
    if not form.symmetric:
        size = (groups, padded)
        zero = integers(0, 1 << form.bits, size, device, torch.uint8)
    scale, offset, step = _random_scales(scheme, form, (groups, padded), rows, device)
    weight = FragmentWeight(
        format=form,
        out_features=rows,
        in_features=columns,
        words=words,
        plane=plane,
        scale=scale,
        zero=zero,
        counters=torch.zeros(padded // ROW_PADDING, dtype=torch.int32, device=device),
        table=_table(form, device),
        scale_offset=offset,
        scale_step=step,
    )
    return weight.with_decoded_scales()


def copy_of(weight: FragmentWeight) -> FragmentWeight:
    """Returns the same weight in memory of its own."""
    fields = ("words", "plane", "scale", "zero", "counters")
    held = {name: getattr(weight, name) for name in fields}
    return dataclasses.replace(weight, **{n: t.clone() for n, t in held.items() if t is not None})


def _random_scales(
    scheme: Scheme, form: Format, size: tuple[int, int], rows: int, device: str
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if not scheme.double_quant:
        scale = uniform(size, device).mul_(0.01).add_(0.005)
        return scale.to(form.torch_scale_dtype), None, None
    blocks = math.ceil(size[0] * rows / SCALE_BLOCK)
    codes = integers(0, 256, size, device, torch.uint8)
    offset = torch.full((blocks,), 0.005, dtype=torch.bfloat16, device=device)
    return codes, offset, torch.full_like(offset, 4e-5)


def _table(form: Format, device: str) -> Tensor | None:
    if form.codebook is None:
        return None
    return torch.tensor(codebook_table(form.codebook), dtype=torch.int32, device=device)
