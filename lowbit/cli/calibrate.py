"""`lowbit calibrate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from lowbit.cli.screen import screen

if TYPE_CHECKING:
    from lowbit.pipeline.stored_statistics import StoredStatistics


def calibrate_command(
    model: Annotated[
        str, typer.Argument(help="Folder of a decoder in safetensors, or a hub name.")
    ],
    stats: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
    calibration: Annotated[
        str, typer.Option(help="Text, JSONL, data set, or token ids (.safetensors, .npy).")
    ],
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seqlen: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    seed: Annotated[int, typer.Option(help="Chooses the windows.")] = 0,
    text_field: Annotated[
        str | None, typer.Option(help="Field of JSONL or data set rows; text or messages.")
    ] = None,
    loss_mask: Annotated[
        bool, typer.Option("--loss-mask", help="Of chat messages, count only the answers.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; the GPU if there is one.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run.")
    ] = False,
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
