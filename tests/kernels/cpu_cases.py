"""Weights in strips, made without the code under test, and the native kernels' C interface."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.scheme import NF4_LEVELS

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ISA_NAMES = ("portable", "avx2", "avx512")
RADIX, LARGEST = 254, 254 * 127 + 126
# kind, bits, whether zero points are stored
KINDS = [
    *((f"int{bits}{'_asym' if asym else ''}", bits, asym) for bits in (2, 3, 4, 8)
      for asym in (False, True)),
    ("nf4", 4, False),
]  # fmt: skip


class CWeight(ctypes.Structure):
    """`lowbit::Weight` of src/weight.h."""

    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in ("kind", "rows", "columns", "group", "groups", "type")
        ),
        *(
            (name, ctypes.c_void_p)
            for name in ("codes", "high", "scale", "zero", "table", "levels")
        ),
        ("table_unit", ctypes.c_float),
    )


@dataclass
class Packed:
    """A weight in strips, with what it decodes to."""

    c: CWeight
    tensors: tuple[Tensor | None, ...]
    dense: Tensor


def in_strips(codes: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor | None]:
    """Returns the bytes of uint8 `codes` `[N, K]`, as src/weight.h draws them."""
    parts = [
        torch.nn.functional.pad(part, (0, -part.shape[1] % 32))
        for part in codes.split(group, dim=1)
    ]
    padded = torch.cat(parts, 1)
    padded = torch.nn.functional.pad(padded, (0, 0, 0, -padded.shape[0] % 16))
    strips, columns = padded.shape[0] // 16, padded.shape[1]
    quads = padded.view(strips, 16, columns // 4, 4)
    if bits == 8:
        return quads.permute(0, 2, 1, 3).contiguous(), None
    field = 4 if bits == 4 else 2
    count = 8 // field
    split = (quads & ((1 << field) - 1)).view(strips, 16, -1, count, 4).permute(0, 2, 3, 1, 4)
    packed = sum(split[:, :, j] << (field * j) for j in range(count))
    high = None
    if bits == 3:
        split = (quads >> 2).view(strips, 16, -1, 8, 4).permute(0, 2, 3, 1, 4)
        high = sum(split[:, :, j] << j for j in range(8)).contiguous()
    return packed.contiguous(), high


def random_weight(
    kind: str, bits: int, asym: bool, size: tuple[int, int, int], seed: int,
    scale_dtype: torch.dtype = torch.float16,
) -> Packed:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    rows, columns, group = size
    group = min(group, columns)
    groups = -(-columns // group)
    codes = torch.randint(1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(rows, groups, generator=generator) * 0.02 + 0.001).to(scale_dtype)
    zero = None
    if asym:
        zero = torch.randint(1 << bits, (rows, groups), generator=generator, dtype=torch.uint8)
    table = levels = None
    unit = 0.0
    if kind == "nf4":
        levels = torch.tensor(NF4_LEVELS)
        unit = float(levels.abs().max()) / LARGEST
        values = (levels / unit).round()
        upper = (values / RADIX).round()
        table = (torch.cat([upper, values - RADIX * upper]) + 128).to(torch.uint8)
        decoded = levels[codes.long()]
    else:
        middle = torch.full((rows, groups), 2.0 ** (bits - 1)) if zero is None else zero.float()
        decoded = codes.float() - middle.repeat_interleave(group, 1)[:, :columns]
    dense = decoded * scale.float().repeat_interleave(group, 1)[:, :columns]

    def transposed(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        padded = torch.nn.functional.pad(values, (0, 0, 0, -rows % 16))
        return padded.view(-1, 16, groups).permute(0, 2, 1).contiguous()

    packed, high = in_strips(codes, bits, group)
    tensors = (packed, high, transposed(scale), transposed(zero), table, levels)
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    number = 16 if kind == "nf4" else bits
    c = CWeight(number, rows, columns, group, groups, TYPES[scale_dtype], *pointers, unit)
    return Packed(c, tensors, dense)


def linear(
    library: Any, weight: Packed, x: Tensor, bias: Tensor | None, planes: int, isa: int,
    threads: int = 1, out: Tensor | None = None, step: float = 0.0,
) -> Tensor:  # fmt: skip
    if out is None:
        out = torch.full((x.shape[0], weight.c.rows), torch.nan, dtype=x.dtype)
    status = library.lowbit_linear(
        ctypes.byref(weight.c), ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.stride(0)),
        TYPES[x.dtype], x.shape[0], ctypes.c_void_p(0 if bias is None else bias.data_ptr()),
        ctypes.c_void_p(out.data_ptr()), TYPES[out.dtype], planes,
        ctypes.c_float(step), threads, isa,
    )  # fmt: skip
    assert status == 0
    return out


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())
