"""GPTQ: against an oracle that eliminates H^-1 step by step, and the properties around it."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import oracles
import pytest
import torch
from schemes import every_scheme
from test_rtn import statistics_of, weight_of

from lowbit.algorithms import GPTQ, RTN, Quantized, Statistics
from lowbit.algorithms import gptq as gptq_module
from lowbit.algorithms import ldlq as ldlq_module
from lowbit.algorithms.ldlq import factorise, solve
from lowbit.algorithms.scales import fit_grid
from lowbit.errors import LowbitError
from lowbit.quant import Grid
from lowbit.scheme import Scheme

# A target this close to the middle between two values (in units of their distance) may round to
# either: fp32 feedback over some hundred columns is off by a few 1e-5 of a step.
TIE = 1e-3


def output_error(weight: torch.Tensor, result: Quantized, statistics: Statistics) -> float:
    """Returns tr(dW H dW^T) / N of a result in float64."""
    decoded = result.grid.dequantize(result.codes).double().numpy()
    return oracles.output_error(
        weight.double().numpy(), decoded, statistics.hessian.double().numpy()
    )


def oracle_order(hessian: torch.Tensor, act_order: bool) -> list[int]:
    """Returns the columns in the order of visiting."""
    columns = list(range(hessian.shape[0]))
    return sorted(columns, key=lambda i: -float(hessian[i, i])) if act_order else columns


def oracle_solution(
    weight: torch.Tensor, grid: Grid, hessian: torch.Tensor, damp_percent: float, act_order: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (quantized, targets) of the oracle on `grid`, its H damped as in the paper."""
    scheme, h = grid.scheme, hessian.double().numpy()
    damped = h + damp_percent * np.diag(h).mean() * np.eye(len(h))
    width = scheme.group_width(weight.shape[1])

    def quantize(targets: np.ndarray, column: int) -> np.ndarray:
        scales = grid.scales[:, column // width].double().numpy()
        zeros = None if grid.zeros is None else grid.zeros[:, column // width].double().numpy()
        zeros = np.zeros_like(scales) if zeros is None else zeros
        return oracles.nearest_values(targets, scales, zeros, scheme.bits, scheme.codebook)

    order = oracle_order(hessian, act_order)
    return oracles.gptq(weight.double().numpy(), damped, order, quantize)


def assert_same_up_to_ties(
    values: np.ndarray, expected: np.ndarray, targets: np.ndarray, order: list[int]
) -> int:
    """Asserts that every row agrees until a provable tie; returns how many rows met one.

    After a tie that went the other way a row's later targets differ, so nothing is asked of them.
    """
    tied_rows = 0
    for row in range(len(values)):
        differing = [i for i in order if abs(values[row, i] - expected[row, i]) > 1e-6]
        if not differing:
            continue
        first = differing[0]
        gap = abs(values[row, first] - expected[row, first])
        middle = (values[row, first] + expected[row, first]) / 2
        assert abs(targets[row, first] - middle) <= TIE * gap, (row, first)
        tied_rows += 1
    return tied_rows


@every_scheme
@pytest.mark.parametrize("act_order", [True, False])
def test_values_are_those_of_the_oracle(scheme: Scheme, act_order: bool) -> None:
    rows, columns = 12, 139
    weight, statistics = weight_of(rows, columns), statistics_of(columns)
    grid = fit_grid(weight, scheme)
    factor = factorise(statistics.hessian, 0.01, act_order)
    assert factor is not None
    solution = solve(weight, grid, factor, block_size=32)
    expected, targets = oracle_solution(weight, grid, statistics.hessian, 0.01, act_order)
    values = grid.dequantize(solution.codes).double().numpy()
    order = oracle_order(statistics.hessian, act_order)
    tied = assert_same_up_to_ties(values, expected, targets, order)
    assert tied <= 3
    untied = np.abs(values - expected).max(1) < 1e-6
    assert np.abs(solution.targets.double().numpy() - targets)[untied].max() < 1e-4


def test_every_code_is_that_of_the_oracle_on_a_well_conditioned_layer() -> None:
    weight, x = weight_of(8, 48), torch.randn(400, 48, generator=torch.Generator().manual_seed(0))
    hessian = x.T @ x / 400
    grid = fit_grid(weight, Scheme.parse("W4A16_G16"))
    factor = factorise(hessian, 0.01, act_order=True)
    assert factor is not None
    solution = solve(weight, grid, factor, block_size=16)
    expected, _ = oracle_solution(weight, grid, hessian, 0.01, act_order=True)
    assert np.abs(grid.dequantize(solution.codes).double().numpy() - expected).max() < 1e-6


@every_scheme
def test_blocked_equals_unblocked(scheme: Scheme) -> None:
    weight, statistics = weight_of(10, 139), statistics_of(139)
    grid = fit_grid(weight, scheme)
    factor = factorise(statistics.hessian, 0.01, act_order=True)
    assert factor is not None
    whole = solve(weight, grid, factor, block_size=139)
    order = oracle_order(statistics.hessian, act_order=True)
    for block_size in (1, 7, 128):
        blocked = solve(weight, grid, factor, block_size)
        tied = assert_same_up_to_ties(
            grid.dequantize(blocked.codes).double().numpy(),
            grid.dequantize(whole.codes).double().numpy(),
            whole.targets.double().numpy(),
            order,
        )
        assert tied <= 2


@every_scheme
def test_gptq_beats_rounding_and_reports_its_loss(scheme: Scheme) -> None:
    weight, statistics = weight_of(24, 203), statistics_of(203)
    result = GPTQ().quantize(weight, scheme, statistics)
    rounded = RTN().quantize(weight, scheme, statistics)
    loss = output_error(weight, result, statistics)
    assert loss < 0.8 * output_error(weight, rounded, statistics)
    assert result.report["loss"] == pytest.approx(loss, rel=0.01)
    assert int(result.codes.min()) >= scheme.code_min
    assert int(result.codes.max()) <= scheme.code_max


@pytest.mark.parametrize("name", ["W2A16_G64", "W3A16_G64", "W4A16_ASYM_G64", "NF4_DQ"])
def test_second_fit_never_raises_the_loss(name: str) -> None:
    weight, statistics = weight_of(24, 192), statistics_of(192)
    once = GPTQ(refit=False).quantize(weight, Scheme.parse(name), statistics)
    twice = GPTQ().quantize(weight, Scheme.parse(name), statistics)
    assert float(twice.report["loss"]) <= float(once.report["loss"])


def test_without_correlations_gptq_is_rounding() -> None:
    weight, scheme = weight_of(9, 96), Scheme.parse("W4A16_G32")
    # Equal variances too, so that GPTQ weighs all features alike, as rounding without data does.
    statistics = Statistics(0.7 * torch.eye(96), 1000)
    result = GPTQ(refit=False).quantize(weight, scheme, statistics)
    assert torch.equal(result.codes, RTN().quantize(weight, scheme, None).codes)


def test_rows_are_independent_of_each_other_and_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, statistics, scheme = weight_of(40, 96), statistics_of(96), Scheme.parse("W3A16_G32")
    whole = GPTQ(refit=False).quantize(weight, scheme, statistics)
    monkeypatch.setattr(ldlq_module, "ROWS_PER_CHUNK", 7)
    chunked = GPTQ(refit=False).quantize(weight, scheme, statistics)
    # A product of another shape may sum in another order, which only a tie can show.
    assert float((whole.codes != chunked.codes).float().mean()) < 0.005
    assert chunked.report["loss"] == pytest.approx(whole.report["loss"], rel=0.01)


@every_scheme
def test_dead_features_become_zero_and_do_not_shape_the_scales(scheme: Scheme) -> None:
    weight, statistics = weight_of(6, 139), statistics_of(139)
    dead = torch.tensor([0, 17, 18, 138])
    hessian = statistics.hessian.clone()
    hessian[dead], hessian[:, dead] = 0, 0
    weight[:, dead] = 50.0  # would dominate every scale
    result = GPTQ().quantize(weight, scheme, Statistics(hessian, 1000))
    decoded = result.grid.dequantize(result.codes)
    assert torch.equal(decoded[:, dead], torch.zeros(6, 4))
    zeroed = weight.index_fill(1, dead, 0.0)
    same = GPTQ().quantize(zeroed, scheme, Statistics(hessian, 1000))
    assert torch.equal(result.codes, same.codes)
    assert result.report["dead_features"] == 4
    assert result.report["loss"] == pytest.approx(
        output_error(zeroed, result, Statistics(hessian, 1000)), rel=0.01
    )


def test_rank_deficient_hessian_is_solved() -> None:
    x = torch.randn(20, 128, generator=torch.Generator().manual_seed(0))
    statistics, weight = Statistics(x.T @ x / 20, 20), weight_of(16, 128)
    result = GPTQ().quantize(weight, Scheme.parse("W4A16_G32"), statistics)
    assert "fallback" not in result.report
    rounded = RTN().quantize(weight, Scheme.parse("W4A16_G32"), statistics)
    assert output_error(weight, result, statistics) < 0.5 * output_error(
        weight, rounded, statistics
    )


def test_damping_is_raised_and_recorded_where_needed() -> None:
    # An eigenvalue of -5% of the mean: no covariance, but what rounding can make of one.
    direction = torch.full((96, 1), 96**-0.5)
    statistics = Statistics(torch.eye(96) - 1.05 * direction @ direction.T, 1000)
    weight = weight_of(8, 96)
    result = GPTQ().quantize(weight, Scheme.parse("W4A16_G32"), statistics)
    assert result.report["damp_percent"] == pytest.approx(0.1)
    assert "fallback" not in result.report


@pytest.mark.parametrize("broken", ["indefinite", "nan", "zero"])
def test_layer_that_cannot_be_solved_falls_back_to_rtn_and_says_so(broken: str) -> None:
    weight, scheme = weight_of(8, 96), Scheme.parse("W4A16_G32")
    hessian = statistics_of(96).hessian
    if broken == "indefinite":
        hessian[0, 1] = hessian[1, 0] = 1e6
    elif broken == "nan":
        hessian[3, 4] = float("nan")
    else:
        hessian.zero_()
    result = GPTQ().quantize(weight, scheme, Statistics(hessian, 1000))
    assert result.report["fallback"] == "rtn"
    assert np.isfinite(float(result.report["loss"]))
    relative = (weight - result.grid.dequantize(result.codes)).norm() / weight.norm()
    assert float(relative) < 0.2


def test_layers_with_the_same_statistics_share_one_factorisation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def counting(*arguments: object) -> object:
        calls.append(arguments)
        return factorise(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(gptq_module, "factorise", counting)
    scheme, weight = Scheme.parse("W4A16_G32"), weight_of(8, 96)
    first, equal = statistics_of(96), statistics_of(96)
    for block_size in (32, 64, 128):
        GPTQ(block_size=block_size).quantize(weight, scheme, first)
    assert len(calls) == 1
    GPTQ().quantize(weight, scheme, equal)  # equal values, but another object
    GPTQ(act_order=False).quantize(weight, scheme, equal)
    assert len(calls) == 3


def test_factor_is_freed_with_its_statistics() -> None:
    statistics = statistics_of(96)
    factor = gptq_module.shared_factor(statistics, 0.01, act_order=True)
    assert factor is not None
    alive = weakref.ref(factor)
    del factor
    assert alive() is not None
    del statistics
    gc.collect()
    assert alive() is None


def test_arguments_are_not_changed_and_the_result_is_repeatable() -> None:
    weight, statistics = weight_of(8, 96).requires_grad_(), statistics_of(96)
    before_weight, before_hessian = weight.detach().clone(), statistics.hessian.clone()
    first = GPTQ().quantize(weight, Scheme.parse("W3A16_G32"), statistics)
    second = GPTQ().quantize(weight, Scheme.parse("W3A16_G32"), statistics_of(96))
    assert torch.equal(weight.detach(), before_weight)
    assert torch.equal(statistics.hessian, before_hessian)
    assert torch.equal(first.codes, second.codes)
    assert not first.grid.scales.requires_grad


def test_missing_or_foreign_statistics_are_refused() -> None:
    with pytest.raises(LowbitError, match="needs calibration statistics"):
        GPTQ().quantize(weight_of(4, 64), Scheme(), None)
    with pytest.raises(LowbitError, match=r"statistics are of 32 input features, .* has 64"):
        GPTQ().quantize(weight_of(4, 64), Scheme(), statistics_of(32))


def test_few_tokens_raise_the_damping_and_the_report_says_so() -> None:
    hessian, weight, scheme = statistics_of(96).hessian, weight_of(8, 96), Scheme.parse("W3A16_G32")
    for tokens, expected in ((10, 1.0), (96, 1.0), (192, 0.25), (480, 0.04)):
        statistics = Statistics(hessian, tokens)
        result = GPTQ().quantize(weight, scheme, statistics)
        assert result.report["damp_percent"] == pytest.approx(expected)
        fixed = GPTQ(damp_percent=expected).quantize(weight, scheme, Statistics(hessian, 96_000))
        assert torch.equal(result.codes, fixed.codes)
    assert "damp_percent" not in GPTQ().quantize(weight, scheme, Statistics(hessian, 970)).report
