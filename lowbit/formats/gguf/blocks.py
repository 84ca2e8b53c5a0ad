"""Blocks of ggml and back: codes, a scale and perhaps a minimum for each sub-block.

    value = scale * code - minimum        float32, in this order

Layouts, first byte to last (fp16 unless said; codes of a byte, lowest bits first):

    Q4_0    d | 16 bytes: byte i has codes i and i + 16
    Q4_1    d | m | 16 bytes as Q4_0
    Q5_0    d | u32: bit i is the fifth bit of code i | 16 bytes as Q4_0
    Q8_0    d | 32 int8
    IQ4_NL  d | 16 bytes as Q4_0, indices into a table of int8
    Q2_K    16 bytes: scale, minimum (4 bits each) | 64 bytes | d | dmin
    Q3_K    32 bytes: bit j of byte i is the third bit of code 32 j + i, inverted | 64 bytes
            | 12 bytes: 16 scales of 6 bits | d
    Q4_K    d | dmin | 12 bytes: 8 scales and 8 minima of 6 bits | 128 bytes
    Q5_K    d | dmin | 12 bytes alike | 32 bytes: bit j of byte i is the fifth bit of code 32 j + i
            | 128 bytes
    Q6_K    128 bytes: low 4 bits | 64 bytes: high 2 bits | 16 int8 scales | d

Of 128 two-bit codes, byte i of 32 has codes i, i + 32, i + 64 and i + 96; of 64 four-bit codes (128
in Q6_K, 64 bytes) byte i has codes i and i + 32 (i + 64).

Source: ggml `ggml-common.h`, `ggml-quants.c`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.formats.gguf.types import GgmlType

# Rows are decoded so many weights at a time: a handful of copies in float32.
CHUNK_WEIGHTS = 1 << 22
IQ4_NL_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Blocks:
    """What blocks hold.

    Args:
        codes: int8 `[rows, columns]`.
        scales: float32 `[rows, sub-blocks]`.
        minima: float32 `[rows, sub-blocks]`, or None.
    """

    codes: Tensor
    scales: Tensor
    minima: Tensor | None = None

    def values(self) -> Tensor:
        """Returns the float32 values `[rows, columns]`."""
        codes = self.codes.float().unflatten(1, (self.scales.shape[1], -1))
        values: Tensor = self.scales[..., None] * codes
        if self.minima is not None:
            values -= self.minima[..., None]
        return values.flatten(1)


def unpack_blocks(raw: Tensor, kind: GgmlType) -> Blocks:
    """Returns what the rows `raw` (uint8 `[rows, bytes]`) of a block type hold."""
    rows = raw.shape[0]
    blocks = raw.reshape(-1, kind.block_bytes)
    codes, scales, minima = _READERS[kind.name](blocks)
    return Blocks(
        codes.reshape(rows, -1),
        scales.reshape(rows, -1),
        None if minima is None else minima.reshape(rows, -1),
    )


def decode_rows(raw: Tensor, kind: GgmlType, dtype: torch.dtype) -> Tensor:
    """Returns the values of uint8 rows `[rows, bytes]` of any type, cast once to `dtype`."""
    if kind.dtype is not None:
        return raw.contiguous().view(kind.dtype).to(dtype)
    columns = raw.shape[1] // kind.block_bytes * kind.block
    values = torch.empty(raw.shape[0], columns, dtype=dtype)
    step = max(1, CHUNK_WEIGHTS // columns)
    for start in range(0, raw.shape[0], step):
        values[start : start + step] = unpack_blocks(raw[start : start + step], kind).values()
    return values


def scales_are_finite(raw: Tensor, kind: GgmlType) -> bool:
    """Returns False if a float in the uint8 rows `raw` is NaN or Inf."""
    if kind.dtype is not None:
        return bool(torch.isfinite(raw.contiguous().view(kind.dtype)).all())
    blocks = raw.reshape(-1, kind.block_bytes)
    places = _HALVES[kind.name]
    return all(bool(torch.isfinite(_half(blocks, place)).all()) for place in places)


def zero_scales(raw: Tensor, kind: GgmlType) -> Tensor:
    """Returns which blocks of the uint8 rows `raw` have the scale zero, bool `[blocks]`."""
    return _half(raw.reshape(-1, kind.block_bytes), _HALVES[kind.name][0]).squeeze(1) == 0


def zero_points(blocks: Blocks) -> Tensor | None:
    """Returns the integers z of 0...15 with minimum = scale * z, None where there are none.

    Args:
        blocks: of Q4_1.

    Returns:
        float32 `[rows, sub-blocks]`.
    """
    assert blocks.minima is not None
    safe = torch.where(blocks.scales == 0, 1.0, blocks.scales)
    zeros = (blocks.minima / safe).round()
    fits = (zeros * blocks.scales == blocks.minima) & (zeros >= 0) & (zeros <= 15)
    return zeros if bool(fits.all()) else None


def _half(blocks: Tensor, begin: int) -> Tensor:
    """Returns the fp16 at byte `begin` of every block as float32 `[blocks, 1]`."""
    return blocks[:, begin : begin + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor, apart: int) -> Tensor:
    """Returns codes `[blocks, 2 * bytes]`: byte i of each `apart` has codes i and i + apart."""
    runs = packed.unflatten(1, (-1, 1, apart))
    return torch.cat([runs & 15, runs >> 4], dim=2).flatten(1)


def _crumbs(packed: Tensor) -> Tensor:
    """Returns two-bit codes `[blocks, 4 * bytes]`: byte i of each 32 has i, i + 32, i + 64..."""
    runs = packed.unflatten(1, (-1, 1, 32))
    return torch.cat([(runs >> shift) & 3 for shift in (0, 2, 4, 6)], dim=2).flatten(1)


def _bit_planes(packed: Tensor) -> Tensor:
    """Returns bits `[blocks, 8 * 32]`: bit j of byte i belongs to code 32 j + i."""
    return torch.cat([(packed >> shift) & 1 for shift in range(8)], dim=1)


_Read = tuple[Tensor, Tensor, Tensor | None]


def _q4_0(blocks: Tensor) -> _Read:
    return _nibbles(blocks[:, 2:], 16).to(torch.int8) - 8, _half(blocks, 0), None


def _q4_1(blocks: Tensor) -> _Read:
    return _nibbles(blocks[:, 4:], 16).to(torch.int8), _half(blocks, 0), -_half(blocks, 2)


def _q5_0(blocks: Tensor) -> _Read:
    # Byte i of the word has the fifth bits of codes 8 i ... 8 i + 7.
    high = torch.stack([(blocks[:, 2:6] >> shift) & 1 for shift in range(8)], dim=2).flatten(1)
    codes = _nibbles(blocks[:, 6:], 16) | (high << 4)
    return codes.to(torch.int8) - 16, _half(blocks, 0), None


def _q8_0(blocks: Tensor) -> _Read:
    return blocks[:, 2:].contiguous().view(torch.int8), _half(blocks, 0), None


def _iq4_nl(blocks: Tensor) -> _Read:
    table = torch.tensor(IQ4_NL_LEVELS, dtype=torch.int8)
    return table[_nibbles(blocks[:, 2:], 16).long()], _half(blocks, 0), None


def _q2_k(blocks: Tensor) -> _Read:
    scales = _half(blocks, 80) * (blocks[:, :16] & 15).float()
    minima = _half(blocks, 82) * (blocks[:, :16] >> 4).float()
    return _crumbs(blocks[:, 16:80]).to(torch.int8), scales, minima


def _q3_k(blocks: Tensor) -> _Read:
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    upper = torch.cat([(high >> shift) & 3 for shift in (0, 2, 4, 6)], dim=1)
    six = torch.cat([low & 15, low >> 4], dim=1) | (upper << 4)
    codes = (_crumbs(blocks[:, 32:96]) | (_bit_planes(blocks[:, :32]) << 2)).to(torch.int8) - 4
    return codes, _half(blocks, 108) * (six.to(torch.int8) - 32).float(), None


def six_bit_pairs(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Returns 8 scales and 8 minima, uint8 `[blocks, 8]` each, of 12 bytes.

    byte 0-3: bits 4-5 of scale 4-7 | scale 0-3       byte 4-7: the same of minima
    byte 8-11: low 4 bits of minimum 4-7 | of scale 4-7
    """
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat([first & 63, (third & 15) | (first >> 6 << 4)], dim=1)
    return scales, torch.cat([second & 63, (third >> 4) | (second >> 6 << 4)], dim=1)


def _q4_k(blocks: Tensor) -> _Read:
    scales, minima = six_bit_pairs(blocks[:, 4:16])
    codes = _nibbles(blocks[:, 16:], 32).to(torch.int8)
    return codes, _half(blocks, 0) * scales.float(), _half(blocks, 2) * minima.float()


def _q5_k(blocks: Tensor) -> _Read:
    scales, minima = six_bit_pairs(blocks[:, 4:16])
    codes = _nibbles(blocks[:, 48:], 32) | (_bit_planes(blocks[:, 16:48]) << 4)
    return (
        codes.to(torch.int8),
        _half(blocks, 0) * scales.float(),
        _half(blocks, 2) * minima.float(),
    )


def _q6_k(blocks: Tensor) -> _Read:
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    codes = _nibbles(blocks[:, :128], 64) | (_crumbs(blocks[:, 128:192]) << 4)
    return codes.to(torch.int8) - 32, _half(blocks, 208) * scales, None


_READERS: dict[str, Callable[[Tensor], _Read]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q8_0": _q8_0,
    "IQ4_NL": _iq4_nl,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
# Where the fp16 of a block are.
_HALVES: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q8_0": (0,),
    "IQ4_NL": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
