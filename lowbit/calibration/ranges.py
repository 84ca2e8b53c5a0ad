"""The magnitudes of a layer's inputs, and the one scale that rounds all of them to int8 best.

Kept are the largest magnitude and a histogram over [0, 2^e). A larger input widens the range by a
power of two, which merges neighbouring bins, so the histogram is that of all inputs in the final
range: the scale depends neither on the order of the batches nor on how inputs were cut into them.

The scale minimises the squared rounding error over the histogram: a few outliers far from
everything else cost less when they saturate than all other values lose in resolution. Measured
against the largest magnitude and against percentiles: `docs/design/activations.md`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowbit.quant.activations import MAX_CODE

# Half of them at least are below the largest magnitude: 258 to each of 127 steps, and still 4 where
# values saturate at a 64th of it.
BINS = 1 << 16
# Clips that are tried: 16 to each halving of the largest magnitude, down to a 256th of it.
CLIPS = tuple(2 ** (-i / 16) for i in range(129))
# Below, neither magnitudes nor their scale would be normal numbers.
_SMALLEST_EXPONENT = -100


class InputRange:
    """Accumulates the magnitudes of input values.

    Attributes:
        largest: the largest magnitude so far.
    """

    def __init__(self) -> None:
        self.largest = 0.0
        self._exponent = _SMALLEST_EXPONENT
        self._counts = torch.zeros(BINS, dtype=torch.int64)

    def add(self, x: Tensor) -> None:
        """Adds all values of `x`, any float dtype and shape.

        Left out is what is not finite, and zeros, which every scale rounds to zero.
        """
        values = x.detach().float().flatten().abs()
        values = values[(values > 0) & values.isfinite()]
        if values.numel() == 0:
            return
        largest = float(values.max())
        self.largest = max(self.largest, largest)
        self._widen(math.frexp(largest)[1])
        # By a power of two, hence exact: a value has one bin, whatever came before it.
        bins = (values * (BINS * 2.0**-self._exponent)).to(torch.int32)
        self._counts += torch.bincount(bins, minlength=BINS).cpu()

    def _widen(self, exponent: int) -> None:
        """Makes the range [0, 2^exponent) if it is smaller."""
        merged = 1 << min(max(exponent - self._exponent, 0), BINS.bit_length() - 1)
        if merged > 1:
            kept = self._counts.view(-1, merged).sum(1)
            self._counts = torch.cat([kept, kept.new_zeros(BINS - len(kept))])
            self._exponent = exponent

    def scale(self) -> Tensor:
        """Returns the scale of least squared error, float32 `[1]`, positive.

        A layer whose inputs are all zero gets 1: it rounds zeros to zeros like any other.
        """
        if self.largest == 0:
            return torch.ones(1)
        used = self._counts.nonzero().squeeze(1)
        counts = self._counts[used].double()
        values = (used.double() + 0.5) * (2.0**self._exponent / BINS)

        def error(scale: float) -> float:
            codes = (values / scale).round_().clamp_(max=MAX_CODE)
            return float((values - codes * scale).square_() @ counts)

        # The first of equal ones, which is the widest.
        best = min((self.largest / MAX_CODE * clip for clip in CLIPS), key=error)
        return torch.tensor([max(best, torch.finfo(torch.float32).tiny)])
