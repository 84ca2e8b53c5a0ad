"""Per-token scores of one window: the only place that sees logits.

A window's logits are the largest thing an evaluation holds: 2048 x 151,936 in bf16 is 0.6 GB, in
float64 2.5 GB. They stay in the model's dtype and are widened a few rows at a time, so a window
costs its logits (twice, with a baseline) plus some tens of megabytes.

Everything is in float64: near-lossless models diverge by 1e-4 nats a token, a sum of differences
between log probabilities near 10, of which float32 keeps two digits. It costs a fifth more time
than float32 on a CPU (256 rows x 151,936: 0.46 s against 0.38 s), which waits for memory anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit_eval.statistics import Floats

# float64 elements in one chunk of rows: 16 MB a copy, about five copies live.
CHUNK_ELEMENTS = 1 << 21


@dataclass(frozen=True)
class Scores:
    """What is kept of a window, or of all of them: `[windows, seqlen - 1]`, one per prediction.

    Args:
        nll: float64, -log Q(next token), nats.
        base_nll: float64, -log P(next token) of the baseline, nats; None without one.
        divergence: float64, KL(P || Q) over the whole vocabulary, nats; None without one.
        flipped: float64 0 or 1, the most likely token differs; None without one.
    """

    nll: Floats
    base_nll: Floats | None = None
    divergence: Floats | None = None
    flipped: Floats | None = None

    @staticmethod
    def stack(windows: list[Scores]) -> Scores:
        """Returns the scores of `windows`, stacked along the first axis."""
        compared = windows[0].base_nll is not None

        def joined(column: str) -> Floats:
            return np.concatenate([getattr(window, column) for window in windows])

        return Scores(
            nll=joined("nll"),
            base_nll=joined("base_nll") if compared else None,
            divergence=joined("divergence") if compared else None,
            flipped=joined("flipped") if compared else None,
        )


def score_window(ids: Tensor, logits: Tensor, base_logits: Tensor | None = None) -> Scores:
    """Returns the scores of one window's `seqlen - 1` predictions, `[1, seqlen - 1]`.

    Args:
        ids: int64 `[seqlen]`.
        logits: float `[seqlen, vocabulary]` of the model, row t predicts token t + 1.
        base_logits: the same of the baseline.

    Raises:
        LowbitError: the logits hold NaN or +inf, or the two vocabularies differ.

    Reference:
        Kullback and Leibler (1951), eq. 2.1, with P the baseline.
    """
    if base_logits is not None and base_logits.shape != logits.shape:
        raise LowbitError(
            f"the baseline has a vocabulary of {base_logits.shape[-1]}, the model one of "
            f"{logits.shape[-1]}; compare models that share their tokens"
        )
    columns: list[list[Tensor]] = [[], [], [], []]
    for rows in _row_chunks(*logits.shape):
        targets = ids[1:][rows].to(logits.device)[:, None]
        log_q = _log_softmax(logits[:-1][rows])
        columns[0].append(-log_q.gather(1, targets)[:, 0])
        if base_logits is None:
            continue
        base_rows = base_logits[:-1][rows].to(logits.device)
        log_p = _log_softmax(base_rows)
        columns[1].append(-log_p.gather(1, targets)[:, 0])
        columns[2].append(_divergence(log_p, log_q))
        columns[3].append(log_p.argmax(1) != log_q.argmax(1))
    nll, *rest = (_column(parts) if parts else None for parts in columns)
    assert nll is not None
    if np.isnan(nll).any() or (rest[0] is not None and np.isnan(rest[0]).any()):
        raise LowbitError(
            "a model gave logits that are NaN or infinite, so its weights are broken or its dtype "
            "overflows; try --dtype float32"
        )
    return Scores(nll, *rest)


def _row_chunks(seqlen: int, vocabulary: int) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // vocabulary)
    for start in range(0, seqlen - 1, step):
        yield slice(start, min(start + step, seqlen - 1))


def _log_softmax(rows: Tensor) -> Tensor:
    # MPS has no float64.
    wide = torch.float32 if rows.device.type == "mps" else torch.float64
    return rows.to(wide).log_softmax(-1)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Returns KL(P || Q) of each row; a token that P rules out (log P = -inf) adds nothing."""
    terms = log_p.exp() * (log_p - log_q)
    return terms.masked_fill_(torch.isneginf(log_p), 0.0).sum(-1)


def _column(parts: list[Tensor]) -> Floats:
    column: Floats = torch.cat(parts).double().cpu().numpy()[None]
    return column
