"""Refinement: one sweep against oracles, and that no row, scheme or start ever gets worse."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from schemes import every_scheme
from test_gptq import assert_same_up_to_ties, oracle_order, output_error
from test_rtn import statistics_of, weight_of

from lowbit.algorithms import GPTQ
from lowbit.algorithms import ldlq as ldlq_module
from lowbit.algorithms.ldlq import Factor, Solution, factorise, solve
from lowbit.algorithms.refine import Coupling, _Rows, refine
from lowbit.algorithms.scales import fit_grid
from lowbit.errors import LowbitError
from lowbit.quant import QuantizedWeight
from lowbit.scheme import Scheme

COLUMNS = 139  # short last group; no multiple of the block size


def solved(
    scheme: Scheme, rows: int = 12, columns: int = COLUMNS
) -> tuple[torch.Tensor, torch.Tensor, Factor, Solution]:
    """Returns (weight, hessian, factor, GPTQ's solution)."""
    weight, hessian = weight_of(rows, columns), statistics_of(columns).hessian
    factor = factorise(hessian, 0.01, act_order=True)
    assert factor is not None
    grid = fit_grid(weight, scheme, factor.importance())
    return weight, hessian, factor, solve(weight, grid, factor, 32)


def damped(hessian: torch.Tensor, factor: Factor) -> np.ndarray:
    """Returns the Hessian of the recursion, float64."""
    exact: np.ndarray = hessian.double().numpy()
    return exact + factor.damp * np.eye(len(exact))


def rows_of(weight: torch.Tensor, hessian: torch.Tensor, factor: Factor, start: Solution) -> _Rows:
    """Returns all rows, ready for a sweep."""
    coupling = Coupling.of(hessian, factor)
    return _Rows(weight, start.codes, start.grid, torch.arange(len(weight)), coupling)


@every_scheme
def test_sweep_of_codes_is_that_of_the_oracle(scheme: Scheme) -> None:
    weight, hessian, factor, start = solved(scheme)
    state = rows_of(weight, hessian, factor, start)
    state.sweep_codes(block_size=32)

    def quantize(targets: np.ndarray, column: int) -> np.ndarray:
        group = column // scheme.group_width(COLUMNS)
        scales = start.grid.scales[:, group].double().numpy()
        zeros = start.grid.zeros
        zeros_N = np.zeros_like(scales) if zeros is None else zeros[:, group].double().numpy()
        return oracles.nearest_values(targets, scales, zeros_N, scheme.bits, scheme.codebook)

    order = oracle_order(hessian, act_order=True)
    before = start.grid.dequantize(start.codes).double().numpy()
    expected, targets = oracles.coordinate_descent(
        weight.double().numpy(), before, damped(hessian, factor), order, quantize
    )
    values = start.grid.dequantize(state.codes()).double().numpy()
    assert np.abs(expected - before).max() > 0
    assert assert_same_up_to_ties(values, expected, targets, order) <= 3


@pytest.mark.parametrize("name", ["W4A16_G32_FP32", "W3A16_ASYM_G64_FP32", "NF4_FP32"])
def test_sweep_of_scales_is_the_least_squares_solution(name: str) -> None:
    scheme = Scheme.parse(name)
    weight, hessian, factor, start = solved(scheme, rows=5)
    state = rows_of(weight, hessian, factor, start)
    state.sweep_scales()
    exact, width = damped(hessian, factor), scheme.group_width(COLUMNS)
    error = (weight - start.grid.dequantize(start.codes)).double().numpy()
    for row in range(5):
        for group in range(scheme.groups(COLUMNS)):
            columns = slice(group * width, (group + 1) * width)
            old = float(start.grid.scales[row, group])
            part = np.zeros(COLUMNS)
            values = start.grid.dequantize(start.codes)[row, columns].double().numpy()
            part[columns] = values / old
            factor_of_part = oracles.best_factor(error[row], part, exact)
            new = float(state.grid.scales[row, group])
            assert new == pytest.approx(old + factor_of_part, rel=1e-4)
            error[row] -= (new - old) * part


@every_scheme
def test_no_row_gets_worse_and_the_loss_is_reported(scheme: Scheme) -> None:
    weight, hessian, factor, start = solved(scheme)
    once = refine(weight, start, hessian, factor, sweeps=1, block_size=32)
    more = refine(weight, start, hessian, factor, sweeps=4, block_size=32)
    exact = hessian.double().numpy()
    for solution in (start, once, more):
        values = solution.grid.dequantize(solution.codes).double().numpy()
        error = weight.double().numpy() - values
        losses = np.einsum("nk,kl,nl->n", error, exact, error)
        assert solution.row_losses.numpy() == pytest.approx(losses, rel=0.01)
        assert (losses <= start.row_losses.numpy() * (1 + 1e-5)).all()
    assert more.loss < once.loss < start.loss
    assert int(more.codes.min()) >= scheme.code_min
    assert int(more.codes.max()) <= scheme.code_max


@every_scheme
def test_what_is_stored_decodes_to_what_was_refined(scheme: Scheme) -> None:
    weight, hessian, factor, start = solved(scheme)
    result = refine(weight, start, hessian, factor, sweeps=2, block_size=32)
    stored = QuantizedWeight.from_codes(result.codes, result.grid)
    decoded = result.grid.dequantize(result.codes)
    assert torch.equal(stored.dequantize(torch.float32), decoded)


@pytest.mark.parametrize("name", ["W2A16_G64", "W4A16_ASYM_G64_DQ", "NF4_DQ"])
def test_chunks_of_rows_and_blocks_do_not_change_the_result(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hessian, factor, start = solved(Scheme.parse(name))
    whole = refine(weight, start, hessian, factor, sweeps=2, block_size=COLUMNS)
    monkeypatch.setattr(ldlq_module, "ROWS_PER_CHUNK", 5)
    parts = refine(weight, start, hessian, factor, sweeps=2, block_size=16)
    same = (whole.codes == parts.codes).all(1)
    assert int((~same).sum()) <= 2  # rows that met a tie
    assert torch.allclose(whole.grid.scales[same], parts.grid.scales[same], rtol=1e-3)
    assert parts.loss == pytest.approx(whole.loss, rel=0.02)


def test_dead_features_stay_zero() -> None:
    weight, statistics = weight_of(8, 96), statistics_of(96)
    dead = torch.tensor([0, 40, 95])
    statistics.hessian[dead], statistics.hessian[:, dead] = 0.0, 0.0
    result = GPTQ(sweeps=3).quantize(weight, Scheme.parse("W4A16_G32"), statistics)
    assert result.grid.dequantize(result.codes)[:, dead].abs().max() == 0
    assert result.report["dead_features"] == 3


@pytest.mark.parametrize("name", ["W2A16_G64", "W3A16_ASYM_G64", "W4A16", "NF4_DQ", "FP4"])
def test_gptq_with_sweeps_reports_both_losses(name: str) -> None:
    weight, statistics, scheme = weight_of(24, 192), statistics_of(192), Scheme.parse(name)
    plain = GPTQ(sweeps=0).quantize(weight, scheme, statistics)
    swept = GPTQ(sweeps=4).quantize(weight, scheme, statistics)
    assert swept.report["loss_before_sweeps"] == plain.report["loss"]
    assert float(swept.report["loss"]) < 0.97 * float(plain.report["loss"])
    loss = output_error(weight, swept, statistics)
    assert swept.report["loss"] == pytest.approx(loss, rel=0.01)


def test_negative_sweeps_are_refused() -> None:
    with pytest.raises(LowbitError, match="sweeps -1 is negative"):
        GPTQ(sweeps=-1)
