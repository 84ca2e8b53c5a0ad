"""Files of token ids: `.safetensors` (tensor `input_ids`) or `.npy`, integers `[rows, length]`."""

from __future__ import annotations

import tokenize
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowbit.errors import LowbitError

TOKEN_SUFFIXES = (".safetensors", ".npy")
# What numpy raises for headers that are no literals, and for dtypes and shapes that it lacks.
_BROKEN = (
    ValueError, EOFError, OSError, TypeError, OverflowError, AttributeError, SyntaxError,
    RecursionError, tokenize.TokenError,
)  # fmt: skip


def read_token_rows(path: Path) -> Tensor:
    """Returns the int64 ids `[rows, length]` of a `.safetensors` or `.npy` file.

    Raises:
        LowbitError: it is missing, not readable without running code, or holds anything else.
    """
    name = f"tokens {str(path)!r}"
    if not path.is_file():
        raise LowbitError(f"{name}: no such file")
    rows = _read_npy(path, name) if path.suffix.lower() == ".npy" else _read_tensor(path, name)
    if not np.issubdtype(rows.dtype, np.integer) or rows.ndim != 2 or not rows.size:
        raise LowbitError(
            f"{name}: got {rows.dtype} of shape {list(rows.shape)}, needed integers (uint16, "
            "int32 or int64) of shape [rows, length]"
        )
    if rows.dtype == np.uint64 and int(rows.max()) > np.iinfo(np.int64).max:
        raise LowbitError(f"{name}: id {int(rows.max())} is no token id")
    return torch.from_numpy(rows.astype(np.int64))


def _read_npy(path: Path, name: str) -> NDArray[Any]:
    try:
        # A pickled array would run code on load; a mapped one is checked against the file's size.
        rows: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except _BROKEN as error:
        raise LowbitError(
            f"{name} is not a plain .npy array of integers ({error}); pickled arrays are refused, "
            "save with np.save(path, ids.astype(np.int32))"
        ) from error
    return rows


def _read_tensor(path: Path, name: str) -> NDArray[Any]:
    try:
        with safe_open(path, framework="numpy") as tensors:
            if "input_ids" in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                rows: NDArray[Any] = tensors.get_tensor("input_ids")
                return rows
            found = ", ".join(list(tensors.keys())[:4]) or "nothing"
    except (SafetensorError, *_BROKEN) as error:
        raise LowbitError(f"{name} is not a readable safetensors file ({error})") from error
    raise LowbitError(f"{name} holds no tensor `input_ids` (found {found}); rename it")
