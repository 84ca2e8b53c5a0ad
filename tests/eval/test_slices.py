"""Slices: which prediction belongs to which document, and labels that do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from eval_models import byte_tokenizer, tiny_llama
from lowbit_eval import Slicing, evaluate
from lowbit_eval.scores import Scores
from lowbit_eval.slices import read_labels, slice_scores

from lowbit.calibration.text import Document
from lowbit.calibration.tokens import TokenWindows
from lowbit.errors import LowbitError


def two_windows() -> TokenWindows:
    """Documents 0 and 1 share the first window, 1 and 2 the second; 3 has no token."""
    return TokenWindows(
        torch.zeros(2, 4, dtype=torch.int64),
        ("a", "b", "c", "unseen"),
        torch.tensor([[0, 0, 0, 1], [1, 1, 2, 2]], dtype=torch.int32),
        8,
    )


SCORES = Scores(
    nll=np.array([[1.0, 2.0, 3.0], [5.0, 8.0, 9.0]]),
    base_nll=np.array([[1.0, 1.0, 3.0], [4.0, 8.0, 8.0]]),
    divergence=np.array([[0.1, 0.2, 0.3], [0.5, 0.8, np.inf]]),
    flipped=np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]),
)


def test_a_prediction_belongs_to_the_document_of_the_predicted_token() -> None:
    found = {found.label: found for found in slice_scores(SCORES, two_windows())}
    assert set(found) == {"a", "b", "c"}
    assert [found[label].tokens for label in "abc"] == [2, 2, 2]
    assert found["a"].perplexity == pytest.approx(np.exp(1.5))
    assert found["b"].perplexity == pytest.approx(np.exp((3 + 5) / 2))
    assert found["b"].perplexity_ratio == pytest.approx(np.exp(0.5))
    divergence, flips = found["b"].divergence, found["b"].flips
    assert divergence is not None
    assert flips is not None
    assert (divergence.mean, flips.mean) == (pytest.approx(0.4), 0.5)


def test_infinite_divergence_stays_in_its_own_slice_and_sorts_first() -> None:
    slices = slice_scores(SCORES, two_windows())
    assert slices[0].label == "c"
    assert [found.divergence is not None and found.divergence.mean for found in slices[1:]] == [
        pytest.approx(0.4),
        pytest.approx(0.15),
    ]


def test_labels_merge_documents() -> None:
    found = slice_scores(SCORES, two_windows(), ["x", "y", "x", "x"])
    assert {part.label: part.tokens for part in found} == {"x": 4, "y": 2}


def test_slices_of_real_text_add_up_to_the_whole() -> None:
    documents = [
        Document("one", "some words"),
        Document("two", "é and more"),
        Document("three", "z" * 30),
    ]
    windows = TokenWindows.from_documents(documents, byte_tokenizer(), 16)
    result = evaluate(tiny_llama(1), windows, tiny_llama(2), Slicing())
    assert sum(part.tokens for part in result.slices) == result.predictions
    weighted = sum(np.log(part.perplexity) * part.tokens for part in result.slices)
    assert weighted / result.predictions == pytest.approx(result.perplexity.nll.mean)


def test_slow_tokenizer_is_refused() -> None:
    windows = TokenWindows(torch.zeros(2, 4, dtype=torch.int64), ("a", "b"), None, 8)
    with pytest.raises(LowbitError, match="fast tokenizer"):
        slice_scores(SCORES, windows)


@pytest.mark.parametrize(
    ("content", "needle"),
    [
        (b"a\nb\n", "has 2 lines, but the text has 3 documents"),
        (b"", "has 0 lines"),
        (b"a\n\nb\n", "line 2 is blank"),
        (b"a\n\xff\nb\n", "not UTF-8"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, content: bytes, needle: str) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes(content)
    with pytest.raises(LowbitError, match=needle):
        read_labels(str(path), 3)


def test_labels_are_stripped_lines(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes(b"code\r\n prose \ncode")
    assert read_labels(str(path), 3) == ["code", "prose", "code"]
    with pytest.raises(LowbitError, match="no such file"):
        read_labels(str(tmp_path / "missing"), 3)
