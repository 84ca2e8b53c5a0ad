"""Tensors of a checkpoint that are computed when somebody reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.reader import TensorEntry


@dataclass(frozen=True)
class ComputedEntry(TensorEntry):
    """A tensor that is in no file; `file` is the one that holds what it is made of.

    Args:
        compute: returns it, float32 or as exact as it is known.
    """

    compute: Callable[[], Tensor]

    @staticmethod
    def like(
        name: str, file: Path, dtype: torch.dtype, shape: tuple[int, ...], compute: Any
    ) -> ComputedEntry:
        """Returns the entry of a tensor of `shape` that is to be stored as `dtype`."""
        size = torch.Size(shape).numel() * dtype.itemsize
        return ComputedEntry(name, file, dtype, tuple(shape), 0, size, compute)

    def exact(self) -> Tensor:
        """Returns the tensor, computed anew."""
        return self.compute()

    def read(self) -> Tensor:
        """Returns the tensor in `dtype`."""
        return self.compute().to(self.dtype)
