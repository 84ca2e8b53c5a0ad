"""Evaluates a fragment of inline PTX over arrays of 32-bit words, one element per lane.

    run("{ .reg .b32 t; shr.b32 t, $1, 4; and.b32 $0, t, 0xF; }", [words], outputs=1)

Operands are numbered as in `tl.inline_asm_elementwise`: outputs first, then inputs. The semantics
are those of NVIDIA's PTX ISA, bit for bit: fused multiply-adds round once, to nearest even, keep
subnormals and make every NaN 0x7FFF. What is not known here raises, and so does reading a register
that nothing wrote: an emulator that guesses would test nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

Array = np.ndarray

BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "xor.b32": np.bitwise_xor,
    "add.u32": np.add,
    "sub.u32": np.subtract,
}


def run(asm: str, inputs: Sequence[Array], outputs: int) -> list[Array]:
    """Returns the `outputs` words, uint32 arrays, that `asm` makes of `inputs`.

    Args:
        asm: the fragment, in braces.
        inputs: uint32 arrays of one shape.
        outputs: how many of the operands are written.

    Raises:
        ValueError: for anything that is not known, declared, or written before it is read.
    """
    text = re.sub(r"//[^\n]*", "", asm).strip()
    if not (text.startswith("{") and text.endswith("}")):
        raise ValueError("a fragment stands in braces: its registers are its own")
    if any(value.dtype != np.uint32 or value.shape != inputs[0].shape for value in inputs):
        raise ValueError("inputs are uint32 arrays of one shape")
    lanes = _Lanes(inputs, outputs)
    for statement in filter(None, map(str.strip, text[1:-1].split(";"))):
        lanes.execute(statement)
    return [lanes.read(f"${i}") for i in range(outputs)]


class _Lanes:
    """The registers of all lanes."""

    def __init__(self, inputs: Sequence[Array], outputs: int) -> None:
        self.shape = inputs[0].shape
        self.values = {f"${outputs + i}": value for i, value in enumerate(inputs)}
        self.writable = {f"${i}" for i in range(outputs)}

    def execute(self, statement: str) -> None:
        """Runs one instruction or declaration."""
        opcode, _, rest = statement.partition(" ")
        if opcode == ".reg":
            kind, _, names = rest.strip().partition(" ")
            if kind != ".b32":
                raise ValueError(f"{statement}: registers are .b32 here")
            self.writable |= {name.strip() for name in names.split(",")}
            return
        target, *sources = (operand.strip() for operand in rest.split(","))
        if target not in self.writable:
            raise ValueError(f"{statement}: {target} is neither an output nor declared")
        with np.errstate(over="ignore"):
            self.values[target] = self.evaluate(statement, opcode, sources)

    def evaluate(self, statement: str, opcode: str, sources: Sequence[str]) -> Array:
        """Returns the result of an instruction."""
        # The truth table of lop3 is part of the instruction, not an operand.
        operands = [self.read(name) for name in sources[:3]]
        match opcode, operands:
            case "mov.b32", [a]:
                return a
            case (("and.b32" | "or.b32" | "xor.b32" | "add.u32" | "sub.u32"), [a, b]):
                return BINARY[opcode](a, b)
            case "shl.b32", [a, b]:
                return np.where(b < 32, a << np.minimum(b, 31), 0).astype(np.uint32)
            case (("shr.b32" | "shr.u32"), [a, b]):
                return np.where(b < 32, a >> np.minimum(b, 31), 0).astype(np.uint32)
            case "lop3.b32", [a, b, c] if len(sources) == 4:
                return lop3(a, b, c, int(sources[3], 0))
            case "prmt.b32", [a, b, c] if len(sources) == 3:
                return prmt(a, b, c)
            case (("fma.rn.bf16x2" | "fma.rn.f16x2"), [a, b, c]) if len(sources) == 3:
                if any(name[0].isdigit() or name[0] == "-" for name in sources):
                    raise ValueError(f"{statement}: packed floats take no immediates")
                return fma(a, b, c, "bf16" if "bf16" in opcode else "fp16")
        raise ValueError(f"{statement}: not known here")

    def read(self, name: str) -> Array:
        """Returns the words of a register or an immediate."""
        if re.fullmatch(r"-?\d+|0[xX][0-9a-fA-F]{1,8}", name):
            return np.full(self.shape, int(name, 0) % 2**32, np.uint32)
        if name not in self.values:
            raise ValueError(f"{name} is read before anything wrote it")
        return self.values[name]


def lop3(a: Array, b: Array, c: Array, table: int) -> Array:
    """Returns any function of three bits: bit i of `table` is its value for i = (a, b, c)."""
    result = np.zeros_like(a)
    for i in (i for i in range(8) if table >> i & 1):
        result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def prmt(a: Array, b: Array, selector: Array) -> Array:
    """Returns four bytes of a (0 to 3) and b (4 to 7); bit 3 of a selector spreads the sign."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(a)
    for i in range(4):
        choice = selector >> np.uint32(4 * i) & 15
        byte = (both >> (8 * (choice & 7)).astype(np.uint64) & np.uint64(0xFF)).astype(np.uint32)
        byte = np.where(choice & 8, np.where(byte & 0x80, 0xFF, 0), byte).astype(np.uint32)
        result |= byte << np.uint32(8 * i)
    return result


def fma(a: Array, b: Array, c: Array, dtype: str) -> Array:
    """Returns a * b + c of both halves, rounded once."""
    result = np.zeros_like(a)
    for shift in (np.uint32(0), np.uint32(16)):
        x, y, z = (_values((word >> shift).astype(np.uint16), dtype) for word in (a, b, c))
        with np.errstate(invalid="ignore"):  # infinity * 0 and infinity - infinity
            total, rest = _sum(x * y, z)
        result |= _rounded(total, rest, dtype).astype(np.uint32) << shift
    return result


def _values(bits: Array, dtype: str) -> Array:
    if dtype == "fp16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def _sum(p: Array, c: Array) -> tuple[Array, Array]:
    """Returns the float64 nearest to p + c, and what it is off by (Knuth's two-sum)."""
    total = p + c
    part = total - p
    return total, (p - (total - part)) + (c - part)


def _rounded(total: Array, rest: Array, dtype: str) -> Array:
    """Returns `total + rest` as 16 bits.

    Rounding to a shorter float on the way would round twice; rounding to odd instead (cut off, and
    set the last bit if anything was lost) keeps what the last rounding has to know.
    """
    odd = _to_odd(total, rest, np.uint64)
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == "fp16":
            bits = odd.astype(np.float16).view(np.uint16)
        else:
            single = odd.astype(np.float32)
            lost = np.where(np.isfinite(odd), odd - single.astype(np.float64), 0.0)
            word = _to_odd(single, lost, np.uint32).view(np.uint32).astype(np.uint64)
            bits = (word + 0x7FFF + (word >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(total), 0x7FFF, bits).astype(np.uint16)


def _to_odd(nearest: Array, rest: Array, unsigned: type[np.unsignedinteger]) -> Array:
    """Returns `nearest + rest` rounded to odd, in the float type of `nearest`."""
    bits = np.ascontiguousarray(nearest).view(unsigned)
    one = unsigned(1)
    beyond = np.signbit(nearest) != np.signbit(rest)  # rounded away from zero
    odd = (np.where(beyond, bits - one, bits) | one).view(nearest.dtype)
    return np.where((rest != 0) & ~np.isnan(rest), odd, nearest)
