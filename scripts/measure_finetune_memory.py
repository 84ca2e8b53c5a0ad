"""Measures the peak memory of fine-tuning beside what `lowbit finetune --dry-run` says.

    python scripts/measure_finetune_memory.py

A Llama with random weights and the bundled model's tokenizer is trained for a few steps on full
rows, once for each case, in a process of its own. On a CPU the process first trains the bundled
model for one step, so that libraries and kernels are there, and what counts is how far resident
memory rises above that. On a GPU it is the peak of torch's allocator.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowbit import quantize
from lowbit.errors import LowbitError
from scripts import command_line
from scripts.make_random_llama import RandomLlama, write_checkpoint
from scripts.provenance import RESULTS, ROOT, write_result

BUNDLED = ROOT / "tests" / "assets" / "books-4m"
STEPS = 2
CLEAR_PEAK = "5"  # Linux, Documentation/filesystems/proc.rst, clear_refs


@dataclass(frozen=True)
class Case:
    """One run.

    Args:
        scheme: of the base.
        precision: of the activations.
        checkpointing: recompute activations.
        optimizer: by its name here.
    """

    scheme: str
    precision: str
    checkpointing: bool
    optimizer: str = "adamw"


CPU_CASES = (
    Case("NF4_DQ", "fp32", True),
    Case("NF4_DQ", "fp32", False),
    Case("W4A16_G64", "bf16", True),
    Case("W4A16_G64", "bf16", False),
    Case("W3A16_G64", "fp32", True, "adafactor"),
)
GPU_CASES = (
    *dict.fromkeys(replace(case, precision="bf16") for case in CPU_CASES),
    Case("NF4_DQ", "bf16", True, "adamw_8bit"),
)


def settings_of(case: dict[str, Any]) -> Any:
    """Returns the settings of a run: full rows of plain text."""
    from lowbit.train import AdapterSettings, BaseSettings, DataSettings, Settings, TrainSettings

    return Settings(
        BaseSettings(device=case["device"]),
        DataSettings(seqlen=case["seqlen"]),
        AdapterSettings(rank=case["rank"]),
        TrainSettings(
            max_steps=STEPS,
            batch=case["batch"],
            precision=case["precision"],
            checkpointing=case["checkpointing"],
            optimizer=case["optimizer"],
            save_steps=STEPS,
        ),
    )


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Trains and returns forecast and measurement; called in a process of its own."""
    import torch

    from lowbit.hf.loading import choose_device, quiet_libraries
    from lowbit.memory import release_freed_memory
    from lowbit.train import finetune
    from lowbit.train.memory import forecast

    quiet_libraries()
    settings = settings_of(case)
    said = forecast(case["model"], settings).to_dict()
    device = choose_device(case["device"])
    with tempfile.TemporaryDirectory() as folder:
        short = replace(
            settings,
            base=replace(settings.base, scheme="W4A16_G64"),
            data=replace(settings.data, seqlen=128),
        )
        finetune(BUNDLED, "pydoc", Path(folder) / "warm", settings=short)
        gc.collect()
        release_freed_memory()
        before = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        else:
            Path("/proc/self/clear_refs").write_text(CLEAR_PEAK)
            before = _status("VmRSS")
        finetune(case["model"], "pydoc", Path(folder) / "run", settings=settings)
        cuda = device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(device) if cuda else _status("VmHWM")
    measured = peak - before
    return {**case, "forecast": said, "measured": measured, "ratio": said["total"] / measured}


def _status(field: str) -> int:
    """Returns a size of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise LowbitError(f"/proc/self/status has no {field}; run this on Linux")


def make_model(folder: Path, shape: RandomLlama) -> Path:
    """Returns the folder of a random model with a tokenizer."""
    model = folder / "model"
    write_checkpoint(shape, model, progress=False)
    for file in BUNDLED.glob("tokenizer*"):
        shutil.copy(file, model)
    return model


def main() -> None:
    """Runs the command."""
    parser = command_line.parser(__doc__, "python scripts/measure_finetune_memory.py --batch 2")
    parser.add_argument("--hidden", type=int, default=1024, help="width")
    parser.add_argument("--intermediate", type=int, default=2816, help="of the MLPs")
    parser.add_argument("--blocks", type=int, default=8, help="decoder blocks")
    parser.add_argument("--heads", type=int, default=16, help="attention heads")
    parser.add_argument("--vocab", type=int, default=32000, help="tokens")
    parser.add_argument("--batch", type=int, default=4, help="rows at once")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens in a row")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--case", default=None, help=argparse.SUPPRESS)
    parser.add_argument(
        "--json", type=Path, default=RESULTS / "finetune_memory.json", help="result"
    )
    command_line.run(parser, _run)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.case is not None:
        print(json.dumps(run_case(json.loads(arguments.case))))
        return
    shape = RandomLlama(
        arguments.hidden,
        arguments.intermediate,
        arguments.blocks,
        arguments.heads,
        arguments.vocab,
    )
    cases = GPU_CASES if arguments.device == "cuda" else CPU_CASES
    results = []
    with tempfile.TemporaryDirectory() as folder:
        original = make_model(Path(folder), shape)
        for case in cases:
            # Not quantized while loading: at that moment it may take more than training does.
            model = Path(folder) / case.scheme
            if not model.exists():
                quantize(original, model, scheme=case.scheme, algorithm="rtn", progress=False)
            task = {**vars(case), "model": str(model), "device": arguments.device}
            task |= {name: getattr(arguments, name) for name in ("batch", "seqlen", "rank")}
            result = _measure(task)
            results.append({**result, "model": "random"})
            print(
                f"{case.scheme:10} {case.precision} {case.optimizer:9} "
                f"checkpointing {case.checkpointing!s:5}: forecast "
                f"{result['forecast']['total'] / 1e9:.3f} GB, measured "
                f"{result['measured'] / 1e9:.3f} GB, ratio {result['ratio']:.3f}",
                flush=True,
            )
    content = {"model": vars(shape), "steps": STEPS, "cases": results}
    shown = ("hidden", "intermediate", "blocks", "heads", "vocab", "batch", "seqlen", "rank")
    options = " ".join(f"--{name} {getattr(arguments, name)}" for name in shown)
    command = f"python scripts/measure_finetune_memory.py {options} --device {arguments.device}"
    write_result(arguments.json, command, content)


def _measure(task: dict[str, Any]) -> dict[str, Any]:
    """Returns what `run_case` found in a process of its own."""
    command = [sys.executable, __file__, "--case", json.dumps(task)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise LowbitError(f"a measured process gave exit {done.returncode}: {lines[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.decode().strip().splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
