"""Fused dequantize-and-multiply: out[M, N] = x[M, K] . W[N, K]^T + bias, W in fragment order.

The operands are swapped, out^T[N, M] = W . x^T: the weight is the tensor core's left operand, which
comes from registers, so a decoded weight never passes through shared memory. A program owns BLOCK_N
rows of W, BLOCK_M rows of x and a range of K; it takes 128 columns per step.

Scales are applied where they cost least (MODE):

    row    one scale per row: loaded once, applied to sums
    post   groups of 64 columns and more, few rows of x: each group's product is scaled in float32,
           acc += scale * dot(levels, x), so that scale * level is never rounded to 16 bits
    pre    small groups, or many rows of x: scale * level is rounded to the dtype of x, as plain
           torch would, and summed by the tensor core

With SPLIT > 1 programs share an output tile along K: each writes its float32 part, the last to
arrive adds them in order and leaves the counter at zero. Results do not depend on who is last, and
nothing has to be cleared before a launch.

Shapes: N rows of the weight (`rows` with padding), K columns, M rows of activations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowbit_kernels.gpu.decode import (
    decode_tile,
    load_scales,
    load_table,
    load_words,
    tile_columns,
)


@triton.jit
def scaled_tile(
    words,
    plane,
    scale,
    zero,
    offset,
    step,
    table,
    row,
    column,
    groups,
    chunks,
    scale_stride,
    in_rows,
    ASM: tl.constexpr,
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_GROUP: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    SIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_K: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Returns scale * (code - zero) or scale * level, rounded once to DTYPE, [BLOCK_N, TILE_K].

    TILE_GROUP is the widest power of two, at most TILE_K, that lies in one group wherever it
    starts at a multiple of itself.
    """
    low, high = load_words(words, plane, row, column, chunks, BITS, TILE_K)
    levels = decode_tile(low, high, None, table, ASM, BITS, DTYPE, BLOCK_N, TILE_K, WIDE).to(
        tl.float32
    )
    GROUPS: tl.constexpr = TILE_K // TILE_GROUP
    group = tl.minimum((column + tl.arange(0, GROUPS) * TILE_GROUP) // GROUP, groups - 1)[None, :]
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
    return (split * scales[:, :, None]).to(DTYPE).reshape(BLOCK_N, TILE_K)


@triton.jit
def multiply(
    x_tile,
    in_tokens,
    words,
    plane,
    scale,
    zero,
    offset,
    step,
    table,
    row,
    in_rows,
    first,
    last,
    K,
    chunks,
    groups,
    scale_stride,
    ASM: tl.constexpr,
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_GROUP: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    SIGNED: tl.constexpr,
    MODE: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Returns the scaled products of weight rows and activations, float32 [BLOCK_N, BLOCK_M].

    Args:
        x_tile: pointers to the first columns of the rows of activations, [1, BLOCK_M].
        in_tokens: bool [BLOCK_M]; the others are read as zeros.
        row: int32 [BLOCK_N], rows of the weight.
        in_rows: bool [BLOCK_N]: rows whose scales and zero points may be read.
        first, last: steps of 128 columns.
    """
    TILE_K: tl.constexpr = 64 if MODE == "post" and TILE_GROUP == 64 else 128
    levels = None if table is None else load_table(table, ASM, DTYPE)
    row_zero = None
    if MODE == "row":
        row_scale = load_scales(
            scale, offset, step, row, 0, groups, scale_stride, in_rows, SCALE_DTYPE, SIGNED
        )
        if zero is not None:
            row_zero = tl.load(zero + row, mask=in_rows, other=0).to(tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for i in tl.range(first, last, num_stages=STAGES):
        for j in tl.static_range(128 // TILE_K):
            column = i * 128 + j * TILE_K
            k = column + tile_columns(TILE_K, WIDE)[:, None]
            mask = in_tokens[None, :]
            if not EVEN_K:
                mask = mask & (k < K)
            x_KM = tl.load(x_tile + k, mask=mask, other=0.0).to(DTYPE)
            if MODE == "pre":
                tile = scaled_tile(
                    words,
                    plane,
                    scale,
                    zero,
                    offset,
                    step,
                    levels,
                    row,
                    column,
                    groups,
                    chunks,
                    scale_stride,
                    in_rows,
                    ASM,
                    BITS,
                    DTYPE,
                    GROUP,
                    TILE_GROUP,
                    SCALE_DTYPE,
                    SIGNED,
                    BLOCK_N,
                    TILE_K,
                    WIDE,
                )
                acc = tl.dot(tile, x_KM, acc, input_precision="ieee")
            else:
                low, high = load_words(words, plane, row, column, chunks, BITS, TILE_K)
                if MODE == "row":
                    tile = decode_tile(
                        low, high, row_zero, levels, ASM, BITS, DTYPE, BLOCK_N, TILE_K, WIDE
                    )
                    if BLOCK_M > 32:
                        acc = tl.dot(tile, x_KM, acc, input_precision="ieee")
                    else:
                        # In few columns, sums kept in the tensor core would make it wait for each
                        # product in turn (ptxas C7515).
                        acc += tl.dot(tile, x_KM, input_precision="ieee") * row_scale[:, None]
                else:
                    # Padding may begin a group that does not exist; x is zero there.
                    group = tl.minimum(column // GROUP, groups - 1)
                    scales = load_scales(
                        scale,
                        offset,
                        step,
                        row,
                        group,
                        groups,
                        scale_stride,
                        in_rows,
                        SCALE_DTYPE,
                        SIGNED,
                    )
                    zeros = None
                    if zero is not None:
                        zeros = tl.load(
                            zero + group * scale_stride + row, mask=in_rows, other=0
                        ).to(tl.float32)
                    tile = decode_tile(
                        low, high, zeros, levels, ASM, BITS, DTYPE, BLOCK_N, TILE_K, WIDE
                    )
                    acc += tl.dot(tile, x_KM, input_precision="ieee") * scales[:, None]
    if MODE == "row" and BLOCK_M > 32:
        acc *= row_scale[:, None]
    return acc


@triton.jit(do_not_specialize=["M", "groups", "chunks"])
def linear_kernel(
    x,
    words,
    plane,
    scale,
    zero,
    offset,
    step,
    table,
    bias,
    out,
    partial,
    counters,
    M,
    N,
    K,
    rows,
    chunks,
    groups,
    x_stride,
    scale_stride,
    ASM: tl.constexpr,
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_GROUP: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    SIGNED: tl.constexpr,
    MODE: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """See the head of this file. Grid: (rows / BLOCK_N, SPLIT, M / BLOCK_M).

    Args:
        x: DTYPE [M, K], rows `x_stride` apart.
        words, plane, scale, zero, offset, step, table, counters: see `weight.FragmentWeight`.
        bias: [N] or None.
        out: [M, N], contiguous.
        partial: float32 [SPLIT, BLOCK_M, rows], for SPLIT > 1.
    """
    tile_n, part = tl.program_id(0), tl.program_id(1)
    row = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = row < N
    x_tile = x + token.to(tl.int64)[None, :] * x_stride
    steps = chunks // 2
    acc = multiply(
        x_tile,
        token < M,
        words,
        plane,
        scale,
        zero,
        offset,
        step,
        table,
        row,
        in_rows,
        part * steps // SPLIT,
        (part + 1) * steps // SPLIT,
        K,
        chunks,
        groups,
        scale_stride,
        ASM,
        BITS,
        DTYPE,
        GROUP,
        TILE_GROUP,
        SCALE_DTYPE,
        SIGNED,
        MODE,
        EVEN_K,
        BLOCK_M,
        BLOCK_N,
        STAGES,
        WIDE,
    )
    if SPLIT > 1:
        place = partial + tl.arange(0, BLOCK_M)[None, :] * rows + row[:, None]
        tl.store(place + part * (BLOCK_M * rows), acc)
        tl.debug_barrier()  # all of this program's part is written before it is counted
        if tl.atomic_add(counters + tile_n, 1, sem="acq_rel") != SPLIT - 1:
            return
        tl.store(counters + tile_n, 0)
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for other in tl.range(SPLIT):
            # Written by other programs: not from this one's L1.
            acc += tl.load(place + other * (BLOCK_M * rows), cache_modifier=".cg")
    if bias is not None:
        acc += tl.load(bias + row, mask=in_rows, other=0.0).to(tl.float32)[:, None]
    target = out + token.to(tl.int64)[None, :] * N + row[:, None]
    tl.store(target, acc.to(out.dtype.element_ty), mask=in_rows[:, None] & (token[None, :] < M))
