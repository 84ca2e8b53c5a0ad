"""int8 times int8: codes and sums to the bit, results against float64 from the same codes.

Buffers are poisoned, integers too, so that a counter that nobody clears and a part that nobody
writes are seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fragment_weights import DEVICE
from int8_cases import assert_exact, case, quantized
from lowbit_kernels.gpu import w8a8
from lowbit_kernels.gpu.w8a8 import Tile, quantize_rows, run, w8a8_linear
from torch import Tensor

numeric = pytest.mark.usefixtures("exact_bf16", "poisoned", "poisoned_integers")
BY_NAME = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
every_dtype = pytest.mark.parametrize("dtype", BY_NAME.values(), ids=BY_NAME)
# Small enough for the interpreter; several tiles, groups of tiles and steps in small shapes.
SMALL = Tile(16, 64, 64, 4, 2, 1)


@pytest.fixture
def poisoned_integers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Like `poisoned`, for integers: fills them, and fails if one beyond the end is written."""
    guarded: list[Tensor] = []
    new_empty, guard = torch.Tensor.new_empty, 4096

    def poison(self: Tensor, *size: Any, **options: Any) -> Tensor:
        result = new_empty(self, *size, **options)
        if result.dtype not in (torch.int8, torch.int32) or type(result) is not Tensor:
            return result
        whole = result.new_full((result.numel() + guard,), 91)
        guarded.append(whole[result.numel() :])
        return whole[: result.numel()].view(result.shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", poison)
    yield
    assert all(bool((tail == 91).all()) for tail in guarded)


@numeric
@every_dtype
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 300), (2, 4096), (2, 16384 + 33)])
@pytest.mark.parametrize("activation_scale", [None, 0.0173])
def test_codes_are_those_of_ieee_division(
    size: tuple[int, int], dtype: torch.dtype, activation_scale: float | None, seed: int
) -> None:
    x = case(size[0], 1, size[1], seed, dtype).x
    codes, scales = quantize_rows(x, activation_scale)
    assert (codes.dtype, scales.dtype) == (torch.int8, torch.float32)
    expected_codes, expected_scales = quantized(x, activation_scale)
    assert np.array_equal(codes.cpu().numpy(), expected_codes)
    assert np.array_equal(scales.cpu().numpy(), expected_scales)
    if activation_scale is None:
        assert (codes.abs().amax(1) == 127).all()


@numeric
@every_dtype
def test_halves_go_to_even_and_given_scales_saturate(dtype: torch.dtype) -> None:
    values = [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.5, 200, 3e4, -127.5, -128.5, -129, -3e4]
    expected = [0, 2, 2, 0, -2, -2, 126, 127, 127, 127, -127, -127, -127, -127]
    x = torch.tensor([values], dtype=dtype, device=DEVICE)
    codes, scales = quantize_rows(x, 1.0)
    assert codes.tolist() == [expected]
    assert scales.tolist() == [1.0]
    codes, _ = quantize_rows(x / 4, 0.25)
    assert codes.tolist() == [expected]


@numeric
@every_dtype
@pytest.mark.parametrize("columns", [70, 16384 + 70], ids=["one block", "two blocks"])
def test_rows_of_zeros_and_of_tiny_numbers_are_safe(dtype: torch.dtype, columns: int) -> None:
    x = torch.zeros(3, columns, dtype=dtype, device=DEVICE)
    x[1] = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the smallest number
    x[2, -1] = -3.0
    codes, scales = quantize_rows(x)
    assert not codes[0].any()
    assert codes[2].tolist() == [0] * (columns - 1) + [-127]
    assert scales.isfinite().all()
    assert (scales > 0).all()
    weight = torch.full((2, columns), 127, dtype=torch.int8, device=DEVICE)
    ones = torch.ones(2, device=DEVICE)
    result = w8a8_linear(x, weight, ones)
    assert not result[0].any()
    assert result.isfinite().all()
    assert torch.equal(w8a8_linear(x, weight, ones, ones)[0], ones.to(dtype))


@numeric
@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy, of the codes of NaN
@pytest.mark.parametrize("activation_scale", [None, 0.1])
@pytest.mark.parametrize("place", [0, 69, 16384 + 20])
def test_a_nan_takes_its_row_and_no_other(place: int, activation_scale: float | None) -> None:
    columns = 70 if place < 70 else 16384 + 70
    given = case(4, 3, columns, 1, torch.float16)
    given.x[2, place] = float("nan")
    result = w8a8_linear(given.x, given.codes, given.scales, None, activation_scale)
    assert result[2].isnan().all()
    assert result[[0, 1, 3]].isfinite().all()


@numeric
@pytest.mark.filterwarnings("ignore:invalid value")
def test_an_infinity_does_not_pass_as_a_number() -> None:
    given = case(3, 5, 70, 1)
    given.x[1, 7] = float("inf")
    result = w8a8_linear(given.x, given.codes, given.scales)
    assert result[1].isnan().all()
    assert result[[0, 2]].isfinite().all()
    saturated = w8a8_linear(given.x, given.codes, given.scales, None, 0.1)
    given.x[1, 7] = 1e30
    assert torch.equal(saturated, w8a8_linear(given.x, given.codes, given.scales, None, 0.1))


TILES = (SMALL, Tile(32, 64, 32, 4, 2, 1), *w8a8._TILES, w8a8._WIDE_TILE)


@numeric
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: "x".join(map(str, tile[:3])))
@pytest.mark.parametrize("size", [(1, 1, 1), (5, 67, 37), (16, 64, 256), (35, 300, 520)])
@pytest.mark.parametrize("split", [1, 2, 5])
def test_sums_are_those_of_integers(
    tile: Tile, size: tuple[int, int, int], split: int, seed: int
) -> None:
    m, n, k = size
    generator = torch.Generator().manual_seed(seed)
    ints = torch.randint(-127, 128, (m, k), generator=generator)
    codes = torch.randint(-128, 128, (n, k), generator=generator)
    expected = ints @ codes.T
    ones = torch.ones(n, device=DEVICE)
    x, weight = ints.float().to(DEVICE), codes.to(torch.int8).to(DEVICE)
    result = run(x, weight, ones, None, 1.0, w8a8.fitting(tile, 0), split)
    assert torch.equal(result.cpu(), expected.float())


@numeric
@pytest.mark.parametrize("split", [1, 3])
def test_the_largest_sums_do_not_saturate(split: int) -> None:
    """-127 * -128 * K is near 2^30; tensor cores may clamp sums, floats would lose the ones."""
    x = torch.full((2, 2**16), -127.0, device=DEVICE)
    codes = torch.full((3, 2**16), -128, dtype=torch.int8, device=DEVICE)
    codes[1] = 127
    tile = Tile(16, 64, 1024, 4, 1, 1) if DEVICE == "cpu" else SMALL
    result = run(x, codes, torch.ones(3, device=DEVICE), None, 1.0, tile, split)
    assert result.tolist() == [[127.0 * 2**23, -(127.0**2) * 2**16, 127.0 * 2**23]] * 2


@numeric
def test_results_do_not_depend_on_tiles_or_split(seed: int) -> None:
    given = case(20, 130, 600, seed)
    arguments = given.x, given.codes, given.scales, given.bias, None
    expected = run(*arguments, SMALL, 1)
    for tile in TILES[1:]:
        for split in (1, 4):
            assert torch.equal(run(*arguments, w8a8.fitting(tile, 0), split), expected)
    # More tiles of M than a group has, the last group not full.
    given = case(16 * 11 + 3, 130, 64, seed)
    arguments = given.x, given.codes, given.scales, None, None
    expected = run(*arguments, Tile(256, 64, 64, 8, 2, 1), 1)
    assert torch.equal(run(*arguments, SMALL, 1), expected)
    assert torch.equal(run(*arguments, SMALL, 2), expected)


@numeric
@every_dtype
@pytest.mark.parametrize("activation_scale", [None, 0.02])
@pytest.mark.parametrize(
    ("size", "scale_dtype"),
    [
        ((1, 70, 1040), torch.float16),
        ((17, 65, 133), torch.bfloat16),
        ((33, 129, 1536), torch.float32),
        ((66, 64, 1024), torch.float32),
    ],
)
def test_results_are_exact_but_for_rounding(
    size: tuple[int, int, int],
    scale_dtype: torch.dtype,
    dtype: torch.dtype,
    activation_scale: float | None,
    seed: int,
) -> None:
    given = case(*size, seed, dtype, scale_dtype)
    for bias in (None, given.bias):
        result = w8a8_linear(given.x, given.codes, given.scales, bias, activation_scale)
        assert result.dtype == dtype
        assert_exact(result, given, bias, activation_scale)
    again = w8a8_linear(given.x, given.codes, given.scales, given.bias, activation_scale)
    assert torch.equal(result, again)


@numeric
def test_any_shape_and_stride_of_activations(seed: int) -> None:
    given = case(12, 33, 64, seed, torch.float16)
    flat = given.x

    def linear(x: Tensor) -> Tensor:
        return w8a8_linear(x, given.codes, given.scales, given.bias)

    expected = linear(flat)
    assert torch.equal(linear(flat.view(3, 4, 64)), expected.view(3, 4, 33))
    assert torch.equal(linear(flat[5]), expected[5])
    assert torch.equal(linear(flat.T.contiguous().T), expected)
    assert torch.equal(linear(torch.stack([flat, flat + 1], dim=2)[..., 0]), expected)
    assert torch.equal(linear(torch.cat([flat, flat], dim=1)[:, :64]), expected)
    swapped = flat.view(3, 4, 64).transpose(0, 1)
    assert torch.equal(linear(swapped), expected.view(3, 4, 33).transpose(0, 1))
    codes, scales = quantize_rows(swapped)
    assert codes.shape == (12, 64)
    assert torch.equal(codes[1], quantize_rows(flat[4])[0][0])
    assert scales.shape == (12,)


def test_nothing_in_nothing_out() -> None:
    given = case(2, 33, 64, 1, torch.float16)
    x = torch.empty(2, 0, 64, dtype=torch.float16, device=DEVICE, requires_grad=True)
    bias = given.bias.requires_grad_()
    result = w8a8_linear(x, given.codes, given.scales, bias)
    assert (result.shape, result.dtype) == ((2, 0, 33), torch.float16)
    result.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert bias.grad is not None
    assert not bias.grad.any()
    assert w8a8_linear(given.x, given.codes[:0], given.scales[:0]).shape == (2, 0)
    codes, scales = quantize_rows(x)
    assert (codes.shape, scales.shape) == ((0, 64), (0,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 64, dtype=torch.int8)}, "x is torch.int8; float16"),
        ({"x": torch.zeros(2, 63)}, r"\[2, 63\].*64 input features"),
        ({"x": torch.zeros(())}, "one column or more"),
        ({"x": torch.zeros(2, 0)}, "one column or more"),
        ({"x": torch.zeros(2, 64, device="meta")}, "x is on meta, but the weight"),
        ({"codes": torch.zeros(33, 64)}, "codes are torch.float32.*int8"),
        ({"codes": torch.zeros(64, 33, dtype=torch.int8).T}, "contiguous int8"),
        ({"codes": torch.zeros(33, 64, 1, dtype=torch.int8)}, r"\[N, K\] is needed"),
        ({"codes": torch.zeros(1, 2**17, dtype=torch.int8)}, "131072 columns"),
        ({"scales": torch.ones(32)}, r"scales is torch.float32 \[32\].*\[33\]"),
        ({"scales": torch.ones(33, dtype=torch.int32)}, "scales is torch.int32"),
        ({"scales": torch.ones(66)[::2]}, r"scales is on .* strides \[2\]"),
        ({"scales": torch.ones(33, device="meta")}, "scales is on meta"),
        ({"bias": torch.ones(33, 1)}, r"bias is torch.float32 \[33, 1\]"),
        ({"activation_scale": 0.0}, "activation_scale is 0.0"),
        ({"activation_scale": -1.0}, "activation_scale is -1.0"),
        ({"activation_scale": float("nan")}, "activation_scale is nan"),
        ({"activation_scale": float("inf")}, "activation_scale is inf"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(2, 64),
        "codes": torch.zeros(33, 64, dtype=torch.int8),
        "scales": torch.ones(33),
        "bias": torch.ones(33),
        "activation_scale": None,
        **change,
    }
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.device.type == "cpu":
            strides = value.stride()
            moved = value.to(DEVICE)
            arguments[name] = moved if moved.stride() == strides else value
    with pytest.raises(ValueError, match=message) as caught:
        w8a8_linear(**arguments)
    assert "\n" not in str(caught.value)


def test_the_cpu_is_refused_where_nothing_interprets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(w8a8, "_INTERPRETED", False)
    with pytest.raises(ValueError, match="x is on the CPU; the kernels run on CUDA"):
        quantize_rows(torch.zeros(2, 64))


# Multiprocessors and bytes of shared memory.
CHIPS = {
    "sm80": (108, 166912),
    "sm89": (128, 101376),
    "sm90": (132, 232448),
    "gfx942": (304, 65536),
}


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("shape", [(1024, 4096), (28672, 8192), (4096, 14336), (48, 100), (1, 1)])
def test_tiles_fit_the_chip(
    chip: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    processors, shared = CHIPS[chip]
    monkeypatch.setattr(w8a8, "_device", lambda index: CHIPS[chip])
    w8a8.choose.cache_clear()
    try:
        for exponent in range(4, 15):
            m = 2**exponent
            tile, split = w8a8.choose(0, m, *shape)
            assert tile.stages >= 1
            assert tile.stages * (tile.block_m + tile.block_n) * tile.block_k <= shared
            assert tile.block_m >= min(m, 128)
            tiles = -(-m // tile.block_m) * -(-shape[0] // tile.block_n)
            assert split == 1 or shape[1] // split >= 512
            # Parts of a split are on the chip at once, so their room does not grow with M.
            assert split == 1 or tiles * split <= 1.5 * tile.per_sm * processors
    finally:
        w8a8.choose.cache_clear()
