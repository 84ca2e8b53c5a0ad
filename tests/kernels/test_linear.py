"""The fused kernel: bits where bits are defined, and elsewhere errors against float64.

Identity activations print what the kernel multiplies with: one weight per sum, no rounding but the
last. Buffers are poisoned, so that what a kernel fails to write is NaN.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from fragment_weights import (
    DEVICE,
    fragment,
    needs_interpreter,
    random_fragment,
    random_qweight,
)
from lowbit_kernels.gpu import matmul
from lowbit_kernels.gpu.configs import Tile
from lowbit_kernels.gpu.matmul import constants, run_fused
from lowbit_kernels.gpu.weight import FragmentWeight, concatenate
from schemes import every_scheme
from torch import Tensor

from lowbit.quant import QuantizedWeight
from lowbit.scheme import Scheme

pytestmark = pytest.mark.usefixtures("exact_bf16", "poisoned")

every_dtype = pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, pytest.param(torch.float32, marks=needs_interpreter)],
    ids=["fp16", "bf16", "fp32"],
)
half_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"]
)
either_order = pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
# One of every kind of decoding, of scales, and of MODE.
SCHEMES = ("W2A16_ASYM_G32", "W3A16_ASYM_G64", "W3A16_CHANNEL", "W4A16_G64_DQ", "W4A16", "NF4_DQ",
           "W8A16_ASYM_CHANNEL", "W8A16_ASYM_G64", "FP4_G32_FP32")  # fmt: skip
few_schemes = pytest.mark.parametrize("scheme", SCHEMES)
DQ_SCHEMES = ("W4A16_G64_DQ", "W4A16_ASYM_G64_DQ", "NF4_DQ", "W2A16_G16_DQ", "W8A16_CHANNEL_DQ")
GROUP_SIZES = (None, 16, 24, 32, 40, 64, 96, 120, 128, 192, 256)


def fused(x: Tensor, weight: FragmentWeight, bias: Tensor | None = None, **tile: int) -> Tensor:
    """Returns `x W^T + bias` by the fused kernel with small tiles, and checks the counters."""
    chosen = {"block_m": 16, "block_n": 64, "warps": 4, "stages": 2, "split": 1, **tile}
    result = run_fused(x, weight, bias, Tile(**chosen))
    assert result.dtype == x.dtype
    assert not weight.counters.any()
    return result


def printed(weight: FragmentWeight, dtype: torch.dtype, **tile: int) -> Tensor:
    """Returns the weight as the fused kernel sees it, `[N, K]`."""
    eye = torch.eye(weight.in_features, dtype=dtype, device=DEVICE)
    return fused(eye, weight, **tile).T.cpu()


def multiplied(qweight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Returns what the fused kernel is documented to multiply with, float32 `[N, K]`.

    Integers are exact; a codebook's levels are rounded to `dtype` before they are scaled.
    """
    grid, levels = qweight.grid(), qweight.scheme.levels
    if levels is None:
        return qweight.dequantize(torch.float32)
    table = torch.tensor(levels, dtype=torch.float32).to(dtype).float()
    return table[qweight.codes().long() + 8] * grid.per_column(grid.scales)


def order_columns(monkeypatch: pytest.MonkeyPatch, wide: bool) -> None:
    """Makes the kernel run as on chips with wgmma (False) or with mma.sync alone (True)."""
    monkeypatch.setattr(matmul, "_multiplies_with_mma_sync", lambda index: wide)


def activations(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def assert_as_exact_as_torch(
    result: Tensor, x: Tensor, qweight: QuantizedWeight, bias: Tensor | None = None
) -> None:
    """Fails if the error against float64 is more than twice that of plain PyTorch."""
    weight = qweight.dequantize(torch.float32)
    exact = F.linear(x.double().cpu(), weight.double(), None if bias is None else bias.double())
    plain_bias = None if bias is None else bias.to(x.dtype).to(DEVICE)
    plain = F.linear(x, weight.to(x.dtype).to(DEVICE), plain_bias)
    ours = (result.double().cpu() - exact).abs().max()
    assert ours <= 2 * (plain.double().cpu() - exact).abs().max() + torch.finfo(x.dtype).tiny


@every_scheme
@every_dtype
@pytest.mark.parametrize("block_m", [64, 128], ids=["post", "pre"])
def test_identity_activations_print_the_decoded_weight(
    scheme: Scheme, dtype: torch.dtype, block_m: int, seed: int
) -> None:
    qweight = random_qweight(scheme, (40, 168), seed)
    result = printed(fragment(qweight), dtype, block_m=block_m)
    assert torch.equal(result, multiplied(qweight, dtype).to(dtype))
    if scheme.codebook is None:
        assert torch.equal(result, qweight.dequantize(dtype))


@either_order
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("in_features", [300, 64])
@pytest.mark.parametrize("block_m", [64, 128], ids=["post", "pre"])
def test_every_size_of_groups_and_order_of_columns(
    group_size: int | None,
    in_features: int,
    block_m: int,
    wide: bool,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last group is short, or the only one is larger than the row."""
    order_columns(monkeypatch, wide)
    bits = (2, 3, 4, 8)[seed % 4]
    scheme = Scheme(bits=bits, group_size=group_size, symmetric=bool(seed & 4))
    qweight = random_qweight(scheme, (70, in_features), seed)
    # Ones at a few columns, so that M stays small: both ends, and both sides of group borders.
    columns = {0, in_features - 1, *range(group_size or 64, in_features, group_size or 64)}
    columns |= {column - 1 for column in columns if column} | {seed % in_features}
    picked = torch.tensor(sorted(columns))
    x = torch.zeros(len(picked), in_features, dtype=torch.float16, device=DEVICE)
    x[torch.arange(len(picked)), picked.to(DEVICE)] = 1
    result = fused(x, fragment(qweight), block_m=block_m).T.cpu()
    assert torch.equal(result, qweight.dequantize(torch.float16)[:, picked])


@either_order
@pytest.mark.parametrize("name", ["W2A16_G64", "W3A16_ASYM_G128", "W4A16_ASYM_G16", "NF4", "W8A16"])
def test_either_order_of_columns_multiplies_the_same(
    name: str, wide: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    order_columns(monkeypatch, wide)
    qweight = random_qweight(name, (40, 150), seed)
    for dtype in (torch.float16, torch.bfloat16):
        found = printed(fragment(qweight), dtype, block_m=64)
        assert torch.equal(found, multiplied(qweight, dtype).to(dtype))


def test_the_mode_is_that_of_the_group_size_and_the_rows() -> None:
    weights = {"row": "W4A16_CHANNEL", "post": "W4A16_G64", "pre": "W4A16_G32"}
    for mode, name in weights.items():
        weight = random_fragment(name, (64, 256), 0)
        groups = weight.scale.shape[0]
        assert constants(weight.format, groups, "fp16", 64, False)["MODE"] == mode
        many = constants(weight.format, groups, "fp16", 128, False)["MODE"]
        assert many == ("row" if mode == "row" else "pre")


@few_schemes
@half_dtypes
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 64, 65, 130])
def test_error_is_at_most_twice_that_of_torch(
    scheme: str, dtype: torch.dtype, rows: int, seed: int
) -> None:
    qweight = random_qweight(scheme, (64 if rows > 17 else 100, 200), seed)
    x = activations((rows, 200), dtype, seed)
    block_m = min(128, max(16, 1 << (rows - 1).bit_length()))
    result = fused(x, fragment(qweight), block_m=block_m)
    assert_as_exact_as_torch(result, x, qweight)


@needs_interpreter
@few_schemes
@pytest.mark.parametrize("block_m", [16, 128])
@pytest.mark.parametrize("split", [1, 2])
def test_float32_activations_lose_nothing_but_what_sums_round(
    scheme: str, block_m: int, split: int, seed: int
) -> None:
    """So no scale, level or part of a sum passes through 16 bits, whatever the activations are."""
    qweight = random_qweight(scheme, (100, 200), seed)
    x = activations((9, 200), torch.float32, seed)
    result = fused(x, fragment(qweight), block_m=block_m, split=split).double()
    weight = qweight.dequantize(torch.float32).double()
    bound = 200**0.5 * 2.0**-23 * (x.double().abs() @ weight.abs().T)
    assert bool(((result - x.double() @ weight.T).abs() <= bound).all())


@pytest.mark.parametrize("scheme", ["W4A16_G64", "W4A16_ASYM_G32", "W3A16_CHANNEL", "NF4_DQ"])
@pytest.mark.parametrize("split", [1, 2, 3, 4, 5])
def test_split_sums_are_right_repeatable_and_leave_the_counters_at_zero(
    scheme: str, split: int, seed: int
) -> None:
    """In 3 steps of 128 columns: parts of unequal size, and with 4 and 5 parts empty ones."""
    qweight = random_qweight(scheme, (100, 300), seed)
    weight, x = fragment(qweight), activations((5, 300), torch.float16, seed)
    bias = activations((100,), torch.float16, seed + 1)
    first = fused(x, weight, bias, split=split)
    assert_as_exact_as_torch(first, x, qweight, bias.cpu())
    assert torch.equal(fused(x, weight, bias, split=split), first)


@pytest.mark.parametrize("split", [2, 3])
def test_split_sums_add_the_parts_in_order(split: int, seed: int) -> None:
    weight = random_fragment("W4A16_CHANNEL", (64, 384), seed)
    weight = dataclasses.replace(weight, scale=torch.ones_like(weight.scale))
    x = activations((2, 384), torch.float32 if DEVICE == "cpu" else torch.float16, seed)
    steps = [part * 3 // split for part in range(split + 1)]
    total = torch.zeros(2, 64, device=DEVICE)
    for first, last in itertools.pairwise(steps):
        only = torch.zeros_like(x)
        only[:, 128 * first : 128 * last] = x[:, 128 * first : 128 * last]
        total += fused(only, weight).float()
    result = fused(x, weight, split=split)
    if DEVICE == "cpu":
        assert torch.equal(result, total)
    else:
        torch.testing.assert_close(result.float(), total, rtol=2e-3, atol=0.2)


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if "G32" not in name])
@pytest.mark.parametrize("bias_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_bias_is_added_before_the_only_rounding(
    scheme: str, bias_dtype: torch.dtype, seed: int
) -> None:
    """Small groups are left out: there a weight is rounded before the sum, too."""
    qweight = random_qweight(scheme, (70, 64), seed)
    bias = activations((70,), bias_dtype, seed)
    eye = torch.eye(64, dtype=torch.float16, device=DEVICE)
    result = fused(eye, fragment(qweight), bias, block_m=64)
    expected = multiplied(qweight, torch.float16).T + bias.float().cpu()
    assert torch.equal(result.cpu(), expected.half())


@pytest.mark.parametrize("scheme", ["W4A16_G64", "W4A16_ASYM_G32", "NF4_DQ"])
def test_rows_of_activations_do_not_depend_on_each_other(scheme: str, seed: int) -> None:
    """M beyond block_m is cut into tiles; the result of a row is the same wherever it lies."""
    weight = random_fragment(scheme, (70, 200), seed)
    x = activations((50, 200), torch.float16, seed)
    x[:, 7] = 0
    together = fused(x, weight)
    assert torch.equal(together[16:32], fused(x[16:32], weight))
    assert torch.equal(together[48:], fused(x[48:], weight))
    x[20] = float("nan")
    spoiled = fused(x, weight)
    assert spoiled[20].isnan().all()
    others = torch.arange(50) != 20
    assert torch.equal(spoiled[others], together[others])


@half_dtypes
def test_what_lies_beside_the_activations_is_not_read(dtype: torch.dtype, seed: int) -> None:
    qweight = random_qweight("W4A16_G32", (64, 200), seed)
    weight = fragment(qweight)
    buffer = torch.full((20, 333), float("nan"), dtype=dtype, device=DEVICE)
    x = buffer[3:8, 9:209]
    x.copy_(activations((5, 200), dtype, seed))
    assert torch.equal(fused(x, weight), fused(x.contiguous(), weight))


def test_broadcast_rows_of_activations(seed: int) -> None:
    weight = random_fragment("W4A16_G32", (64, 200), seed)
    x = activations((1, 200), torch.float16, seed).expand(5, 200)
    assert torch.equal(fused(x, weight), fused(x.contiguous(), weight))


@few_schemes
@pytest.mark.parametrize("block_m", [16, 128])
def test_padding_may_hold_anything(scheme: str, block_m: int, seed: int) -> None:
    """Scales of rows beyond N are NaN here, and codes of padding random."""
    weight = random_fragment(scheme, (70, 200), seed).with_decoded_scales()
    form = weight.format
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**form.bits, (128, 256), generator=generator, dtype=torch.uint8)
    codes[:70, :200] = weight.codes().cpu()
    ones = torch.ones(128, form.groups(256), dtype=form.torch_scale_dtype)
    zero = None if form.symmetric else torch.zeros(ones.shape, dtype=torch.uint8)
    random = FragmentWeight.from_codes(form, codes, ones, zero)
    scale = weight.scale.clone()
    scale[:, 70:] = float("nan")
    plane = None if random.plane is None else random.plane.to(DEVICE)
    noisy = dataclasses.replace(weight, words=random.words.to(DEVICE), plane=plane, scale=scale)
    x = activations((5, 200), torch.float16, seed)
    expected = fused(x, weight, block_m=block_m)
    assert torch.equal(fused(x, noisy, block_m=block_m), expected)
    assert expected.isfinite().all()


@pytest.mark.parametrize("scheme", DQ_SCHEMES)
@pytest.mark.parametrize("block_m", [16, 128])
@half_dtypes
def test_scales_decoded_in_the_kernel_or_before_give_the_same_bits(
    scheme: str, block_m: int, dtype: torch.dtype, seed: int
) -> None:
    # More than 256 scales: several blocks, and rows that begin in the middle of one.
    coded = random_fragment(scheme, (260 if "CHANNEL" in scheme else 70, 330), seed)
    x = activations((5, 330), dtype, seed)
    result = fused(x, coded, block_m=block_m)
    assert torch.equal(fused(x, coded.with_decoded_scales(), block_m=block_m), result)


@pytest.mark.parametrize("scheme", ["W4A16_ASYM_G64", "W3A16_G32", "NF4_DQ", "W8A16_ASYM_CHANNEL"])
def test_concatenated_weights_multiply_like_their_parts(scheme: str, seed: int) -> None:
    sizes = (70, 64, 20)
    parts = [
        random_fragment(scheme, (n, 200), seed + i).with_decoded_scales()
        for i, n in enumerate(sizes)
    ]
    whole = concatenate(parts)
    x = activations((5, 200), torch.float16, seed)
    result = fused(x, whole, split=2)
    start = 0
    for part in parts:
        expected = fused(x, part, split=2)
        stop = start + part.out_features
        assert torch.equal(result[:, start:stop], expected)
        view = whole.rows(start, start + part.padded_rows, part.out_features)
        assert torch.equal(fused(x, view, split=2), expected)
        start += part.padded_rows


@pytest.mark.parametrize(
    ("shape", "block_n"),
    [
        ((1, 1), 64),
        ((1, 200), 64),
        ((64, 16), 64),
        ((65, 128), 64),
        ((65, 128), 128),
        ((128, 129), 128),
    ],
)
@pytest.mark.parametrize("scheme", ["W4A16_ASYM_G32", "W3A16_G64", "NF4_CHANNEL"])
def test_sizes_at_the_edges_of_tiles(
    shape: tuple[int, int], block_n: int, scheme: str, seed: int
) -> None:
    qweight = random_qweight(scheme, shape, seed)
    weight = fragment(qweight)
    eye = torch.eye(shape[1], dtype=torch.float16, device=DEVICE)[-16:]
    result = fused(eye, weight, block_n=block_n).T.cpu()
    assert torch.equal(result, multiplied(qweight, torch.float16).half()[:, -16:])


@pytest.mark.parametrize("scheme", ["W8A16_ASYM_CHANNEL", "W8A16_ASYM_G64", "W4A16_G128"])
@pytest.mark.parametrize("split", [1, 2])
def test_sums_far_beyond_float16_are_scaled_back_into_it(
    scheme: str, split: int, seed: int
) -> None:
    """Sums of x * (code - zero) are millions on the way: nothing there may be float16."""
    qweight = random_qweight(scheme, (64, 256), seed)
    weight = fragment(qweight)
    grid = qweight.grid()
    levels = dataclasses.replace(grid, scales=torch.ones_like(grid.scales))
    weight = dataclasses.replace(weight, scale=torch.full_like(weight.scale, 2.0**-14))
    x = activations((16, 256), torch.float32, seed).mul(20000).clamp(-60000, 60000).half()
    exact = x.double().cpu() @ levels.dequantize(qweight.codes()).double().T
    assert exact.abs().max() > 1e6
    result = fused(x, weight, split=split).double().cpu()
    # Half a unit in the last place of float16, and what float32 sums round.
    error, exact = (result - exact * 2.0**-14).abs(), exact * 2.0**-14
    assert bool((error <= 2.0**-10 * exact.abs() + 1e-2).all())
