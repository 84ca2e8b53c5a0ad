"""Statistics of activations: the mean of x x^T, whatever the batches, and what is left out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.calibration.statistics import TOKENS_PER_CHUNK, HessianAccumulator
from lowbit.errors import LowbitError


def reference(x: torch.Tensor) -> np.ndarray:
    """Returns the mean of x x^T over tokens in float64."""
    x_TK = x.double().flatten(0, -2).numpy()
    return np.einsum("tk,tl->kl", x_TK, x_TK) / x_TK.shape[0]


def assert_close(hessian: torch.Tensor, expected: np.ndarray) -> None:
    """Asserts equality up to fp32 rounding, relative to the largest entry.

    A product over 2048 tokens rounds 2048 times: about sqrt(2048) * 2^-24 = 3e-6 at the worst.
    """
    assert hessian.dtype == torch.float32
    assert np.abs(hessian.double().numpy() - expected).max() <= 1e-5 * np.abs(expected).max()


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    features=st.integers(1, 24),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_mean_does_not_depend_on_the_batches(
    sizes: list[int], features: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(sum(sizes), features, generator=generator) * 3).to(dtype)
    accumulator = HessianAccumulator(features, "cpu")
    for part in x.split(sizes):
        accumulator.add(part)
    statistics = accumulator.statistics()
    assert (statistics.tokens, statistics.dropped) == (sum(sizes), 0)
    assert_close(statistics.hessian, reference(x.float()))


def test_every_leading_dimension_and_chunk_is_counted() -> None:
    x = torch.randn(3, TOKENS_PER_CHUNK - 5, 4, generator=torch.Generator().manual_seed(0))
    accumulator = HessianAccumulator(4)
    accumulator.add(x)
    accumulator.add(x[0, 0])
    statistics = accumulator.statistics()
    assert statistics.tokens == 3 * (TOKENS_PER_CHUNK - 5) + 1
    assert_close(statistics.hessian, reference(torch.cat([x.flatten(0, 1), x[0, :1]])))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_vectors_that_are_not_finite_are_left_out_and_counted(bad: float) -> None:
    x = torch.randn(1000, 6, generator=torch.Generator().manual_seed(0))
    spoiled = x.clone()
    spoiled[17, 3] = bad
    spoiled[18] = bad
    accumulator = HessianAccumulator(6)
    accumulator.add(spoiled)
    statistics = accumulator.statistics()
    assert (statistics.tokens, statistics.dropped) == (998, 2)
    assert_close(statistics.hessian, reference(torch.cat([x[:17], x[19:]])))


def test_too_many_vectors_that_are_not_finite_are_refused() -> None:
    x = torch.randn(1000, 6)
    x[:10, 0] = float("nan")
    at_the_limit = HessianAccumulator(6)
    at_the_limit.add(x)
    assert at_the_limit.statistics().dropped == 10
    above = HessianAccumulator(6)
    above.add(x)
    above.add(x[:1])
    with pytest.raises(LowbitError, match=r"11 of 1001 input vectors .* bfloat16 or float32"):
        above.statistics()
    nothing_left = HessianAccumulator(6)
    nothing_left.add(torch.full((4, 6), float("nan")))
    with pytest.raises(LowbitError, match="4 of 4"):
        nothing_left.statistics()


def test_a_layer_without_tokens_is_refused() -> None:
    accumulator = HessianAccumulator(6)
    accumulator.add(torch.empty(0, 6))
    with pytest.raises(LowbitError, match="saw no token"):
        accumulator.statistics()


def test_inputs_of_another_width_are_refused() -> None:
    with pytest.raises(LowbitError, match="got inputs of 5 features, expected 6"):
        HessianAccumulator(6).add(torch.randn(2, 5))


def test_statistics_are_one_shared_object_and_end_the_accumulation() -> None:
    accumulator = HessianAccumulator(6)
    accumulator.add(torch.randn(9, 6))
    assert accumulator.statistics() is accumulator.statistics()
    with pytest.raises(RuntimeError, match="must not change"):
        accumulator.add(torch.randn(9, 6))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_products_on_a_gpu_lose_nothing(dtype: torch.dtype) -> None:
    x = torch.randn(5000, 192, generator=torch.Generator().manual_seed(0)).to(dtype)
    accumulator = HessianAccumulator(192, "cuda")
    accumulator.add(x.cuda())
    expected = x.double().T @ x.double() / 5000
    found = accumulator.statistics().hessian.double().cpu()
    assert ((found - expected).norm() / expected.norm()) < 1e-5
