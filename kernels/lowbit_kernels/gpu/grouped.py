"""Kernels for rows of activations that each belong to one of many stacked weights.

A tile is up to BLOCK_M rows of the same expert, and a program multiplies one tile by BLOCK_N rows
of that expert's weight. How many tiles there are is known on the device only, so that the grid is
an upper bound and programs without a tile return at once. Which rows a tile has, is found in one of
two ways:

    few rows     every program reads the expert of each row and counts: row r begins a tile if the
                 rows before it of its expert fill whole tiles. No launch but the product's own,
                 which is what a step of decoding is made of.
    many rows    from tables that `routed.py` makes by a stable sort on the device

Rows of no expert (their number is not in [0, experts)) are a last, extra expert whose tiles write
zeros.

Shapes: R routed rows, T rows of activations, N rows and K columns per expert; `rows` are the stored
rows of an expert.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowbit_kernels.gpu.dequantize import exact_tile
from lowbit_kernels.gpu.linear import multiply


@triton.jit
def tile_rows(
    tile,
    expert_of_row,
    order,
    starts,
    tile_ends,
    R,
    experts,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Returns the expert of `tile`, its rows int32 [BLOCK_M], which of them count, if it exists.

    Args:
        expert_of_row: int [R] for few rows, at most BLOCK_R; else None.
        order, starts, tile_ends: see `routed.Tables`; None for few rows.
    """
    slot = tl.arange(0, BLOCK_M)
    if order is None:
        others = tl.arange(0, BLOCK_R)
        there = others < R
        expert_R = tl.load(expert_of_row + others, mask=there, other=0)
        expert = tl.load(expert_of_row + tile)
        expert_R = tl.where((expert_R >= 0) & (expert_R < experts), expert_R, experts).to(tl.int32)
        expert = tl.where((expert >= 0) & (expert < experts), expert, experts).to(tl.int32)
        same = ((expert_R == expert) & there).to(tl.int32)
        before = tl.sum(tl.where(others < tile, same, 0))
        # Each row's place among the rows of the expert, from the first of this tile on.
        place = tl.cumsum(same) - 1 - before
        chosen = (same[None, :] != 0) & (place[None, :] == slot[:, None])
        row = tl.sum(tl.where(chosen, others[None, :], 0), 1)
        in_tile = slot < tl.sum(same) - before
        exists = before % BLOCK_M == 0
    else:
        ids = tl.arange(0, BLOCK_E)
        # Tiles of experts before this one end at or before it; experts without rows have none.
        ends = tl.load(tile_ends + ids, mask=ids <= experts, other=2147483647)
        expert = tl.sum((ends <= tile).to(tl.int32))
        exists = expert <= experts
        expert = tl.minimum(expert, experts)
        first = tl.load(tile_ends + expert - 1, mask=expert > 0, other=0)
        place = tl.load(starts + expert) + (tile - first) * BLOCK_M + slot
        in_tile = place < tl.load(starts + expert + 1)
        row = tl.load(order + place, mask=in_tile, other=0).to(tl.int32)
    return expert, row, in_tile, exists


@triton.jit(do_not_specialize=["R", "T", "experts", "groups", "chunks"])
def grouped_linear_kernel(
    x,
    words,
    plane,
    scale,
    zero,
    table,
    expert_of_row,
    order,
    starts,
    tile_ends,
    token_of_row,
    row_scale,
    out,
    partial,
    counters,
    R,
    T,
    N,
    K,
    experts,
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
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out[r] = row_scale[r] * W[expert_of_row[r]] x[token_of_row[r]]; see `linear.linear_kernel`.

    Grid: (rows / BLOCK_N, SPLIT, upper bound of the tiles).

    Args:
        x: DTYPE [T, K], rows `x_stride` apart.
        words, plane, scale, zero, table: of all experts, see `weight.FragmentWeight`.
        expert_of_row, order, starts, tile_ends: see `tile_rows`.
        token_of_row: int [R]; None for row r of x.
        row_scale: floats [R] or None.
        out: [R, N], contiguous.
        partial: float32 [SPLIT, R, rows], for SPLIT > 1.
        counters: int32 [tiles * rows / BLOCK_N], zeros, for SPLIT > 1; left as zeros.
    """
    tile_n, part, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    expert, row_M, in_tile, exists = tile_rows(
        tile, expert_of_row, order, starts, tile_ends, R, experts, BLOCK_M, BLOCK_R, BLOCK_E
    )
    if not exists:
        return
    token = row_M
    if token_of_row is not None:
        token = tl.load(token_of_row + row_M, mask=in_tile, other=-1)
    valid = in_tile & (token >= 0) & (token < tl.where(expert < experts, T, 0))
    token = tl.where(valid, token, 0).to(tl.int64)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = n < N
    steps = tl.where(expert < experts, chunks // 2, 0)
    acc = multiply(
        x + token[None, :] * x_stride,
        valid,
        words,
        plane,
        scale,
        zero,
        None,
        None,
        table,
        tl.minimum(expert, experts - 1) * rows + n,
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
        # As in linear_kernel.
        place = partial + row_M.to(tl.int64)[None, :] * rows + n[:, None]
        part_stride = R.to(tl.int64) * rows
        tl.store(place + part * part_stride, acc, mask=in_tile[None, :])
        tl.debug_barrier()
        counter = counters + tile * tl.num_programs(0) + tile_n
        if tl.atomic_add(counter, 1, sem="acq_rel") != SPLIT - 1:
            return
        tl.store(counter, 0)
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for other in tl.range(SPLIT):
            acc += tl.load(
                place + other * part_stride, mask=in_tile[None, :], other=0.0, cache_modifier=".cg"
            )
    if row_scale is not None:
        acc *= tl.load(row_scale + row_M, mask=valid, other=0.0).to(tl.float32)[None, :]
    # Scales of the weight may be NaN, which is no business of a row that has no expert.
    acc = tl.where(valid[None, :], acc, 0.0)
    target = out + row_M.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(target, acc.to(out.dtype.element_ty), mask=in_rows[:, None] & in_tile[None, :])


@triton.jit(do_not_specialize=["R", "experts", "groups", "chunks"])
def grouped_grad_kernel(
    grad,
    words,
    plane,
    scale,
    zero,
    table,
    expert_of_row,
    order,
    starts,
    tile_ends,
    row_scale,
    out,
    R,
    N,
    K,
    experts,
    rows,
    chunks,
    groups,
    grad_stride,
    scale_stride,
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_GROUP: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    SIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """out[r] = row_scale[r] * grad[r] W[expert_of_row[r]], with the weight as `dequantize` has it.

    The sum runs over rows of the weight, BLOCK_N per step; the decoded tile is transposed in shared
    memory, so that the product is [BLOCK_K, BLOCK_M] and few rows waste little.

    Grid: (K / BLOCK_K, upper bound of the tiles). out: [R, K], contiguous.
    """
    expert, row_M, in_tile, exists = tile_rows(
        tl.program_id(1),
        expert_of_row,
        order,
        starts,
        tile_ends,
        R,
        experts,
        BLOCK_M,
        BLOCK_R,
        BLOCK_E,
    )
    if not exists:
        return
    first = tl.program_id(0) * BLOCK_K
    base = tl.minimum(expert, experts - 1) * rows
    grad_tile = grad + row_M.to(tl.int64)[None, :] * grad_stride
    acc = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    for start in tl.range(0, tl.where(expert < experts, N, 0), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        in_rows = n < N
        w_NK = exact_tile(
            words,
            plane,
            scale,
            zero,
            None,
            None,
            table,
            base + n,
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
        ).to(DTYPE)
        mask = in_rows[:, None] & in_tile[None, :]
        grad_NM = tl.load(grad_tile + n[:, None], mask=mask, other=0.0).to(DTYPE)
        acc = tl.dot(tl.trans(w_NK), grad_NM, acc, input_precision="ieee")
    if row_scale is not None:
        acc *= tl.load(row_scale + row_M, mask=in_tile, other=0.0).to(tl.float32)[None, :]
        acc = tl.where(expert < experts, acc, 0.0)
    k = first + tl.arange(0, BLOCK_K)
    target = out + row_M.to(tl.int64)[None, :] * K + k[:, None]
    tl.store(target, acc.to(out.dtype.element_ty), mask=(k < K)[:, None] & in_tile[None, :])
