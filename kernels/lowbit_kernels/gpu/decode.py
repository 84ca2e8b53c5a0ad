"""Device functions that turn loaded words into tiles of a weight, shared by all kernels.

`decode_tile` gives what a tensor core multiplies, in the dtype of the activations: code - zero for
integers, exact in 16 bits, and the level for a codebook, rounded to that dtype. On NVIDIA it is
inline PTX (`ptx.py`); elsewhere, and in the interpreter, plain Triton. No scale is applied.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_offsets(rows, columns_in_words, chunks, WORDS: tl.constexpr):
    """Returns int64 offsets of words: row's strip and place in it, plus the place in the chunks.

    rows [BN] are row numbers, columns_in_words [W] count words of the row from its first chunk.
    """
    strip = (rows // 16).to(tl.int64) * (chunks * (64 * WORDS)) + (rows % 16) * (4 * WORDS)
    place = columns_in_words // (4 * WORDS) * (64 * WORDS) + columns_in_words % (4 * WORDS)
    return strip[:, None] + place[None, :]


@triton.jit
def unpack_codes(
    words, plane, BITS: tl.constexpr, CODEBOOK: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
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
    lanes = codes.to(tl.int32).reshape(BN, BK // 64, 4, WORDS, CODES // 4, 2, 2)
    return lanes.permute(0, 1, 3, 4, 5, 2, 6).reshape(BN, BK)


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
        return tl.join(tl.join(a, c), tl.join(b, d))
    if PAIRS == 2:
        a, b = tl.inline_asm_elementwise(
            ASM,
            "=&r,=&r,r,r,r",
            [words, plane, zero_pair],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
        return tl.join(a, b)
    if PAIRS == 4:
        a, b, c, d = tl.inline_asm_elementwise(
            ASM,
            "=&r,=&r,=&r,=&r,r,r,r",
            [words, plane, zero_pair],
            dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
        return tl.join(tl.join(a, c), tl.join(b, d))
    a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
        ASM,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r",
        [words, plane, zero_pair],
        dtype=(
            tl.uint32,
            tl.uint32,
            tl.uint32,
            tl.uint32,
            tl.uint32,
            tl.uint32,
            tl.uint32,
            tl.uint32,
        ),
        is_pure=True,
        pack=1,
    )
    # Slots are 2 s + h, and the last join is the fastest index.
    even = tl.join(tl.join(a, e), tl.join(c, g))
    odd = tl.join(tl.join(b, f), tl.join(d, h))
    return tl.join(even, odd)


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
):
    """Returns the tile [BLOCK_N, BLOCK_K] in DTYPE, without scales.

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
        if zero is not None:
            bits = (-zero).to(DTYPE).to(tl.uint16, bitcast=True).to(tl.uint32)
            zero_pair = (bits | (bits << 16))[:, None]
        else:
            zero_pair = tl.zeros((BLOCK_N, 1), tl.uint32)
        pairs = _fragments(words, plane.to(tl.uint32), zero_pair, table, ASM, 16 // FIELD)
        low = (pairs & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)
        high = (pairs >> 16).to(tl.uint16).to(DTYPE, bitcast=True)
        lanes = tl.join(low, high).reshape(BLOCK_N, BLOCK_K // 64, 4, WORDS, 4 // WORDS, 2, 2)
        return lanes.permute(0, 1, 3, 4, 5, 2, 6).reshape(BLOCK_N, BLOCK_K)
    codes = unpack_codes(words, plane, BITS, table is not None, BLOCK_N, BLOCK_K)
    if table is not None:
        return tl.load(table + codes).to(DTYPE)
    if zero is not None:
        return (codes - zero.to(tl.int32)[:, None]).to(DTYPE)
    return (codes - (1 << (BITS - 1))).to(DTYPE)


@triton.jit
def load_table(table, ASM: tl.constexpr, DTYPE: tl.constexpr):
    """Returns what `decode_tile` takes: eight words of byte planes, or a pointer to float32."""
    if ASM is None:
        return (table + 16).to(tl.pointer_type(tl.float32))
    first = table + (0 if DTYPE == tl.bfloat16 else 8)
    return (
        tl.load(first),
        tl.load(first + 1),
        tl.load(first + 2),
        tl.load(first + 3),
        tl.load(first + 4),
        tl.load(first + 5),
        tl.load(first + 6),
        tl.load(first + 7),
    )
