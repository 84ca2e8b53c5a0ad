"""What the drivers of peers share: one job in, dequantized weights and a JSON report out.

A driver is run as a module in the peer's own environment (`python -m scripts.peers.NAME`), where
lowbit is not installed, so this file imports torch, safetensors and transformers only.

    job      model folder, token ids, method, bits, group size, symmetric or not
    report   <output>/report.json, and beside it weights.safetensors with the dequantized weights
             by their Hugging Face names; or the sentence in which the peer refuses the job

Two sizes are reported. `stored_bytes` is what the peer's own tensors take, as it keeps or writes
them. `dense_bits` counts every code at its nominal width plus scales and zero points as stored:
the size that the format could have, and what comparisons use, so that no peer loses for keeping
3-bit codes in a byte.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

REPORT, WEIGHTS = "report.json", "weights.safetensors"


class RefusedError(Exception):
    """The peer cannot do this job; the sentence says why."""


@dataclass(frozen=True)
class Job:
    """One run of one peer.

    Args:
        model: folder of the 16-bit decoder.
        tokens: safetensors file, `input_ids` int64 `[samples, seqlen]`.
        method: of the peer, for a driver that knows several.
        bits: width of a code.
        group_size: input features that share a scale.
        symmetric: without zero points.
        output: folder for the report.
        seed: of whatever the peer draws itself.
        options: further settings of the method.
    """

    model: Path
    tokens: Path
    method: str
    bits: int
    group_size: int
    symmetric: bool
    output: Path
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def input_ids(self) -> Tensor:
        """Returns the calibration tokens, int64 `[samples, seqlen]`."""
        ids: Tensor = load_file(self.tokens)["input_ids"]
        return ids.long()

    def load_model(self, dtype: torch.dtype = torch.float32) -> Any:
        """Returns the decoder on the CPU, in evaluation mode."""
        from transformers import AutoModelForCausalLM

        try:
            return AutoModelForCausalLM.from_pretrained(self.model, dtype=dtype).eval()
        except TypeError:  # transformers before 4.56 call it torch_dtype
            return AutoModelForCausalLM.from_pretrained(self.model, torch_dtype=dtype).eval()


class Stopwatch:
    """Time spent inside `with` blocks, added up.

    `seconds` are the clock's; `cpu_seconds` those that all threads of the process computed, which
    other work on the machine does not change much.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.cpu_seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self._start = time.perf_counter()
        self._cpu_start = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start
        self.cpu_seconds += time.process_time() - self._cpu_start


@dataclass
class Outcome:
    """What a peer made of a job.

    Args:
        weights: Hugging Face name -> dequantized weight `[out_features, in_features]`.
        stored_bytes: of all tensors that the peer keeps for them.
        dense_bits: of codes at their nominal width, scales and zero points.
        options: everything that was not left at the peer's default.
        watch: ran while quantizing; loading and reading back are left out where that is possible.
        changed: other tensors that the peer changed and the quantized weights belong to, by name:
            norms that took a scale over. They are not counted, their size is what it was.
    """

    weights: dict[str, Tensor]
    stored_bytes: int
    dense_bits: float
    options: dict[str, Any]
    watch: Stopwatch
    changed: dict[str, Tensor] = field(default_factory=dict)


def quantized_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Returns the linear layers that are compared: all of the decoder blocks, not the head."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("lm_head")
    }


def tensor_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Returns the bytes of `tensors`, without those that are None."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Returns every tensor of the safetensors files in `folder`."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            tensors.update((name, handle.get_tensor(name)) for name in handle.keys())  # noqa: SIM118
    return tensors


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Returns the codes that int32 `words` `[n, columns]` hold, first code in the lowest bits.

    The words of a column are one stream of bits, so 3-bit codes may cross a word, 32 of them in
    three words (AutoGPTQ's layout). Result: int32 `[32 * n // bits, columns]`.
    """
    count, columns = words.shape
    shifts = torch.arange(32, dtype=torch.int32)[None, :, None]
    stream = ((words[:, None, :] >> shifts) & 1).reshape(count * 32, columns)
    codes = stream[: count * 32 // bits * bits].reshape(-1, bits, columns)
    weights = (1 << torch.arange(bits, dtype=torch.int32))[None, :, None]
    return (codes * weights).sum(1, dtype=torch.int32)


def decode_gptq(tensors: dict[str, Tensor], name: str, job: Job, zero_offset: int) -> Tensor:
    """Returns the float32 weight `[out_features, in_features]` of a layer in GPTQ's file format.

    Args:
        tensors: `<name>.qweight` `[in * bits / 32, out]`, `.qzeros` `[groups, out * bits / 32]`,
            `.scales` `[groups, out]` and, for reordered groups, `.g_idx` `[in]`.
        name: of the layer.
        job: bits and group size.
        zero_offset: added to stored zero points: 1 in the first version of the format, else 0.

    Raises:
        ValueError: symmetric weights whose zero points are not the middle code: a wrong offset.
    """
    codes = unpack_words(tensors[f"{name}.qweight"], job.bits)
    zeros = unpack_words(tensors[f"{name}.qzeros"].T.contiguous(), job.bits).T + zero_offset
    scales = tensors[f"{name}.scales"].float()
    middle = 1 << (job.bits - 1)
    if job.symmetric and not bool((zeros == middle).all()):
        raise ValueError(f"{name}: symmetric zero points are {zeros.unique().tolist()}")
    groups = tensors.get(f"{name}.g_idx")
    if groups is None:
        groups = torch.arange(len(codes)) // job.group_size
    index = groups.long()
    return ((codes - zeros[index]).float() * scales[index]).T.contiguous()


def gptq_dense_bits(tensors: dict[str, Tensor], name: str, job: Job) -> float:
    """Returns the bits of codes, scales and, for asymmetric weights, zero points of a layer."""
    scales = tensors[f"{name}.scales"]
    codes = tensors[f"{name}.qweight"].numel() * 32
    zeros = 0 if job.symmetric else scales.numel() * job.bits
    return codes + scales.numel() * scales.element_size() * 8 + zeros


def gptq_outcome(
    folder: Path, job: Job, options: dict[str, Any], watch: Stopwatch, zero_offset: int = 1
) -> Outcome:
    """Returns the outcome of a checkpoint in GPTQ's file format."""
    tensors = read_tensors(folder)
    names = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
    parts = ("qweight", "qzeros", "scales", "g_idx")
    return Outcome(
        weights={f"{name}.weight": decode_gptq(tensors, name, job, zero_offset) for name in names},
        stored_bytes=tensor_bytes(tensors.get(f"{n}.{part}") for n in names for part in parts),
        dense_bits=sum(gptq_dense_bits(tensors, name, job) for name in names),
        options=options,
        watch=watch,
    )


def parse_job() -> Job:
    """Returns the job of the command line, which is one JSON file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path, help="JSON file with the fields of `Job`")
    fields = json.loads(parser.parse_args().job.read_text())
    for key in ("model", "tokens", "output"):
        fields[key] = Path(fields[key])
    return Job(**fields)


def write_job(file: Path, job: Job) -> None:
    """Writes `job` for `parse_job`."""
    file.write_text(json.dumps(asdict(job), default=str))


def report(job: Job, outcome: Outcome, packages: Sequence[str]) -> None:
    """Writes weights and report of a finished job."""
    job.output.mkdir(parents=True, exist_ok=True)
    tensors = {**outcome.changed, **outcome.weights}
    # Clones: tools return views of one storage, which safetensors refuses.
    save_file(
        {name: tensor.detach().float().contiguous().clone() for name, tensor in tensors.items()},
        job.output / WEIGHTS,
    )
    count = sum(weight.numel() for weight in outcome.weights.values())
    content = {
        "weights": count,
        "stored_bits_per_weight": 8 * outcome.stored_bytes / count,
        "bits_per_weight": outcome.dense_bits / count,
        "options": outcome.options,
        "seconds": outcome.watch.seconds,
        "cpu_seconds": outcome.watch.cpu_seconds,
        "versions": versions(packages),
    }
    (job.output / REPORT).write_text(json.dumps(content, default=str))


def refuse(job: Job, reason: str, packages: Sequence[str]) -> NoReturn:
    """Writes why the job cannot be done, and ends the process: a refusal is a result."""
    job.output.mkdir(parents=True, exist_ok=True)
    content = {"refused": reason, "versions": versions(packages)}
    (job.output / REPORT).write_text(json.dumps(content))
    raise SystemExit(0)


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Returns the versions of `packages`, torch and transformers; None where one is missing."""
    found: dict[str, str | None] = {}
    for package in (*packages, "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
