"""Errors of a mean over tokens, when tokens of one window are not independent.

Tokens of a window share a text, so the spread of single tokens understates the error of their mean.
Everywhere here the *window* is the unit that is drawn at random: standard errors sum residuals
inside a window before squaring, and the bootstrap draws whole windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 10_000
# Draws are made in slabs of this many indices (32 MB), whatever the number of windows.
_SLAB_INDICES = 1 << 22


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error, in the unit of the values.

    The error is None where it is unknown: from a single window, or around an infinite mean.
    """

    mean: float
    standard_error: float | None


@dataclass(frozen=True)
class Interval:
    """A 95% interval."""

    low: float
    high: float


def clustered_mean(sums: Floats, counts: Floats) -> Estimate:
    """Returns the mean over tokens with the standard error of a ratio of window totals.

    With equally long windows this is the standard error of the mean of window means.

    Args:
        sums: float64 `[windows]`, the total of the values in each window.
        counts: float64 `[windows]`, how many values it has; windows of none are left out.

    Reference:
        Cochran, Sampling Techniques (1977), eq. 6.9, without the finite population correction.
    """
    used = counts > 0
    sums, counts = sums[used], counts[used]
    total = counts.sum()
    mean = float(sums.sum() / total)
    windows = len(counts)
    # An infinite mean (a token that the model rules out) has no spread.
    if windows < 2 or not np.isfinite(mean):
        return Estimate(mean, None)
    residuals = sums - mean * counts
    variance = windows / (windows - 1) * np.square(residuals).sum() / total**2
    return Estimate(mean, float(np.sqrt(variance)))


def bootstrap_interval(window_means: Floats, seed: int) -> Interval | None:
    """Returns the percentile bootstrap interval of the mean over windows, None for one window
    or where a mean is infinite.

    Args:
        window_means: float64 `[windows]`; of *differences* for a paired bootstrap.
        seed: of the draws.

    Reference:
        Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.
    """
    if len(window_means) < 2 or not np.isfinite(window_means).all():
        return None
    means = np.concatenate(list(_resampled_means(window_means, seed)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(low), float(high))


def _resampled_means(values: Floats, seed: int) -> Iterator[Floats]:
    generator = np.random.default_rng(seed)
    windows = len(values)
    slab = max(1, _SLAB_INDICES // windows)
    for start in range(0, RESAMPLES, slab):
        draws = generator.integers(windows, size=(min(slab, RESAMPLES - start), windows))
        yield values[draws].mean(axis=1)
