"""Measures peak memory and time of quantizing and loading a model that is large beside a block.

    python scripts/make_random_llama.py --output ./random-7b
    python scripts/measure_memory.py ./random-7b

Each case is a process of its own, so nothing of one stays in the peak of the next:

    imports   torch, transformers and lowbit, no model: the constant in every other case
    rtn       the whole model, no data
    gptq      the first blocks only, on random token ids; the rest is copied in 16 bits
    load      `from_pretrained` of what rtn wrote, then every tensor read once: they are mapped,
              and what was never read would not count
    forward   the same and a forward pass of 16 tokens
    on_load   `from_pretrained` of the 16-bit model, quantizing while it loads

Peak RSS is the kernel's own high-water mark. It counts file pages that are mapped from the
checkpoint (`file`), which the kernel may drop at any time, beside memory that was allocated
(`anonymous`); both are sampled too, every few milliseconds, so their peaks may be a little low and
need not fall into the same moment.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from lowbit_eval import measure_size

from lowbit.checkpoint import Checkpoint
from lowbit.errors import LowbitError
from scripts import command_line
from scripts.provenance import RESULTS, ROOT, write_result

SAMPLE_SECONDS = 0.005

IMPORTS = (
    "import torch, transformers, transformers.models.llama.modeling_llama, lowbit.hf.quantizer"
)
LOAD = """
import sys, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
for tensor in [*model.parameters(), *model.buffers()]:
    tensor.count_nonzero()
"""
FORWARD = LOAD + "model(model.dummy_inputs['input_ids'].new_zeros(1, 16))"
ON_LOAD = """
import sys, transformers, lowbit
transformers.AutoModelForCausalLM.from_pretrained(
    sys.argv[1], quantization_config=lowbit.LowbitConfig(sys.argv[2])
)
"""


@dataclass(frozen=True)
class Usage:
    """What one process used.

    Args:
        seconds: wall time, imports included.
        peak_rss_bytes: the kernel's high-water mark.
        peak_anonymous_bytes: the largest sampled allocated memory.
        peak_file_bytes: the largest sampled sum of mapped file pages.
    """

    seconds: float
    peak_rss_bytes: int
    peak_anonymous_bytes: int
    peak_file_bytes: int


def measure(arguments: list[str]) -> Usage:
    """Returns what `python ARGUMENTS` used.

    Raises:
        LowbitError: it failed; the message ends with its last line.
    """
    with tempfile.TemporaryFile() as errors:
        begin = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=errors, cwd=ROOT
        )
        anonymous = file = 0
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            memory = _memory(process.pid)
            anonymous = max(anonymous, memory.get("RssAnon", 0))
            file = max(file, memory.get("RssFile", 0))
            time.sleep(SAMPLE_SECONDS)
        seconds = time.monotonic() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines() or ["no message"]
            raise LowbitError(f"a measured process gave exit {process.returncode}: {lines[-1]}")
    # KiB on Linux. The mark of a child starts at the size of the process that forked it, this
    # one, which is smaller than any child: those import transformers, too.
    return Usage(round(seconds, 2), usage.ru_maxrss * 1024, anonymous, file)


def _memory(pid: int) -> dict[str, int]:
    """Returns the sizes in /proc/PID/status in bytes, empty once the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): 1024 * int(size) for name, size, _ in fields}


@dataclass(frozen=True)
class Task:
    """The sizes of the measurement.

    Args:
        scheme: of both algorithms.
        gptq_blocks: blocks that GPTQ quantizes.
        samples: its calibration windows.
        seqlen: tokens in each.
    """

    scheme: str
    gptq_blocks: int
    samples: int
    seqlen: int

    def rtn(self, model: Path, output: Path) -> list[str]:
        """Returns the arguments of the RTN run."""
        return [*self._quantize(model, output), "--algorithm", "rtn"]

    def gptq(self, model: Path, output: Path, tokens: Path) -> list[str]:
        """Returns the arguments of the GPTQ run."""
        first = "|".join(str(block) for block in range(self.gptq_blocks))
        return [
            *self._quantize(model, output),
            *("--algorithm", "gptq", "--calibration", str(tokens)),
            *("--samples", str(self.samples), "--seqlen", str(self.seqlen)),
            *("--dynamic", rf"layers\.(?!({first})\.)\d+\.=none"),
        ]

    def _quantize(self, model: Path, output: Path) -> list[str]:
        command = ["-m", "lowbit.cli", "quantize", str(model.resolve()), str(output)]
        return [*command, "--scheme", self.scheme, "--device", "cpu"]


def block_bytes(checkpoint: Checkpoint) -> int:
    """Returns the bytes of the first decoder block, as stored."""
    return sum(e.end - e.begin for name, e in checkpoint.entries.items() if ".layers.0." in name)


def main() -> None:
    """Runs the command."""
    parser = command_line.parser(__doc__, "python scripts/measure_memory.py ./random-7b")
    parser.add_argument("model", type=Path, help="folder of a decoder, as make_random_llama writes")
    parser.add_argument("--scheme", default="W4A16_G128", help="of the quantized models")
    parser.add_argument("--gptq-blocks", type=int, default=2, help="blocks that GPTQ quantizes")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of GPTQ")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens in each")
    parser.add_argument(
        "--folder", type=Path, default=None, help="for the outputs; beside the model by default"
    )
    parser.add_argument("--json", type=Path, default=RESULTS / "memory.json", help="result")
    command_line.run(parser, _run)


def _run(arguments: argparse.Namespace) -> None:
    if not Path("/proc/self/status").exists():
        raise LowbitError("memory is read from /proc, which only Linux has; run this there")
    task = Task(arguments.scheme, arguments.gptq_blocks, arguments.samples, arguments.seqlen)
    checkpoint = Checkpoint.open(arguments.model)
    vocab_size = checkpoint.config["vocab_size"]
    original = measure_size(arguments.model)
    folder = arguments.folder or arguments.model.resolve().parent
    usage: dict[str, Usage] = {}

    def case(name: str, command: list[str]) -> None:
        usage[name] = measure(command)
        peak = usage[name].peak_rss_bytes / 1e9
        print(f"{name}: {usage[name].seconds:.1f} s, peak {peak:.2f} GB", flush=True)

    with tempfile.TemporaryDirectory(dir=folder, prefix="memory-") as outputs:
        case("imports", ["-c", IMPORTS])
        case("rtn", task.rtn(arguments.model, Path(outputs) / "rtn"))
        quantized = measure_size(Path(outputs) / "rtn")
        case("load", ["-c", LOAD, str(Path(outputs) / "rtn")])
        case("forward", ["-c", FORWARD, str(Path(outputs) / "rtn")])
        tokens = Path(outputs) / "tokens.npy"
        ids = np.random.default_rng(0).integers(vocab_size, size=(task.samples, task.seqlen))
        np.save(tokens, ids.astype(np.int32))
        case("on_load", ["-c", ON_LOAD, str(arguments.model), task.scheme])
        case("gptq", task.gptq(arguments.model, Path(outputs) / "gptq", tokens))
    constant = usage["imports"].peak_rss_bytes
    content = {
        "model": {
            "name": arguments.model.resolve().name,
            "parameters": original.parameters,
            "bytes_on_disk": original.bytes_on_disk,
            "block_bytes": block_bytes(checkpoint),
            "blocks": checkpoint.config["num_hidden_layers"],
        },
        **asdict(task),
        "quantized_bytes_on_disk": quantized.bytes_on_disk,
        # What loading takes beyond the imports, by the size of the files.
        "load_ratio": (usage["load"].peak_rss_bytes - constant) / quantized.bytes_on_disk,
        "cases": {name: asdict(found) for name, found in usage.items()},
    }
    write_result(arguments.json, "python scripts/measure_memory.py MODEL", content)


if __name__ == "__main__":
    main()
