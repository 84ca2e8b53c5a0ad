"""A weight in strips of 16 rows, as src/weight.h draws them, and the way back to its codes."""

from __future__ import annotations

import dataclasses
import functools
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit_kernels.cpu import memory
from lowbit_kernels.format import SCALE_BLOCK, Format, decode_scales

STRIP = 16
GROUP_PADDING = 32
# Rows are rearranged a block at a time: a few copies of a block's codes exist at once.
CODES_PER_STEP = 1 << 22

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# 16-bit values of a codebook as two bytes: 254 * high + low, both in -127 ... 127.
_RADIX, _LARGEST = 254, 254 * 127 + 126
_CODEBOOK_KIND = 16
# `lowbit::Weight`, native alignment.
_HEADER = struct.Struct("@6i6Pf4x")


@dataclass(frozen=True)
class StripWeight:
    """The tensors of one weight, or of several with their padded rows one after the other.

    Args:
        format: what the codes mean.
        out_features: rows that count, N.
        in_features: columns that count, K.
        codes: uint8 [strips, padded K * bits / 8 * 16]; the low two bits of 3-bit codes.
        high: uint8 [strips, padded K * 2], the high bits of 3-bit codes, else None.
        scale: [strips, groups, 16] in the format's scale dtype.
        zero: uint8 [strips, groups, 16] unsigned zero points, or None.
        scale_codes: uint8 [N, groups], the stored form of double-quantized scales, else None.
        scale_offset: bf16 [blocks] of double-quantized scales.
        scale_step: bf16 [blocks].
    """

    format: Format
    out_features: int
    in_features: int
    codes: Tensor
    high: Tensor | None
    scale: Tensor
    zero: Tensor | None
    scale_codes: Tensor | None = None
    scale_offset: Tensor | None = None
    scale_step: Tensor | None = None

    @staticmethod
    def from_codes(
        format: Format,  # noqa: A002
        shape: tuple[int, int],
        codes_of: Callable[[int, int], Tensor],
        scale: Tensor,
        zero: Tensor | None,
        scale_offset: Tensor | None = None,
        scale_step: Tensor | None = None,
    ) -> StripWeight:
        """Returns the weight `[N, K]` in strips.

        Args:
            format: what the codes mean.
            shape: (N, K).
            codes_of: returns the unsigned codes of the rows from one index to another, uint8
                `[rows, K]`; called block by block, so that all codes never exist at once.
            scale: `[N, groups]` in the format's scale dtype, or uint8 codes of double-quantized
                scales, which are decoded here and kept.
            zero: uint8 `[N, groups]` unsigned zero points, or None.
            scale_offset: bf16 [blocks] where scales are double-quantized.
            scale_step: bf16 [blocks].
        """
        (N, K), bits = shape, format.bits
        strips = -(-N // STRIP)
        columns = padded_columns(format, K)
        width = columns * _low_bits(bits) // 8 * STRIP
        codes = memory.empty((strips, width), torch.uint8)
        high = memory.empty((strips, columns * 2), torch.uint8) if bits == 3 else None
        for start, stop in row_blocks(N, K):
            rows = slice(start // STRIP, -(-stop // STRIP))
            low_part, high_part = _in_strips(_pad_groups(codes_of(start, stop), format), bits)
            codes[rows] = low_part
            if high is not None and high_part is not None:
                high[rows] = high_part
        stored_codes = None
        if scale_offset is not None and scale_step is not None:
            stored_codes, scale = scale, _decoded(scale, scale_offset, scale_step, format)
        return StripWeight(
            format,
            N,
            K,
            codes,
            high,
            _group_strips(scale),
            None if zero is None else _group_strips(zero),
            stored_codes,
            scale_offset,
            scale_step,
        )

    @property
    def strips(self) -> int:
        """Strips that are stored."""
        return self.codes.shape[0]

    def codes_of(self, start: int, stop: int) -> Tensor:
        """Returns the unsigned codes of the rows `start` to `stop`, uint8 `[rows, K]`."""
        rows = torch.arange(start, stop)
        strip, row = rows // STRIP, rows % STRIP
        bits = self.format.bits
        vectors = self.codes.view(self.strips, -1, STRIP, 4)[strip, :, row]
        codes = _fields(vectors, _low_bits(bits))
        if self.high is not None:
            vectors = self.high.view(self.strips, -1, STRIP, 4)[strip, :, row]
            codes |= _fields(vectors, 1) << 2
        return _unpad_groups(codes, self.format, self.in_features)

    def group_values(self, tensor: Tensor) -> Tensor:
        """Returns `scale` or `zero` as the checkpoint has it, `[N, groups]`."""
        rows = tensor.transpose(1, 2).flatten(0, 1)[: self.out_features]
        return rows.clone(memory_format=torch.contiguous_format)

    def strip_range(self, start: int, stop: int, out_features: int | None = None) -> StripWeight:
        """Returns a view of the strips `start` to `stop`.

        Its first `out_features` rows count; None: all that count here.
        """
        rows = slice(start, stop)
        rows_here = min(self.out_features, stop * STRIP) - start * STRIP
        return dataclasses.replace(
            self,
            out_features=rows_here if out_features is None else out_features,
            codes=self.codes[rows],
            high=None if self.high is None else self.high[rows],
            scale=self.scale[rows],
            zero=None if self.zero is None else self.zero[rows],
            scale_codes=None,
            scale_offset=None,
            scale_step=None,
        )

    def header(self) -> bytes:
        """Returns `lowbit::Weight`: sizes, and the addresses of the tensors as they are now."""
        form = self.format
        kind, table, levels, unit = form.bits, 0, 0, 0.0
        if form.codebook is not None:
            kind = _CODEBOOK_KIND
            tables, values, unit = _codebook(form.codebook)
            table, levels = tables.data_ptr(), values.data_ptr()
        return _HEADER.pack(
            kind,
            self.out_features,
            self.in_features,
            min(form.group_size, self.in_features) or self.in_features,
            self.scale.shape[1],
            TYPES[self.scale.dtype],
            self.codes.data_ptr(),
            0 if self.high is None else self.high.data_ptr(),
            self.scale.data_ptr(),
            0 if self.zero is None else self.zero.data_ptr(),
            table,
            levels,
            unit,
        )


def concatenate(weights: Sequence[StripWeight]) -> StripWeight:
    """Returns one weight that holds the strips of all, in order.

    Its `out_features` are all stored rows, padding included, so that part i begins at a strip.

    Raises:
        ValueError: for weights of different format or width.
    """
    first = weights[0]
    for weight in weights:
        if (weight.format, weight.in_features) != (first.format, first.in_features):
            raise ValueError("weights of different format or width cannot be one weight")

    def joined(name: str) -> Tensor | None:
        parts = [getattr(weight, name) for weight in weights]
        return None if parts[0] is None else memory.cat(parts)

    codes, scale = joined("codes"), joined("scale")
    assert codes is not None
    assert scale is not None
    rows = codes.shape[0] * STRIP
    return StripWeight(
        first.format, rows, first.in_features, codes, joined("high"), scale, joined("zero")
    )


def padded_columns(format: Format, in_features: int) -> int:  # noqa: A002
    """Returns the stored columns: each group is padded to a multiple of 32."""
    width, last = _group_widths(format, in_features)
    groups = format.groups(in_features)
    return (groups - 1) * _padded(width) + _padded(last)


def row_blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Yields (start, stop) of blocks of whole strips, about `CODES_PER_STEP` codes each."""
    step = max(1, CODES_PER_STEP // (columns * STRIP)) * STRIP
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _padded(columns: int) -> int:
    return -(-columns // GROUP_PADDING) * GROUP_PADDING


def _group_widths(format: Format, in_features: int) -> tuple[int, int]:  # noqa: A002
    """Returns the columns of a full group and of the last one."""
    width = min(format.group_size or in_features, in_features)
    return width, in_features - (format.groups(in_features) - 1) * width


def _low_bits(bits: int) -> int:
    """Returns the bits of a code in `codes`."""
    return 2 if bits == 3 else bits


def _pad_groups(codes: Tensor, format: Format) -> Tensor:  # noqa: A002
    """Returns `codes` `[n, K]` with padded groups, `[n padded to a strip, padded columns]`."""
    rows, columns = codes.shape
    width, last = _group_widths(format, columns)
    missing = -rows % STRIP
    if width % GROUP_PADDING == 0 and last % GROUP_PADDING == 0:
        return F.pad(codes, (0, 0, 0, missing)) if missing else codes
    whole = codes[:, : columns - last].unflatten(1, (-1, width)) if columns > last else None
    parts = [F.pad(codes[:, columns - last :], (0, _padded(last) - last))]
    if whole is not None:
        parts.insert(0, F.pad(whole, (0, _padded(width) - width)).flatten(1))
    return F.pad(torch.cat(parts, 1), (0, 0, 0, missing))


def _unpad_groups(codes: Tensor, format: Format, in_features: int) -> Tensor:  # noqa: A002
    """Returns the columns `[n, K]` that are no padding; the inverse of `_pad_groups`."""
    width, last = _group_widths(format, in_features)
    if width % GROUP_PADDING == 0:  # only the last group is padded
        return codes[:, :in_features]
    stored = codes.shape[1] - _padded(last)
    parts = [codes[:, stored : stored + last]]
    if stored:
        whole = codes[:, :stored].unflatten(1, (-1, _padded(width)))
        parts.insert(0, whole[:, :, :width].flatten(1))
    return torch.cat(parts, 1)


def _in_strips(codes: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """Returns padded uint8 codes as the bytes of strips, and the high bits of 3-bit codes."""
    strips, quads = codes.shape[0] // STRIP, codes.shape[1] // 4
    by_quad = codes.view(strips, STRIP, quads, 4).transpose(1, 2)
    if bits == 8:
        return by_quad.flatten(1), None
    high = None
    if bits == 3:
        high = _joined_fields((by_quad >> 2) & 1, 1)
    width = _low_bits(bits)
    return _joined_fields(by_quad & ((1 << width) - 1), width), high


def _joined_fields(by_quad: Tensor, width: int) -> Tensor:
    """Returns `[strips, quads, 16, 4]` with 8 / width quads in a byte, `[strips, bytes]`."""
    fields = by_quad.unflatten(1, (-1, 8 // width))
    joined: Tensor = fields[:, :, 0].contiguous()
    for j in range(1, 8 // width):
        joined |= fields[:, :, j] << (width * j)
    return joined.flatten(1)


def _fields(vectors: Tensor, width: int) -> Tensor:
    """Returns the codes in `vectors` `[n, vectors, 4]` of bytes, `[n, padded columns]`."""
    if width == 8:
        return vectors.flatten(1)
    mask = (1 << width) - 1
    parts = [(vectors >> (width * j)) & mask for j in range(8 // width)]
    return torch.stack(parts, 2).flatten(1)


def _group_strips(values: Tensor) -> Tensor:
    """Returns `[N, groups]` as `[strips, groups, 16]`."""
    padded: Tensor = F.pad(values, (0, 0, 0, -values.shape[0] % STRIP))
    return padded.view(-1, STRIP, values.shape[1]).transpose(1, 2).contiguous()


def _decoded(codes: Tensor, offset: Tensor, step: Tensor, format: Format) -> Tensor:  # noqa: A002
    """Returns double-quantized scales `[N, groups]` in the scale dtype."""
    blocks = math.ceil(codes.numel() / SCALE_BLOCK)
    padded = F.pad(codes.flatten(), (0, blocks * SCALE_BLOCK - codes.numel()))
    scales = decode_scales(padded.view(blocks, SCALE_BLOCK), offset[:, None], step[:, None], format)
    return scales.flatten()[: codes.numel()].view_as(codes)


@functools.cache
def _codebook(levels: tuple[float, ...]) -> tuple[Tensor, Tensor, float]:
    """Returns the byte tables of `lowbit::Weight`, the float32 levels, and the unit."""
    values = torch.tensor(levels, dtype=torch.float32)
    unit = float(values.abs().max()) / _LARGEST
    integers = (values.double() / unit).round()
    upper = (integers / _RADIX).round()
    tables = (torch.cat([upper, integers - _RADIX * upper]) + 128).to(torch.uint8)
    return tables, values, unit
