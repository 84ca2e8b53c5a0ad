"""Quantizes the bundled model to 4 and 3 bits, with and without calibration, and compares them.

    make demo

Perplexity and divergence are measured on tokens sampled from the original model that the
calibration never saw. The quantized models stay in `demo-output/`.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lowbit_eval import EvaluationResult, evaluate, measure_size
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowbit import quantize
from lowbit.calibration.tokens import TokenWindows, load_windows
from lowbit.hf.loading import quiet_libraries, use_threads
from lowbit.nn import kernels_of
from lowbit.progress import RunProgress
from scripts import command_line

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "tests" / "assets"
MODEL = ASSETS / "books-4m"
CALIBRATION = ASSETS / "books-4m-calibration.safetensors"
TEST = ASSETS / "books-4m-test.safetensors"

SEQLEN = 512
RUNS = [
    ("W4A16_G64", "rtn"),
    ("W4A16_G64", "gptq"),
    ("W3A16_G64", "rtn"),
    ("W3A16_G64", "gptq"),
]
PROMPT = "The old man looked at the sea and said"
NEW_TOKENS = 24
COLUMNS = 100


@dataclass(frozen=True)
class Row:
    """One model of the table.

    Args:
        name: scheme and algorithm.
        result: its scores against the original.
        continuation: what it writes after `PROMPT`, greedily.
        kernels: what multiplied by its quantized weights, "" for the original.
    """

    name: str
    result: EvaluationResult
    continuation: str
    kernels: str


def load(directory: Path) -> Any:
    """Returns the model in float32, where all of them are computed alike."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def score(
    name: str, directory: Path, windows: TokenWindows, original: Any, bar: RunProgress
) -> Row:
    """Returns the row of the model in `directory`."""
    model = load(directory)
    bar.stage(f"measuring {name}", len(windows))
    size = measure_size(directory)
    result = evaluate(model, windows, original, size=size, advance=lambda: bar.advance(1))
    return Row(name, result, continuation(model), ", ".join(kernels_of(model)))


def continuation(model: Any) -> str:
    """Returns the most likely continuation of `PROMPT`."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.inference_mode():
        generated = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    return " ".join(tokenizer.decode(generated[0, ids.shape[1] :]).split())


def comparison(rows: list[Row]) -> Table:
    """Returns the table of all models, no wider than 100 columns."""
    table = Table(title=f"{MODEL.name}, {rows[0].result.predictions:,} test tokens", box=None)
    table.add_column("model", no_wrap=True)
    for heading in ("bits / weight", "file, MB", "perplexity", "KL to original", "same top-1"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        result, size, distance = row.result, row.result.size, row.result.divergence
        assert size is not None
        assert distance is not None
        bits = size.quantized_bits_per_weight or size.bits_per_parameter or 0.0
        is_original = not size.quantized_weights
        table.add_row(
            row.name,
            f"{bits:.3f}",
            f"{size.bytes_on_disk / 1e6:.2f}",
            f"{result.perplexity.perplexity:.3f}",
            "-"
            if is_original
            else f"{distance.mean.mean:.4f} +- {distance.mean.standard_error or 0:.4f}",
            "-" if is_original else f"{100 * (1 - distance.flips.mean):.2f}%",
        )
    table.caption = "KL in nats per token with its standard error; bits of the quantized weights"
    return table


def main() -> None:
    """Runs the command."""
    parser = command_line.parser(__doc__, "python scripts/demo.py --windows 16")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "demo-output", help="folder for the models"
    )
    parser.add_argument("--windows", type=int, default=48, help="test windows of 512 tokens")
    # One thread: matrices this small gain little from a second, and lose much where it has to wait
    # for a busy core (78 s on one thread; 522 s on two, beside other work).
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    command_line.run(parser, _run)


def _run(arguments: argparse.Namespace) -> None:
    quiet_libraries()
    use_threads(arguments.threads)
    screen = Console()
    console = Console(width=min(screen.width, COLUMNS) if screen.is_terminal else COLUMNS)
    original = load(MODEL)
    windows = load_windows(str(TEST), None, original.config.vocab_size, SEQLEN)
    windows = windows.first(arguments.windows)
    arguments.output.mkdir(parents=True, exist_ok=True)
    directories = {}
    for scheme, algorithm in RUNS:
        directory = arguments.output / f"{MODEL.name}-{scheme}-{algorithm}"
        shutil.rmtree(directory, ignore_errors=True)
        console.print(f"{scheme} with {algorithm}", style="bold")
        calibration = CALIBRATION if algorithm == "gptq" else None
        quantize(MODEL, directory, scheme=scheme, algorithm=algorithm, calibration=calibration)
        directories[f"{scheme} {algorithm}"] = directory
    with RunProgress(screen.is_terminal) as bar:
        rows = [score("original", MODEL, windows, original, bar)]
        rows += [
            score(name, directory, windows, original, bar)
            for name, directory in directories.items()
        ]
    console.print()
    console.print(comparison(rows))
    used = ", ".join(sorted({row.kernels for row in rows if row.kernels}))
    console.print(f"Quantized weights were multiplied by: {used}", highlight=False)
    console.print(f"\n{PROMPT} ...", style="italic")
    for row in rows:
        console.print(f"  {row.name:<16} {row.continuation}", highlight=False, markup=False)
    console.print(f"\nThe quantized models are in {arguments.output}.", highlight=False)


if __name__ == "__main__":
    main()
