"""Evaluation from its definitions: plain float64 NumPy, loops over tokens, no shipped code."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def log_probabilities(logits: Floats) -> Floats:
    """Returns log softmax of one row `[vocabulary]`."""
    shifted = logits - logits.max()
    return shifted - math.log(np.exp(shifted).sum())


def window_nll(ids: list[int], logits: Floats) -> list[float]:
    """Returns -log p(next token) of each position but the last."""
    return [
        -float(log_probabilities(logits[position])[ids[position + 1]])
        for position in range(len(ids) - 1)
    ]


def kl_divergence(base_logits: Floats, logits: Floats) -> float:
    """Returns sum p (log p - log q) of one row, leaving out tokens of no probability."""
    log_p, log_q = log_probabilities(base_logits), log_probabilities(logits)
    return sum(
        math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True) if not math.isinf(p)
    )


def perplexity(window_nlls: list[list[float]]) -> float:
    """Returns exp of the mean over windows of their mean nll."""
    means = [sum(nll) / len(nll) for nll in window_nlls]
    return math.exp(sum(means) / len(means))


def standard_error(window_means: list[float]) -> float:
    """Returns the sample standard deviation of the means by the root of their number."""
    count = len(window_means)
    center = sum(window_means) / count
    return math.sqrt(sum((mean - center) ** 2 for mean in window_means) / (count - 1) / count)
