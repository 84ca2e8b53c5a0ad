"""Blocks of ggml against an oracle of their layouts, the gguf package and golden bytes."""

from __future__ import annotations

from pathlib import Path

import gguf_oracles as oracle
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lowbit.formats.gguf.blocks import decode_rows, scales_are_finite, unpack_blocks, zero_points
from lowbit.formats.gguf.packing import pack_q4_0, pack_q4_1, pack_q4_k, pack_q6_k, pack_q8_0
from lowbit.formats.gguf.types import GGML_TYPES
from lowbit.quant import Grid, QuantizedWeight

GOLDEN = Path(__file__).parent / "golden" / "gguf.safetensors"
RNG = np.random.default_rng()
BLOCK_TYPES = [name for name, kind in GGML_TYPES.items() if kind.dtype is None]


def rows_of(name: str, rows: int = 3, blocks: int = 2) -> tuple[np.ndarray, torch.Tensor]:
    raw = oracle.random_rows(RNG, name, rows, blocks)
    return raw, torch.from_numpy(raw)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_blocks_decode_as_their_layout_says(name: str) -> None:
    raw, tensor = rows_of(name)
    decoded = decode_rows(tensor, GGML_TYPES[name], torch.float32)
    assert np.array_equal(decoded.numpy().astype(np.float64), oracle.decode(name, raw))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_blocks_decode_as_the_gguf_package_decodes_them(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    raw, tensor = rows_of(name, rows=7, blocks=3)
    theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    assert np.array_equal(decode_rows(tensor, GGML_TYPES[name], torch.float32).numpy(), theirs)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_blocks_decode_as_llama_cpp_decodes_them(name: str) -> None:
    golden = load_file(GOLDEN)
    blocks, decoded = golden[f"{name}.blocks"], golden[f"{name}.decoded"]
    assert np.array_equal(oracle.decode(name, blocks.numpy()), decoded.double().numpy())
    assert torch.equal(decode_rows(blocks, GGML_TYPES[name], torch.float32), decoded)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_a_type_with_a_scheme_has_its_values(name: str) -> None:
    kind = GGML_TYPES[name]
    if kind.scheme is None or not kind.scheme.symmetric:
        pytest.skip("has a minimum")
    raw, tensor = rows_of(name)
    blocks = unpack_blocks(tensor, kind)
    grid = Grid(kind.scheme, blocks.codes.shape[1], blocks.scales, None)
    weight = QuantizedWeight.from_codes(blocks.codes, grid)
    assert np.array_equal(weight.dequantize().numpy().astype(np.float64), oracle.decode(name, raw))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_rows_are_decoded_in_chunks_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, tensor = rows_of(name, rows=5)
    whole = decode_rows(tensor, GGML_TYPES[name], torch.bfloat16)
    monkeypatch.setattr("lowbit.formats.gguf.blocks.CHUNK_WEIGHTS", 2 * whole.shape[1])
    assert torch.equal(decode_rows(tensor, GGML_TYPES[name], torch.bfloat16), whole)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_nan_and_inf_are_seen(name: str) -> None:
    raw, tensor = rows_of(name)
    assert scales_are_finite(tensor, GGML_TYPES[name])
    for at in oracle.HALVES[name]:
        for bits in (0x7C00, 0xFE01):
            broken = raw.copy()
            size = oracle.ORACLES[name][1]
            broken[1, size + at : size + at + 2] = np.array([bits], np.uint16).view(np.uint8)
            assert not scales_are_finite(torch.from_numpy(broken), GGML_TYPES[name])


def random_ints(low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(RNG.integers(low, high, shape))


def random_halves(*shape: int) -> torch.Tensor:
    return torch.from_numpy(RNG.normal(0, 0.1, shape)).to(torch.float16).float()


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0"])
def test_packed_scales_and_codes_decode_to_their_products(name: str) -> None:
    low, pack = (-8, pack_q4_0) if name == "Q4_0" else (-128, pack_q8_0)
    codes, scales = random_ints(low, -low, 3, 96), random_halves(3, 3)
    decoded = oracle.decode(name, pack(codes, scales).numpy())
    expected = codes.double() * scales.double().repeat_interleave(32, 1)
    assert np.array_equal(decoded, expected.numpy())


def test_packed_q4_1_has_minima() -> None:
    codes, scales, minima = random_ints(0, 16, 3, 64), random_halves(3, 2), random_halves(3, 2)
    decoded = oracle.decode("Q4_1", pack_q4_1(codes, scales, minima).numpy())
    products = codes.float() * scales.repeat_interleave(32, 1)
    assert np.array_equal(decoded, (products - minima.repeat_interleave(32, 1)).double().numpy())


def test_packed_q4_k_has_scales_and_minima_of_six_bits() -> None:
    codes = random_ints(0, 16, 2, 512)
    sub = random_ints(0, 64, 2, 16), random_ints(0, 64, 2, 16)
    halves = random_halves(2, 2), random_halves(2, 2)
    decoded = oracle.decode("Q4_K", pack_q4_k(codes, sub, halves).numpy())
    scale, minimum = (
        (s.float() * h.repeat_interleave(8, 1)).repeat_interleave(32, 1)
        for s, h in zip(sub, halves, strict=True)
    )
    assert np.array_equal(decoded, (scale * codes.float() - minimum).double().numpy())


def test_packed_q6_k_has_signed_scales() -> None:
    codes, sub, halves = (
        random_ints(-32, 32, 2, 512),
        random_ints(-128, 128, 2, 32),
        random_halves(2, 2),
    )
    decoded = oracle.decode("Q6_K", pack_q6_k(codes, sub, halves).numpy())
    scale = (sub.float() * halves.repeat_interleave(16, 1)).repeat_interleave(16, 1)
    assert np.array_equal(decoded, (scale * codes.float()).double().numpy())


def test_q4_1_with_whole_zero_points_is_told_from_others() -> None:
    codes, zeros = random_ints(0, 16, 3, 64), random_ints(0, 9, 3, 2)
    scales = (random_ints(1, 200, 3, 2) / 1024).float()  # 8 bits, so times 0...8 is exact in fp16
    kind = GGML_TYPES["Q4_1"]
    blocks = unpack_blocks(pack_q4_1(codes, scales, scales * zeros), kind)
    found = zero_points(blocks)
    assert found is not None
    assert torch.equal(found, zeros.float())
    minima = scales * zeros
    minima[1, 1] += 1 / 64 if zeros[1, 1] < 1 else scales[1, 1] / 2
    assert zero_points(unpack_blocks(pack_q4_1(codes, scales, minima), kind)) is None
