"""Which way a product goes, by instruction set, dtype, tokens and format.

The numbers in `crossover.json` are measured: see `kernels/benchmarks/cpu_crossover.py`.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

from lowbit_kernels.format import Format

# `activations` of the operators: as they are; rounded to 8 bits with a unit per token and segment
# of up to 256 columns, which is as fast as any and the most exact; with one unit per token, or one
# for all, as W8A8 checkpoints mean it.
FLOAT, INT8, INT8_TOKEN, INT8_STATIC = "float", "int8", "int8_token", "int8_static"
ACTIVATIONS = (FLOAT, INT8, INT8_TOKEN, INT8_STATIC)

# `planes` of lowbit_linear: float32 products, 8-bit and 16-bit integers, bf16 products.
FLOATS, ONE_PLANE, TWO_PLANES, BFLOAT = 0, 1, 2, 3
# Decode blocks of the weight and let torch multiply.
DECODE = -1
_WAYS = {"two_planes": TWO_PLANES, "one_plane": ONE_PLANE, "bf16": BFLOAT, "decode": DECODE}
_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@functools.lru_cache(maxsize=4096)
def choose(
    isa: str,
    dtype: torch.dtype,
    tokens: int,
    form: Format,
    activations: str,
) -> int:
    """Returns `planes` of lowbit_linear, or `DECODE`."""
    kind = "codebook" if form.codebook is not None else f"int{form.bits}"
    steps = _table()[isa][_DTYPES[dtype] if activations == FLOAT else "int8"][kind]
    return next(_WAYS[way] for most, way in steps if most is None or tokens <= most)


@functools.cache
def _table() -> dict[str, dict[str, dict[str, list[tuple[int | None, str]]]]]:
    path = Path(__file__).parent / "crossover.json"
    table: dict[str, dict[str, dict[str, list[tuple[int | None, str]]]]]
    table = json.loads(path.read_text())["ways"]
    return table
