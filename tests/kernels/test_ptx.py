"""The inline PTX, run word by word through an emulator: every code, zero point, slot and half.

What is expected is computed from the description of the layout and the values of the floats alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from fragment_weights import needs_interpreter, random_fragment
from interpreter import emulate_inline_asm
from lowbit_kernels.gpu import matmul
from lowbit_kernels.gpu.configs import Tile
from lowbit_kernels.gpu.matmul import run_fused
from lowbit_kernels.gpu.ptx import codebook_table, decode_asm
from ptx_emulator import run as emulate

from lowbit.scheme import FP4_LEVELS, NF4_LEVELS

Array = np.ndarray

every_dtype = pytest.mark.parametrize("dtype", ["bf16", "fp16"])
every_width = pytest.mark.parametrize("bits", [2, 3, 4, 8])
either_symmetry = pytest.mark.parametrize("asymmetric", [False, True], ids=["sym", "asym"])

# The bit of each half of `plane` that holds the top bit of slot 2 s + h of a 3-bit code.
TOP_BITS = (2, 4, 6, 1, 3, 5, 0, 7)


def float_bits(values: Array, dtype: str) -> Array:
    """Returns the 16 bits of `values`, which must be exact in `dtype`; zero is positive."""
    kind = torch.bfloat16 if dtype == "bf16" else torch.float16
    exact = torch.from_numpy(np.asarray(values, dtype=np.float64) + 0.0)
    rounded = exact.to(kind)
    assert torch.equal(rounded.double(), exact)
    return rounded.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)


def slots_of(bits: int) -> int:
    """Returns the pairs of codes in one word; 3-bit codes keep two bits of each there."""
    return {2: 8, 3: 8, 4: 4, 8: 2}[bits]


def words_of(codes: Array, bits: int) -> tuple[Array, Array]:
    """Returns words and high bits of unsigned `codes` [n, slots, 2], as weight.py describes."""
    codes = codes.astype(np.uint32)
    width = 2 if bits == 3 else bits
    stored = codes ^ 0x80 if bits == 8 else codes & (2**width - 1)
    word, plane = (np.zeros(len(codes), np.uint32) for _ in range(2))
    for slot in range(slots_of(bits)):
        for half in range(2):
            word |= stored[:, slot, half] << np.uint32(width * slot + 16 * half)
            plane |= (codes[:, slot, half] >> 2) << np.uint32(8 * half + TOP_BITS[slot])
    return word, plane if bits == 3 else np.zeros_like(plane)


def decoded(
    codes: Array, zero: Array | None, bits: int, dtype: str, rng: np.random.Generator
) -> Array:
    """Returns the 16-bit floats [n, slots, 2] that the fragment makes of `codes`."""
    word, plane = words_of(codes, bits)
    noise = rng.integers(0, 2**32, len(word), dtype=np.uint32)
    pair = noise  # unread where the format is symmetric
    if zero is not None:
        # As the kernel makes it: the negative of a float, so that zero becomes -0.0.
        negative = float_bits(zero, dtype) ^ 0x8000
        pair = negative | negative << 16
    high = plane if bits == 3 else noise
    asm = decode_asm(bits, dtype, zero is not None)
    outputs = emulate(asm, [word, high, pair], slots_of(bits))
    return np.stack([np.stack([out & 0xFFFF, out >> 16], -1) for out in outputs], 1)


@every_width
@every_dtype
@either_symmetry
def test_every_code_in_every_place_under_every_zero_point(
    bits: int, dtype: str, asymmetric: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    levels, slots = 2**bits, slots_of(bits)
    zeros = np.arange(levels) if asymmetric else np.array([levels // 2])
    # For each zero point every place goes through all codes, each place in an order of its own.
    rounds = max(1, 4096 // levels // len(zeros))
    order = [rng.permutation(levels) for _ in range(len(zeros) * rounds * slots * 2)]
    codes = np.stack(order).reshape(len(zeros), rounds, slots, 2, levels)
    codes = codes.transpose(0, 1, 4, 2, 3).reshape(-1, slots, 2)
    zero = np.repeat(zeros, rounds * levels)
    for slot in range(slots):
        for half in range(2):
            pairs = set(zip(codes[:, slot, half].tolist(), zero.tolist(), strict=True))
            assert len(pairs) == levels * len(zeros)
    found = decoded(codes, zero if asymmetric else None, bits, dtype, rng)
    expected = float_bits(codes - zero[:, None, None], dtype)
    np.testing.assert_array_equal(found, expected)


@every_width
@every_dtype
@either_symmetry
def test_every_half_word(bits: int, dtype: str, asymmetric: bool, seed: int) -> None:
    """All neighbours that a code can have in its half, beside a random other half."""
    rng = np.random.default_rng(seed)
    width, slots = (2 if bits == 3 else bits), slots_of(bits)
    halves = np.arange(2**16, dtype=np.uint32)
    codes = np.empty((2**16, slots, 2), np.int64)
    for half, pattern in enumerate((halves, rng.permutation(halves))):
        for slot in range(slots):
            codes[:, slot, half] = pattern >> np.uint32(width * slot) & (2**width - 1)
    if bits == 3:
        codes += 4 * rng.integers(0, 2, codes.shape)
    zero = rng.integers(0, 2**bits, 2**16) if asymmetric else np.full(2**16, 2 ** (bits - 1))
    found = decoded(codes, zero if asymmetric else None, bits, dtype, rng)
    np.testing.assert_array_equal(found, float_bits(codes - zero[:, None, None], dtype))


@every_dtype
def test_every_pattern_of_high_bits(dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    patterns = np.arange(2**16)
    codes = rng.integers(0, 4, (2**16, 8, 2))
    for half in range(2):
        for slot in range(8):
            codes[:, slot, half] += 4 * (patterns >> (8 * half + TOP_BITS[slot]) & 1)
    np.testing.assert_array_equal(words_of(codes, 3)[1], patterns)
    found = decoded(codes, None, 3, dtype, rng)
    np.testing.assert_array_equal(found, float_bits(codes - 4, dtype))


def look_up(words: Array, table: Sequence[int], dtype: str) -> Array:
    """Returns the 16-bit values [n, 4, 2] that the fragment looks up."""
    planes = [np.full(len(words), word % 2**32, np.uint32) for word in table]
    outputs = emulate(decode_asm(4, dtype, codebook=True), [words, *planes], 4)
    return np.stack([np.stack([out & 0xFFFF, out >> 16], -1) for out in outputs], 1)


def codebook_words(seed: int) -> tuple[Array, Array]:
    """Returns words, among them all patterns of either half, and their codes [n, 4, 2]."""
    rng = np.random.default_rng(seed)
    low = np.arange(2**16, dtype=np.uint32)
    words = low | rng.permutation(low) << np.uint32(16)
    places = [[8 * slot + 4 * half for half in range(2)] for slot in range(4)]
    return words, words[:, None, None] >> np.array(places, np.uint32) & 15


@every_dtype
@pytest.mark.parametrize("codebook", [NF4_LEVELS, FP4_LEVELS], ids=["nf4", "fp4"])
def test_every_code_of_a_codebook_is_looked_up(
    codebook: tuple[float, ...], dtype: str, seed: int
) -> None:
    words, codes = codebook_words(seed)
    table = codebook_table(codebook)[:8] if dtype == "bf16" else codebook_table(codebook)[8:16]
    kind = torch.bfloat16 if dtype == "bf16" else torch.float16
    levels = torch.tensor(codebook, dtype=torch.float64).to(kind)
    bits = levels.view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(look_up(words, table, dtype), bits[codes])


def test_any_table_is_looked_up(seed: int) -> None:
    """Bytes with every top bit: PRMT can copy a byte's sign instead of the byte."""
    rng = np.random.default_rng(seed)
    words, codes = codebook_words(seed)
    for _ in range(8):
        values = rng.permutation(2**16)[:16].astype(np.uint16)
        planes = [(values >> shift & 0xFF).astype(np.uint8).view("<u4") for shift in (0, 8)]
        found = look_up(words, np.concatenate(planes).tolist(), "bf16")
        np.testing.assert_array_equal(found, values[codes])


def test_a_table_holds_the_rounded_levels_as_byte_planes_and_the_exact_ones(seed: int) -> None:
    random = torch.randn(16, generator=torch.Generator().manual_seed(seed))
    for codebook in (NF4_LEVELS, FP4_LEVELS, tuple(random.tolist())):
        table = np.array(codebook_table(codebook), dtype=np.int32)
        assert table.shape == (32,)
        levels = torch.tensor(codebook, dtype=torch.float64)
        for first, kind in ((0, torch.bfloat16), (8, torch.float16)):
            planes = table[first : first + 8].view(np.uint8).astype(np.uint16)
            bits = planes[:16] | planes[16:] << 8
            expected = levels.to(kind).view(torch.int16).numpy().view(np.uint16)
            np.testing.assert_array_equal(bits, expected)
        np.testing.assert_array_equal(table[16:].view(np.float32), levels.float().numpy())


FRAGMENTS = [
    *((bits, dtype, asymmetric, False)
      for bits in (2, 3, 4, 8) for dtype in ("bf16", "fp16") for asymmetric in (False, True)),
    (4, "bf16", False, True),
    (4, "fp16", False, True),
]  # fmt: skip


@pytest.mark.parametrize(("bits", "dtype", "asymmetric", "codebook"), FRAGMENTS)
def test_fragments_run_on_ampere_and_write_no_input(
    bits: int, dtype: str, asymmetric: bool, codebook: bool
) -> None:
    """Packed bfloat16 has only the fused multiply-add before sm_90, and that takes no constants."""
    asm = decode_asm(bits, dtype, asymmetric, codebook)
    outputs = slots_of(bits)
    inputs = 9 if codebook else 3
    numbers = {int(number) for number in re.findall(r"\$(\d+)", asm)}
    assert numbers <= set(range(outputs + inputs))
    assert set(range(outputs + 1)) <= numbers
    # What is passed along for the sake of one form is read by it alone.
    if not codebook:
        assert (outputs + 1 in numbers) == (bits == 3)
        assert (outputs + 2 in numbers) == asymmetric
    for line in re.findall(r"[^;{}]+", asm):
        opcode, *operands = line.strip().replace(",", " ").split() or [".reg"]
        if opcode == ".reg":
            continue
        assert opcode in {
            "mov.b32", "and.b32", "shl.b32", "shr.b32", "lop3.b32", "prmt.b32",
            "fma.rn.bf16x2", "fma.rn.f16x2",
        }  # fmt: skip
        assert not operands[0].startswith("$") or int(operands[0][1:]) < outputs
        if opcode.startswith("fma"):
            assert opcode.endswith("bf16x2") == (dtype == "bf16")
            assert all(re.fullmatch(r"\$\d+|[a-z]\w*", operand) for operand in operands)


@pytest.fixture
def ptx_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Runs kernels as on NVIDIA chips, inline PTX through the emulator; gives what ran."""
    matmul.constants.cache_clear()
    monkeypatch.setattr(matmul, "_plain_triton", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    yield emulate_inline_asm(monkeypatch, emulate)
    matmul.constants.cache_clear()


@needs_interpreter
@pytest.mark.usefixtures("exact_bf16")
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(
    "scheme",
    [
        *(f"W{bits}A16{form}" for bits in (2, 3, 4, 8)
          for form in ("_G64", "_ASYM_G16", "_ASYM_G64")),
        *("W3A16_CHANNEL", "W4A16_ASYM_CHANNEL", "W8A16_CHANNEL", "NF4", "FP4_G32", "NF4_CHANNEL"),
    ],
)  # fmt: skip
def test_the_kernel_puts_what_it_decodes_where_it_belongs(
    scheme: str,
    dtype: torch.dtype,
    wide: bool,
    seed: int,
    ptx_in_the_interpreter: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel with inline PTX and without agree bit for bit, in either order of columns."""
    monkeypatch.setattr(matmul, "_multiplies_with_mma_sync", lambda index: wide)
    weight = random_fragment(scheme, (64, 128), seed)
    eye, tile = torch.eye(128, dtype=dtype), Tile(64, 64, 4, 2, 1)
    with_ptx = run_fused(eye, weight, None, tile)
    short = "fp16" if dtype == torch.float16 else "bf16"
    form = weight.format
    asymmetric = not form.symmetric and form.group_size != 16  # small groups subtract later
    expected = decode_asm(form.bits, short, asymmetric, form.codebook is not None)
    assert set(ptx_in_the_interpreter) == {expected}
    matmul.constants.cache_clear()
    monkeypatch.setattr(matmul, "_plain_triton", lambda: True)
    ptx_in_the_interpreter.clear()
    assert torch.equal(run_fused(eye, weight, None, tile), with_ptx)
    assert not ptx_in_the_interpreter
