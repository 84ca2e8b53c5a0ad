"""Perplexity against its definition, on probabilities chosen by hand and on a tiny llama."""

from __future__ import annotations

import math
from types import SimpleNamespace

import eval_oracles as oracle
import numpy as np
import pytest
import torch
from eval_models import VOCABULARY, logits_of, tiny_llama
from lowbit_eval import evaluate
from lowbit_eval.perplexity import perplexity, perplexity_ratio
from lowbit_eval.statistics import bootstrap_interval, clustered_mean
from torch import Tensor, nn

from lowbit.calibration.tokens import TokenWindows
from lowbit.errors import LowbitError


def random_windows(count: int, seqlen: int, seed: int = 0) -> TokenWindows:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (count, seqlen), generator=generator)
    return TokenWindows.from_rows(ids, seqlen)


class Stated(nn.Module):
    """Gives the next token the probability 1/2, 1/4 or 1/8 that its position states."""

    def __init__(self, probabilities: list[float], vocabulary: int) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.probabilities, self.vocabulary = probabilities, vocabulary

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        assert use_cache is False
        rows = []
        following = [*input_ids[0, 1:].tolist(), 0]
        for probability, token in zip([*self.probabilities, 0.5], following, strict=True):
            row = torch.full((self.vocabulary,), (1 - probability) / (self.vocabulary - 1))
            row[token] = probability
            rows.append(row.log())
        return SimpleNamespace(logits=torch.stack(rows)[None])


def test_known_probabilities_give_their_geometric_mean() -> None:
    # Three predictions of a window of four: (1/2 * 1/4 * 1/8)^(-1/3) = 4, in every window.
    windows = TokenWindows.from_rows(torch.arange(20).reshape(5, 4) % 11, 4)
    result = evaluate(Stated([0.5, 0.25, 0.125], 11), windows)
    assert result.perplexity.perplexity == pytest.approx(4.0, rel=1e-6)
    assert result.perplexity.interval is not None
    assert result.perplexity.interval.low == pytest.approx(4.0, rel=1e-6)
    assert result.predictions == 15


@pytest.mark.parametrize(("count", "seqlen"), [(1, 2), (3, 17), (6, 64)])
def test_tiny_llama_matches_the_oracle(count: int, seqlen: int) -> None:
    model, windows = tiny_llama(), random_windows(count, seqlen)
    expected = [oracle.window_nll(ids.tolist(), logits_of(model, ids)) for ids in windows.ids]
    result = evaluate(model, windows)
    assert result.perplexity.perplexity == pytest.approx(oracle.perplexity(expected), rel=1e-9)
    if count > 1:
        means = [float(np.mean(nll)) for nll in expected]
        error = result.perplexity.nll.standard_error
        assert error == pytest.approx(oracle.standard_error(means), rel=1e-9)
    else:
        assert result.perplexity.interval is None
        assert result.perplexity.nll.standard_error is None


def test_result_is_deterministic_and_carries_the_token_digest() -> None:
    model, windows = tiny_llama(), random_windows(4, 16)
    first, second = (evaluate(model, windows).to_dict() for _ in range(2))
    for result in (first, second):
        del result["speed"]
    assert first == second
    assert first["token_digest"] == windows.digest


def test_paired_interval_is_far_tighter_than_the_unpaired_one() -> None:
    generator = np.random.default_rng(0)
    base = generator.normal(3.0, 0.5, size=(40, 1)) + np.zeros((40, 8))
    worse = base + 0.01 + generator.normal(0, 0.001, size=base.shape)
    ratio, alone = perplexity_ratio(worse, base), perplexity(base)
    assert ratio.ratio == pytest.approx(math.exp((worse - base).mean()))
    assert ratio.interval is not None
    assert alone.interval is not None
    assert ratio.interval.low < math.exp(0.01) < ratio.interval.high
    width = ratio.interval.high - ratio.interval.low
    assert width < 0.01 * (alone.interval.high - alone.interval.low) / alone.perplexity


def test_bootstrap_covers_the_normal_interval_and_repeats_with_its_seed() -> None:
    values = np.random.default_rng(1).normal(size=400)
    interval = bootstrap_interval(values, seed=5)
    assert interval is not None
    half = 1.96 * oracle.standard_error(values.tolist())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert interval == bootstrap_interval(values, seed=5) != bootstrap_interval(values, seed=6)


def test_clustered_error_sees_that_tokens_of_a_window_agree() -> None:
    # Ten windows of 100 equal tokens hold ten observations, not a thousand.
    means = np.arange(10.0)
    estimate = clustered_mean(means * 100, np.full(10, 100.0))
    assert estimate.mean == 4.5
    assert estimate.standard_error == pytest.approx(oracle.standard_error(means.tolist()))


def test_empty_windows_do_not_count() -> None:
    with_empty = clustered_mean(np.array([3.0, 0.0, 5.0]), np.array([1.0, 0.0, 2.0]))
    assert with_empty == clustered_mean(np.array([3.0, 5.0]), np.array([1.0, 2.0]))


def test_out_of_memory_is_a_sentence_about_the_window() -> None:
    class Full(Stated):
        def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(LowbitError, match="too little memory for a window of 8 tokens"):
        evaluate(Full([0.5], 11), random_windows(1, 8))


def test_overflowing_perplexity_is_null_in_json_and_keeps_its_nll() -> None:
    huge = perplexity(np.full((3, 4), 900.0))
    assert math.isinf(huge.perplexity)
    model = Stated([0.0], 11)
    result = evaluate(model, TokenWindows.from_rows(torch.tensor([[1, 2], [3, 4]]), 2)).to_dict()
    assert result["perplexity"]["perplexity"] is None
