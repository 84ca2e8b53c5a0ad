"""Input mismatch: the corrected weight is a regression, and GPTQ aims at it."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from test_rtn import weight_of

from lowbit.algorithms import GPTQ, Statistics
from lowbit.algorithms.ldlq import factorise
from lowbit.algorithms.mismatch import corrected_weight
from lowbit.errors import LowbitError
from lowbit.scheme import Scheme

COLUMNS, TOKENS = 96, 800


def inputs(drift: float = 0.3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (x_ref, x), float64 `[TOKENS, COLUMNS]`: x has lost some and mixed some."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=torch.float64) / COLUMNS**0.5
    x_ref = torch.randn(TOKENS, COLUMNS, generator=generator, dtype=torch.float64) @ mix
    noise = torch.randn(TOKENS, COLUMNS, generator=generator, dtype=torch.float64)
    return x_ref, x_ref * (1 - drift / 2) + drift * (x_ref @ mix.T + 0.3 * noise)


def statistics_between(x_ref: torch.Tensor, x: torch.Tensor) -> Statistics:
    """Returns the statistics of x, with the cross moment."""
    hessian, cross = (x.T @ x / len(x)).float(), (x_ref.T @ x / len(x)).float()
    return Statistics(hessian, len(x), cross=cross)


def drifted_loss(
    weight: torch.Tensor, values: torch.Tensor, pair: tuple[torch.Tensor, ...]
) -> float:
    """Returns mean |W x_ref - Q x|^2 per output, float64."""
    x_ref, x = pair
    difference = x_ref @ weight.double().T - x @ values.double().T
    return float(difference.square().mean())


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("damp_percent", [0.01, 0.3])
def test_corrected_weight_is_the_damped_regression(act_order: bool, damp_percent: float) -> None:
    weight, (x_ref, x) = weight_of(7, COLUMNS), inputs()
    statistics = statistics_between(x_ref, x)
    factor = factorise(statistics.hessian, damp_percent, act_order)
    assert factor is not None
    expected = oracles.mismatched_weight(
        weight.double().numpy(), x_ref.numpy(), x.numpy(), factor.damp
    )
    whole = corrected_weight(weight, statistics, factor, 1.0)
    assert np.abs(expected - weight.double().numpy()).max() > 0.005
    assert np.abs(whole.double().numpy() - expected).max() < 1e-5
    half = corrected_weight(weight, statistics, factor, 0.5)
    assert torch.allclose(half, (whole + weight) / 2, atol=1e-6)


def test_equal_inputs_change_nothing() -> None:
    weight, (x_ref, _) = weight_of(16, COLUMNS), inputs()
    scheme, statistics = Scheme.parse("W3A16_G32"), statistics_between(x_ref, x_ref)
    result = GPTQ().quantize(weight, scheme, statistics)
    plain = GPTQ().quantize(weight, scheme, Statistics(statistics.hessian, TOKENS))
    assert torch.equal(result.codes, plain.codes)
    assert result.report["mismatch_correction"] == 0


@pytest.mark.parametrize("name", ["W4A16_G32", "W3A16_ASYM_G32", "W2A16_G32", "NF4_DQ"])
def test_outputs_come_closer_to_the_full_precision_model(name: str) -> None:
    weight, pair = weight_of(16, COLUMNS), inputs()
    unseen = inputs(seed=0)[0][TOKENS // 2 :], inputs(seed=0)[1][TOKENS // 2 :]
    statistics = statistics_between(pair[0][: TOKENS // 2], pair[1][: TOKENS // 2])
    losses = []
    for share in (0.0, 0.5, 1.0):
        result = GPTQ(mismatch=share).quantize(weight, Scheme.parse(name), statistics)
        losses.append(drifted_loss(weight, result.grid.dequantize(result.codes), unseen))
    assert losses[2] < losses[1] < 0.8 * losses[0]


def test_features_dead_here_but_not_there_are_made_up_for() -> None:
    weight, (x_ref, x) = weight_of(8, COLUMNS), inputs()
    x[:, 5] = 0
    statistics = statistics_between(x_ref, x)
    factor = factorise(statistics.hessian, 0.01, act_order=True)
    assert factor is not None
    corrected = corrected_weight(weight, statistics, factor, 1.0)
    assert corrected[:, 5].abs().max() == 0
    expected = oracles.mismatched_weight(
        weight.double().numpy(), x_ref.numpy(), x.numpy(), factor.damp
    )
    live = torch.arange(COLUMNS) != 5
    assert np.abs(corrected[:, live].double().numpy() - expected[:, live]).max() < 1e-5


def test_wrong_cross_moments_are_refused() -> None:
    weight, (x_ref, x) = weight_of(4, COLUMNS), inputs()
    for wrong in (torch.ones(3, 3), torch.full((COLUMNS, COLUMNS), float("nan"))):
        statistics = statistics_between(x_ref, x)
        statistics.cross = wrong
        with pytest.raises(LowbitError, match=r"statistics.cross is \["):
            GPTQ().quantize(weight, Scheme.parse("W4A16_G32"), statistics)
    with pytest.raises(LowbitError, match=r"mismatch 2\.0 is out of range"):
        GPTQ(mismatch=2.0)
