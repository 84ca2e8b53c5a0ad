"""Inline PTX that turns one word of codes into pairs of 16-bit floats.

Reference for the integer trick: Kim et al. 2022, "Who Says Elephants Can't Run" (arXiv 2211.10017).
The bits of a small integer in the mantissa of a power of two are that power plus the integer:

    bfloat16   0x4300 | c = 128 + c     for codes of up to 7 bits
    float16    0x6400 | c = 1024 + c    for codes of up to 10 bits

One logic instruction does that for two codes, and one fused multiply-add takes power and zero point
away, exactly. A code that sits r bits too high gives 128 + 2^r c, and the multiplication by 2^-r is
free: most codes need no shift.

Every fragment has the form that `tl.inline_asm_elementwise` wants: outputs $0 ... $(n-1), then the
inputs. For integers these are always the word, the high bits (read for 3-bit codes) and the pair
(-zero, -zero) (read where zero points are stored); for a codebook the word and eight words of its
table. Slots and bit positions are those of `weight.py`.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Sequence

# (x & y) | z and (x & y) ^ z as truth tables of lop3: the operands are 0xF0, 0xCC and 0xAA.
AND_OR, AND_XOR = (0xF0 & 0xCC) | 0xAA, (0xF0 & 0xCC) ^ 0xAA

# bits -> pairs of floats in one word
PAIRS = {2: 8, 3: 8, 4: 4, 8: 2}

# Where `plane` keeps the high bit of slot j of a 3-bit code, within each half: one shift brings the
# bits of three slots next to their low bits (positions 2, 4 and 6).
PLANE_BITS = (2, 4, 6, 1, 3, 5, 0, 7)
_PLANE_SHIFTS = (0, 0, 0, -1, -1, -1, -2, 3)

# $0 = $1 + 0, where the zero is lane >> 5 of a lane number that went through a shuffle.
PER_LANE_ASM = """{
.reg .b32 t;
mov.u32 t, %laneid;
shfl.sync.bfly.b32 t, t, 0, 31, -1;
shr.u32 t, t, 5;
add.u32 $0, $1, t;
}"""


@functools.cache
def decode_asm(bits: int, dtype: str, asymmetric: bool = False, codebook: bool = False) -> str:
    """Returns the fragment that decodes a word.

    Args:
        bits: 2, 3, 4 or 8.
        dtype: "bf16" or "fp16", of the results.
        asymmetric: whether zero points are an input; otherwise they are 2^(bits-1).
        codebook: whether codes are looked up. The table is an input for the sake of registers: as
            constants its words would be loaded anew for every lookup.
    """
    if codebook:
        return _codebook_asm()
    if bits == 8 and dtype == "bf16":
        return _bytes_to_bf16_asm(asymmetric)
    return _integer_asm(bits, dtype, asymmetric)


def _integer_asm(bits: int, dtype: str, asymmetric: bool) -> str:
    pairs = PAIRS[bits]
    word, high, zero = (f"${pairs + i}" for i in range(3))
    power, mantissa = (128.0, 7) if dtype == "bf16" else (1024.0, 10)
    field = 2 if bits == 3 else bits
    # Positions up to which a code may stay where it is; 3-bit codes have one bit above their field.
    room = min(mantissa, 7) - (bits - field) if bits == 3 else mantissa
    lines: list[str] = []
    registers = ["w", "p"]
    source, shifted = word, 0
    if bits == 3:
        lines.append(f"prmt.b32 p, {high}, 0, 0x4140;")
    added: dict[int, str] = {}
    for slot in range(pairs):
        position = field * slot
        if position + field - shifted > room:
            shifted, source = position, "w"
            lines.append(f"shr.b32 w, {word}, {shifted};")
        rest = position - shifted
        mask = _pair(((1 << field) - 1) << rest)
        if bits == 8:
            # Stored in two's complement: the flipped top bit makes it 128 + code.
            lines.append(
                _lop3(f"${slot}", source, mask, _pair(_bits(power, dtype) | 0x80), AND_XOR)
            )
        else:
            lines.append(_lop3(f"${slot}", source, mask, _pair(_bits(power, dtype)), AND_OR))
        if bits == 3:
            moved = _shift(_PLANE_SHIFTS[slot], lines)
            lines.append(_lop3(f"${slot}", moved, _pair(1 << (rest + 2)), f"${slot}", AND_OR))
        offset = -power * 2.0**-rest
        if rest not in added:
            added[rest] = _pair(_bits(offset - 2 ** (bits - 1), dtype))
            if asymmetric:
                added[rest] = f"z{rest}"
                registers.append(f"z{rest}")
                one, constant = _pair(_bits(1.0, dtype)), _pair(_bits(offset, dtype))
                lines.append(_fma(f"z{rest}", zero, one, constant, dtype))
        factor = _pair(_bits(2.0**-rest, dtype))
        lines.append(_fma(f"${slot}", f"${slot}", factor, added[rest], dtype))
    return _block(registers, lines)


def _shift(amount: int, lines: list[str]) -> str:
    """Returns the register that holds `p` shifted right by `amount` (left where negative)."""
    if amount == 0:
        return "p"
    lines.append(f"shr.b32 w2, p, {amount};" if amount > 0 else f"shl.b32 w2, p, {-amount};")
    return "w2"


def _bytes_to_bf16_asm(asymmetric: bool) -> str:
    """8 bits do not fit bfloat16's 7: low bits minus a top bit that falls into the exponent.

    128 + low minus (128 or, where the top bit is set, 256) is the two's complement.
    """
    lines: list[str] = []
    one, minus_one = _pair(_bits(1.0, "bf16")), _pair(_bits(-1.0, "bf16"))
    magic = _pair(_bits(128.0, "bf16"))
    for slot in range(2):
        source = "$2"
        if slot:
            lines.append("shr.b32 w, $2, 8;")
            source = "w"
        lines.append(_lop3("t", source, _pair(0x80), magic, AND_OR))
        lines.append(_lop3(f"${slot}", source, _pair(0x7F), magic, AND_OR))
        lines.append(_fma(f"${slot}", "t", minus_one, f"${slot}", "bf16"))
        if asymmetric:
            lines.append(_fma(f"${slot}", "z", one, f"${slot}", "bf16"))
    if asymmetric:
        # The zero point is unsigned like the codes of the checkpoint; these codes are signed.
        lines.insert(0, _fma("z", "$4", one, magic, "bf16"))
    return _block(["w", "t", "z"], lines)


def _codebook_asm() -> str:
    """Looks up the low and the high bytes of four codes at a time (PRMT), then interleaves them.

    A selector has three bits: the lower and the upper half of the table are looked up, and the
    code's top bit chooses between them.
    """
    lines = [
        "and.b32 s, $4, 0x77777777;",
        "shr.b32 m, $4, 1;",
        _lop3("m", "m", "0x44444444", "0x32103210", AND_OR),
    ]
    for half in range(2):
        if half:
            lines += ["shr.b32 s, s, 16;", "shr.b32 m, m, 16;"]
        for name, first in (("l", 5), ("h", 9)):
            lines += [
                f"prmt.b32 {name}, ${first}, ${first + 1}, s;",
                f"prmt.b32 {name}1, ${first + 2}, ${first + 3}, s;",
                f"prmt.b32 {name}, {name}, {name}1, m;",
            ]
        lines += [f"prmt.b32 ${2 * half + i}, l, h, {('0x5140', '0x7362')[i]};" for i in range(2)]
    return _block(["s", "m", "l", "l1", "h", "h1"], lines)


def codebook_table(codebook: Sequence[float]) -> list[int]:
    """Returns 32 signed words: low and high bytes of 16 values in bf16, in fp16, and in float32."""
    table: list[int] = []
    for dtype in ("bf16", "fp16"):
        encoded = [_bits(value, dtype) for value in codebook]
        for shift in (0, 8):
            plane = bytes(value >> shift & 0xFF for value in encoded)
            table += struct.unpack("<4i", plane)
    return table + [struct.unpack("<i", struct.pack("<f", value))[0] for value in codebook]


def _block(registers: Sequence[str], lines: Sequence[str]) -> str:
    """Declares the registers that are used, and puts the constants of fma into registers."""
    text = "\n".join(lines)
    constants = {}
    for line in lines:
        if line.startswith("fma"):
            # The packed forms of fma take no immediates.
            constants.update({c: f"c{c[2:]}" for c in re.findall("0x[0-9A-F]{8}", line)})
            text = text.replace(line, re.sub("0x([0-9A-F]{8})", r"c\1", line))
    moves = "".join(f"mov.b32 {name}, {value};\n" for value, name in constants.items())
    used = [name for name in (*registers, "w2") if any(_mentions(line, name) for line in lines)]
    used += constants.values()
    declared = f".reg .b32 {', '.join(used)};\n" if used else ""
    return "{\n" + declared + moves + text + "\n}"


def _mentions(line: str, register: str) -> bool:
    return register in line.replace(",", " ").replace(";", " ").split()


def _lop3(out: str, a: str, b: str, c: str, table: int) -> str:
    return f"lop3.b32 {out}, {a}, {b}, {c}, 0x{table:02X};"


def _fma(out: str, a: str, b: str, c: str, dtype: str) -> str:
    # There is no bf16x2 addition before sm_90; the fused form is as fast.
    return f"fma.rn.{'bf16x2' if dtype == 'bf16' else 'f16x2'} {out}, {a}, {b}, {c};"


def _bits(value: float, dtype: str) -> int:
    """Returns the 16 bits of `value`, rounded to nearest even."""
    if dtype == "fp16":
        return int(struct.unpack("<H", struct.pack("<e", value))[0])
    bits = int(struct.unpack("<I", struct.pack("<f", value))[0])
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def _pair(bits: int) -> str:
    return f"0x{bits * 0x10001:08X}"
