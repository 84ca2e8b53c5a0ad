"""Codes, scales and minima packed into blocks of ggml: the inverse of `blocks.py`.

Everything here is integers and fp16 that have been chosen already; nothing is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.formats.gguf.types import GgmlType


def pack_q4_0(codes: Tensor, scales: Tensor) -> Tensor:
    """Returns rows of Q4_0.

    Args:
        codes: integers -8...7 `[rows, columns]`.
        scales: exact in fp16, `[rows, columns / 32]`.

    Returns:
        uint8 `[rows, bytes]`.
    """
    return _joined(codes.shape[0], _halves(scales), _nibbles(_blocks(codes + 8, 32), 16))


def pack_q4_1(codes: Tensor, scales: Tensor, minima: Tensor) -> Tensor:
    """Returns rows of Q4_1, whose value is scale * code - minimum.

    Args:
        codes: integers 0...15 `[rows, columns]`.
        scales: exact in fp16, `[rows, columns / 32]`.
        minima: the same.
    """
    packed = _nibbles(_blocks(codes, 32), 16)
    return _joined(codes.shape[0], _halves(scales), _halves(-minima), packed)


def pack_q8_0(codes: Tensor, scales: Tensor) -> Tensor:
    """Returns rows of Q8_0; codes are integers -128...127, else as `pack_q4_0`."""
    eight = codes.to(torch.int8).contiguous().view(torch.uint8)
    return _joined(codes.shape[0], _halves(scales), eight.reshape(-1, 32))


def pack_q4_k(codes: Tensor, sub: tuple[Tensor, Tensor], halves: tuple[Tensor, Tensor]) -> Tensor:
    """Returns rows of Q4_K.

    Args:
        codes: integers 0...15 `[rows, columns]`.
        sub: scales and minima of sub-blocks, integers 0...63, `[rows, columns / 32]` each.
        halves: what they are multiplied by, exact in fp16, `[rows, columns / 256]` each.
    """
    scales, minima = (_blocks(values, 8) for values in sub)
    pairs = torch.cat(
        [
            scales[:, :4] | (scales[:, 4:] >> 4 << 6),
            minima[:, :4] | (minima[:, 4:] >> 4 << 6),
            (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4),
        ],
        dim=1,
    )
    packed = _nibbles(_blocks(codes, 256), 32)
    return _joined(codes.shape[0], _halves(halves[0]), _halves(halves[1]), pairs, packed)


def pack_q6_k(codes: Tensor, sub: Tensor, halves: Tensor) -> Tensor:
    """Returns rows of Q6_K.

    Args:
        codes: integers -32...31 `[rows, columns]`.
        sub: scales of sub-blocks, integers -128...127, `[rows, columns / 16]`.
        halves: what they are multiplied by, exact in fp16, `[rows, columns / 256]`.
    """
    unsigned = _blocks(codes + 32, 256)
    high = (unsigned >> 4).unflatten(1, (2, 4, 32))
    upper = high[:, :, 0] | (high[:, :, 1] << 2) | (high[:, :, 2] << 4) | (high[:, :, 3] << 6)
    eight = sub.to(torch.int8).contiguous().view(torch.uint8).reshape(-1, 16)
    low = _nibbles(unsigned & 15, 64)
    return _joined(codes.shape[0], low, upper.flatten(1), eight, _halves(halves))


def float_rows(values: Tensor, kind: GgmlType) -> Tensor:
    """Returns floats `[rows, columns]` as uint8 rows of a plain type."""
    assert kind.dtype is not None
    raw: Tensor = values.to(kind.dtype).contiguous().view(torch.uint8)
    return raw


def _blocks(values: Tensor, size: int) -> Tensor:
    return values.to(torch.uint8).reshape(-1, size)


def _halves(values: Tensor) -> Tensor:
    """Returns fp16 as uint8 `[blocks, 2]`."""
    raw: Tensor = values.reshape(-1, 1).to(torch.float16).contiguous().view(torch.uint8)
    return raw


def _nibbles(codes: Tensor, apart: int) -> Tensor:
    """Returns bytes that have code i in their low and code i + `apart` in their high half."""
    runs = codes.unflatten(1, (-1, 2, apart))
    packed: Tensor = (runs[:, :, 0] | (runs[:, :, 1] << 4)).flatten(1)
    return packed


def _joined(rows: int, *parts: Tensor) -> Tensor:
    raw: Tensor = torch.cat(parts, dim=1).reshape(rows, -1)
    return raw
