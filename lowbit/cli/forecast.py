"""What `lowbit finetune --dry-run` prints."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer
from rich.table import Table

from lowbit.cli.screen import screen

if TYPE_CHECKING:
    from lowbit.train import Settings
    from lowbit.train.memory import MemoryForecast


def print_forecast(base: str, settings: Settings, as_json: bool) -> None:
    """Prints the bytes that training will take, as a table or as one JSON object."""
    from lowbit.train.memory import forecast

    found = forecast(base, settings)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        screen().print(_table(found))


def _table(found: MemoryForecast) -> Table:
    asked, other = ("with", "without") if found.checkpointing else ("without", "with")
    table = Table(
        title=f"{found.batch} x {found.seqlen:,} tokens in {found.precision} on {found.device}",
        caption=f"libraries not counted; {other} checkpointing {_gigabytes(found.total_otherwise)}",
    )
    table.add_column("")
    table.add_column("bytes", justify="right")
    table.add_column("GB", justify="right")
    for name, size in found.parts().items():
        label = f"{name}, {asked} checkpointing" if name == "activations" else name
        table.add_row(label, f"{size:,}", f"{size / 1e9:.3f}")
    table.add_section()
    table.add_row("total", f"{found.total:,}", f"{found.total / 1e9:.3f}")
    return table


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3f} GB"
