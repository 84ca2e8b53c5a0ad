"""Where the commands print their tables."""

from __future__ import annotations

from rich.console import Console

COLUMNS = 100


def screen() -> Console:
    """Returns standard output, at most 100 columns wide; in a pipe, exactly that."""
    terminal = Console()
    return Console(width=min(terminal.width, COLUMNS) if terminal.is_terminal else COLUMNS)
