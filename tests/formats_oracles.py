"""References in float64 and plain Python, written from what the formats say of themselves.

Nothing here imports the code under test. Each returns the weight `[out, in]` that tensors stand
for, code by code, and is slow on purpose.
"""

from __future__ import annotations

import json

import numpy as np
import oracles
import torch

Tensors = dict[str, torch.Tensor]


def fields(words: np.ndarray, count: int, bits: int) -> list[int]:
    """Returns the unsigned numbers of `bits` each in a little-endian stream of words."""
    stream = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return [(stream >> (index * bits)) & ((1 << bits) - 1) for index in range(count)]


def gptq_weight(tensors: Tensors, bits: int, version: int) -> np.ndarray:
    """AutoGPTQ: qweight packs in_features, qzeros out_features; version 1 stores zero - 1.

    weight[n, k] = scales[g, n] * (code[k, n] - zero[g, n]), g = g_idx[k]
    """
    qweight, qzeros = tensors["qweight"].numpy(), tensors["qzeros"].numpy()
    scales, g_idx = tensors["scales"].double().numpy(), tensors["g_idx"].tolist()
    weight = np.empty((qweight.shape[1], len(g_idx)))
    zeros = [fields(row, len(weight), bits) for row in qzeros]
    for n in range(weight.shape[0]):
        codes = fields(qweight[:, n], len(g_idx), bits)
        for k, group in enumerate(g_idx):
            zero = zeros[group][n] + (1 if version == 1 else 0)
            weight[n, k] = scales[group, n] * (codes[k] - zero)
    return weight


def awq_weight(tensors: Tensors, group_size: int) -> np.ndarray:
    """AutoAWQ, version gemm: nibble j of word w is column 8 w + (0, 2, 4, 6, 1, 3, 5, 7)[j]."""
    qweight, qzeros = tensors["qweight"].numpy(), tensors["qzeros"].numpy()
    scales = tensors["scales"].double().numpy()
    place = {column: nibble for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7))}
    weight = np.empty((scales.shape[1], qweight.shape[0]))
    for n in range(weight.shape[0]):
        word, nibble = n // 8, place[n % 8]
        for k in range(weight.shape[1]):
            code = int(qweight[k, word]) >> (4 * nibble) & 15
            zero = int(qzeros[k // group_size, word]) >> (4 * nibble) & 15
            weight[n, k] = scales[k // group_size, n] * (code - zero)
    return weight


def bnb_weight(tensors: Tensors, kind: str) -> np.ndarray:
    """bitsandbytes: high nibble first, blocks of the flat matrix, statistics perhaps nested."""
    state = json.loads(bytes(tensors[f"weight.quant_state.bitsandbytes__{kind}"].tolist()))
    absmax = tensors["weight.absmax"].numpy()
    if "nested_absmax" in str(list(tensors)):
        table = tensors["weight.nested_quant_map"].double().numpy()
        outer = tensors["weight.nested_absmax"].double().numpy()
        block = np.arange(len(absmax)) // state["nested_blocksize"]
        absmax = table[absmax] * outer[block] + state["nested_offset"]
    levels = oracles.table_of({"nf4": "nf4", "fp4": "fp4bnb"}[kind])
    packed = tensors["weight"].flatten().tolist()
    flat = [levels[nibble] for byte in packed for nibble in (byte >> 4, byte & 15)]
    scales = np.repeat(absmax.astype(np.float64), state["blocksize"])
    return (np.array(flat) * scales[: len(flat)]).reshape(state["shape"])


def compressed_weight(tensors: Tensors, bits: int, group_size: int | None) -> np.ndarray:
    """compressed-tensors: signed codes, stored with 2^(bits - 1) added where they are packed."""
    scales = tensors["weight_scale"].double().numpy()
    half = 1 << (bits - 1)
    if "weight_packed" in tensors:
        rows, columns = tensors["weight_shape"].tolist()
        packed = tensors["weight_packed"].numpy()
        codes = [[code - half for code in fields(packed[n], columns, bits)] for n in range(rows)]
    else:
        codes = tensors["weight"].tolist()
    weight = np.array(codes, dtype=np.float64)
    group = np.arange(weight.shape[1]) // (group_size or weight.shape[1])
    if "weight_zero_point" in tensors:
        packed = tensors["weight_zero_point"].numpy()
        zeros = [fields(column, len(weight), bits) for column in packed.T]
        weight -= (np.array(zeros).T - half)[:, group]
    return weight * scales[:, group]
