"""References in float64 and plain Python, written from the papers and imported by tests only.

Nothing here imports the code under test: a mistake made once must not be able to agree with itself.
They are slow on purpose; each follows its definition line by line.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence

import numpy as np

Array = np.ndarray

# NF4 as printed in the QLoRA paper's appendix E, and E2M1 from the OCP MX specification, table 5.
# fmt: off
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
       0.7229568362236023, 1.0]
# fmt: on


def e2m1(index: int) -> float:
    """Returns the value of a 4-bit float: sign, 2 exponent bits (bias 1), 1 mantissa bit."""
    sign = -1.0 if index & 8 else 1.0
    exponent, mantissa = (index >> 1) & 3, index & 1
    if exponent == 0:
        return sign * mantissa * 0.5
    return sign * (1 + mantissa / 2) * 2.0 ** (exponent - 1)


def fp4_of_bitsandbytes(index: int) -> float:
    """Returns the value of a 4-bit float of bitsandbytes: `dDequantizeFP4Tree` in its kernels.c.

    A sign, and three bits that choose a number of twelfths.
    """
    twelfths = {0b111: 3, 0b110: 2, 0b101: 6, 0b100: 4, 0b011: 12, 0b010: 8, 0b001: 0.0625, 0: 0}
    return (-1 if index & 8 else 1) * twelfths[index & 7] / 12


def table_of(codebook: str) -> list[float]:
    """Returns the 16 values of a codebook by table index."""
    if codebook == "fp4bnb":
        return [fp4_of_bitsandbytes(i) for i in range(16)]
    return NF4 if codebook == "nf4" else [e2m1(i) for i in range(16)]


# Packing: a row is one big integer. Code i is added at bit i * bits; words are cut off the low end.


def pack_row(codes: Sequence[int], bits: int) -> list[int]:
    """Returns the int32 words of one row of signed codes."""
    stream = 0
    for i, code in enumerate(codes):
        stream |= (code + 2 ** (bits - 1)) << (i * bits)
    words = math.ceil(len(codes) * bits / 32)
    unsigned = [(stream >> (32 * j)) & 0xFFFFFFFF for j in range(words)]
    return [word - 2**32 if word >= 2**31 else word for word in unsigned]


def unpack_row(words: Sequence[int], bits: int, columns: int) -> list[int]:
    """Returns the signed codes of one packed row."""
    stream = 0
    for j, word in enumerate(words):
        stream |= (word % 2**32) << (32 * j)
    return [((stream >> (i * bits)) & (2**bits - 1)) - 2 ** (bits - 1) for i in range(columns)]


# Rounding


def decode(code: int, scale: float, zero: int, codebook: str | None) -> float:
    """Returns the value that a code stands for, exactly, in float64."""
    if codebook is not None:
        return table_of(codebook)[code + 8] * scale
    return (code - zero) * scale


def codes_of(bits: int) -> range:
    """Returns every code of a width."""
    return range(-(2 ** (bits - 1)), 2 ** (bits - 1))


def nearest_value(value: float, scale: float, zero: int, bits: int, codebook: str | None) -> float:
    """Returns the representable value nearest to `value`, found by trying every code."""
    candidates = [decode(code, scale, zero, codebook) for code in codes_of(bits)]
    return min(candidates, key=lambda candidate: abs(candidate - value))


def nearest_values(
    values: Array, scales: Array, zeros: Array, bits: int, book: str | None
) -> Array:
    """Returns `nearest_value` of every element (`scales` and `zeros` shaped like `values`)."""
    levels = np.array([decode(code, 1.0, 0, book) for code in codes_of(bits)])
    candidates = (levels - (0 if book else zeros[..., None])) * scales[..., None]
    best = np.abs(candidates - values[..., None]).argmin(-1)
    return np.take_along_axis(candidates, best[..., None], -1)[..., 0]


def weighted_error(
    weight: Array, scales: Array, zeros: Array, bits: int, book: str | None, importance: Array
) -> float:
    """Returns sum of importance * (w - nearest value)^2: the objective of the scale search."""
    nearest = nearest_values(weight, scales, zeros, bits, book)
    return float((importance * (weight - nearest) ** 2).sum())


def absmax_scale(group: Sequence[float], bits: int, kind: str) -> tuple[float, int]:
    """Returns (scale, zero point) that just cover a group.

    `kind` is "symmetric", "asymmetric", "nf4", "fp4" or "fp4bnb".
    """
    low, high = min(group), max(group)
    if kind in ("nf4", "fp4bnb"):
        return max(high, -low), 0
    if kind == "fp4":
        return max(high, -low) / 6, 0
    if kind == "symmetric":
        extreme = high if high > -low else low
        return extreme / -(2 ** (bits - 1)), 0
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**bits - 1)
    return scale, round(-(2 ** (bits - 1)) - low / scale)


# Double quantization


def _bf16(value: float, towards: str) -> float:
    """Returns `value` (not negative) as bfloat16, rounded "up" or "down"."""
    # Truncating the fp32 pattern drops 16 mantissa bits.
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    if towards == "up":
        bits += 0xFFFF
    return struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0]


def double_quantize(scales: Sequence[float], signed: bool) -> list[tuple[float, float]]:
    """Returns (decoded scale, step of its block) for a flat sequence of scales.

    Blocks of 256; offset = the smallest magnitude rounded down to bf16; step = the range above the
    offset divided by the codes and rounded up to bf16; code = nearest.
    """
    top = 127 if signed else 255
    decoded = []
    for start in range(0, len(scales), 256):
        block = scales[start : start + 256]
        offset = _bf16(min(abs(s) for s in block), "down")
        spread = float(np.float32(np.float32(max(abs(s) for s in block)) - np.float32(offset)))
        step = _bf16(float(np.float32(spread) / np.float32(top)), "up")
        for scale in block:
            code = 0 if step == 0 else min(top, round((abs(scale) - offset) / step))
            decoded.append((math.copysign(offset + step * code, scale), step))
    return decoded


# GPTQ


def gptq(
    weight: Array,
    hessian: Array,
    order: Sequence[int],
    quantize: Callable[[Array, int], Array],
) -> tuple[Array, Array]:
    """Returns (quantized weights, targets), both `[N, K]`, by optimal brain quantization.

    Frantar et al. 2022, eq. 2 and 3, in a fixed order: quantize column i, spread its error over
    the remaining columns with delta = -(w_i - q_i) / [H^-1]_ii * [H^-1]_i, then eliminate row and
    column i from H^-1 by one step of Gaussian elimination. No Cholesky, no blocks.

    Args:
        weight: float64 `[N, K]`.
        hessian: float64 `[K, K]`, damped.
        order: columns in the order of visiting.
        quantize: maps (targets `[N]`, column) to the values on the grid.
    """
    work, inverse = weight.copy(), np.linalg.inv(hessian)
    quantized, targets = np.empty_like(weight), np.empty_like(weight)
    for i in order:
        targets[:, i] = work[:, i]
        quantized[:, i] = quantize(work[:, i], i)
        error = (work[:, i] - quantized[:, i]) / inverse[i, i]
        work -= np.outer(error, inverse[i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return quantized, targets


def output_error(weight: Array, quantized: Array, hessian: Array) -> float:
    """Returns tr(dW H dW^T) / N."""
    delta = weight - quantized
    return float(np.einsum("nk,kl,nl->", delta, hessian, delta)) / weight.shape[0]


# Refinement and input mismatch


def coordinate_descent(
    weight: Array,
    values: Array,
    hessian: Array,
    order: Sequence[int],
    quantize: Callable[[Array, int], Array],
) -> tuple[Array, Array]:
    """Returns (quantized weights, targets), both `[N, K]`, after one visit of each column.

    Behdin et al. 2023, "QuantEase", eq. 6 and 7: with everything else fixed the loss is a parabola
    in column i, whose minimum is the target; its nearest value on the grid is the best one.

    Args:
        weight: float64 `[N, K]`.
        values: float64 `[N, K]`, the quantized weights to begin with.
        hessian: float64 `[K, K]`.
        order: columns in the order of visiting.
        quantize: maps (targets `[N]`, column) to the values on the grid.
    """
    quantized, targets = values.copy(), np.empty_like(weight)
    for i in order:
        # d/dq_i of (w - q) H (w - q)^T = 0, where q_i is left out of the sum.
        rest = np.delete(np.arange(len(hessian)), i)
        pull = (weight[:, rest] - quantized[:, rest]) @ hessian[rest, i]
        targets[:, i] = weight[:, i] + pull / hessian[i, i]
        quantized[:, i] = quantize(targets[:, i], i)
    return quantized, targets


def best_factor(error: Array, part: Array, hessian: Array) -> float:
    """Returns the x that minimises (error - x part) H (error - x part)^T, by least squares.

    Args:
        error: float64 `[K]`.
        part: float64 `[K]`, not zero.
        hessian: float64 `[K, K]`, positive definite.
    """
    root = np.linalg.cholesky(hessian).T
    return float(np.linalg.lstsq((root @ part)[:, None], root @ error, rcond=None)[0][0])


def mismatched_weight(weight: Array, x_ref: Array, x: Array, damp: float) -> Array:
    """Returns the V `[N, K]` that minimises mean |W x_ref - V x|^2 + damp |V - W|^2.

    Least squares over tokens, with one more observation for each entry of the penalty.

    Args:
        weight: float64 `[N, K]`.
        x_ref: float64 `[tokens, K]`, inputs in the full-precision model.
        x: float64 `[tokens, K]`, the inputs there really are.
        damp: what is added to the diagonal of the mean of x x^T.
    """
    penalty = math.sqrt(damp * len(x)) * np.eye(x.shape[1])
    inputs, wanted = np.vstack([x, penalty]), np.vstack([x_ref @ weight.T, penalty @ weight.T])
    return np.linalg.lstsq(inputs, wanted, rcond=None)[0].T


# Integer activations


def int8_linear(x: Array, codes: Array, scales: Array, input_scale: float | None) -> Array:
    """Returns the product of one token `[K]` and the int8 `codes` `[N, K]`, float64 `[N]`.

    s = max |x| / 127, or the given scale; q = round(x / s), ties to even, within -127 ... 127;
    y = (sum of q code) s scale. Python's integers add up exactly.

    Args:
        x: float64 `[K]`.
        codes: integers `[N, K]`.
        scales: float64 `[N]`.
        input_scale: None for the scale of the token itself.
    """
    if np.isnan(x).any() or (input_scale is None and np.isinf(x).any()):
        return np.full(len(codes), np.nan)
    scale = float(np.abs(x).max()) / 127 if input_scale is None else input_scale
    if scale == 0:
        return np.zeros(len(codes))
    bound = 127 * scale  # an infinity saturates
    q = [max(-127, min(127, round(min(max(float(value), -bound), bound) / scale))) for value in x]
    sums = [sum(a * int(b) for a, b in zip(q, row, strict=True)) for row in codes]
    return np.array([total * scale * by for total, by in zip(sums, scales.tolist(), strict=True)])
