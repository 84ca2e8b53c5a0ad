"""Decoding a whole weight: bit for bit what `QuantizedWeight.dequantize` gives."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import triton
import triton.language as tl
from fragment_weights import DEVICE, fragment, random_fragment, random_qweight
from lowbit_kernels.gpu.decode import tile_offsets
from lowbit_kernels.gpu.dequantize import dequantize_into, tile_group
from lowbit_kernels.gpu.matmul import dequantize, grad_input
from lowbit_kernels.gpu.weight import concatenate
from schemes import every_scheme

from lowbit.scheme import Scheme

pytestmark = pytest.mark.usefixtures("exact_bf16", "poisoned")

every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"]
)
GROUP_SIZES = (None, 16, 24, 32, 40, 64, 96, 120, 128, 192, 256)


@every_scheme
@every_dtype
@pytest.mark.parametrize("shape", [(33, 168), (70, 20)])
def test_decoding_is_that_of_the_reference(
    scheme: Scheme, dtype: torch.dtype, shape: tuple[int, int], seed: int
) -> None:
    qweight = random_qweight(scheme, shape, seed)
    result = dequantize(fragment(qweight), dtype)
    assert result.dtype == dtype
    assert torch.equal(result.cpu(), qweight.dequantize(dtype))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("in_features", [300, 50])
def test_every_size_of_groups(
    group_size: int | None, bits: int, in_features: int, seed: int
) -> None:
    scheme = Scheme(bits=bits, group_size=group_size, symmetric=bool(seed & 1))
    qweight = random_qweight(scheme, (33, in_features), seed)
    result = dequantize(fragment(qweight), torch.float16)
    assert torch.equal(result.cpu(), qweight.dequantize(torch.float16))


@pytest.mark.parametrize("scheme", ["W4A16_G64_DQ", "W4A16_ASYM_G16_DQ", "NF4_G32_BF16_DQ"])
def test_double_quantized_scales_decode_alike_in_the_kernel_and_before(
    scheme: str, seed: int
) -> None:
    # More than 256 scales: several blocks, and rows that begin in the middle of one.
    qweight = random_qweight(scheme, (70, 330), seed)
    coded = fragment(qweight)
    expected = qweight.dequantize(torch.float32)
    assert torch.equal(dequantize(coded, torch.float32).cpu(), expected)
    assert torch.equal(dequantize(coded.with_decoded_scales(), torch.float32).cpu(), expected)


@pytest.mark.parametrize("signed", [True, False])
def test_scales_that_decode_beyond_float16_are_clamped_everywhere(signed: bool) -> None:
    """Steps are rounded up: the largest scale of a block may decode to more than it was."""
    weight = random_fragment("W4A16_G64_DQ" if signed else "NF4_DQ", (64, 64), 0)
    assert weight.scale_offset is not None
    coded = dataclasses.replace(
        weight,
        scale=torch.full_like(weight.scale, 0xFF),
        scale_offset=torch.full_like(weight.scale_offset, 40000.0),
        scale_step=torch.full_like(weight.scale_offset, 256.0),
    )
    decoded = coded.with_decoded_scales()
    assert bool((decoded.scale == (-65504.0 if signed else 65504.0)).all())
    found = dequantize(coded, torch.float32)
    assert bool(found.isfinite().all())
    assert torch.equal(found, dequantize(decoded, torch.float32))


@pytest.mark.parametrize("scheme", ["W4A16_ASYM_G64", "W3A16_G32", "NF4_CHANNEL"])
def test_rows_of_a_concatenated_weight_decode_like_its_parts(scheme: str, seed: int) -> None:
    parts = [random_fragment(scheme, (n, 200), seed + n) for n in (70, 64, 1)]
    whole = concatenate(parts)
    start = 0
    for part in parts:
        view = whole.rows(start, start + part.padded_rows, part.out_features)
        assert torch.equal(dequantize(view, torch.float16), dequantize(part, torch.float16))
        start += part.padded_rows


@pytest.mark.parametrize("scheme", ["W4A16_ASYM_G64", "NF4_DQ"])
@every_dtype
def test_the_gradient_of_activations_is_a_product_with_the_decoded_weight(
    scheme: str, dtype: torch.dtype, seed: int
) -> None:
    qweight = random_qweight(scheme, (70, 200), seed)
    grad = torch.randn(2, 3, 70, generator=torch.Generator().manual_seed(seed)).to(dtype)
    expected = grad.to(DEVICE) @ qweight.dequantize(dtype).to(DEVICE)
    found = grad_input(grad.to(DEVICE), fragment(qweight))
    assert found.dtype == dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("group_size", range(8, 257, 8))
def test_a_tile_group_never_crosses_a_border_of_groups(group_size: int) -> None:
    width = tile_group(group_size, 128)
    assert width <= 128
    assert math.log2(width).is_integer()
    for first in range(0, 4096, width):
        assert first // group_size == (first + width - 1) // group_size
    doubled = range(0, 4096, 2 * width)
    crosses = any(i // group_size != (i + 2 * width - 1) // group_size for i in doubled)
    assert crosses or width == 128


@triton.jit
def _offsets_kernel(out, first_row, first_word, chunks, WORDS: tl.constexpr):  # noqa: N803
    row = first_row + tl.arange(0, 16)
    word = first_word + tl.arange(0, 16)
    place = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out + place, tile_offsets(row, word, chunks, WORDS))


@pytest.mark.parametrize("words", [1, 2, 4])
@pytest.mark.parametrize(
    ("rows", "columns"), [(128256, 8192), (128 * 14336, 4096), (384 * 4096, 14336), (64, 1 << 24)]
)
def test_offsets_of_large_weights_do_not_wrap(words: int, rows: int, columns: int) -> None:
    """The last words of a head of 128256 rows and of stacked experts, some beyond 2^31."""
    out = torch.full((16, 16), -1, dtype=torch.int64, device=DEVICE)
    chunks = columns // 64
    first_row, first_word = rows - 16, chunks * 4 * words - 16
    _offsets_kernel[(1,)](out, first_row, first_word, chunks, WORDS=words)
    for i in (0, 7, 15):
        for j in (0, 5, 15):
            row, (chunk, inside) = first_row + i, divmod(first_word + j, 4 * words)
            place = ((row // 16 * chunks + chunk) * 16 + row % 16) * 4 * words + inside
            assert int(out[i, j]) == place
    assert int(out[15, 15]) == rows * chunks * 4 * words - 1


def test_decoding_writes_into_a_given_buffer(seed: int) -> None:
    qweight = random_qweight("W4A16_ASYM_G32", (65, 130), seed)
    around = torch.full((67, 130), float("nan"), dtype=torch.float16, device=DEVICE)
    buffer = around[1:66]
    assert dequantize_into(fragment(qweight), buffer) is buffer
    assert torch.equal(buffer.cpu(), qweight.dequantize(torch.float16))
    assert around[[0, 66]].isnan().all()
