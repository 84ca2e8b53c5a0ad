"""Opening a checkpoint in any layout, and reading its modules."""

from __future__ import annotations

from pathlib import Path

from lowbit.checkpoint import Checkpoint
from lowbit.errors import LowbitError
from lowbit.formats.base import Layout, StoredAs
from lowbit.formats.gguf.checkpoint import SUFFIX, GgufCheckpoint
from lowbit.pipeline.source import local_directory
from lowbit.quant import QuantizedWeight


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Returns the checkpoint at `path` after checking every header and size.

    Args:
        path: a folder, the name of one on the hub, or a GGUF file; a folder that holds one GGUF
            file and no config.json stands for that file.

    Raises:
        LowbitError: for a path that is no checkpoint, and for one that is damaged.
    """
    file = gguf_file(path)
    if file is not None:
        return GgufCheckpoint.open_file(file)
    return Checkpoint.open(local_directory(path))


def gguf_file(path: str | Path) -> Path | None:
    """Returns the GGUF file that a path stands for, None for another checkpoint.

    Args:
        path: see `open_checkpoint`; nothing is fetched from the hub.

    Raises:
        LowbitError: a folder holds several.
    """
    if Path(path).suffix == SUFFIX and not Path(path).is_dir():
        return Path(path)
    directory = Path(path)
    if not directory.is_dir() or (directory / "config.json").exists():
        return None
    files = sorted(directory.glob(f"*{SUFFIX}"))
    if len(files) > 1:
        raise LowbitError(f"{directory}: holds {len(files)} GGUF files; give one of them")
    return files[0] if files else None


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
