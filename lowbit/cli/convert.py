"""`lowbit convert`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from lowbit.cli.options import (
    Engine,
    Resume,
    TensorParallel,
    Verify,
    print_serve,
    require_engine,
    require_read,
)
from lowbit.cli.quantize import exit_interrupted
from lowbit.cli.screen import screen, size_on_disk
from lowbit.errors import LowbitError

# Of a long list, so many lines are shown.
SHOWN = 8
GGUF = "gguf"


def convert_command(
    source: Annotated[
        str, typer.Argument(help="Folder of a quantized checkpoint, a hub name, or a GGUF file.")
    ],
    output: Annotated[
        Path, typer.Argument(help="Folder to write, new or empty; or a new FILE.gguf.")
    ],
    to: Annotated[
        str | None,
        typer.Option(
            help="compressed-tensors, gptq, gptq_v2, awq, bnb (bitsandbytes), gguf, lowbit or bf16."
        ),
    ] = None,
    engine: Engine = None,
    tp: TensorParallel = 1,
    requantize: Annotated[
        bool,
        typer.Option(
            "--requantize", help="Round what the format cannot hold to the nearest that it can."
        ),
    ] = False,
    gguf_type: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="With --to gguf: Q8_0, Q4_0, Q4_1, Q4_K or Q6_K, of a 16-bit model too; left out, "
            "the one that has the values of the source.",
        ),
    ] = None,
    stats: Annotated[
        Path | None,
        typer.Option(
            help="With --gguf-type, of a 16-bit model: statistics that `lowbit calibrate` wrote; "
            "GPTQ chooses the codes."
        ),
    ] = None,
    resume: Resume = False,
    verify: Verify = True,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the manifest's summary.")
    ] = False,
) -> None:
    """Convert a quantized checkpoint to another format, and one of another tool to ours.

    Where the format can hold the values they are kept bit for bit, and every weight is read back
    and compared.

    Example: lowbit convert ./llama-w4 ./llama-gptq --to gptq

    Example: lowbit convert ./llama-w4 ./llama-vllm --for vllm --tp 2

    Example: lowbit convert ./llama ./llama.gguf --to gguf --gguf-type Q4_K --stats ./llama-stats
    """
    require_engine(engine, tp)
    from lowbit.engines import engine_named
    from lowbit.formats.conversion import convert
    from lowbit.formats.gguf.writing import GgufOptions

    to = None if to is None else to.lower()
    if engine is not None and (gguf_type or stats):
        # Codes are chosen anew, so nothing of the source limits them.
        to = to or _only_gguf(engine)
        require_read(engine, to)
    elif engine is not None:
        to = _format_for(source, engine, tp, to, requantize)
    elif to is None:
        raise LowbitError("give the format (--to gptq) or what will serve it (--for vllm)")
    with exit_interrupted(*_rest(to, output)):
        chosen = None if gguf_type is None and stats is None else GgufOptions(gguf_type, stats)
        result = convert(
            source,
            output,
            to,
            requantize=requantize,
            resume=resume,
            verify=verify,
            gguf=chosen,
        )
    summary = dict(result.manifest["summary"])
    if engine is not None:
        summary["serve"] = engine_named(engine).command(result.path, tp)
    if json_output:
        typer.echo(json.dumps({"path": str(result.path), **summary}, indent=2))
    else:
        _print_summary(result.path, summary)


def _only_gguf(engine: str) -> str:
    """Returns the format that --gguf-type is for, where the engine's own choice is that too.

    Raises:
        LowbitError: if it would be another one.
    """
    from lowbit.engines import engine_named

    best = engine_named(engine).writes[0]
    if best != GGUF:
        raise LowbitError(
            f"--gguf-type and --stats are for GGUF files, but --for {engine} writes {best}; leave "
            "them out, or add --to gguf where the engine reads it"
        )
    return GGUF


def _rest(to: str, output: Path) -> tuple[str, ...]:
    """Returns what is said to somebody who interrupts, if it is not the usual."""
    from lowbit.formats.gguf.writing import file_of

    if to != GGUF:
        return ()
    return (
        "a GGUF file is written as a whole or not at all; where "
        f"{file_of(output)} is there, `lowbit verify` checks it",
    )


def _format_for(
    source: str, engine: str, tensor_parallel: int, to: str | None, requantize: bool
) -> str:
    """Returns the format that the engine serves, after saying what is not known of it."""
    from lowbit.engines.choice import Target
    from lowbit.engines.converting import format_for

    served = format_for(source, Target.named(engine, tensor_parallel), to, requantize)
    for sentence in served.unknown:
        warnings.warn(sentence, stacklevel=2)
    return served.layout


def _print_summary(path: Path, summary: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None)
    table.add_row("written", str(path))
    table.add_row("format", summary["format"])
    table.add_row("size on disk", size_on_disk(path))
    table.add_row("stored as", ", ".join(summary["schemes"]))
    table.add_row("kept bit for bit", f"{summary['exact']} weights")
    rounded = summary["rounded"]
    for name, error in list(rounded.items())[:SHOWN]:
        how = "decoded to bf16" if error is None else f"rounded again, relative error {error:.2g}"
        table.add_row("[yellow]changed[/]", f"{name}: {how}")
    if len(rounded) > SHOWN:
        table.add_row("", f"and {len(rounded) - SHOWN} more, see --json")
    screen().print(table)
    print_serve(summary)
