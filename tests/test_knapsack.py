"""The knapsack against brute force, and at the size of large models."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from lowbit.allocation.knapsack import pack


def brute_force(sizes: list[list[int]], losses: list[list[float]], budget: int) -> float:
    """Returns the least loss of all choices within the budget."""
    best = float("inf")
    for picks in itertools.product(*(range(len(options)) for options in sizes)):
        if sum(s[p] for s, p in zip(sizes, picks, strict=True)) <= budget:
            best = min(best, sum(row[p] for row, p in zip(losses, picks, strict=True)))
    return best


def instance(seed: int, groups: int, kind: str) -> tuple[list[list[int]], list[list[float]]]:
    """Returns random sizes and losses: unrelated, falling with size, or nearly proportional."""
    rng = np.random.default_rng(seed)
    sizes, losses = [], []
    for _ in range(groups):
        count = int(rng.integers(1, 6))
        size = rng.integers(0, 60, count)
        loss = rng.random(count)
        if kind == "falling":
            loss = rng.random() * np.exp(-size / 20)
        elif kind == "proportional":  # the hardest: all options gain the same for a byte
            loss = (70 - size + rng.integers(0, 3, count)).astype(float)
        sizes.append([int(s) for s in size])
        losses.append([float(row) for row in loss])
    return sizes, losses


@pytest.mark.parametrize("kind", ["unrelated", "falling", "proportional"])
@pytest.mark.parametrize("seed", range(12))
def test_pack_is_as_good_as_brute_force_at_every_budget(kind: str, seed: int) -> None:
    sizes, losses = instance(seed, 5, kind)
    low, high = sum(map(min, sizes)), sum(map(max, sizes))
    for budget in sorted({low, low + 1, (low + high) // 3, (low + high) // 2, high - 1, high + 9}):
        if budget < low:
            continue
        packing = pack(sizes, losses, budget)
        assert packing.loss == pytest.approx(brute_force(sizes, losses, budget), abs=1e-12)
        assert packing.size <= budget
        assert packing.size == sum(s[p] for s, p in zip(sizes, packing.picks, strict=True))
        assert packing.gap == 0


def test_of_equally_good_choices_the_smaller_is_taken() -> None:
    assert pack([[4, 3, 9]], [[1.0, 1.0, 1.0]], 100).picks == (1,)


def test_a_budget_that_the_smallest_options_exceed_is_refused() -> None:
    with pytest.raises(ValueError, match="sum to 7, above the budget of 6"):
        pack([[3, 5], [4, 9]], [[1, 0], [1, 0]], 6)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        pack([[1]], [[float("nan")]], 10)


@pytest.mark.parametrize("max_states", [1, 3, 10])
def test_with_too_few_states_the_bound_is_still_one(max_states: int) -> None:
    gaps = []
    for seed in range(12):
        sizes, losses = instance(seed, 6, "unrelated")
        budget = (sum(map(min, sizes)) + sum(map(max, sizes))) // 2
        packing = pack(sizes, losses, budget, max_states)
        best = brute_force(sizes, losses, budget)
        assert packing.bound <= best + 1e-12
        assert packing.loss >= best - 1e-12
        assert packing.size <= budget
        gaps.append(packing.gap)
        assert packing.loss * (1 - packing.gap) == pytest.approx(packing.bound)
    assert max(gaps) > 0 or max_states > 1


@pytest.mark.parametrize("blocks", [32, 80])
def test_a_large_decoder_takes_seconds_and_is_exact(blocks: int) -> None:
    shapes = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]  # qkv, o, gate_up, down
    rng = np.random.default_rng(0)
    options = [(bits, group) for bits in (2, 3, 4, 8) for group in (32, 64, 128)]
    sizes, losses = [], []
    for rows, columns in shapes * blocks:
        sizes.append([rows * columns * b // 8 + 2 * rows * columns // g for b, g in options])
        scale = float(rng.lognormal(sigma=1.0))
        error = [4.0**-b * g**0.3 * rng.lognormal(sigma=0.05) for b, g in options]
        losses.append([scale * float(e) for e in error])
    weights = sum(rows * columns for rows, columns in shapes * blocks)
    for bits in (2.6, 3.5, 4.25):
        start = time.process_time()
        packing = pack(sizes, losses, int(weights * bits / 8))
        assert time.process_time() - start < 5
        assert packing.gap == 0
