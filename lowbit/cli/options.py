"""Arguments and options that mean the same in several commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli.screen import screen
from lowbit.errors import LowbitError

Model = Annotated[str, typer.Argument(help="Folder of a decoder in safetensors, or a hub name.")]
Output = Annotated[Path, typer.Argument(help="Folder to write; new or empty.")]
Samples = Annotated[int, typer.Option(help="Calibration windows.")]
Seqlen = Annotated[int, typer.Option(help="Tokens per window.")]
Seed = Annotated[int, typer.Option(help="Chooses the windows.")]
TextField = Annotated[
    str | None, typer.Option(help="Field of JSONL or data set rows; text or messages.")
]
LossMask = Annotated[
    bool, typer.Option("--loss-mask", help="Of chat messages, count only the answers.")
]
OptionalCalibration = Annotated[
    str | None, typer.Option(help="Text, JSONL, data set, or token ids (.safetensors, .npy).")
]
Stats = Annotated[
    Path | None,
    typer.Option(help="Statistics that `lowbit calibrate` wrote, instead of --calibration."),
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; the GPU if there is one.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")]
Verify = Annotated[
    bool,
    typer.Option("--verify/--no-verify", help="Check the result, as `lowbit verify` does."),
]
Engine = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="ENGINE",
        help="What will serve it: vllm, sglang, llama.cpp, transformers or tensorrt-llm. What it "
        "would refuse is refused first, and the output is in the format it serves best.",
    ),
]
TensorParallel = Annotated[
    int, typer.Option("--tp", metavar="N", help="With --for: GPUs that divide every layer.")
]


def require_engine(engine: str | None, tensor_parallel: int) -> None:
    """Refuses an unknown engine, and GPUs without one, before anything else is looked at.

    Raises:
        LowbitError: naming the engines.
    """
    from lowbit.engines import engine_named

    if engine is not None:
        engine_named(engine)
    elif tensor_parallel != 1:
        raise LowbitError("--tp is for an engine; name it too, for example --for vllm --tp 2")


def require_read(engine: str, layout: str) -> None:
    """Refuses a format that an engine does not read.

    Raises:
        LowbitError: naming those that it reads.
    """
    from lowbit.engines import engine_named

    found = engine_named(engine)
    if layout not in found.formats:
        known = ", ".join(found.formats)
        raise LowbitError(f"--for {engine}: {found} does not read {layout}; it reads {known}")


def print_serve(summary: dict[str, Any]) -> None:
    """Prints the command that serves a checkpoint, on one line to be copied."""
    if "serve" in summary:
        screen().print(f" serve it: {summary['serve']}", soft_wrap=True, highlight=False)
