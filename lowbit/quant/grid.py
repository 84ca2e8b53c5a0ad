"""The values a quantized matrix can take, and the maps between weights and integer codes.

A `Grid` is the scales and zero points of one matrix, already rounded to what is stored. Rounding
comes first and codes are chosen against the rounded scales: codes chosen against scales that are
rounded afterwards decode to something nobody optimised.

Shapes: `weight_NK` is `[out_features, in_features]`, `scales_NG` is `[out_features, groups]`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.quant.double_quant import DoubleQuantizedScales, double_quantize
from lowbit.scheme import Scheme


@functools.lru_cache(maxsize=16)
def sorted_codebook(
    scheme: Scheme,
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[int, ...]]:
    """Returns a codebook's distinct levels in ascending order, the boundaries between neighbours
    as float32 has them, and the code of each level.
    """
    assert scheme.levels is not None
    code_of: dict[float, int] = {}
    for index, level in enumerate(scheme.levels):
        code_of.setdefault(level, index + scheme.code_min)  # -0.0 == 0.0: the first index is kept
    ordered = torch.tensor(sorted(code_of))
    boundaries = (ordered[1:] + ordered[:-1]) / 2
    return (
        tuple(ordered.tolist()),
        tuple(boundaries.tolist()),
        tuple(code_of[level] for level in sorted(code_of)),
    )


def nearest_code(weight: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """Returns the code of the representable value nearest to `weight`.

    Args:
        weight: float32, any shape.
        scale: float32, broadcastable to `weight`, none zero.
        zero: float32 integer values, broadcastable, or None for a symmetric scheme.
        scheme: the scheme.

    Returns:
        float32 integer values in `scheme.code_min ... scheme.code_max`, shaped like `weight`.
        Ties go to the even code (integers) or to the smaller level (codebooks).
    """
    scaled = weight / scale
    if scheme.codebook is not None:
        _, boundaries, codes = sorted_codebook(scheme)
        index = torch.bucketize(scaled, torch.tensor(boundaries, device=weight.device))
        return torch.tensor(codes, dtype=torch.float32, device=weight.device)[index]
    codes_float = scaled.round_() if zero is None else scaled.add_(zero).round_()
    return codes_float.clamp_(scheme.code_min, scheme.code_max)


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """Returns the float32 values of `codes`: `(code - zero) * scale`, or table entry * scale."""
    if scheme.levels is not None:
        table = torch.tensor(scheme.levels, dtype=torch.float32, device=codes.device)
        return table[codes.long() - scheme.code_min] * scale
    levels = codes.float() if zero is None else codes.float() - zero
    return levels * scale


@dataclass(frozen=True)
class Grid:
    """The representable values of one matrix under a scheme. Build it with `Grid.storable`.

    Args:
        scheme: the scheme.
        in_features: columns of the matrix.
        scales: float32 `[out_features, groups]`, exact in the scheme's scale dtype, none zero.
        zeros: float32 integer values `[out_features, groups]`, None for a symmetric scheme.
        double_quantized: the stored form of `scales` where the scheme double-quantizes them.
    """

    scheme: Scheme
    in_features: int
    scales: Tensor
    zeros: Tensor | None
    double_quantized: DoubleQuantizedScales | None = None

    @staticmethod
    def storable(scheme: Scheme, in_features: int, scales: Tensor, zeros: Tensor | None) -> Grid:
        """Returns the grid with `scales` rounded to what the scheme stores.

        Magnitudes are clamped from below to the smallest positive value of the scale dtype (from
        above to the largest), so that no stored scale is zero or infinite; a sign is kept.

        Args:
            scheme: the scheme.
            in_features: columns of the matrix.
            scales: float32 `[out_features, groups]`.
            zeros: integer values `[out_features, groups]` in the range of a code, or None.
        """
        dtype = scheme.torch_scale_dtype
        # fp16 keeps its subnormals (they decode exactly everywhere); for bf16 and fp32 the
        # smallest normal is far below any weight.
        smallest = 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny
        sign = torch.where(scales < 0, -1.0, 1.0)
        magnitude = scales.abs().float().clamp(smallest, torch.finfo(dtype).max)
        rounded = sign * magnitude.to(dtype).float()
        double_quantized = None
        if scheme.double_quant:
            double_quantized = double_quantize(rounded, scheme.signed_scales)
            rounded = double_quantized.decode(dtype)
        return Grid(scheme, in_features, rounded, zeros, double_quantized)

    def per_column(self, values: Tensor) -> Tensor:
        """Returns `values` `[N, groups]` repeated over each group's columns, `[N, K]`."""
        width = self.scheme.group_width(self.in_features)
        return values.repeat_interleave(width, dim=1)[:, : self.in_features]

    def group_of_column(self, device: torch.device) -> Tensor:
        """Returns the group index of every column, int64 `[in_features]`."""
        width = self.scheme.group_width(self.in_features)
        return torch.arange(self.in_features, device=device) // width

    def rows(self, rows: Tensor) -> Grid:
        """Returns the grid of the rows `rows` (int64 `[n]`) alone, without its stored form."""
        zeros = None if self.zeros is None else self.zeros[rows]
        return Grid(self.scheme, self.in_features, self.scales[rows], zeros)

    def round(self, weight: Tensor) -> Tensor:
        """Returns int8 codes `[N, K]` of the values nearest to `weight` `[N, K]`."""
        zeros = None if self.zeros is None else self.per_column(self.zeros)
        scales = self.per_column(self.scales)
        return nearest_code(weight.float(), scales, zeros, self.scheme).to(torch.int8)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Returns the float32 weights `[N, K]` that `codes` `[N, K]` stand for."""
        zeros = None if self.zeros is None else self.per_column(self.zeros)
        return decode(codes, self.per_column(self.scales), zeros, self.scheme)
