"""Measures training steps of adapters: lowbit, bitsandbytes and 16 bits, in one run.

    python scripts/bench_qlora.py tests/assets/books-4m --batch 4 --seqlen 256

Every contender trains the same LoRA (rank, targets, optimizer, checkpointing) on the same random
tokens, and has a process of its own that stays alive: memory is that of one contender alone, while
the timed steps of all take turns, so that whatever else the machine does falls on all of them. Only
ratios of medians within one run are meant to be compared.

Memory is the peak while training, the frozen base included: on a GPU the allocator's, on a CPU the
resident set less what importing took.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError, unknown_name
from lowbit.progress import RunProgress
from scripts import command_line
from scripts.provenance import RESULTS, package_version, write_result

LOWBIT, PEER, PLAIN = "lowbit", "bitsandbytes", "16 bits"
# contender -> how the base is held
CONTENDERS = {
    f"{LOWBIT} NF4_DQ": "NF4_DQ",
    f"{LOWBIT} W4A16_G64": "W4A16_G64",
    f"{LOWBIT} W2A16_G64": "W2A16_G64",
    f"{PEER} NF4 DQ": PEER,
    f"{PLAIN} LoRA": PLAIN,
}
DEFAULT = [f"{LOWBIT} NF4_DQ", f"{LOWBIT} W4A16_G64", f"{PEER} NF4 DQ", f"{PLAIN} LoRA"]


def load_base(model: str, base: str, device: str) -> Any:
    """Returns the frozen bf16 model whose linear layers are held as `base` says."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    import lowbit

    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": device}
    if base == PEER:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    elif base != PLAIN:
        options["quantization_config"] = lowbit.LowbitConfig(base)
    return AutoModelForCausalLM.from_pretrained(model, **options)


class Trainee:
    """A contender in its process: a model with adapters, an optimizer, and a batch of tokens."""

    def __init__(self, arguments: argparse.Namespace, base: str) -> None:
        import torch
        from peft import LoraConfig, get_peft_model

        self.torch, self.device = torch, arguments.device
        self.imported = _resident("VmRSS")
        torch.manual_seed(0)
        model = load_base(arguments.model, base, arguments.device)
        config = LoraConfig(
            r=arguments.rank,
            lora_alpha=2 * arguments.rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model.config.use_cache = False
        if arguments.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        self.model = get_peft_model(model, config, autocast_adapter_dtype=False).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trained = sum(p.numel() for p in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        shape, vocab = (arguments.batch, arguments.seqlen), model.config.vocab_size
        self.ids = torch.randint(vocab, shape, generator=torch.Generator().manual_seed(0))
        self.ids = self.ids.to(self.device)
        self._forget_peak()

    def _forget_peak(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, proc(5)

    def step(self) -> dict[str, float]:
        """Returns the seconds of one step, its loss, and the peak of memory so far in bytes."""
        self._wait()
        start = time.perf_counter()
        loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._wait()
        seconds = time.perf_counter() - start
        if self.device == "cuda":
            peak = self.torch.cuda.max_memory_allocated()
        else:
            peak = _resident("VmHWM") - self.imported
        return {"seconds": seconds, "loss": float(loss), "peak_bytes": peak}

    def _wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()


def _resident(field: str) -> int:
    """Returns a line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LowbitError(f"/proc/self/status has no {field}; memory is measured on Linux only")


def serve(arguments: argparse.Namespace, base: str) -> None:
    """A contender's process: takes a step for each line that it reads, and writes what it took."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print must not come between
    trainee = Trainee(arguments, base)
    print(json.dumps({"trained": trainee.trained}), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(trainee.step()), file=answers, flush=True)


class Worker:
    """The process of one contender, seen from outside."""

    def __init__(self, arguments: argparse.Namespace, name: str) -> None:
        command = [sys.executable, __file__, arguments.model, "--serve", CONTENDERS[name]]
        for option in ("batch", "seqlen", "rank", "device"):
            command += [f"--{option}", str(getattr(arguments, option))]
        command += [] if arguments.checkpointing else ["--no-checkpointing"]
        self.name, self.steps = name, list[dict[str, float]]()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.trained = int(self._answer()["trained"])

    def step(self) -> dict[str, float]:
        """Returns what one step took."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            reason = (self.process.stderr.read() if self.process.stderr else "").strip()
            last = (reason.splitlines() or ["no message"])[-1]
            raise LowbitError(f"{self.name}: does not run here ({last}); leave it out with --only")
        content: dict[str, float] = json.loads(line)
        return content

    def stop(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()


def measure(arguments: argparse.Namespace, names: list[str]) -> list[dict[str, Any]]:
    """Returns a row for each contender: tokens per second, peak memory, first and last loss."""
    workers: list[Worker] = []
    rounds = arguments.warmup + arguments.steps
    try:
        with RunProgress(True) as bar:
            bar.stage("training steps", len(names) + rounds)
            for name in names:
                bar.describe(f"loading {name}")
                workers.append(Worker(arguments, name))
                bar.advance(1)
            for number in range(rounds):
                for worker in workers:
                    worker.steps.append(worker.step())
                bar.describe(f"step {number + 1}")
                bar.advance(1)
    finally:
        for worker in workers:
            worker.stop()
    tokens = arguments.batch * arguments.seqlen
    return [
        {
            "name": worker.name,
            "trained_parameters": worker.trained,
            "seconds": [round(s["seconds"], 6) for s in worker.steps[arguments.warmup :]],
            "tokens_per_second": tokens / _median(worker, arguments.warmup),
            "peak_bytes": int(worker.steps[-1]["peak_bytes"]),
            "first_loss": worker.steps[0]["loss"],
            "last_loss": worker.steps[-1]["loss"],
        }
        for worker in workers
    ]


def _median(worker: Worker, warmup: int) -> float:
    return statistics.median(step["seconds"] for step in worker.steps[warmup:])


def _run(arguments: argparse.Namespace) -> None:
    if arguments.serve is not None:
        serve(arguments, arguments.serve)
        return
    if not (Path(arguments.model) / "config.json").is_file():
        raise LowbitError(f"{arguments.model}: no decoder here (config.json is missing)")
    names = [name.strip() for name in arguments.only.split(",")] if arguments.only else DEFAULT
    for name in names:
        if name not in CONTENDERS:
            raise unknown_name("contender", name, CONTENDERS)
    rows = measure(arguments, names)
    settings = ("batch", "seqlen", "rank", "checkpointing", "device", "warmup", "steps")
    case = {
        "model": Path(arguments.model).name,
        **{name: getattr(arguments, name) for name in settings},
        "peers": {name: package_version(name) for name in ("bitsandbytes", "peft")},
        "rows": rows,
    }
    kept = json.loads(arguments.json.read_text())["cases"] if arguments.json.exists() else []
    same = ("model", "batch", "seqlen", "device")
    kept = [old for old in kept if any(old[key] != case[key] for key in same)]
    command = f"python scripts/bench_qlora.py {case['model']}"
    write_result(arguments.json, command, {"cases": [*kept, case]})
    fastest = {row["name"]: row["tokens_per_second"] for row in rows}
    for row in rows:
        ratio = row["tokens_per_second"] / fastest.get(f"{PLAIN} LoRA", float("nan"))
        print(
            f"{row['name']:24} {row['tokens_per_second']:10.1f} tokens/s "
            f"{row['peak_bytes'] / 1e9:8.3f} GB {ratio:6.2f} x {PLAIN} LoRA"
        )


def main() -> None:
    """Runs the command."""
    parser = command_line.parser(__doc__, "python scripts/bench_qlora.py tests/assets/books-4m")
    add = parser.add_argument
    add("model", help="folder of a 16-bit decoder")
    add("--only", help=f"contenders, separated by commas, of: {', '.join(CONTENDERS)}")
    add("--batch", type=int, default=1, help="rows of a step")
    add("--seqlen", type=int, default=512, help="tokens of a row")
    add("--rank", type=int, default=16, help="of the adapters, on all linear layers")
    add("--checkpointing", action=argparse.BooleanOptionalAction, default=True,
        help="keep only the inputs of blocks between forward and backward")  # fmt: skip
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    add("--warmup", type=int, default=2, help="steps that are not timed")
    add("--steps", type=int, default=10, help="timed steps of each contender")
    add("--json", type=Path, default=RESULTS / "qlora.json", help="result; cases are added to it")
    add("--serve", metavar="BASE", help=argparse.SUPPRESS)
    command_line.run(parser, _run)


if __name__ == "__main__":
    main()
