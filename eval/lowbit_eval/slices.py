"""The same scores by document, or by labels that a user gives to documents.

An average hides a domain that broke: a calibration set of English prose can leave code or another
language far worse off. A prediction belongs to the document of the token it predicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lowbit.calibration.text import decode_utf8
from lowbit.calibration.tokens import TokenWindows
from lowbit.errors import LowbitError
from lowbit_eval.divergence import flip_rate
from lowbit_eval.scores import Scores
from lowbit_eval.statistics import Estimate, Floats, clustered_mean


@dataclass(frozen=True)
class Slice:
    """The scores of one label.

    Args:
        label: the document's name, or the user's label.
        tokens: predictions in it.
        perplexity: exp of the mean nll.
        perplexity_ratio: to the baseline's, None without one.
        divergence: mean KL(P || Q), nats per token, None without a baseline.
        flips: share of changed most likely tokens, None without a baseline.
    """

    label: str
    tokens: int
    perplexity: float
    perplexity_ratio: float | None
    divergence: Estimate | None
    flips: Estimate | None


def read_labels(path: str, documents: int) -> list[str]:
    """Returns one label for each document, from the lines of a UTF-8 file.

    Raises:
        LowbitError: the file cannot be read, a line is blank, or their number differs.
    """
    if not Path(path).is_file():
        raise LowbitError(f"labels {path!r}: no such file")
    text = decode_utf8(Path(path)).removesuffix("\n")
    labels = [line.strip() for line in text.split("\n")] if text else []
    if len(labels) != documents:
        raise LowbitError(
            f"labels {path!r} has {len(labels)} lines, but the text has {documents} documents; "
            "give one label a line, one line a document"
        )
    if "" in labels:
        raise LowbitError(f"labels {path!r}: line {labels.index('') + 1} is blank; give it a label")
    return labels


def slice_scores(
    scores: Scores, windows: TokenWindows, labels: Sequence[str] | None = None
) -> tuple[Slice, ...]:
    """Returns one slice a label, the worst first: by divergence, else by perplexity.

    Args:
        scores: of all `windows`.
        windows: with `document_of_token`.
        labels: one for each of `windows.documents`; None takes the documents' names.

    Raises:
        LowbitError: the tokenizer cannot tell which document a token came from.
    """
    names = np.array(windows.documents if labels is None else labels)
    label_of_token = names[require_known_documents(windows)[:, 1:].numpy()]
    slices = [_slice(scores, str(name), label_of_token == name) for name in np.unique(names)]
    present = (found for found in slices if found is not None)
    return tuple(sorted(present, key=_damage, reverse=True))


def require_known_documents(windows: TokenWindows) -> Tensor:
    """Returns int32 `[windows, seqlen]`, the document of each token.

    Raises:
        LowbitError: the tokenizer cannot tell.
    """
    if windows.document_of_token is None:
        raise LowbitError(
            "slices need a fast tokenizer, which knows where in the text a token came from; give "
            "token ids instead, one document a row"
        )
    return windows.document_of_token


def _damage(found: Slice) -> float:
    return found.perplexity if found.divergence is None else found.divergence.mean


def _slice(scores: Scores, label: str, member: NDArray[np.bool_]) -> Slice | None:
    """Returns the scores where `member` `[windows, seqlen - 1]` is true; None for no tokens."""
    counts = member.sum(axis=1).astype(np.float64)
    if not counts.any():
        return None

    def mean(values: Floats | None) -> Estimate | None:
        # np.where, not a product: an infinite value of another slice must not become NaN here.
        return None if values is None else clustered_mean(_totals(values, member), counts)

    nll, base_nll = mean(scores.nll), mean(scores.base_nll)
    assert nll is not None
    with np.errstate(over="ignore"):
        return Slice(
            label=label,
            tokens=int(counts.sum()),
            perplexity=float(np.exp(nll.mean)),
            perplexity_ratio=float(np.exp(nll.mean - base_nll.mean)) if base_nll else None,
            divergence=mean(scores.divergence),
            flips=None
            if scores.flipped is None
            else flip_rate(_totals(scores.flipped, member), counts),
        )


def _totals(values: Floats, member: NDArray[np.bool_]) -> Floats:
    totals: Floats = np.where(member, values, 0.0).sum(axis=1)
    return totals
