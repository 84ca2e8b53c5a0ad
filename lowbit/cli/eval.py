"""`lowbit eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.adapted import Adapter, with_adapter
from lowbit.cli.screen import screen
from lowbit.errors import LowbitError

if TYPE_CHECKING:
    from lowbit_eval import EvaluationResult, Slicing

    from lowbit.calibration.tokens import TokenWindows

STANDARD_OUTPUT = Path("-")


def eval_command(
    path: Annotated[
        str, typer.Argument(help="Folder of a checkpoint, a hub name, or a GGUF file.")
    ],
    text: Annotated[
        str,
        typer.Option(
            help="File (.txt, .jsonl), wikitext2, pydoc, a hub data set, or token ids "
            "(.safetensors, .npy)."
        ),
    ],
    seqlen: Annotated[
        int | None,
        typer.Option(help="Tokens per window; 2048, or the model's longest if that is shorter."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="BASE", help="The 16-bit original to compare with.")
    ] = None,
    adapter: Adapter = None,
    windows: Annotated[int | None, typer.Option(help="Only the first N windows.")] = None,
    slices: Annotated[bool, typer.Option("--slices", help="Also by document.")] = False,
    labels: Annotated[
        Path | None, typer.Option(help="Slices by these labels: one line per document.")
    ] = None,
    json_output: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the result as JSON; - prints it."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")
    ] = "auto",
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; the GPU if there is one.")
    ] = None,
    activations: Annotated[
        str, typer.Option(help="float, or int8: rounded while multiplying, on a CPU.")
    ] = "float",
    threads: Annotated[int | None, typer.Option(help="CPU threads; all cores by default.")] = None,
) -> None:
    """Measure perplexity and, against the original, KL divergence and flips.

    Example: lowbit eval ./llama-w4 --text wikitext2 --against ./llama --json result.json
    """
    from lowbit_eval import evaluate, measure_size
    from lowbit_eval.report import render
    from rich.console import Console

    from lowbit.formats.reading import gguf_file
    from lowbit.hf.loading import (
        choose_device,
        evaluation_windows,
        load_model,
        quiet_libraries,
        use_threads,
    )
    from lowbit.progress import RunProgress

    quiet_libraries()
    _check_output(json_output)
    use_threads(threads)
    target = choose_device(device)
    # Everything that can be wrong with the input is found before the weights are loaded.
    chosen = evaluation_windows(path, text, seqlen, windows)
    slicing = _slicing(slices, labels, chosen)
    if against is not None:
        _check_baseline(against, chosen)
    model = with_adapter(load_model(path, dtype, target, activations), path, adapter)
    baseline = None if against is None else load_model(against, dtype, target)
    in_folder = Path(path).is_dir() and gguf_file(path) is None
    size = measure_size(path) if in_folder else None
    with RunProgress(enabled=Console(stderr=True).is_terminal) as progress:
        progress.stage("windows", len(chosen))
        result = evaluate(model, chosen, baseline, slicing, size, lambda: progress.advance(1))
    inputs = {"path": path, "text": text, "against": against}
    if adapter is not None:
        inputs["adapter"] = str(adapter)
    _write(result, inputs, json_output)
    if json_output != STANDARD_OUTPUT:
        screen().print(render(result))


def _slicing(by_document: bool, labels: Path | None, windows: TokenWindows) -> Slicing | None:
    from lowbit_eval import Slicing
    from lowbit_eval.slices import read_labels, require_known_documents

    if labels is None and not by_document:
        return None
    require_known_documents(windows)
    return Slicing(None if labels is None else read_labels(str(labels), len(windows.documents)))


def _check_baseline(against: str, windows: TokenWindows) -> None:
    from lowbit.hf.loading import load_config

    vocab_size = load_config(against).vocab_size
    if int(windows.ids.max()) >= vocab_size:
        raise LowbitError(
            f"--against {against}: its vocabulary of {vocab_size} lacks tokens of the model; give "
            "the checkpoint that the model was quantized from"
        )


def _check_output(json_output: Path | None) -> None:
    if json_output is None or json_output == STANDARD_OUTPUT:
        return
    if json_output.is_dir() or not json_output.parent.is_dir():
        raise LowbitError(f"--json {json_output}: give a file in a folder that exists")


def _write(result: EvaluationResult, inputs: dict[str, Any], json_output: Path | None) -> None:
    if json_output is None:
        return
    text = json.dumps({**inputs, **result.to_dict()}, indent=2, allow_nan=False)
    if json_output == STANDARD_OUTPUT:
        typer.echo(text)
        return
    try:
        json_output.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise LowbitError(f"--json {json_output}: cannot be written ({error.strerror})") from error
