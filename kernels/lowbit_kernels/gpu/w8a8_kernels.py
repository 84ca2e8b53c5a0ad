"""Device code of `w8a8`: quantizing activations to int8, and the product of int8 codes.

The weight is read as it is stored, int8 [N, K] with K contiguous, which is how int8 tensor cores
take both operands. The operands are swapped, out^T[N, M] = W . x^T: the side of 64 and more that
tensor cores want is the weight's, and one token costs a tile of 16.

Sums are integers and exact, so results do not depend on tiles or on the split of K: only the
epilogue rounds. (Triton asks mma.sync for saturating sums; below `w8a8.MAX_IN_FEATURES` columns
none comes that far.)

The split of K writes int32 parts, and the last program to arrive adds them. It knows itself by a
counter that the launch before, which quantizes x, has cleared: the counters live in the workspace
of one call, need no owner and no memset, and calls on two streams cannot meet in them. A second
kernel that adds would be a third launch, longer than the product of a small layer.

Shapes: N rows of the weight, K columns, M rows of activations (tokens).
"""

from __future__ import annotations

import triton
import triton.language as tl

# The smallest normal float32: rows of zeros divide by it.
SMALLEST_SCALE = tl.constexpr(2.0**-126)
# Adding and subtracting it rounds to an integer, half to even, where |value| < 2^22.
_ROUND = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def _magnitudes(values):
    """Returns the bits of |values|, int32: they order like the numbers, with NaN above all."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _codes(values, scale, STATIC: tl.constexpr):
    """Returns int8 values / scale, to nearest even; IEEE division, so that any device agrees."""
    levels = tl.math.div_rn(values, scale)
    if STATIC:
        levels = tl.minimum(tl.maximum(levels, -127.0), 127.0)
    return (levels + _ROUND - _ROUND).to(tl.int8)


@triton.jit(do_not_specialize=["counters"])
def quantize_rows_kernel(
    x,
    codes,
    scales,
    workspace,
    K,
    x_stride,
    static_scale,
    counters,
    STATIC: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Quantizes one row per program; together they clear the counters of the product that follows.

    Args:
        x: float [M, K], rows `x_stride` apart.
        codes: int8 [M, K], contiguous.
        scales: float32 [M].
        workspace: int32, or None; the first `counters` are cleared.
        static_scale: float32 number, the scale of every row if STATIC.
    """
    token = tl.program_id(0)
    source = x + token.to(tl.int64) * x_stride
    target = codes + token.to(tl.int64) * K
    column = tl.arange(0, BLOCK_K)
    # The first block, which is all of most rows, stays in registers; what follows is read twice.
    values = tl.load(source + column, mask=column < K, other=0.0).to(tl.float32)
    largest = tl.max(_magnitudes(values), axis=0)
    for start in tl.range(BLOCK_K, K, BLOCK_K):
        more = tl.load(source + start + column, mask=start + column < K, other=0.0)
        largest = tl.maximum(largest, tl.max(_magnitudes(more.to(tl.float32)), axis=0))
    scale = tl.math.div_rn(largest.to(tl.float32, bitcast=True), 127.0)
    if STATIC:
        scale = tl.where(scale == scale, static_scale, scale)
    else:
        scale = tl.where(scale < SMALLEST_SCALE, SMALLEST_SCALE, scale)
        # Codes of an infinite scale are 0 or arbitrary: they must not pass as numbers.
        scale = tl.where(scale == float("inf"), float("nan"), scale)
    tl.store(scales + token, scale)
    tl.store(target + column, _codes(values, scale, STATIC), mask=column < K)
    for start in tl.range(BLOCK_K, K, BLOCK_K):
        more = tl.load(source + start + column, mask=start + column < K, other=0.0)
        more_codes = _codes(more.to(tl.float32), scale, STATIC)
        tl.store(target + start + column, more_codes, mask=start + column < K)
    if workspace is not None:
        place = tl.arange(0, 256)
        for start in tl.range(token * 256, counters, tl.num_programs(0) * 256):
            tl.store(workspace + start + place, 0, mask=start + place < counters)


@triton.jit(do_not_specialize=["M", "counters"])
def w8a8_kernel(
    x,
    x_scales,
    codes,
    scales,
    bias,
    out,
    workspace,
    counters,
    M,
    N,
    K,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """See the head of this file. Grid: (tiles of M * tiles of N, SPLIT).

    Args:
        x: int8 [M, K], contiguous; x_scales: float32 [M].
        codes: int8 [N, K], contiguous; scales: fp16, bf16 or fp32 [N].
        bias: fp16, bf16 or fp32 [N], or None.
        out: fp16, bf16 or fp32 [M, N], contiguous.
        workspace: int32, `counters` zeros and [SPLIT, M, N], for SPLIT > 1; else None.
        counters: number of tiles; read for SPLIT > 1.
        EVEN_K: K is a multiple of BLOCK_K.
        GROUP_M: tiles of M that take the same rows of the weight one after the other, from L2.
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first = tile // group * GROUP_M
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP_M)
    token = (first + tile % group % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tile % group // height * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows beyond N read the last one: cheaper than a mask, and their results are not stored.
    w_tile = codes + tl.minimum(row, N - 1).to(tl.int64)[:, None] * K
    x_tile = x + token.to(tl.int64)[None, :] * K
    column = tl.arange(0, BLOCK_K)
    steps = tl.cdiv(K, BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for i in tl.range(part * steps // SPLIT, (part + 1) * steps // SPLIT, num_stages=STAGES):
        k = i * BLOCK_K + column
        if EVEN_K:
            w_NK = tl.load(w_tile + k[None, :])
            x_KM = tl.load(x_tile + k[:, None], mask=token[None, :] < M, other=0)
        else:
            w_NK = tl.load(w_tile + k[None, :], mask=k[None, :] < K, other=0)
            mask = (token[None, :] < M) & (k[:, None] < K)
            x_KM = tl.load(x_tile + k[:, None], mask=mask, other=0)
        acc = tl.dot(w_NK, x_KM, acc, out_dtype=tl.int32)
    inside = (row[:, None] < N) & (token[None, :] < M)
    place = token.to(tl.int64)[None, :] * N + row[:, None]
    if SPLIT > 1:
        parts = workspace + counters + place
        size = M.to(tl.int64) * N
        tl.store(parts + part * size, acc, mask=inside)
        tl.debug_barrier()  # all of this program's part is written before it is counted
        if tl.atomic_add(workspace + tile, 1, sem="acq_rel") != SPLIT - 1:
            return
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
        for other in tl.range(SPLIT):
            # Written by other programs: not from this one's L1.
            acc += tl.load(parts + other * size, mask=inside, other=0, cache_modifier=".cg")
    x_scale = tl.load(x_scales + token, mask=token < M, other=0.0)
    scale = tl.load(scales + row, mask=row < N, other=0.0).to(tl.float32)
    result = acc.to(tl.float32) * x_scale[None, :] * scale[:, None]
    if bias is not None:
        result += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)
