"""`lowbit inspect`: what every tensor of a checkpoint is stored as, and what that cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from lowbit.cli.screen import screen


def inspect_command(
    path: Annotated[str, typer.Argument(help="Folder of a checkpoint, a hub name, a GGUF file.")],
    against: Annotated[
        Path | None, typer.Option(help="Its 16-bit original: measure each weight's error.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List every tensor: scheme, shape, bits per weight, error.

    Example: lowbit inspect ./llama-w4 --against ./llama
    """
    from lowbit.formats.listing import listing

    rows = listing(path, against)
    if json_output:
        typer.echo(
            json.dumps({"path": str(path), "tensors": [row.to_dict() for row in rows]}, indent=2)
        )
        return
    table = Table(title=str(path), caption=_totals([row.to_dict() for row in rows]))
    table.add_column("tensor", overflow="fold", ratio=1)
    for heading in ("stored as", "shape", "bits/weight", "rel. error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        error = "" if row.relative_error is None else f"{row.relative_error:.4f}"
        shape = "x".join(map(str, row.shape))
        table.add_row(row.name, row.stored_as, shape, f"{row.bits_per_weight:.3f}", error)
    screen().print(table)


def _totals(rows: list[dict[str, Any]]) -> str:
    stored = sum(row["bytes"] for row in rows)
    weights = sum(row["weights"] for row in rows)
    bits = 8 * stored / max(weights, 1)
    return f"{weights:,} weights in {stored / 1e6:,.2f} MB, {bits:.3f} bits each"
