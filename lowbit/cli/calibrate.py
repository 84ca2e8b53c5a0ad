"""`lowbit calibrate`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from lowbit.cli.options import (
    Device,
    LossMask,
    Model,
    Output,
    Resume,
    Samples,
    Seed,
    Seqlen,
    TextField,
)
from lowbit.cli.screen import screen

if TYPE_CHECKING:
    from lowbit.pipeline.stored_statistics import StoredStatistics


def calibrate_command(
    model: Model,
    stats: Output,
    calibration: Annotated[
        str, typer.Option(help="Text, JSONL, data set, or token ids (.safetensors, .npy).")
    ],
    samples: Samples = 128,
    seqlen: Seqlen = 512,
    seed: Seed = 0,
    text_field: TextField = None,
    loss_mask: LossMask = False,
    device: Device = None,
    resume: Resume = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a model's activations once, for any number of `lowbit quantize --stats`.

    Example: lowbit calibrate ./llama ./llama-stats --calibration text.txt
    """
    from lowbit.cli.quantize import exit_interrupted
    from lowbit.pipeline import calibrate

    with exit_interrupted():
        stored = calibrate(
            model,
            stats,
            calibration=calibration,
            samples=samples,
            seqlen=seqlen,
            seed=seed,
            text_field=text_field,
            loss_mask=loss_mask,
            device=device,
            resume=resume,
        )
    if json_output:
        typer.echo(json.dumps({"path": str(stats), **stored.summary()}, indent=2))
    else:
        screen().print(_table(stored))


def _table(stored: StoredStatistics) -> Table:
    summary = stored.summary()
    table = Table(show_header=False, box=None)
    table.add_row("written", str(stored.directory))
    table.add_row("size on disk", f"{summary['bytes'] / 1e6:,.1f} MB")
    table.add_row("layers", f"{summary['layers']:,} in {summary['groups']:,} groups")
    table.add_row("tokens counted", f"{summary['tokens']:,}")
    table.add_row(
        "tokens per input dimension", f"{summary['tokens_per_dimension']:.1f} in the widest layer"
    )
    if summary["unreached"]:
        table.add_row("[yellow]never reached[/]", ", ".join(summary["unreached"]))
    return table
