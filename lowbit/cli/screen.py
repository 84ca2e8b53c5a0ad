"""Where the commands print their tables."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

COLUMNS = 100


def screen() -> Console:
    """Returns standard output, at most 100 columns wide; in a pipe, exactly that."""
    terminal = Console()
    return Console(width=min(terminal.width, COLUMNS) if terminal.is_terminal else COLUMNS)


def size_on_disk(path: Path) -> str:
    """Returns the megabytes of what was written: a GGUF file, or the weights in a folder."""
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return f"{sum(file.stat().st_size for file in files) / 1e6:,.1f} MB"
