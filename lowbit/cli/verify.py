"""`lowbit verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from lowbit.cli.options import Device
from lowbit.cli.quantize import exit_interrupted
from lowbit.cli.screen import screen
from lowbit.errors import LowbitError

if TYPE_CHECKING:
    from lowbit.verification import Report

MARKS = {True: "[green]passed[/]", False: "[red]FAILED[/]", None: "[dim]not run[/]"}


def verify_command(
    path: Annotated[Path, typer.Argument(help="Folder of a checkpoint, or a GGUF file.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="BASE", help="The original: also measure KL, perplexity and flips."),
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Highest KL against it, nats per token; above, it fails.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="Text or token ids to measure on, as for eval; default pydoc."),
    ] = None,
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens per window; 2048, or the model's longest.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Measure on at most N windows.")] = 16,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Run a few tokens through the model.")
    ] = True,
    card: Annotated[
        bool, typer.Option("--card", help="Write the measurement into its model card.")
    ] = False,
    device: Device = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a saved checkpoint; exit with status 3 if something is wrong with it.

    Every save does this by itself. Where everything passes, the mark of one that failed is cleared;
    a GGUF file keeps it, for nothing in it says which weights it should hold.

    Example: lowbit verify ./llama-w4 --against ./llama --max-kl 0.05 --card
    """
    from rich.console import Console

    from lowbit.checkpoint.manifest import read_manifest
    from lowbit.hf.loading import choose_device, quiet_libraries
    from lowbit.verification import verify
    from lowbit.verification.marking import clear_mark, is_marked, stays_marked

    if card and against is None:
        raise LowbitError("--card writes what --against has measured; give the original too")
    if card and path.exists() and (path.is_file() or read_manifest(path) is None):
        raise LowbitError(
            f"{path}: has no manifest, and --card writes into what lowbit wrote; leave it out"
        )
    quiet_libraries()
    with exit_interrupted("nothing was changed"):
        report = verify(
            path,
            against=against,
            max_kl=max_kl,
            text=text,
            seqlen=seqlen,
            windows=windows,
            probe=probe,
            device=choose_device(device),
            progress=Console(stderr=True).is_terminal,
        )
    stays = stays_marked(report)
    cleared = clear_mark(report)
    if json_output:
        found = {**report.to_dict(), "mark_cleared": cleared, "mark_stays": stays}
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(report, "it was marked as bad, and is not any more" if cleared else stays)
    if card and report.measured is not None and not is_marked(path):
        from lowbit.model_card import write_measured

        write_measured(path, report.measured)
    if not report.ok:
        raise typer.Exit(3)


def _print(report: Report, note: str | None) -> None:
    words = "passes" if report.ok else "FAILS"
    table = Table(
        title=f"{report.path} ({report.layout}) {words}",
        title_justify="left",
        caption=note,
        box=None,
    )
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold", ratio=1)
    for check in report.checks:
        table.add_row(check.name, MARKS[check.passed], check.detail)
    screen().print(table)
