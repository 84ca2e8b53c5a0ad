"""`lowbit merge`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from lowbit.cli.options import (
    Device,
    OptionalCalibration,
    Resume,
    Samples,
    Seed,
    Seqlen,
    Stats,
    Verify,
)
from lowbit.cli.quantize import exit_interrupted
from lowbit.cli.screen import screen

if TYPE_CHECKING:
    from lowbit.merging import MergeResult


def merge_command(
    base: Annotated[str, typer.Argument(help="Folder of a 16-bit or lowbit model, or hub name.")],
    adapter: Annotated[Path, typer.Argument(help="Folder of a LoRA adapter in PEFT's format.")],
    output: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
    to: Annotated[
        str, typer.Option(help="bf16, fp16, fp32, or a scheme such as W4A16_G64.")
    ] = "bf16",
    stats: Stats = None,
    calibration: OptionalCalibration = None,
    samples: Samples = 128,
    seqlen: Seqlen = 512,
    seed: Seed = 0,
    quality: Annotated[
        str | None,
        typer.Option(help="fast, balanced or best; balanced with --calibration, fast with --stats"),
    ] = None,
    algorithm: Annotated[
        str | None, typer.Option(help="Only this: gptq, awq, awq+gptq or rtn; rtn without data.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Held-out text to measure on, as for eval; default pydoc.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Measure on at most N windows.")] = 16,
    text_seqlen: Annotated[
        int | None, typer.Option(help="Tokens per window; 2048, or the model's longest.")
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(help="Highest KL, nats per token; by default .01 for 16 bits, .1 for 4 bits."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Accept a KL above that.")] = False,
    measured: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measuring loads both models.")
    ] = True,
    device: Device = None,
    resume: Resume = False,
    verify: Verify = True,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Merge an adapter into its base and measure what that changed.

    Example: lowbit merge ./llama-nf4 ./adapter ./merged --to W4A16_G64 --stats ./llama-stats
    """
    from lowbit.hf.loading import quiet_libraries
    from lowbit.merging import HeldOut, merge

    quiet_libraries()
    with exit_interrupted():
        result = merge(
            base,
            adapter,
            output,
            to=to,
            stats=stats,
            calibration=calibration,
            samples=samples,
            seqlen=seqlen,
            seed=seed,
            algorithm=algorithm,
            quality=quality,
            held_out=HeldOut(text, text_seqlen, windows, max_kl, force, not measured),
            device=device,
            resume=resume,
            verify=verify,
        )
    if json_output:
        typer.echo(json.dumps(result.to_dict(), indent=2))
    else:
        _print(result)


def _print(result: MergeResult) -> None:
    table = Table(show_header=False, box=None)
    size = sum(file.stat().st_size for file in result.path.glob("*.safetensors"))
    table.add_row("written", str(result.path))
    table.add_row("stored as", result.target)
    table.add_row("size on disk", f"{size / 1e6:,.1f} MB")
    measured = result.measured
    if measured is None:
        table.add_row("measured", "no; `lowbit eval` compares checkpoints")
    else:
        error = "" if measured.kl_error is None else f" ± {measured.kl_error:.1g}"
        table.add_row("text", f"{measured.text}, {measured.predictions:,} tokens")
        table.add_row("perplexity before", f"{measured.perplexity_before:.4g} (base + adapter)")
        table.add_row("perplexity after", f"{measured.perplexity_after:.4g}")
        table.add_row("KL", f"{measured.kl:.3g}{error} nats per token, limit {result.max_kl:g}")
        table.add_row("flips", f"{measured.flips:.2%}")
    screen().print(table)
