"""Divergence against its definition; the hazards are cancellation, chunks and broken logits."""

from __future__ import annotations

import math

import eval_oracles as oracle
import lowbit_eval.scores as scores_module
import numpy as np
import pytest
import torch
from eval_models import VOCABULARY, logits_of, tiny_llama
from lowbit_eval import evaluate
from lowbit_eval.divergence import divergence, flip_rate
from lowbit_eval.scores import Scores, score_window

from lowbit.calibration.tokens import TokenWindows
from lowbit.errors import LowbitError


def windows_of(count: int, seqlen: int) -> TokenWindows:
    generator = torch.Generator().manual_seed(3)
    return TokenWindows.from_rows(
        torch.randint(VOCABULARY, (count, seqlen), generator=generator), seqlen
    )


def test_a_model_has_no_distance_to_itself() -> None:
    model = tiny_llama()
    result = evaluate(model, windows_of(3, 20), against=model)
    assert result.divergence is not None
    assert result.divergence.mean.mean == 0.0
    assert result.divergence.maximum == 0.0
    assert result.divergence.flips.mean == 0.0
    assert result.divergence.log_ratio.mean == 0.0
    assert result.perplexity_ratio is not None
    assert result.perplexity_ratio.ratio == 1.0


def test_tiny_llamas_match_the_oracle() -> None:
    model, base, windows = tiny_llama(1), tiny_llama(2), windows_of(4, 24)
    per_token, ratios, flips = [], [], []
    for ids in windows.ids:
        q, p = logits_of(model, ids), logits_of(base, ids)
        per_token.append([oracle.kl_divergence(p[t], q[t]) for t in range(23)])
        ratios.append(
            np.subtract(
                oracle.window_nll(ids.tolist(), q), oracle.window_nll(ids.tolist(), p)
            ).mean()
        )
        flips.append([p[t].argmax() != q[t].argmax() for t in range(23)])
    found = evaluate(model, windows, against=base).divergence
    assert found is not None
    means = [float(np.mean(window)) for window in per_token]
    assert found.mean.mean == pytest.approx(np.mean(means), rel=1e-9)
    assert found.mean.standard_error == pytest.approx(oracle.standard_error(means), rel=1e-9)
    ordered = sorted(np.ravel(per_token))
    assert found.median == pytest.approx(ordered[math.ceil(0.5 * 91)], rel=1e-9)
    assert found.percentile_99 == pytest.approx(ordered[math.ceil(0.99 * 91)], rel=1e-9)
    assert found.percentile_999 == found.maximum == pytest.approx(ordered[-1], rel=1e-9)
    assert found.log_ratio.mean == pytest.approx(np.mean(ratios), rel=1e-9)
    assert found.flips.mean == np.mean(flips)


def test_divergence_of_a_hair_is_not_lost_to_rounding() -> None:
    # KL of a shift d of one logit is p (1 - p) d^2 / 2 to second order: 1e-12 here, which a float32
    # sum over 4096 tokens would drown in 1e-7.
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2, 4096, generator=generator, dtype=torch.float64)
    model = base.clone()
    model[0, 7] += 1e-4
    p = math.exp(oracle.log_probabilities(base[0].numpy())[7])
    found = score_window(torch.tensor([0, 1]), model, base).divergence
    assert found is not None
    assert found[0, 0] == pytest.approx(p * (1 - p) * 1e-8 / 2, rel=1e-3)


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_chunks_of_rows_do_not_change_a_bit(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    q, p = torch.randn(2, 11, 50, generator=generator).bfloat16()
    ids = torch.arange(11)
    whole = score_window(ids, q, p)
    monkeypatch.setattr(scores_module, "CHUNK_ELEMENTS", rows * 50)
    chunked = score_window(ids, q, p)
    for name in ("nll", "base_nll", "divergence", "flipped"):
        np.testing.assert_array_equal(getattr(chunked, name), getattr(whole, name))
        assert getattr(whole, name).shape == (1, 10)


def test_tokens_that_the_baseline_rules_out_add_nothing() -> None:
    base = torch.tensor([[0.0, 0.0, -math.inf], [0.0, 0.0, 0.0]])
    same = score_window(torch.tensor([0, 1]), base, base)
    assert same.divergence is not None
    assert same.divergence[0, 0] == 0.0
    spread = score_window(torch.tensor([0, 1]), torch.zeros(2, 3), base)
    assert spread.divergence is not None
    assert spread.divergence[0, 0] == pytest.approx(math.log(3 / 2))


def test_nan_logits_are_refused() -> None:
    logits = torch.zeros(3, 5)
    logits[1, 2] = math.nan
    with pytest.raises(LowbitError, match="NaN"):
        score_window(torch.tensor([0, 1, 2]), logits)
    with pytest.raises(LowbitError, match="NaN"):
        score_window(torch.tensor([0, 1, 2]), torch.zeros(3, 5), logits)


def test_vocabularies_that_differ_are_refused() -> None:
    with pytest.raises(LowbitError, match="a vocabulary of 6, the model one of 5"):
        score_window(torch.tensor([0, 1]), torch.zeros(2, 5), torch.zeros(2, 6))


def test_flip_error_is_never_below_the_binomial_one() -> None:
    even = flip_rate(np.full(10, 5.0), np.full(10, 50.0))
    assert even.mean == 0.1
    assert even.standard_error == pytest.approx(math.sqrt(0.1 * 0.9 / 500))
    uneven = flip_rate(np.array([0.0, 50.0] + [0.0] * 8), np.full(10, 50.0))
    assert uneven.standard_error == pytest.approx(0.1)


def test_log_ratio_of_sampled_text_estimates_the_divergence() -> None:
    # Two coins: tokens drawn from P have mean log P/Q equal to KL(P || Q).
    p, q = np.array([0.7, 0.3]), np.array([0.5, 0.5])
    draws = np.random.default_rng(0).choice(2, p=p, size=(50, 400))
    exact = float((p * np.log(p / q)).sum())
    found = divergence(
        Scores(-np.log(q[draws]), -np.log(p[draws]), np.full(draws.shape, exact), draws * 0.0)
    )
    assert found.log_ratio.standard_error is not None
    assert abs(found.log_ratio.mean - exact) < 3 * found.log_ratio.standard_error
    assert found.mean.mean == pytest.approx(exact)
