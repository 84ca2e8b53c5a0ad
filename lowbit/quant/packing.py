"""The one canonical packing of integer codes: compressed-tensors' `pack-quantized`, byte for byte.

A row of codes is a dense little-endian bit stream in int32 words. A code `q` is stored unsigned,
as `q + 2^(bits-1)`; code i occupies bits `i * bits ... (i + 1) * bits - 1` of its row's stream, so
3-bit codes straddle bytes and words:

    bit      0     3     6     9    ...        30     33
    code     | q0  | q1  | q2  | ...  | q9   | q10  |
    word     <------------- word 0 -------------->|<-- word 1

A row is padded with zero bits to a whole word. Because the stream is little-endian, the smallest
whole number of bytes that holds whole codes (a unit: 4 codes in 1 byte, 8 codes in 3 bytes, ...)
can be packed and unpacked on its own; words are only a view of the bytes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _unit(bits: int) -> tuple[int, int]:
    """Returns (codes, bytes) of the smallest run of whole codes that fills whole bytes."""
    unit_bits = math.lcm(bits, 8)
    return unit_bits // bits, unit_bits // 8


def words_per_row(columns: int, bits: int) -> int:
    """Returns the int32 words that `columns` codes occupy."""
    return math.ceil(columns * bits / 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Returns `codes` packed along the last dimension.

    Args:
        codes: integer `[..., columns]`, each in `-2^(bits-1) ... 2^(bits-1) - 1`.
        bits: 2, 3, 4 or 8.

    Returns:
        int32 `[..., ceil(columns * bits / 32)]`.
    """
    columns = codes.shape[-1]
    unit_codes, unit_bytes = _unit(bits)
    # 32 codes fill exactly `bits` words, whatever the width.
    padded = math.ceil(columns / 32) * 32
    unsigned = codes.new_zeros((*codes.shape[:-1], padded), dtype=torch.uint8)
    # int16 holds -128 + 128 ... 127 + 128; int8 would wrap.
    unsigned[..., :columns] = (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    units = unsigned.unflatten(-1, (padded // unit_codes, unit_codes))
    stream = units[..., 0].to(torch.int32)
    for i in range(1, unit_codes):
        stream |= units[..., i].to(torch.int32) << (i * bits)
    as_bytes = torch.stack([(stream >> (8 * j)).to(torch.uint8) for j in range(unit_bytes)], dim=-1)
    words = as_bytes.flatten(-2).contiguous().view(torch.int32)
    return words[..., : words_per_row(columns, bits)].contiguous()


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Returns the int8 codes `[..., columns]` of `packed`, the inverse of `pack`."""
    unit_codes, unit_bytes = _unit(bits)
    words = packed.contiguous()
    if words.stride(-1) != 1:  # torch calls [n, 1] contiguous whatever its last stride is
        words = words.clone(memory_format=torch.contiguous_format)
    as_bytes = words.view(torch.uint8)
    units = math.ceil(columns / unit_codes)
    if units * unit_bytes > as_bytes.shape[-1]:  # the last 3-byte unit may be cut by the word
        missing = units * unit_bytes - as_bytes.shape[-1]
        as_bytes = torch.nn.functional.pad(as_bytes, (0, missing))
    as_bytes = as_bytes[..., : units * unit_bytes].unflatten(-1, (units, unit_bytes))
    # A unit of 3 bytes needs 24 bits to shift in; single-byte units stay bytes.
    stream = as_bytes[..., 0] if unit_bytes == 1 else as_bytes[..., 0].to(torch.int32)
    for j in range(1, unit_bytes):
        stream = stream | (as_bytes[..., j].to(torch.int32) << (8 * j))
    mask = (1 << bits) - 1
    codes = packed.new_empty((*packed.shape[:-1], units, unit_codes), dtype=torch.int8)
    for i in range(unit_codes):
        # uint8 - 128 wraps to the right int8 bit pattern, so the subtraction is done in bytes.
        unsigned = ((stream >> (i * bits)) & mask).to(torch.uint8)
        codes[..., i] = (unsigned - (1 << (bits - 1))).view(torch.int8)
    return codes.flatten(-2)[..., :columns].contiguous()
