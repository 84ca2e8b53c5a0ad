"""A weight in fragment order as an ordinary matrix: for large M and for the backward pass.

Values are computed in float32 from exact levels and scales and rounded once, so they equal the
reference decoding bit for bit. Writing 16-bit values moves several times the bytes that are read,
which leaves time enough for unpacking without inline assembly.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.gpu.decode import load_scales, load_words, unpack_codes
from lowbit_kernels.gpu.weight import FragmentWeight

BLOCK_N, BLOCK_K = 32, 128
TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}


@triton.jit
def exact_tile(
    words,
    plane,
    scale,
    zero,
    offset,
    step,
    table,
    row,
    first,
    in_rows,
    chunks,
    groups,
    scale_stride,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_GROUP: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    SIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Returns float32 [BLOCK_N, BLOCK_K] of rows `row` and the columns from `first` on.

    Scales and zero points of rows that are not `in_rows` are not read.
    """
    low, high = load_words(words, plane, row, first, chunks, BITS, BLOCK_K)
    codes = unpack_codes(low, high, BITS, table is not None, BLOCK_N, BLOCK_K, False)
    if table is not None:
        levels = tl.load((table + 16).to(tl.pointer_type(tl.float32)) + codes)
    else:
        levels = (codes - (1 << (BITS - 1))).to(tl.float32)
    GROUPS: tl.constexpr = BLOCK_K // TILE_GROUP
    group = tl.minimum((first + tl.arange(0, GROUPS) * TILE_GROUP) // GROUP, groups - 1)[None, :]
    scales = load_scales(
        scale,
        offset,
        step,
        row[:, None],
        group,
        groups,
        scale_stride,
        in_rows[:, None],
        SCALE_DTYPE,
        SIGNED,
    )
    split = levels.reshape(BLOCK_N, GROUPS, TILE_GROUP)
    if zero is not None:
        zeros = tl.load(zero + group * scale_stride + row[:, None], mask=in_rows[:, None], other=0)
        split -= (zeros.to(tl.float32) - (1 << (BITS - 1)))[:, :, None]
    return (split * scales[:, :, None]).reshape(BLOCK_N, BLOCK_K)


@triton.jit(do_not_specialize=["N", "K", "chunks", "groups"])
def dequantize_kernel(
    words,
    plane,
    scale,
    zero,
    offset,
    step,
    table,
    out,
    N,
    K,
    chunks,
    groups,
    scale_stride,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_GROUP: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    SIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: (N / BLOCK_N, K / BLOCK_K). out: [N, K], contiguous."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * BLOCK_K
    in_rows = row < N
    values = exact_tile(
        words,
        plane,
        scale,
        zero,
        offset,
        step,
        table,
        row,
        first,
        in_rows,
        chunks,
        groups,
        scale_stride,
        BITS,
        GROUP,
        TILE_GROUP,
        SCALE_DTYPE,
        SIGNED,
        BLOCK_N,
        BLOCK_K,
    )
    column = first + tl.arange(0, BLOCK_K)
    target = out + row.to(tl.int64)[:, None] * K + column[None, :]
    mask = in_rows[:, None] & (column[None, :] < K)
    tl.store(target, values.to(out.dtype.element_ty), mask=mask)


def tile_group(group_size: int, columns: int) -> int:
    """Returns the widest power of two up to `columns` whose multiples begin no second group."""
    width = columns
    while group_size % width:
        width //= 2
    return width


def exact_constants(weight: FragmentWeight) -> dict[str, Any]:
    """Returns the compile-time arguments of `exact_tile` that depend on the weight."""
    form = weight.format
    # One scale per row: the kernel is the same for every K.
    group_size = BLOCK_K if weight.scale.shape[0] == 1 else form.group_size
    return {
        "BITS": form.bits,
        "GROUP": group_size,
        "TILE_GROUP": tile_group(group_size, BLOCK_K),
        "SCALE_DTYPE": TRITON_DTYPES[form.torch_scale_dtype],
        "SIGNED": form.signed_scales,
        "BLOCK_K": BLOCK_K,
    }


def dequantize_into(weight: FragmentWeight, out: Tensor) -> Tensor:
    """Writes the weight into `out` `[N, K]`, contiguous, fp16, bf16 or fp32, and returns it."""
    size = (weight.out_features, weight.in_features)
    coded = weight.scale.dtype == torch.uint8
    dequantize_kernel[(triton.cdiv(size[0], BLOCK_N), triton.cdiv(size[1], BLOCK_K))](
        weight.words,
        weight.plane,
        weight.scale,
        weight.zero,
        weight.scale_offset if coded else None,
        weight.scale_step if coded else None,
        weight.table,
        out,
        *size,
        weight.words.shape[1],
        weight.scale.shape[0],
        weight.scale.stride(0),
        **exact_constants(weight),
        BLOCK_N=BLOCK_N,
    )
    return out
