"""Perplexity by the protocol of the GPTQ paper (P2048, here for any window length).

The text is tokenised once and cut into windows that do not overlap (`lowbit.calibration.tokens`).
Each window is one forward pass and gives `seqlen - 1` predictions; perplexity is
exp(mean nll over all predictions). The intervals draw windows, not tokens; the ratio to a baseline
draws the same windows for both, which cancels how hard each window is, and is far tighter than two
separate intervals.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lowbit_eval.statistics import Estimate, Floats, Interval, bootstrap_interval, clustered_mean


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a set of windows.

    Args:
        perplexity: exp(nll.mean); infinite where that overflows.
        interval: 95% bootstrap interval over windows; None for one window.
        nll: mean negative log-likelihood with its standard error, nats per token.
    """

    perplexity: float
    interval: Interval | None
    nll: Estimate


@dataclass(frozen=True)
class PerplexityRatio:
    """Perplexity divided by the baseline's, on the same windows; 1.01 is one percent worse."""

    ratio: float
    interval: Interval | None


def perplexity(nll: Floats, seed: int = 0) -> Perplexity:
    """Returns the perplexity of float64 `nll` `[windows, seqlen - 1]`, nats."""
    window_means = nll.mean(axis=1)
    estimate = clustered_mean(nll.sum(axis=1), np.full(len(nll), float(nll.shape[1])))
    return Perplexity(
        _exp(estimate.mean), _exp_interval(bootstrap_interval(window_means, seed)), estimate
    )


def perplexity_ratio(nll: Floats, base_nll: Floats, seed: int = 0) -> PerplexityRatio:
    """Returns the ratio to the baseline with its paired bootstrap interval.

    Args:
        nll: float64 `[windows, seqlen - 1]`, nats, of the model.
        base_nll: the same of the baseline, on the same tokens.
        seed: of the bootstrap.
    """
    differences = (nll - base_nll).mean(axis=1)
    return PerplexityRatio(
        _exp(float(differences.mean())), _exp_interval(bootstrap_interval(differences, seed))
    )


def _exp(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(value))


def _exp_interval(interval: Interval | None) -> Interval | None:
    return None if interval is None else Interval(_exp(interval.low), _exp(interval.high))
