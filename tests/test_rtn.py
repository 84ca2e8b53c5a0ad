"""Round to nearest: grids against definitions, the search against absmax, edges of the input."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from schemes import NAMES, every_scheme

from lowbit.algorithms import ALGORITHMS, RTN, Statistics, make_algorithm
from lowbit.algorithms import scales as scales_module
from lowbit.errors import LowbitError
from lowbit.quant import Grid
from lowbit.scheme import Scheme


def weight_of(rows: int, columns: int, seed: int = 0, tails: float = 4.0) -> torch.Tensor:
    """Returns heavy-tailed weights (Student t) of the size found in trained layers."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    chi = torch.randn(int(tails), rows, columns, generator=generator).square().sum(0)
    return 0.02 * normal / (chi / tails).sqrt()


def statistics_of(columns: int, seed: int = 0) -> Statistics:
    """Returns statistics of correlated inputs whose sizes differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(4 * columns, columns, generator=generator) @ (torch.eye(columns) + mix)
    x *= torch.exp(torch.randn(columns, generator=generator))
    return Statistics(x.T @ x / x.shape[0], x.shape[0])


def objective(weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None) -> float:
    """Returns the weighted squared error of the best codes on `grid`, by the oracle."""
    scheme = grid.scheme
    group = np.arange(weight.shape[1]) // scheme.group_width(weight.shape[1])
    scales = grid.scales.double().numpy()[:, group]
    zeros = np.zeros_like(scales) if grid.zeros is None else grid.zeros.double().numpy()[:, group]
    weights = np.ones(weight.shape[1]) if importance is None else importance.double().numpy()
    return oracles.weighted_error(
        weight.double().numpy(), scales, zeros, scheme.bits, scheme.codebook, weights
    )


def kind_of(scheme: Scheme) -> str:
    """Returns the oracle's name for the kind of grid."""
    return scheme.codebook or ("symmetric" if scheme.symmetric else "asymmetric")


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("DQ")])
@pytest.mark.parametrize("columns", [64, 203])
def test_absmax_is_the_definition(name: str, columns: int) -> None:
    scheme, weight = Scheme.parse(name), weight_of(6, columns)
    grid = RTN(search=False).quantize(weight, scheme, None).grid
    for row in range(6):
        for group, part in enumerate(weight[row].split(scheme.group_width(columns))):
            scale, zero = oracles.absmax_scale(part.tolist(), scheme.bits, kind_of(scheme))
            stored = torch.tensor(scale).to(scheme.torch_scale_dtype)
            assert float(grid.scales[row, group]) == pytest.approx(float(stored), rel=1e-6)
            if grid.zeros is not None:
                assert int(grid.zeros[row, group]) == zero


@every_scheme
@pytest.mark.parametrize("search", [False, True])
def test_codes_are_the_nearest_on_the_stored_grid(scheme: Scheme, search: bool) -> None:
    weight = weight_of(7, 203)
    result = RTN(search).quantize(weight, scheme, None)
    error = float((weight - result.grid.dequantize(result.codes)).double().square().sum())
    assert error == pytest.approx(objective(weight, result.grid, None), rel=1e-4)
    assert result.report["loss"] == pytest.approx(error / weight.numel(), rel=1e-4)


@every_scheme
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_search_is_never_worse_than_absmax(scheme: Scheme, weighted: bool) -> None:
    columns = 203
    statistics = statistics_of(columns) if weighted else None
    importance = statistics.hessian.diagonal() if statistics else None
    for seed, tails in ((0, 3.0), (1, 30.0)):
        weight = weight_of(9, columns, seed, tails)
        found = RTN().quantize(weight, scheme, statistics).grid
        absmax = RTN(search=False).quantize(weight, scheme, statistics).grid
        after, before = objective(weight, found, importance), objective(weight, absmax, importance)
        assert after <= before * (1 + 1e-6)
        # At 8 bits there is little to find, and double quantization may undo it.
        if scheme.bits < 8 and not scheme.double_quant:
            assert after < 0.97 * before


@pytest.mark.parametrize(
    "name", ["W2A16_G64", "W3A16_G64", "W4A16_G64", "W4A16_CHANNEL", "NF4", "FP4"]
)
def test_search_comes_close_to_an_exhaustive_one(name: str) -> None:
    scheme, weight = Scheme.parse(name + "_FP32"), weight_of(4, 256, tails=5.0)
    found = RTN().quantize(weight, scheme, None).grid
    absmax = RTN(search=False).quantize(weight, scheme, None).grid
    best = 0.0
    signs = (1, -1) if scheme.signed_scales else (1,)
    factors = [sign * f for f in np.geomspace(0.15, 1.3, 500) for sign in signs]
    for row in range(4):
        for group, part in enumerate(weight[row].split(scheme.group_width(256))):
            w, ones = part.double().numpy()[None], np.ones((1, len(part)))
            scale = float(absmax.scales[row, group])
            best += min(
                oracles.weighted_error(
                    w, scale * f * ones, 0 * ones, scheme.bits, scheme.codebook, ones
                )
                for f in factors
            )
    assert objective(weight, found, None) <= 1.01 * best


@every_scheme
def test_short_last_group_is_fitted_like_a_matrix_of_its_own(scheme: Scheme) -> None:
    width = scheme.group_width(10_000)
    if width == 10_000 or scheme.double_quant:
        pytest.skip("one group per row, or scales that share a block")
    weight = weight_of(5, 2 * width + 24)
    whole = RTN().quantize(weight, scheme, None)
    tail = RTN().quantize(weight[:, 2 * width :], scheme, None)
    assert torch.equal(whole.grid.scales[:, 2:], tail.grid.scales)
    assert torch.equal(whole.codes[:, 2 * width :], tail.codes)


@every_scheme
@pytest.mark.parametrize("search", [False, True])
def test_zero_groups_stay_exactly_zero(scheme: Scheme, search: bool) -> None:
    weight = weight_of(4, 192)
    weight[1] = 0
    weight[2, 64:128] = 0
    result = RTN(search).quantize(weight, scheme, statistics_of(192))
    decoded = result.grid.dequantize(result.codes)
    assert torch.equal(decoded[weight == 0], weight[weight == 0])
    assert bool((result.grid.scales != 0).all())
    nothing = torch.zeros(3, 192)
    empty = RTN(search).quantize(nothing, scheme, None)
    assert torch.equal(empty.grid.dequantize(empty.codes), nothing)
    assert empty.report["loss"] == 0


@every_scheme
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_any_finite_weight_gives_finite_values(scheme: Scheme, data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 80))
    values = st.floats(-1e4, 1e4, width=32)
    flat = data.draw(st.lists(values, min_size=rows * columns, max_size=rows * columns))
    weight = torch.tensor(flat).view(rows, columns)
    result = RTN().quantize(weight, scheme, None)
    decoded = result.grid.dequantize(result.codes)
    assert bool(decoded.isfinite().all())
    assert float(decoded.abs().max()) <= 2 * float(weight.abs().max()) + 1e-6
    before = objective(weight, RTN(search=False).quantize(weight, scheme, None).grid, None)
    assert objective(weight, result.grid, None) <= before * (1 + 1e-5) + 1e-12


@pytest.mark.parametrize("name", ["W4A16_G64", "W4A16_ASYM_G64", "NF4_DQ", "W3A16_CHANNEL"])
def test_result_does_not_depend_on_the_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, weight, statistics = Scheme.parse(name), weight_of(50, 203), statistics_of(203)
    whole = RTN().quantize(weight, scheme, statistics)
    monkeypatch.setattr(scales_module, "CHUNK_ELEMENTS", 3 * 203)
    chunked = RTN().quantize(weight, scheme, statistics)
    assert torch.equal(whole.grid.scales, chunked.grid.scales)
    assert torch.equal(whole.codes, chunked.codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weight_keeps_its_values_and_may_have_any_float_dtype(dtype: torch.dtype) -> None:
    weight = weight_of(5, 96).to(dtype).requires_grad_()
    before = weight.detach().clone()
    result = RTN().quantize(weight, Scheme.parse("W4A16_G32"), None)
    same = RTN().quantize(before.float(), Scheme.parse("W4A16_G32"), None)
    assert torch.equal(weight.detach(), before)
    assert torch.equal(result.codes, same.codes)
    assert not result.grid.scales.requires_grad


def test_loss_with_statistics_is_the_output_error() -> None:
    weight, statistics = weight_of(11, 96), statistics_of(96)
    result = RTN().quantize(weight, Scheme.parse("W3A16_G32"), statistics)
    decoded = result.grid.dequantize(result.codes).double().numpy()
    expected = oracles.output_error(
        weight.double().numpy(), decoded, statistics.hessian.double().numpy()
    )
    assert result.report["loss"] == pytest.approx(expected, rel=1e-4)


def test_algorithms_are_made_by_name_with_checked_options() -> None:
    assert make_algorithm("rtn") == RTN()
    assert make_algorithm("RTN", search=False) == RTN(search=False)
    assert make_algorithm(RTN(search=False)) == RTN(search=False)
    for name, algorithm in ALGORITHMS.items():
        assert make_algorithm(name).name == name == algorithm.name


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("rnt", {}, "did you mean 'rtn'"),
        ("gptq", {"damp": 0.1}, "did you mean 'damp_percent'"),
        ("gptq", {"damp_percent": "0.1"}, "damp_percent is a float such as 0.01, got '0.1'"),
        ("gptq", {"damp_percent": 0.0}, "damp_percent 0.0 is out of range"),
        ("gptq", {"damp_percent": float("nan")}, "damp_percent nan is out of range"),
        ("gptq", {"block_size": True}, "block_size is an int such as 128, got True"),
        ("gptq", {"block_size": 0}, "block_size 0 is not positive"),
        ("gptq", {"act_order": 1}, "act_order is a bool"),
        ("rtn", {"name": "x"}, "unknown option of rtn 'name'"),
    ],
)
def test_bad_options_are_refused_with_a_sentence(
    name: str, options: dict[str, object], sentence: str
) -> None:
    with pytest.raises(LowbitError, match=sentence):
        make_algorithm(name, **options)
