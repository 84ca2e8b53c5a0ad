"""Device functions that turn loaded words into tiles of a weight, shared by all kernels.

`decode_tile` gives what a tensor core multiplies, in the dtype of the activations: code - zero for
integers, exact in 16 bits, and the level for a codebook, rounded to that dtype. On NVIDIA it is
inline PTX (`ptx.py`); elsewhere, and in the interpreter, plain Triton. No scale is applied.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowbit_kernels.gpu import ptx

PER_LANE_ASM = tl.constexpr(ptx.PER_LANE_ASM)


@triton.jit
def tile_offsets(rows, columns_in_words, chunks, WORDS: tl.constexpr):
    """Returns int64 offsets of words: row's strip and place in it, plus the place in the chunks.

    rows [BN] are row numbers, columns_in_words [W] count words of the row from its first chunk.
    """
    strip = (rows // 16).to(tl.int64) * (chunks * (64 * WORDS)) + (rows % 16) * (4 * WORDS)
    place = columns_in_words // (4 * WORDS) * (64 * WORDS) + columns_in_words % (4 * WORDS)
    return strip[:, None] + place[None, :]


@triton.jit
def load_scales(
    scale,
    offset,
    step,
    row,
    group,
    groups,
    scale_stride,
    mask,
    SCALE_DTYPE: tl.constexpr,
    SIGNED: tl.constexpr,
):
    """Returns float32 scales of rows and groups (tiles that broadcast to each other).

    uint8 scales are codes of double quantization: see `format.decode_scales`.
    """
    values = tl.load(scale + group * scale_stride + row, mask=mask, other=0)
    if offset is None:
        return values.to(tl.float32)
    else:
        block = (row * groups + group) // 256
        if SIGNED:
            magnitude = (values & 0x7F).to(tl.float32)
        else:
            magnitude = values.to(tl.float32)
        first = tl.load(offset + block, mask=mask, other=0.0).to(tl.float32)
        width = tl.load(step + block, mask=mask, other=0.0).to(tl.float32)
        # The product is exact, so that fusing it with the sum changes nothing.
        decoded = first + width * magnitude
        if SIGNED:
            decoded = tl.where(values >= 0x80, -decoded, decoded)
        if SCALE_DTYPE == tl.float16:
            # The step is rounded up, so that a block's largest scale may decode to just above it.
            decoded = tl.minimum(tl.maximum(decoded, -65504.0), 65504.0)
        return decoded.to(SCALE_DTYPE).to(tl.float32)


@triton.jit
def load_words(words, plane, row, column, chunks, BITS: tl.constexpr, TILE_K: tl.constexpr):
    """Returns the words [BLOCK_N, W] and high bits of `TILE_K` columns from `column` on."""
    WORDS: tl.constexpr = (2 if BITS == 3 else BITS) // 2
    place = tl.arange(0, TILE_K // 16 * WORDS) + column // 16 * WORDS
    # Each word is used by one program only.
    low = tl.load(
        words + tile_offsets(row, place, chunks, WORDS), eviction_policy="evict_first"
    ).to(tl.uint32, bitcast=True)
    if BITS == 3:
        place = tl.arange(0, TILE_K // 16) + column // 16
        offsets = tile_offsets(row, place, chunks, 1)
        high = tl.load(plane + offsets, eviction_policy="evict_first")
        return low, high.to(tl.uint16, bitcast=True)
    else:
        return low, low


@triton.jit
def tile_columns(TILE_K: tl.constexpr, WIDE: tl.constexpr):
    """Returns the column of the weight that each column of a decoded tile is, int32 [TILE_K].

    A sum over columns may run in any order. WIDE is the order in which one lane's four columns
    2 t, 2 t + 1, 2 t + 8, 2 t + 9 are neighbours: where Triton multiplies with mma.sync (sm_80,
    sm_89, sm_120) it takes a 4-bit operand to be laid out so, and anything else goes through
    shared memory.
    """
    column = tl.arange(0, TILE_K)
    if WIDE:
        lane, half, pair = column % 16 // 4, column % 4 // 2, column % 2
        column = column // 16 * 16 + 8 * half + 2 * lane + pair
        column = tl.max_contiguous(tl.multiple_of(column, 2), 2)
    return column


@triton.jit
def _in_columns(lanes, WORDS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr):
    """Returns values of [BN, words of BK columns, slots / 2, 2, 2] as [BN, BK]."""
    split = lanes.reshape(BN, BK // 64, 4, WORDS, 4 // WORDS, 2, 2)
    if WIDE:
        ordered = split.permute(0, 1, 3, 4, 2, 5, 6)
    else:
        ordered = split.permute(0, 1, 3, 4, 5, 2, 6)
    return ordered.reshape(BN, BK)


@triton.jit
def unpack_codes(
    words,
    plane,
    BITS: tl.constexpr,
    CODEBOOK: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Returns the unsigned codes int32 [BN, BK] of uint32 `words` [BN, W] in fragment order."""
    FIELD: tl.constexpr = 2 if BITS == 3 else BITS
    CODES: tl.constexpr = 32 // FIELD
    WORDS: tl.constexpr = 16 // CODES
    index = tl.arange(0, CODES)
    slot, half = index // 2, index % 2
    if CODEBOOK:
        position = 8 * slot + 4 * half
    else:
        position = FIELD * slot + 16 * half
    codes = (words[:, :, None] >> position[None, None, :].to(tl.uint32)) & ((1 << FIELD) - 1)
    if BITS == 3:
        # PLANE_BITS of ptx.py
        bit = tl.where(slot < 3, 2 + 2 * slot, 2 * slot - 5)
        bit = tl.where(slot == 6, 0, tl.where(slot == 7, 7, bit)) + 8 * half
        high = (plane.to(tl.uint32)[:, :, None] >> bit[None, None, :].to(tl.uint32)) & 1
        codes = codes | (high << 2)
    if BITS == 8:
        codes = codes ^ 0x80
    return _in_columns(codes.to(tl.int32), WORDS, BN, BK, WIDE)


@triton.jit
def _fragments(words, plane, zero_pair, table, ASM: tl.constexpr, PAIRS: tl.constexpr):
    """Returns the float pairs of each word, [BN, W, PAIRS / 2, 2] by slot; see ptx.py."""
    if table is not None:
        t0, t1, t2, t3, t4, t5, t6, t7 = table
        a, b, c, d = tl.inline_asm_elementwise(
            ASM,
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
            [words, t0, t1, t2, t3, t4, t5, t6, t7],
            dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
        pairs = tl.join(tl.join(a, c), tl.join(b, d))
    elif PAIRS == 2:
        a, b = tl.inline_asm_elementwise(
            ASM,
            "=&r,=&r,r,r,r",
            [words, plane, zero_pair],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
        pairs = tl.join(a, b)
    elif PAIRS == 4:
        a, b, c, d = tl.inline_asm_elementwise(
            ASM,
            "=&r,=&r,=&r,=&r,r,r,r",
            [words, plane, zero_pair],
            dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
        pairs = tl.join(tl.join(a, c), tl.join(b, d))
    else:
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            ASM,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r",
            [words, plane, zero_pair],
            dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32) * 2,
            is_pure=True,
            pack=1,
        )
        # Slots are 2 s + h, and the last join is the fastest index.
        even = tl.join(tl.join(a, e), tl.join(c, g))
        odd = tl.join(tl.join(b, f), tl.join(d, h))
        pairs = tl.join(even, odd)
    return pairs


@triton.jit
def decode_tile(
    words,
    plane,
    zero,
    table,
    ASM: tl.constexpr,
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Returns the tile [BLOCK_N, BLOCK_K] in DTYPE, without scales; columns as `tile_columns`.

    Args:
        words: uint32 [BLOCK_N, W] in fragment order.
        plane: uint16 [BLOCK_N, BLOCK_K / 16], read for 3-bit codes.
        zero: float32 [BLOCK_N], or None for 2^(bits-1).
        table: from `load_table`, or None for integers.
        ASM: the PTX, or None for plain Triton.
    """
    FIELD: tl.constexpr = 2 if BITS == 3 else BITS
    WORDS: tl.constexpr = FIELD // 2
    if ASM is not None:
        if zero is None:
            zero_pair = tl.zeros((BLOCK_N, 1), tl.uint32)
        else:
            bits = (-zero).to(DTYPE).to(tl.uint16, bitcast=True).to(tl.uint32)
            zero_pair = (bits | (bits << 16))[:, None]
        pairs = _fragments(words, plane.to(tl.uint32), zero_pair, table, ASM, 16 // FIELD)
        low = (pairs & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)
        high = (pairs >> 16).to(tl.uint16).to(DTYPE, bitcast=True)
        tile = _in_columns(tl.join(low, high), WORDS, BLOCK_N, BLOCK_K, WIDE)
    else:
        codes = unpack_codes(words, plane, BITS, table is not None, BLOCK_N, BLOCK_K, WIDE)
        if table is not None:
            tile = tl.load(table + codes).to(DTYPE)
        elif zero is not None:
            tile = (codes - zero.to(tl.int32)[:, None]).to(DTYPE)
        else:
            tile = (codes - (1 << (BITS - 1))).to(DTYPE)
    return tile


@triton.jit
def _table_word(table, i: tl.constexpr, ASM: tl.constexpr):
    """Returns word i of a codebook's table, [1, 1].

    A tensor rather than a scalar: Triton then keeps the layout that the tensor core wants. And
    through inline assembly that adds a zero which differs between lanes as far as the compiler can
    tell: it would put the table into uniform registers, and move every word out of them again
    before each lookup.
    """
    word = tl.load(table + i + tl.zeros((1, 1), tl.int32))
    return tl.inline_asm_elementwise(ASM, "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def load_table(table, ASM: tl.constexpr, DTYPE: tl.constexpr):
    """Returns what `decode_tile` takes: eight words of byte planes, or a pointer to float32."""
    if ASM is None:
        return (table + 16).to(tl.pointer_type(tl.float32))
    else:
        first = table + (0 if DTYPE == tl.bfloat16 else 8)
        return (
            _table_word(first, 0, PER_LANE_ASM),
            _table_word(first, 1, PER_LANE_ASM),
            _table_word(first, 2, PER_LANE_ASM),
            _table_word(first, 3, PER_LANE_ASM),
            _table_word(first, 4, PER_LANE_ASM),
            _table_word(first, 5, PER_LANE_ASM),
            _table_word(first, 6, PER_LANE_ASM),
            _table_word(first, 7, PER_LANE_ASM),
        )
