"""Reading modules of a checkpoint in any layout."""

from __future__ import annotations

from pathlib import Path

from lowbit.checkpoint import Checkpoint
from lowbit.errors import LowbitError
from lowbit.formats.base import Layout, StoredAs
from lowbit.quant import QuantizedWeight


def read_module(
    checkpoint: Checkpoint, layout: Layout, module: str, stored: StoredAs
) -> QuantizedWeight:
    """Returns the weight of a module, its columns in the order that `stored` says.

    Raises:
        LowbitError: naming the file and the tensor whose content is impossible.
    """
    entries = [checkpoint.entries[name] for name in stored.tensors]
    tensors = {entry.name: entry.read() for entry in entries}
    try:
        return layout.read(module, stored, tensors)
    except LowbitError as error:
        files = sorted({str(entry.file) for entry in entries})
        raise LowbitError(f"{_common(files)}: {error}") from None


def _common(files: list[str]) -> str:
    """Returns the one file, or the directory of several."""
    return files[0] if len(files) == 1 else str(Path(files[0]).parent)
