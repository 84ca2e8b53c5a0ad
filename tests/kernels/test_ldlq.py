"""GPTQ's inner loop as a kernel: against the eager loop, and the float64 oracle of test_gptq."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from fragment_weights import DEVICE, needs_gpu
from lowbit_kernels.gpu import ldlq
from schemes import every_scheme
from test_gptq import assert_same_up_to_ties, oracle_order, oracle_solution
from test_rtn import statistics_of, weight_of

from lowbit.algorithms import GPTQ, Statistics
from lowbit.algorithms import ldlq as solver
from lowbit.algorithms.ldlq import Factor, Solution, factorise, solve
from lowbit.algorithms.scales import fit_grid
from lowbit.quant import Grid, sorted_codebook
from lowbit.scheme import Scheme

# Sums in another order move a target by a few ulp of the largest term.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer to solve, on the CPU for the oracle and on the device for the solvers."""

    weight: torch.Tensor
    hessian: torch.Tensor
    act_order: bool
    grid: Grid
    factor: Factor

    def solve(self, block_size: int, kernel: bool, patch: pytest.MonkeyPatch) -> Solution:
        patch.setattr(solver, "_has_kernel", lambda device: kernel)
        return solve(self.weight.to(DEVICE), self.grid, self.factor, block_size)

    def values(self, solution: Solution) -> np.ndarray:
        decoded: np.ndarray = self.grid.dequantize(solution.codes).double().cpu().numpy()
        return decoded

    def order(self) -> list[int]:
        return oracle_order(self.hessian, self.act_order)


def layer_of(
    rows: int, columns: int, scheme: Scheme | str, seed: int, act_order: bool = True
) -> Layer:
    """Returns a random layer whose grid is fitted and whose H is factorised."""
    scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    weight = weight_of(rows, columns, seed=seed)
    hessian = statistics_of(columns, seed=seed).hessian
    factor = factorise(hessian, 0.01, act_order)
    assert factor is not None
    grid = fit_grid(weight, scheme, factor.importance())
    return Layer(weight, hessian, act_order, on_device(grid), on_device(factor))


def on_device(holder: Any) -> Any:
    """Returns the dataclass `holder` with its tensors on the device."""
    tensors = {
        field.name: getattr(holder, field.name).to(DEVICE)
        for field in dataclasses.fields(holder)
        if isinstance(getattr(holder, field.name), torch.Tensor)
    }
    return dataclasses.replace(holder, **tensors)


def require_same(layer: Layer, kernel: Solution, eager: Solution) -> None:
    """Asserts that both chose the same values in every row, until a provable tie."""
    found, expected = layer.values(kernel), layer.values(eager)
    targets = eager.targets.double().cpu().numpy()
    tied = assert_same_up_to_ties(found, expected, targets, layer.order())
    assert tied <= 1 + len(found) // 8
    same = (kernel.codes == eager.codes).all(1)
    torch.testing.assert_close(kernel.targets[same], eager.targets[same], **CLOSE)
    if tied == 0:
        assert kernel.loss == pytest.approx(eager.loss, rel=1e-3)


@every_scheme
def test_every_scheme_is_solved_as_by_the_eager_loop(
    scheme: Scheme, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_of(11, 72, scheme, seed)
    kernel = layer.solve(32, True, monkeypatch)
    assert int(kernel.codes.min()) >= scheme.code_min
    assert int(kernel.codes.max()) <= scheme.code_max
    require_same(layer, kernel, layer.solve(32, False, monkeypatch))


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("name", ["W2A16_G64", "W3A16_ASYM_G64", "W4A16_G32", "NF4", "FP4"])
def test_values_are_those_of_the_oracle(
    name: str, act_order: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_of(9, 75, name, seed, act_order)
    solution = layer.solve(32, True, monkeypatch)
    expected, targets = oracle_solution(
        layer.weight, cpu_grid(layer), layer.hessian, 0.01, act_order
    )
    values = layer.values(solution)
    assert assert_same_up_to_ties(values, expected, targets, layer.order()) <= 2
    untied = np.abs(values - expected).max(1) < 1e-6
    found = solution.targets.double().cpu().numpy()
    assert np.abs(found - targets)[untied].max() < 1e-4


def cpu_grid(layer: Layer) -> Grid:
    """Returns the grid where the oracle can read it."""
    zeros = None if layer.grid.zeros is None else layer.grid.zeros.cpu()
    return Grid(layer.grid.scheme, layer.grid.in_features, layer.grid.scales.cpu(), zeros)


# Fewer rows than a program takes, as many, and a last program that is not full; one column, blocks
# that are not a power of two, and more columns per block than a launch visits.
@pytest.mark.parametrize("rows", [1, 8, 19])
@pytest.mark.parametrize(("columns", "block"), [(1, 128), (40, 7), (200, 1000)])
def test_ragged_sizes(
    rows: int, columns: int, block: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_of(rows, columns, "W4A16_ASYM_G32", seed)
    kernel = layer.solve(block, True, monkeypatch)
    require_same(layer, kernel, layer.solve(block, False, monkeypatch))


@pytest.mark.parametrize("act_order", [False, True])
def test_the_algorithm_loses_nothing_by_the_kernel(
    act_order: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, statistics = weight_of(32, 160, seed=seed), statistics_of(160, seed=seed)
    there = Statistics(statistics.hessian.to(DEVICE), statistics.tokens)
    errors = []
    for kernel in (False, True):
        monkeypatch.setattr(solver, "_has_kernel", lambda device, kernel=kernel: kernel)
        algorithm = GPTQ(act_order=act_order)
        result = algorithm.quantize(weight.to(DEVICE), Scheme.parse("W3A16_G32"), there)
        decoded = result.grid.dequantize(result.codes).double().cpu().numpy()
        hessian = statistics.hessian.double().numpy()
        errors.append(oracles.output_error(weight.double().numpy(), decoded, hessian))
    assert errors[1] == pytest.approx(errors[0], rel=0.03)


def block_of(rows: int, columns: int, seed: int) -> dict[str, torch.Tensor]:
    """Returns the arguments of one block with a grid of step 0.1; its outputs are poisoned."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(columns, rows, generator=generator)
    block = {
        "target": target,
        "residual": target + 0.01 * torch.randn(columns, rows, generator=generator),
        "codes": torch.full((columns, rows), 99, dtype=torch.int8),
        "errors": torch.full((columns, rows), torch.nan),
        "inner": torch.randn(columns, columns, generator=generator) * 0.1,
        "group": torch.zeros(columns, dtype=torch.int32),
        "scale": torch.full((1, rows), 0.1),
    }
    return {name: tensor.to(DEVICE) for name, tensor in block.items()}


def test_a_block_equals_the_recursion_in_float64(seed: int) -> None:
    block = block_of(20, 33, seed)
    target, residual, inner = (block[name].double() for name in ("target", "residual", "inner"))
    ldlq.solve_block(*block.values(), None, None, (-8, 7))
    for i in reversed(range(33)):
        wanted = target[i] + inner[i, i + 1 :] @ residual[i + 1 :]
        # Follows the kernel's codes, so that one tie does not end the comparison.
        code = block["codes"][i].double()
        near_tie = ((wanted / 0.1) % 1 - 0.5).abs() < 1e-3
        assert bool((((wanted / 0.1).round().clamp(-8, 7) == code) | near_tie).all())
        residual[i] -= code * 0.1
        torch.testing.assert_close(block["target"][i].double(), wanted, **CLOSE)
        torch.testing.assert_close(block["errors"][i].double(), wanted - code * 0.1, **CLOSE)
    torch.testing.assert_close(block["residual"].double(), residual, **CLOSE)


@pytest.mark.parametrize(
    "name", ["W2A16", "W3A16_ASYM_G32", "W4A16", "W4A16_ASYM_G32", "W8A16", "NF4", "FP4"]
)
def test_ties_and_values_beyond_the_grid_round_as_in_torch(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of one column: nothing is summed, so every code is that of `nearest_code`."""
    scheme = Scheme.parse(name)
    points = [k / 4 for k in range(4 * scheme.code_min - 9, 4 * scheme.code_max + 9)]
    points += [1e30, -1e30, 3e7, -3e7, 5e6, -5e6]
    if scheme.codebook is not None:
        points += sorted_codebook(scheme)[1]
    weight = 0.5 * torch.tensor(points, device=DEVICE)[:, None]
    scales = torch.full_like(weight, 0.5)
    if scheme.signed_scales:
        scales[::3] *= -1
    zeros = None if scheme.symmetric else torch.full_like(weight, scheme.code_min + 1)
    grid, one = Grid(scheme, 1, scales, zeros), torch.ones(1, device=DEVICE)
    dead = torch.zeros(1, dtype=torch.bool, device=DEVICE)
    factor = Factor(dead.long(), one[None], one, 0.0, 0.01, dead)
    monkeypatch.setattr(solver, "_has_kernel", lambda device: True)
    assert torch.equal(solve(weight, grid, factor, 128).codes, grid.round(weight))


def test_residuals_and_errors_are_rounded_as_by_the_eager_loop(seed: int) -> None:
    # A fused multiply-add would show here, on a GPU: 0.1 times a code is not exact.
    block = block_of(37, 64, seed)
    weight = block["residual"].clone()
    ldlq.solve_block(*block.values(), None, None, (-8, 7))
    value = block["codes"].float() * block["scale"]
    assert torch.equal(block["residual"], weight - value)
    assert torch.equal(block["errors"], block["target"] - value)


def test_two_runs_are_identical(seed: int) -> None:
    first, second = block_of(37, 64, seed), block_of(37, 64, seed)
    for block in (first, second):
        ldlq.solve_block(*block.values(), None, None, (-8, 7))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_bad_input_is_a_sentence(seed: int) -> None:
    block = block_of(4, 129, seed)
    with pytest.raises(ValueError, match="a block of 129 columns"):
        ldlq.solve_block(*block.values(), None, None, (-8, 7))
    block = block_of(4, 8, seed)
    block["codes"] = block["codes"].T.contiguous().T
    with pytest.raises(ValueError, match="codes is"):
        ldlq.solve_block(*block.values(), None, None, (-8, 7))


def test_without_triton_a_gpu_is_warned_about_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver.importlib.util, "find_spec", lambda name: None)
    solver._warn_without_triton.cache_clear()
    with pytest.warns(UserWarning, match="pip install triton"):
        assert not solver._has_kernel(torch.device("cuda"))
    assert not solver._has_kernel(torch.device("cpu"))


@needs_gpu
def test_on_a_gpu_the_kernel_is_what_solves(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(4099, 512, "W4A16_G32", seed)
    eager = layer.solve(128, False, monkeypatch)
    monkeypatch.undo()
    monkeypatch.delattr(solver, "_eager_solver")
    kernel = solve(layer.weight.to(DEVICE), layer.grid, layer.factor, 128)
    require_same(layer, kernel, eager)
