"""GPTQ's inner loop as a kernel: against the eager loop, which has its own oracle in test_gptq."""

from __future__ import annotations

import pytest
import torch
from fragment_weights import needs_gpu
from lowbit_kernels.gpu import ldlq
from schemes import every_scheme
from test_gptq import output_error
from test_rtn import statistics_of, weight_of

from lowbit.algorithms import GPTQ
from lowbit.algorithms import ldlq as solver
from lowbit.algorithms.ldlq import Factor, factorise, solve
from lowbit.algorithms.scales import fit_grid
from lowbit.scheme import Scheme

# Sums in another order move a target by a few ulp of the largest term.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def factor_of(columns: int, seed: int, act_order: bool = True) -> Factor:
    factor = factorise(statistics_of(columns, seed=seed).hessian, 0.01, act_order)
    assert factor is not None
    return factor


def both(
    weight: torch.Tensor,
    scheme: Scheme,
    factor: Factor,
    block_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[solver.Solution, solver.Solution]:
    """Returns the solutions of the eager loop and of the kernel."""
    grid = fit_grid(weight, scheme, factor.importance())
    monkeypatch.setattr(solver, "_has_kernel", lambda device: False)
    eager = solve(weight, grid, factor, block_size)
    monkeypatch.setattr(solver, "_has_kernel", lambda device: True)
    return eager, solve(weight, grid, factor, block_size)


def require_same(eager: solver.Solution, kernel: solver.Solution, weight: torch.Tensor) -> None:
    """Codes are equal until a target next to a tie falls to the other side, in that row."""
    same = (eager.codes == kernel.codes).all(1)
    assert same.float().mean() >= 0.8
    torch.testing.assert_close(eager.targets[same], kernel.targets[same], **CLOSE)
    assert kernel.loss == pytest.approx(eager.loss, rel=0.02)


@every_scheme
def test_every_scheme_is_solved_as_by_the_eager_loop(
    scheme: Scheme, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = weight_of(21, 96, seed=seed)
    eager, kernel = both(weight, scheme, factor_of(96, seed), 32, monkeypatch)
    require_same(eager, kernel, weight)


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
@pytest.mark.parametrize(("columns", "block"), [(1, 128), (40, 7), (130, 128), (200, 1000)])
def test_ragged_sizes(
    rows: int, columns: int, block: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = weight_of(rows, columns, seed=seed)
    scheme = Scheme.parse("W4A16_ASYM_G32")
    eager, kernel = both(weight, scheme, factor_of(columns, seed), block, monkeypatch)
    if rows >= 16:
        require_same(eager, kernel, weight)
    assert kernel.codes.min() >= scheme.code_min
    assert kernel.codes.max() <= scheme.code_max


@pytest.mark.parametrize("act_order", [False, True])
def test_the_algorithm_loses_nothing_by_the_kernel(
    act_order: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, statistics = weight_of(48, 160, seed=seed), statistics_of(160, seed=seed)
    errors = []
    for has_kernel in (False, True):
        monkeypatch.setattr(solver, "_has_kernel", lambda device, there=has_kernel: there)
        result = GPTQ(act_order=act_order).quantize(weight, Scheme.parse("W3A16_G32"), statistics)
        errors.append(output_error(weight, result, statistics))
    assert errors[1] == pytest.approx(errors[0], rel=0.03)


def block_of(rows: int, columns: int, seed: int) -> dict[str, torch.Tensor]:
    """Returns the arguments of one block with a grid of step 0.1."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(columns, rows, generator=generator)
    return {
        "target": target,
        "residual": target + 0.01 * torch.randn(columns, rows, generator=generator),
        "codes": torch.full((columns, rows), 99, dtype=torch.int8),
        "errors": torch.full((columns, rows), torch.nan),
        "inner": torch.randn(columns, columns, generator=generator) * 0.1,
        "group": torch.zeros(columns, dtype=torch.int32),
        "scale": torch.full((1, rows), 0.1),
    }


def test_a_block_equals_the_recursion_in_float64(seed: int) -> None:
    block = block_of(20, 33, seed)
    target, residual, inner = (block[name].double() for name in ("target", "residual", "inner"))
    ldlq.solve_block(*block.values(), None, None, (-8, 7))
    for i in reversed(range(33)):
        wanted = target[i] + inner[i, i + 1 :] @ residual[i + 1 :]
        # Follows the kernel's codes, so that one tie does not end the comparison.
        code = block["codes"][i].double()
        assert ((wanted / 0.1).round().clamp(-8, 7) - code).abs().max() <= (
            1 if ((wanted / 0.1) % 1 - 0.5).abs().min() < 1e-3 else 0
        )
        residual[i] -= code * 0.1
        torch.testing.assert_close(block["target"][i].double(), wanted, **CLOSE)
        torch.testing.assert_close(block["errors"][i].double(), wanted - code * 0.1, **CLOSE)
    torch.testing.assert_close(block["residual"].double(), residual, **CLOSE)


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
@every_scheme
def test_on_a_gpu_the_kernel_is_what_solves(scheme: Scheme, seed: int) -> None:
    weight = weight_of(300, 512, seed=seed).cuda()
    hessian = statistics_of(512, seed=seed).hessian.cuda()
    factor = factorise(hessian, 0.01, True)
    assert factor is not None
    grid = fit_grid(weight, scheme, factor.importance())
    kernel = solve(weight, grid, factor, 128)
    eager_solver = solver._eager_solver
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solver, "_kernel_solver", eager_solver)
        eager = solve(weight, grid, factor, 128)
    require_same(eager, kernel, weight)
