"""Double quantization: against a scalar reference, and the properties its design is for."""

from __future__ import annotations

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.quant.double_quant import double_quantize

both_signs = pytest.mark.parametrize("signed", [False, True], ids=["positive", "signed"])


def random_scales(rows: int, groups: int, signed: bool, seed: int = 0) -> torch.Tensor:
    """Returns log-normal scales as of a trained matrix, exact in fp16."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.exp(torch.randn(rows, groups, generator=generator) * 0.5 - 5).half().float()
    if signed:
        scales *= torch.where(torch.rand(rows, groups, generator=generator) < 0.5, -1.0, 1.0)
    return scales


@both_signs
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (16, 16), (5, 103), (64, 13)])
def test_decoded_scales_are_the_nearest_of_their_block(
    shape: tuple[int, int], signed: bool
) -> None:
    scales = random_scales(*shape, signed)
    stored = double_quantize(scales, signed)
    assert stored.codes.shape == shape
    reference = oracles.double_quantize(scales.flatten().tolist(), signed)
    for got, (expected, step) in zip(
        stored.decode(torch.float32).flatten().tolist(), reference, strict=True
    ):
        # A scale halfway between two codes may take either: equal error, half a step.
        assert abs(got - expected) <= 1e-6 * abs(expected) or step * 0.999 <= abs(
            got - expected
        ) <= (step * 1.001)


@both_signs
@settings(deadline=None)
@given(data=st.data())
def test_any_scale_keeps_its_sign_and_is_off_by_half_a_step(
    data: st.DataObject, signed: bool
) -> None:
    count = data.draw(st.integers(1, 600))
    seed = data.draw(st.integers(0, 2**31))
    outlier = data.draw(st.sampled_from([1.0, 30.0, 1000.0]))
    scales = random_scales(1, count, signed, seed)
    scales[0, seed % count] *= outlier
    stored = double_quantize(scales, signed)
    decoded = stored.decode(torch.float32)
    block = torch.arange(count) // 256
    step = stored.step.float()[block]
    assert torch.equal(decoded.sign(), scales.sign())  # none became zero either
    assert bool(((decoded - scales).abs()[0] <= 0.5001 * step + 1e-6 * scales.abs()[0]).all())


@both_signs
def test_equal_scales_survive_exactly_when_bf16_holds_them(signed: bool) -> None:
    scales = torch.full((4, 100), 0.0078125 * 1.5)
    assert torch.equal(double_quantize(scales, signed).decode(torch.float16), scales)


@both_signs
def test_one_huge_scale_disturbs_only_its_own_block(signed: bool) -> None:
    scales = random_scales(4, 256, signed)
    disturbed = scales.clone()
    disturbed[2, 17] = 5.0
    before = double_quantize(scales, signed).decode(torch.float32)
    after = double_quantize(disturbed, signed).decode(torch.float32)
    assert torch.equal(before[[0, 1, 3]], after[[0, 1, 3]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_decoded_scales_are_exact_in_the_scale_dtype(dtype: torch.dtype) -> None:
    decoded = double_quantize(random_scales(8, 40, True), True).decode(dtype)
    assert torch.equal(decoded, decoded.to(dtype).float())
