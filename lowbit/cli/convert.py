"""`lowbit convert`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from lowbit.cli.options import Output, Resume
from lowbit.cli.quantize import exit_interrupted
from lowbit.cli.screen import screen

# Of a long list, so many lines are shown.
SHOWN = 8


def convert_command(
    source: Annotated[str, typer.Argument(help="Folder of a quantized checkpoint, or a hub name.")],
    output: Output,
    to: Annotated[
        str,
        typer.Option(
            help="compressed-tensors, gptq, gptq_v2, awq, bnb (bitsandbytes), lowbit or bf16."
        ),
    ],
    requantize: Annotated[
        bool,
        typer.Option(
            "--requantize", help="Round what the format cannot hold to the nearest that it can."
        ),
    ] = False,
    resume: Resume = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the manifest's summary.")
    ] = False,
) -> None:
    """Convert a quantized checkpoint to another format, and one of another tool to ours.

    Where the format can hold the values they are kept bit for bit, and every weight is read back
    and compared.

    Example: lowbit convert ./llama-w4 ./llama-gptq --to gptq
    """
    from lowbit.formats.conversion import convert

    with exit_interrupted():
        result = convert(source, output, to, requantize=requantize, resume=resume)
    summary = result.manifest["summary"]
    if json_output:
        typer.echo(json.dumps({"path": str(result.path), **summary}, indent=2))
    else:
        _print_summary(result.path, summary)


def _print_summary(path: Path, summary: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    table.add_row("written", str(path))
    table.add_row("format", summary["format"])
    table.add_row("size on disk", f"{size / 1e6:,.1f} MB")
    table.add_row("stored as", ", ".join(summary["schemes"]))
    table.add_row("kept bit for bit", f"{summary['exact']} weights")
    rounded = summary["rounded"]
    for name, error in list(rounded.items())[:SHOWN]:
        how = "decoded to bf16" if error is None else f"rounded again, relative error {error:.4f}"
        table.add_row("[yellow]changed[/]", f"{name}: {how}")
    if len(rounded) > SHOWN:
        table.add_row("", f"and {len(rounded) - SHOWN} more, see --json")
    screen().print(table)
