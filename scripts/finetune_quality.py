"""Measures how well adapters learn on bases of few bits: validation loss beside 16-bit LoRA.

    python scripts/finetune_quality.py tests/assets/books-4m

The decoder is tuned to a text of another style (`pydoc`) on a 16-bit base and on low-bit ones, with
the same rows, order and adapters for every base, over several seeds. What is compared is the
validation loss after the last step: its difference to 16-bit LoRA within a seed, because seeds also
choose which rows validate.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit import quantize
from lowbit.errors import LowbitError
from lowbit.hf.loading import quiet_libraries
from lowbit.progress import RunProgress
from lowbit.train import (
    AdapterSettings,
    BaseSettings,
    DataSettings,
    Settings,
    TrainSettings,
    finetune,
)
from scripts import command_line
from scripts.provenance import RESULTS, ROOT, write_result

PLAIN = "16 bits"
ASSETS = ROOT / "tests" / "assets"


@dataclass(frozen=True)
class Base:
    """What is trained on.

    Args:
        name: in the table.
        scheme: of the base, None for 16 bits.
        algorithm: that chose its codes.
        init: of the adapters.
    """

    name: str
    scheme: str | None = None
    algorithm: str = "rtn"
    init: str = "default"


BASES = (
    Base(PLAIN),
    Base("NF4_DQ", "NF4_DQ"),
    Base("W4A16_G64, GPTQ", "W4A16_G64", "gptq"),
    Base("W3A16_G64, GPTQ", "W3A16_G64", "gptq"),
    Base("W2A16_G64, GPTQ", "W2A16_G64", "gptq"),
    Base("W2A16_G64, GPTQ, residual", "W2A16_G64", "gptq", "residual"),
)


def base_folder(arguments: argparse.Namespace, base: Base, work: Path) -> Path:
    """Returns the checkpoint to train on, quantized if it is not there yet."""
    if base.scheme is None:
        return Path(arguments.model)
    folder = work / f"{base.scheme}-{base.algorithm}"
    if not folder.exists():
        data = arguments.calibration if base.algorithm != "rtn" else None
        quantize(
            arguments.model, folder, scheme=base.scheme, algorithm=base.algorithm,
            calibration=data, samples=arguments.samples, progress=False,
        )  # fmt: skip
    return folder


def settings_of(arguments: argparse.Namespace, base: Base, seed: int) -> Settings:
    """Returns the settings of one run."""
    residual = base.init == "residual"
    return Settings(
        BaseSettings(device=arguments.device),
        DataSettings(seqlen=arguments.seqlen, validation_fraction=arguments.validation),
        AdapterSettings(
            rank=arguments.rank, init=base.init, weights=arguments.model if residual else None
        ),
        TrainSettings(
            max_steps=arguments.steps, batch=arguments.batch, lr=arguments.lr,
            eval_steps=max(1, arguments.steps // 8), save_steps=arguments.steps, seed=seed,
        ),
    )  # fmt: skip


def measure(arguments: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Returns a row for each base: the validation losses of every seed, step by step."""
    rows: list[dict[str, Any]] = [{"name": base.name, "seeds": []} for base in BASES]
    with RunProgress(True) as bar:
        bar.stage("fine-tuning", arguments.seeds * len(BASES))
        for seed in range(arguments.seeds):
            for base, row in zip(BASES, rows, strict=True):
                bar.describe(f"{base.name}, seed {seed}")
                result = finetune(
                    base_folder(arguments, base, work),
                    arguments.data,
                    work / f"run-{len(row['seeds'])}-{rows.index(row)}",
                    settings=settings_of(arguments, base, seed),
                )
                history = result.manifest["history"]
                curve = [[e["step"], e["eval_loss"]] for e in history if "eval_loss" in e]
                row["seeds"].append({"validation": curve, "last": curve[-1][1]})
                bar.advance(1)
    plain = [found["last"] for found in rows[0]["seeds"]]
    for row in rows:
        losses = [found["last"] for found in row["seeds"]]
        gaps = [loss - other for loss, other in zip(losses, plain, strict=True)]
        row["validation_loss"] = statistics.fmean(losses)
        row["above_16_bits"] = statistics.fmean(gaps)
        row["standard_error"] = (
            statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
        )
    return rows


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Writes the validation loss over the steps, the mean over seeds, a line for each base."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for row in rows:
        curves = [found["validation"] for found in row["seeds"]]
        steps = [step for step, _ in curves[0]]
        means = [
            statistics.fmean(loss for _, loss in points) for points in zip(*curves, strict=True)
        ]
        axes.plot(steps, means, label=row["name"], color="black" if row["name"] == PLAIN else None)
    axes.set_xlabel("steps")
    axes.set_ylabel("validation loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.seeds < 1 or arguments.steps < 1:
        raise LowbitError("needed at least 1 seed and 1 step")
    quiet_libraries()
    with tempfile.TemporaryDirectory() as name:
        rows = measure(arguments, Path(name))
    draw(rows, arguments.figure)
    shown = ("steps", "batch", "seqlen", "rank", "lr", "seeds", "samples", "validation")
    content = {
        "model": Path(arguments.model).name,
        "data": Path(arguments.data).name,
        "figure": arguments.figure.name,
        **{key: getattr(arguments, key) for key in shown},
        "rows": rows,
    }
    options = " ".join(f"--{key} {getattr(arguments, key)}" for key in shown)
    command = f"python scripts/finetune_quality.py {content['model']} {options}"
    write_result(arguments.json, command, content)
    for row in rows:
        print(
            f"{row['name']:28} {row['validation_loss']:.4f} nats, "
            f"{row['above_16_bits']:+.4f} to {PLAIN}"
        )


def main() -> None:
    """Runs the command."""
    parser = command_line.parser(
        __doc__, "python scripts/finetune_quality.py tests/assets/books-4m"
    )
    add = parser.add_argument
    add("model", help="folder of a 16-bit decoder")
    add("--data", default="pydoc", help="what to learn, as of lowbit finetune")
    add("--validation", type=float, default=0.1, help="share of the rows that validate")
    add("--calibration", default=str(ASSETS / "books-4m-calibration.safetensors"),
        help="text or token ids that the bases are calibrated on")  # fmt: skip
    add("--samples", type=int, default=128, help="calibration windows")
    add("--steps", type=int, default=200, help="of the optimizer")
    add("--batch", type=int, default=4, help="rows of a step")
    add("--seqlen", type=int, default=256, help="tokens of a row")
    add("--rank", type=int, default=16, help="of the adapters")
    add("--lr", type=float, default=1e-3, help="highest learning rate")
    add("--seeds", type=int, default=3, help="of split, order and adapters: 0, 1, ...")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    add("--json", type=Path, default=RESULTS / "finetune.json", help="result")
    add("--figure", type=Path, default=RESULTS / "finetune.png", help="picture")
    command_line.run(parser, _run)


if __name__ == "__main__":
    main()
