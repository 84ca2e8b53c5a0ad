"""Double quantization: the scales of a matrix as 8-bit codes (QLoRA, Dettmers et al. 2023, sec. 3).

The scales `[out_features, groups]` are read row by row as one sequence and cut into blocks of 256.
Each block has an offset and a step, both bf16, and a scale decodes to

    magnitude = offset[block] + step[block] * code

which costs 8 + 32/256 bits per scale: 4.127 bits per weight for NF4 in groups of 64, as in the
paper. The paper subtracts one mean from all scales and scales each block by its absmax; there a
block with one large scale can round its small ones to zero or below. Here the offset is the
block's minimum, so that a decoded magnitude is never below it and never zero.

Signed scales (symmetric integers) keep their sign in the code's top bit and have 7 bits of
magnitude. A decoded scale is then rounded to the scheme's scale dtype, so that a kernel that
decodes once at load and one that decodes on the fly see the same value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.scheme import DOUBLE_QUANT_BLOCK


@dataclass(frozen=True)
class DoubleQuantizedScales:
    """The stored form of a matrix of scales.

    Args:
        codes: uint8 `[out_features, groups]`.
        offset: bf16 `[blocks]`, the smallest magnitude of each block.
        step: bf16 `[blocks]`, not negative.
        signed: whether bit 7 of a code is the sign.
    """

    codes: Tensor
    offset: Tensor
    step: Tensor
    signed: bool

    def decode(self, scale_dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        """Returns the scales, float32 `[out_features, groups]`, exact in `scale_dtype`.

        Args:
            scale_dtype: the scheme's scale dtype.
            rows: int64 `[n]`, the rows to decode, `[n, groups]`; None decodes all.
        """
        groups, device = self.codes.shape[1], self.codes.device
        if rows is None:
            rows = torch.arange(self.codes.shape[0], device=device)
        block = rows[:, None] * groups + torch.arange(groups, device=device)
        block //= DOUBLE_QUANT_BLOCK
        return self._decoded(self.codes[rows], block, scale_dtype)

    def nearest(
        self, scales: Tensor, scale_dtype: torch.dtype, rows: Tensor, group: int
    ) -> tuple[Tensor, Tensor]:
        """Returns codes and values nearest to `scales` with the offsets and steps as they are.

        Args:
            scales: float32 `[n]`, for group `group` of each of `rows`; signs as stored.
            scale_dtype: the scheme's scale dtype.
            rows: int64 `[n]`.
            group: index of the group.

        Returns:
            uint8 `[n]`, and what it decodes to, float32 `[n]`, exact in `scale_dtype`.
        """
        block = (rows * self.codes.shape[1] + group) // DOUBLE_QUANT_BLOCK
        step = self.step.float()[block].clamp_min(torch.finfo(torch.float32).tiny)
        codes = ((scales.abs() - self.offset.float()[block]) / step).round()
        codes = codes.clamp(0, 127 if self.signed else 255).to(torch.uint8)
        if self.signed:
            codes = torch.where(scales < 0, codes | 0x80, codes)
        return codes, self._decoded(codes, block, scale_dtype)

    def _decoded(self, codes: Tensor, block: Tensor, scale_dtype: torch.dtype) -> Tensor:
        """Returns the scales of `codes`, which are in the blocks `block`."""
        magnitude_codes = codes & 0x7F if self.signed else codes
        # fp32 holds bf16 * 8-bit code exactly; only the sum rounds, once, then the cast.
        scales = self.offset.float()[block] + self.step.float()[block] * magnitude_codes.float()
        if self.signed:
            scales = torch.where(codes >= 0x80, -scales, scales)
        # The step is rounded up, so a block's largest scale may decode to just above it.
        largest = torch.finfo(scale_dtype).max
        return scales.clamp(-largest, largest).to(scale_dtype).float()


def double_quantize(scales: Tensor, signed: bool) -> DoubleQuantizedScales:
    """Returns `scales` (float32 `[out_features, groups]`, none zero) as 8-bit codes.

    Signs survive; magnitudes are rounded to the nearest representable one.
    """
    top = 127 if signed else 255
    flat = scales.abs().flatten().float()
    blocks = math.ceil(flat.numel() / DOUBLE_QUANT_BLOCK)
    padding = blocks * DOUBLE_QUANT_BLOCK - flat.numel()
    # Repeating the last scale leaves the minimum and maximum of the last block alone.
    padded = torch.cat([flat, flat[-1:].expand(padding)]).view(blocks, DOUBLE_QUANT_BLOCK)
    low, high = padded.amin(1), padded.amax(1)
    offset = _round_bf16_down(low)
    step = _round_bf16_up((high - offset.float()) / top)
    safe_step = step.float().clamp_min(torch.finfo(torch.float32).tiny)
    codes = ((padded - offset.float()[:, None]) / safe_step[:, None]).round().clamp(0, top)
    codes = codes.flatten()[: flat.numel()].view(scales.shape).to(torch.uint8)
    if signed:
        codes = torch.where(scales < 0, codes | 0x80, codes)
    return DoubleQuantizedScales(codes, offset, step, signed)


def _round_bf16_down(positive: Tensor) -> Tensor:
    """Returns bf16 values not above `positive` (truncation drops mantissa bits of a positive)."""
    return (positive.contiguous().view(torch.int32) & -0x10000).view(torch.float32).bfloat16()


def _round_bf16_up(positive: Tensor) -> Tensor:
    """Returns bf16 values not below `positive`, so that a block's largest scale is reachable."""
    bits = positive.contiguous().view(torch.int32)
    return ((bits + 0xFFFF) & -0x10000).view(torch.float32).bfloat16()
