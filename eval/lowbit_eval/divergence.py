"""How far a quantized model's predictions are from those of its full-precision original.

Perplexity asks only for the probability of one token and lets gains hide losses; the divergence
KL(P_base || P_quantized) compares whole distributions and is zero only where they agree. It ranks
quantized models with far fewer tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lowbit_eval.scores import Scores
from lowbit_eval.statistics import Estimate, Floats, clustered_mean


@dataclass(frozen=True)
class Divergence:
    """Token-level distance to the baseline, nats per token.

    Args:
        mean: mean KL(P || Q) with its standard error over windows.
        median: of the tokens' KL.
        percentile_99: of the tokens' KL.
        percentile_999: the 99.9th percentile; its maximum for fewer than 1000 tokens or so.
        maximum: the worst token.
        flips: share of tokens whose most likely successor changed, 0 to 1.
        log_ratio: mean log P(token) - log Q(token) of the text's own tokens. Where the text was
            sampled from the baseline this is an unbiased estimate of the sequences' KL per token.
    """

    mean: Estimate
    median: float
    percentile_99: float
    percentile_999: float
    maximum: float
    flips: Estimate
    log_ratio: Estimate


def divergence(scores: Scores) -> Divergence:
    """Returns the divergence of `scores`, which must come from a run against a baseline."""
    if scores.divergence is None or scores.flipped is None or scores.base_nll is None:
        raise ValueError("divergence needs scores against a baseline")
    per_token = scores.divergence
    median, high, higher = np.quantile(per_token, [0.5, 0.99, 0.999], method="higher")
    return Divergence(
        mean=_mean(per_token),
        median=float(median),
        percentile_99=float(high),
        percentile_999=float(higher),
        maximum=float(per_token.max()),
        flips=flip_rate(scores.flipped.sum(axis=1), _lengths(per_token)),
        log_ratio=_mean(scores.nll - scores.base_nll),
    )


def flip_rate(flips: Floats, counts: Floats) -> Estimate:
    """Returns the share of flipped tokens with the larger of two standard errors.

    The error over windows is right but coarse with few of them; the binomial one ignores that
    tokens of a window go together, so it is a floor.

    Args:
        flips: float64 `[windows]`, flipped tokens in each.
        counts: float64 `[windows]`, tokens in each.
    """
    share = clustered_mean(flips, counts)
    binomial = float(np.sqrt(share.mean * (1 - share.mean) / counts.sum()))
    return Estimate(share.mean, max(binomial, share.standard_error or 0.0))


def _mean(values: Floats) -> Estimate:
    return clustered_mean(values.sum(axis=1), _lengths(values))


def _lengths(values: Floats) -> Floats:
    return np.full(len(values), float(values.shape[1]))
