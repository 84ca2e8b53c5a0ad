"""The emulator itself, against answers from the PTX ISA and exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx_emulator import run

KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def one(asm: str, *words: int) -> int:
    """Returns the only output of `asm` for one lane."""
    (result,) = run(asm, [np.array([word], np.uint32) for word in words], 1)
    assert result.dtype == np.uint32
    return int(result[0])


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (0xF0, 0xFFFF0000),  # a
        (0xCC, 0xFF00FF00),  # b
        (0xAA, 0xF0F0F0F0),  # c
        (0x80, 0xF0000000),  # a & b & c
        (0xFE, 0xFFFFFFF0),  # a | b | c
        (0x96, 0xF00F0FF0),  # a ^ b ^ c
        (0xEA, 0xFFF0F0F0),  # (a & b) | c
        (0x6A, 0x0FF0F0F0),  # (a & b) ^ c
        (0x00, 0),
        (0xFF, 0xFFFFFFFF),
    ],
)
def test_lop3_follows_its_truth_table(table: int, expected: int) -> None:
    asm = f"{{ lop3.b32 $0, $1, $2, $3, 0x{table:02X}; }}"
    assert one(asm, 0xFFFF0000, 0xFF00FF00, 0xF0F0F0F0) == expected


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (0x3210, 0x83020180),
        (0x7654, 0x07860584),
        (0x0000, 0x80808080),
        (0x5140, 0x05018480),
        (0xFEDC, 0x00FF00FF),  # signs of 0x07, 0x86, 0x05, 0x84
        (0x8B0A, 0xFFFF8000),  # signs of bytes 0 and 3, byte 0, sign of byte 2
    ],
)
def test_prmt_picks_bytes_or_their_signs(selector: int, expected: int) -> None:
    assert one(f"{{ prmt.b32 $0, $1, $2, 0x{selector:X}; }}", 0x83020180, 0x07860584) == expected


def test_shifts_are_logical_and_clamped() -> None:
    assert one("{ shr.b32 $0, $1, 4; }", 0xF0000001) == 0x0F000000
    assert one("{ shl.b32 $0, $1, 4; }", 0xF000000F) == 0xF0
    assert one("{ shr.b32 $0, $1, $2; }", 0xFFFFFFFF, 32) == 0
    assert one("{ shl.b32 $0, $1, $2; }", 0xFFFFFFFF, 40) == 0
    assert one("{ .reg .b32 a, b; mov.b32 a, 7; sub.u32 b, $1, a; mov.b32 $0, b; }", 3) == 2**32 - 4


def exactly(bits: int, dtype: str) -> Fraction:
    word = torch.tensor(bits if bits < 2**15 else bits - 2**16, dtype=torch.int16)
    return Fraction(float(word.view(KINDS[dtype]).double()))


def is_nearest(found: int, exact: Fraction, dtype: str) -> bool:
    """Returns whether no neighbour is nearer, and none as near with an even last bit."""
    value = exactly(found, dtype)
    for other in ((found & 0x7FFF) + 1, (found & 0x7FFF) - 1):
        if other < 0 or other >= (0x7F80 if dtype == "bf16" else 0x7C00):
            continue
        neighbour = exactly(other | found & 0x8000, dtype)
        ours, theirs = abs(value - exact), abs(neighbour - exact)
        if theirs < ours or (theirs == ours and found & 1):
            return False
    return True


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_fma_rounds_once_to_nearest_even(dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    count, kind = 3000, "bf16x2" if dtype == "bf16" else "f16x2"
    # Exponents near each other, so that low bits of the sum decide; and near the subnormals.
    low, high = (0x3E00, 0x4200) if dtype == "bf16" else (0x3000, 0x4400)
    operands = rng.integers(low, high, (3, count)) | rng.integers(0, 2, (3, count)) << 15
    operands[2, : count // 2] = rng.integers(0, 2**15, count // 2)
    operands[2, : count // 2] %= 0x7F00 if dtype == "bf16" else 0x7800
    operands[:, -500:] = rng.integers(0, 0x0500 if dtype == "bf16" else 0x1800, (3, 500))
    a, b, c = (operands | np.roll(operands, 1, axis=1) << 16).astype(np.uint32)
    (result,) = run(f"{{ fma.rn.{kind} $0, $1, $2, $3; }}", [a, b, c], 1)
    for i in range(count):
        for shift in (0, 16):
            x, y, z = (exactly(int(word[i]) >> shift & 0xFFFF, dtype) for word in (a, b, c))
            found = int(result[i]) >> shift & 0xFFFF
            assert is_nearest(found, x * y + z, dtype), (x, y, z, hex(found))


def test_fma_differs_from_rounding_twice() -> None:
    # 1.0078125^2 = 1.01568603515625; minus the rounded square 1.015625 leaves 2^-14 alone.
    assert one("{ fma.rn.bf16x2 $0, $1, $1, $2; }", 0x3F813F81, 0xBF82BF82) == 0x38803880


def test_special_values() -> None:
    infinity, nan = 0x7C00, 0x7FFF
    asm = "{ fma.rn.f16x2 $0, $1, $2, $3; }"
    assert one(asm, 0x7BFF, 0x4000, 0) == infinity  # 65504 * 2
    assert one(asm, infinity, 0, 0) == nan
    assert one(asm, infinity, 0x3C00, 0xFC00) == nan
    assert one(asm, 0x0001, 0x3C00, 0x0001) == 0x0002  # subnormals
    assert one(asm, 0x3C00, 0x3C00, 0xBC00) == 0  # 1 - 1 is +0
    assert one(asm, 0x8000, 0x3C00, 0x8000) == 0x8000  # -0 - 0 is -0
    assert one("{ fma.rn.bf16x2 $0, $1, $2, $3; }", 0x7F7F, 0x4000, 0) == 0x7F80


@pytest.mark.parametrize(
    ("asm", "sentence"),
    [
        ("{ cvt.rn.f16.f32 $0, $1; }", "not known"),
        ("{ and.b32 $0, $1; }", "not known"),
        ("{ lop3.b32 $0, $1, $1, $1; }", "not known"),
        ("{ prmt.b32.f4e $0, $1, $1, $1; }", "not known"),
        ("{ mov.b32 t, $1; mov.b32 $0, t; }", "neither an output nor declared"),
        ("{ .reg .b32 t; mov.b32 $0, t; }", "before anything wrote"),
        ("{ .reg .b16 t; mov.b32 $0, $1; }", "registers are .b32"),
        ("{ mov.b32 $1, 0; mov.b32 $0, $1; }", "neither an output nor declared"),
        ("{ fma.rn.f16x2 $0, $1, $1, 0x3C003C00; }", "no immediates"),
        ("mov.b32 $0, $1;", "braces"),
        ("{ and.b32 t, $1, $1; }", "neither"),
        ("{ }", "before anything wrote"),
    ],
)
def test_what_is_not_known_raises(asm: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        one(asm, 1)
