"""The weights of many experts as one weight in fragment order."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lowbit_kernels.gpu.weight import ROW_PADDING, FragmentWeight, concatenate

# Up to so many routed rows, K may be split: each tile and each 64 rows of an expert count arrivals.
SPLIT_ROWS = 64


@dataclass(frozen=True)
class StackedWeight:
    """The weights of E experts.

    Args:
        weight: all experts' padded rows, one after the other: `weight.padded_rows` / E each. Its
            counters are at least as many as an expert has rows, see `stack`.
        experts: E.
        out_features: rows that count in each expert, N.

    Raises:
        ValueError: if the rows cannot be E times N padded ones, for double-quantized scales, and
            for too few counters.
    """

    weight: FragmentWeight
    experts: int
    out_features: int

    def __post_init__(self) -> None:
        stored, counters = self.weight.padded_rows, self.weight.counters.numel()
        if self.experts < 1 or stored != self.experts * self.rows:
            raise ValueError(
                f"the weight has {stored} stored rows; {self.experts} experts of "
                f"{self.out_features} output features, padded to {self.rows}, need "
                f"{self.experts * self.rows}"
            )
        if self.weight.scale.dtype == torch.uint8:
            raise ValueError("scales of experts are double-quantized; decode them first")
        if counters < self.counters_needed:
            raise ValueError(
                f"the weight has {counters} counters; experts of {self.rows} stored rows need "
                f"{self.counters_needed}: make the stack with `stack`"
            )

    @property
    def counters_needed(self) -> int:
        """Counters for SPLIT_ROWS tiles of one row."""
        return SPLIT_ROWS * self.rows // ROW_PADDING

    @property
    def rows(self) -> int:
        """Stored rows of one expert: N padded."""
        return -(-self.out_features // ROW_PADDING) * ROW_PADDING

    @property
    def in_features(self) -> int:
        """Columns that count, K."""
        return self.weight.in_features


def stack(weights: Sequence[FragmentWeight]) -> StackedWeight:
    """Returns one weight per expert as a stack; double-quantized scales are decoded.

    Raises:
        ValueError: for no weights, and for weights of different format, width or number of rows.
    """
    if not weights:
        raise ValueError("a stack needs the weight of one expert at least, got none")
    sizes = sorted({weight.out_features for weight in weights})
    if len(sizes) > 1:
        raise ValueError(f"experts have {sizes} output features; all of a stack need the same")
    whole = concatenate([weight.with_decoded_scales() for weight in weights])
    rows = -(-sizes[0] // ROW_PADDING) * ROW_PADDING
    missing = max(0, SPLIT_ROWS * rows // ROW_PADDING - whole.counters.numel())
    counters = torch.cat([whole.counters, whole.counters.new_zeros(missing)])
    return StackedWeight(dataclasses.replace(whole, counters=counters), len(weights), sizes[0])
