"""Blocks of ggml decoded one weight at a time, written from the layouts of `ggml-common.h`.

Python integers and float64; nothing of lowbit, torch or the gguf package. A product of fp16 and a
few bits is exact in float32 and float64 alike; where float32 rounds, so does `_f32`.
"""

from __future__ import annotations

import struct

import numpy as np

IQ4_NL = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]


def _f32(value: float) -> float:
    return float(np.float32(value))


def _half(block: bytes, at: int) -> float:
    return float(struct.unpack_from("<e", block, at)[0])


def _nibble_32(block: bytes, at: int, i: int) -> int:
    byte = block[at + i % 16]
    return byte & 15 if i < 16 else byte >> 4


def _six_bits(block: bytes, at: int, j: int) -> tuple[int, int]:
    """Scale and minimum of sub-block j (`get_scale_min_k4`)."""
    q = block[at : at + 12]
    if j < 4:
        return q[j] & 63, q[j + 4] & 63
    return (q[j + 4] & 15) | (q[j - 4] >> 6 << 4), (q[j + 4] >> 4) | (q[j] >> 6 << 4)


def _two_bits(block: bytes, at: int, i: int) -> int:
    half, rest = divmod(i, 128)
    return block[at + 32 * half + rest % 32] >> (2 * (rest // 32)) & 3


def _four_bits(block: bytes, at: int, i: int) -> int:
    quarter, rest = divmod(i, 64)
    return block[at + 32 * quarter + rest % 32] >> (4 * (rest // 32)) & 15


def q4_0(b: bytes, i: int) -> float:
    return _half(b, 0) * (_nibble_32(b, 2, i) - 8)


def q4_1(b: bytes, i: int) -> float:
    return _f32(_half(b, 0) * _nibble_32(b, 4, i) + _half(b, 2))


def q5_0(b: bytes, i: int) -> float:
    fifth = int.from_bytes(b[2:6], "little") >> i & 1
    return _half(b, 0) * ((_nibble_32(b, 6, i) | fifth << 4) - 16)


def q8_0(b: bytes, i: int) -> float:
    return _half(b, 0) * struct.unpack_from("<b", b, 2 + i)[0]


def iq4_nl(b: bytes, i: int) -> float:
    return _half(b, 0) * IQ4_NL[_nibble_32(b, 2, i)]


def q2_k(b: bytes, i: int) -> float:
    pair = b[i // 16]
    scale, minimum = _half(b, 80) * (pair & 15), _half(b, 82) * (pair >> 4)
    return _f32(scale * _two_bits(b, 16, i) - minimum)


def q3_k(b: bytes, i: int) -> float:
    j = i // 16
    low = b[96 + j % 8] & 15 if j < 8 else b[96 + j % 8] >> 4
    high = b[104 + j % 4] >> (2 * (j // 4)) & 3
    third = b[i % 32] >> (i // 32) & 1
    code = _two_bits(b, 32, i) - (0 if third else 4)
    return _f32(_half(b, 108) * ((low | high << 4) - 32) * code)


def q4_k(b: bytes, i: int) -> float:
    scale, minimum = _six_bits(b, 4, i // 32)
    product = _f32(_half(b, 0) * scale * _four_bits(b, 16, i))
    return _f32(product - _half(b, 2) * minimum)


def q5_k(b: bytes, i: int) -> float:
    scale, minimum = _six_bits(b, 4, i // 32)
    fifth = b[16 + i % 32] >> (i // 32) & 1
    product = _f32(_half(b, 0) * scale * (_four_bits(b, 48, i) | fifth << 4))
    return _f32(product - _half(b, 2) * minimum)


def q6_k(b: bytes, i: int) -> float:
    half, rest = divmod(i, 128)
    low = b[64 * half + rest % 64] >> (4 * (rest // 64)) & 15
    high = b[128 + 32 * half + rest % 32] >> (2 * (rest // 32)) & 3
    scale = struct.unpack_from("<b", b, 192 + i // 16)[0]
    return _f32(_half(b, 208) * scale * ((low | high << 4) - 32))


# name -> (weights in a block, bytes of a block, value of weight i of a block)
ORACLES = {
    "Q4_0": (32, 18, q4_0),
    "Q4_1": (32, 20, q4_1),
    "Q5_0": (32, 22, q5_0),
    "Q8_0": (32, 34, q8_0),
    "IQ4_NL": (32, 18, iq4_nl),
    "Q2_K": (256, 84, q2_k),
    "Q3_K": (256, 110, q3_k),
    "Q4_K": (256, 144, q4_k),
    "Q5_K": (256, 176, q5_k),
    "Q6_K": (256, 210, q6_k),
}
# Where the fp16 of a block are.
HALVES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q8_0": [0], "IQ4_NL": [0], "Q2_K": [80, 82],
    "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}  # fmt: skip


# About how large a random code times the scale of its sub-block is.
MAGNITUDES = {
    "Q4_0": 5, "Q4_1": 8, "Q5_0": 9, "Q8_0": 74, "IQ4_NL": 70, "Q2_K": 15, "Q3_K": 42, "Q4_K": 320,
    "Q5_K": 650, "Q6_K": 1300,
}  # fmt: skip


def random_rows(rng: np.random.Generator, name: str, rows: int, blocks: int) -> np.ndarray:
    """Returns uint8 `[rows, bytes]` of random blocks of values around 0.05."""
    _, size, _ = ORACLES[name]
    raw = rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    for at in HALVES[name]:
        halves = rng.normal(0, 0.05 / MAGNITUDES[name], (rows, blocks, 1)).astype(np.float16)
        raw[:, :, at : at + 2] = halves.view(np.uint8)
    return raw.reshape(rows, -1)


def decode(name: str, rows: np.ndarray) -> np.ndarray:
    """Returns the float64 values of uint8 rows `[rows, bytes]`."""
    block, size, value = ORACLES[name]
    decoded = [
        [
            value(bytes(row[start : start + size]), i)
            for start in range(0, len(row), size)
            for i in range(block)
        ]
        for row in rows
    ]
    return np.array(decoded)
