"""A weight in fragment order: its codes lie where the lanes of a tensor core want them.

A tensor core takes 16 rows x 16 columns of the weight from 32 lanes; lane 4 r + t holds, of rows r
and r + 8, the columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9. A row is cut into chunks of 64 columns;
lane t of a chunk owns the 16 columns

    k = 16 s + 8 h + 2 t + e        s = 0..3, h = 0..1, e = 0..1

which are b / 2 words of b-bit codes. Rows lie in strips of 16, a strip's
chunks one after the other:

    words   int32 [strips, chunks, 16 rows, 4 lanes, b / 2 words]

Slot j of word i is 2 s + h = i * 16 / b + j. Integers: half e has slot j at bit `b j`, so that one
mask cuts out two neighbours, 16 bits apart:

    bit      0    4    8    12   16   20   24   28
    4-bit    j0e0 j1e0 j2e0 j3e0 j0e1 j1e1 j2e1 j3e1

Codebooks are looked up by neighbouring nibbles, so there slot j, half e is at bit `8 j + 4 e`.
8-bit codes are stored in two's complement, all others unsigned. 3-bit codes are two planes: their
low two bits in `words`, the high bit in `plane`, int16 [strips, chunks, 16, 4], with half e in byte
e and slot j at bit `PLANE_BITS[j]` of it.

Rows are padded to 64 and columns to 128; kernels read activations beyond K as zero and write no
rows beyond N.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_kernels.format import SCALE_BLOCK, Format, decode_scales
from lowbit_kernels.gpu.ptx import PLANE_BITS, codebook_table

STRIP, CHUNK, LANES = 16, 64, 4
ROW_PADDING, COLUMN_PADDING = 64, 128
# Rows rearranged at once: reordering makes a few int32 copies of what it reorders.
ROWS_PER_STEP = 1024


@dataclass(frozen=True)
class FragmentWeight:
    """The tensors of one weight, or of several with their padded rows one after the other.

    Args:
        format: what the codes mean.
        out_features: rows that count, N.
        in_features: columns that count, K.
        words: int32 [strips, chunks, 16, 4, lane_words(format)].
        plane: int16 [strips, chunks, 16, 4], the high bits of 3-bit codes, else None.
        scale: [groups, padded rows] in the format's scale dtype, or uint8 codes of double-quantized
            scales. Neighbouring rows are neighbours; the stride of the groups is free.
        zero: uint8 [groups, padded rows] unsigned zero points, or None.
        counters: int32 [padded rows / 64], zero between launches: split K counts arrivals here, so
            one weight must not be multiplied on two streams at the same time.
        table: int32 [32], see `ptx.codebook_table`; None for integers.
        scale_offset: bf16 [blocks] of double-quantized scales: offset + step * code, blocks of 256
            scales counted along the rows as the checkpoint stores them ([N, groups]).
        scale_step: bf16 [blocks].
        scale_codes: uint8 [groups, padded rows], kept beside decoded scales; else None.
    """

    format: Format
    out_features: int
    in_features: int
    words: Tensor
    plane: Tensor | None
    scale: Tensor
    zero: Tensor | None
    counters: Tensor
    table: Tensor | None = None
    scale_offset: Tensor | None = None
    scale_step: Tensor | None = None
    scale_codes: Tensor | None = None

    @property
    def padded_rows(self) -> int:
        """Rows that are stored."""
        return self.words.shape[0] * STRIP

    @staticmethod
    def from_codes(
        format: Format,  # noqa: A002 - the field's name
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None = None,
        scale_offset: Tensor | None = None,
        scale_step: Tensor | None = None,
    ) -> FragmentWeight:
        """Returns the weight in fragment order.

        Args:
            format: what the codes mean.
            codes: uint8 `[N, K]`, unsigned.
            scale: `[N, groups]` in the scale dtype, or uint8 codes with `scale_offset` and
                `scale_step`.
            zero: uint8 `[N, groups]`, unsigned, for asymmetric formats.
            scale_offset, scale_step: bf16 `[blocks]`.

        Raises:
            ValueError: for tensors that do not fit each other.
        """
        _check(format, codes, scale, zero, scale_offset, scale_step)
        out_features, in_features = codes.shape
        rows = math.ceil(out_features / ROW_PADDING) * ROW_PADDING
        chunks = math.ceil(in_features / COLUMN_PADDING) * (COLUMN_PADDING // CHUNK)
        size = (rows // STRIP, chunks, STRIP, LANES)
        words = torch.zeros(*size, lane_words(format), dtype=torch.int32, device=codes.device)
        plane = None
        if format.bits == 3:
            plane = torch.zeros(size, dtype=torch.int16, device=codes.device)
        for start in range(0, out_features, ROWS_PER_STEP):
            block = _padded(codes[start : start + ROWS_PER_STEP], chunks * CHUNK)
            strips = slice(start // STRIP, start // STRIP + block.shape[0] // STRIP)
            words[strips], high = _reorder(block, format)
            if plane is not None:
                plane[strips] = high
        return FragmentWeight(
            format=format,
            out_features=out_features,
            in_features=in_features,
            words=words,
            plane=plane,
            scale=_transposed(scale, rows),
            zero=None if zero is None else _transposed(zero, rows),
            counters=torch.zeros(rows // ROW_PADDING, dtype=torch.int32, device=codes.device),
            table=_table(format, codes.device),
            scale_offset=scale_offset,
            scale_step=scale_step,
        )

    def codes(self, rows: Tensor | None = None) -> Tensor:
        """Returns the unsigned codes, uint8 `[N, K]`: what `from_codes` was given.

        Args:
            rows: int64 `[n]`, the rows to read, `[n, K]`; None reads all.
        """
        if rows is None:
            all_rows = torch.arange(self.out_features, device=self.words.device)
            return torch.cat([self.codes(part) for part in all_rows.split(ROWS_PER_STEP)])
        strip, row = rows // STRIP, rows % STRIP
        words = self.words[strip, :, row]
        plane = None if self.plane is None else self.plane[strip, :, row]
        return _restore(words, plane, self.format)[:, : self.in_features]

    def group_values(self, tensor: Tensor, rows: Tensor | None = None) -> Tensor:
        """Returns `scale` or `zero` as the checkpoint has it, `[N, groups]` or `[n, groups]`."""
        return tensor[:, : self.out_features].T.contiguous() if rows is None else tensor[:, rows].T

    def with_decoded_scales(self) -> FragmentWeight:
        """Returns the weight with double-quantized scales decoded, for inference; codes stay."""
        if self.scale.dtype != torch.uint8:
            return self
        assert self.scale_offset is not None
        assert self.scale_step is not None
        groups, rows = self.scale.shape
        index = torch.arange(rows, device=self.scale.device)[None, :] * groups
        index = index + torch.arange(groups, device=self.scale.device)[:, None]
        block = (index // SCALE_BLOCK).clamp_(max=self.scale_offset.numel() - 1)
        scale = decode_scales(
            self.scale, self.scale_offset[block], self.scale_step[block], self.format
        )
        return dataclasses.replace(self, scale=scale, scale_codes=self.scale)

    def with_coded_scales(self) -> FragmentWeight:
        """Returns the weight with double-quantized scales as codes, for training."""
        if self.scale_codes is None:
            return self
        return dataclasses.replace(self, scale=self.scale_codes, scale_codes=None)

    def rows(self, start: int, stop: int, out_features: int) -> FragmentWeight:
        """Returns a view of the stored rows `start` to `stop` (multiples of 64).

        Codes of scales stay with the whole weight: their blocks are counted from its first row.
        """
        strips = slice(start // STRIP, stop // STRIP)
        if self.scale.dtype == torch.uint8 and stop - start < self.padded_rows:
            raise ValueError("rows of double-quantized scales cannot be cut out; decode them first")
        return dataclasses.replace(
            self,
            out_features=out_features,
            words=self.words[strips],
            plane=None if self.plane is None else self.plane[strips],
            scale=self.scale[:, start:stop],
            zero=None if self.zero is None else self.zero[:, start:stop],
            counters=self.counters[start // ROW_PADDING : stop // ROW_PADDING],
            scale_codes=None,
        )


def concatenate(weights: Sequence[FragmentWeight]) -> FragmentWeight:
    """Returns one weight that holds the padded rows of all, in order.

    Its `out_features` are all stored rows, padding included, so that part i begins at a multiple of
    64. Double-quantized scales must be decoded first: their blocks are counted per weight.

    Raises:
        ValueError: for weights of different format or width, or with coded scales.
    """
    first = weights[0]
    for weight in weights:
        if (weight.format, weight.in_features) != (first.format, first.in_features):
            raise ValueError("weights of different format or width cannot be one weight")
        if weight.scale.dtype == torch.uint8:
            raise ValueError("decode double-quantized scales before weights are put together")

    def joined(name: str, dim: int) -> Tensor | None:
        parts = [getattr(weight, name) for weight in weights]
        return None if parts[0] is None else torch.cat(parts, dim)

    words, scale, counters = joined("words", 0), joined("scale", 1), joined("counters", 0)
    assert words is not None
    assert scale is not None
    assert counters is not None
    return FragmentWeight(
        format=first.format,
        out_features=words.shape[0] * STRIP,
        in_features=first.in_features,
        words=words,
        plane=joined("plane", 0),
        scale=scale,
        zero=joined("zero", 1),
        counters=counters,
        table=first.table,
    )


def lane_words(format: Format) -> int:  # noqa: A002
    """Returns the words of one lane in one chunk; of the low plane for 3-bit codes."""
    return max(format.bits & ~1, 2) // 2


def _check(
    format: Format,  # noqa: A002
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    offset: Tensor | None,
    step: Tensor | None,
) -> None:
    if codes.dtype != torch.uint8 or codes.dim() != 2 or 0 in codes.shape:
        raise ValueError(f"codes are {codes.dtype} {list(codes.shape)}, needed: uint8 [N, K]")
    size = (codes.shape[0], format.groups(codes.shape[1]))
    coded = offset is not None or step is not None
    blocks = (-(-math.prod(size) // SCALE_BLOCK),) if coded else None
    _expect("scale", scale, torch.uint8 if coded else format.torch_scale_dtype, size)
    _expect("zero", zero, torch.uint8, None if format.symmetric else size)
    _expect("scale_offset", offset, torch.bfloat16, blocks)
    _expect("scale_step", step, torch.bfloat16, blocks)


def _expect(
    name: str, tensor: Tensor | None, dtype: torch.dtype, size: tuple[int, ...] | None
) -> None:
    found = None if tensor is None else (tensor.dtype, tuple(tensor.shape))
    needed = None if size is None else (dtype, size)
    if found != needed:
        raise ValueError(f"{name} is {found}, needed for this format: {needed}")


def _table(format: Format, device: torch.device) -> Tensor | None:  # noqa: A002
    words = None if format.codebook is None else codebook_table(format.codebook)
    return None if words is None else torch.tensor(words, dtype=torch.int32, device=device)


def _transposed(values: Tensor, rows: int) -> Tensor:
    """Returns `values` `[N, groups]` as `[groups, rows]`, padded with zeros."""
    result = values.new_zeros((values.shape[1], rows))
    result[:, : values.shape[0]] = values.T
    return result


def _padded(codes: Tensor, columns: int) -> Tensor:
    """Returns `codes` padded with zero codes to whole strips and `columns`."""
    missing = -codes.shape[0] % ROW_PADDING, columns - codes.shape[1]
    return torch.nn.functional.pad(codes, (0, missing[1], 0, missing[0]))


def _bit_positions(format: Format, width: int) -> list[int]:  # noqa: A002
    """Returns the position of slot j, half e in a word, by 2 j + e."""
    slots = 16 // width
    if format.codebook is not None:
        return [8 * j + 4 * e for j in range(slots) for e in range(2)]
    return [width * j + 16 * e for j in range(slots) for e in range(2)]


def _reorder(codes: Tensor, format: Format) -> tuple[Tensor, Tensor]:  # noqa: A002
    """Returns words and high-bit plane of whole strips of codes `[rows, chunks * 64]`."""
    rows, columns = codes.shape
    split = codes.view(rows // STRIP, STRIP, columns // CHUNK, 4, 2, LANES, 2)
    lanes = split.permute(0, 2, 1, 5, 3, 4, 6).reshape(-1, 16).to(torch.int32)
    if format.bits == 8:
        lanes = lanes ^ 0x80
    width = 2 if format.bits == 3 else format.bits
    positions = _bit_positions(format, width)
    in_words = (lanes & ((1 << width) - 1)).view(-1, lane_words(format), len(positions))
    words = torch.zeros(in_words.shape[:2], dtype=torch.int32, device=codes.device)
    for i, position in enumerate(positions):
        words |= in_words[..., i] << position
    plane = torch.zeros(lanes.shape[0], dtype=torch.int32, device=codes.device)
    if format.bits == 3:
        for i in range(16):
            plane |= (lanes[:, i] >> 2) << (8 * (i % 2) + PLANE_BITS[i // 2])
    size = rows // STRIP, columns // CHUNK, STRIP, LANES
    # int16 wraps on purpose: the sixteen bits are what is stored.
    return words.view(*size, lane_words(format)), plane.to(torch.int16).view(size)


def _restore(words: Tensor, plane: Tensor | None, format: Format) -> Tensor:  # noqa: A002
    """Returns the codes `[n, chunks * 64]` of `words` `[n, chunks, 4, w]`."""
    width = 2 if format.bits == 3 else format.bits
    positions = torch.tensor(_bit_positions(format, width), device=words.device)
    lanes = (words[..., None] >> positions.int()) & ((1 << width) - 1)
    lanes = lanes.flatten(-2)
    if plane is not None:
        high = torch.tensor([8 * (i % 2) + PLANE_BITS[i // 2] for i in range(16)])
        lanes = lanes | ((plane[..., None].int() >> high.int().to(words.device) & 1) << 2)
    if format.bits == 8:
        lanes = lanes ^ 0x80
    n, chunks = words.shape[:2]
    columns = lanes.to(torch.uint8).view(n, chunks, LANES, 4, 2, 2).permute(0, 1, 3, 4, 2, 5)
    return columns.reshape(n, chunks * CHUNK)
