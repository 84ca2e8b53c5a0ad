"""Asking a client: a small program in its environment, JSON there, safetensors back."""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_tiny
from torch import Tensor

import lowbit

PROGRAM = Path(__file__).with_name("client_program.py")
ASSETS = Path(__file__).parents[1] / "assets"
TOKENIZER = ASSETS / "books-4m"
# Of the tokenizer above, which some clients insist on.
VOCABULARY = len(json.loads((TOKENIZER / "tokenizer.json").read_text())["model"]["vocab"])
IDS = torch.arange(1, 33)[None]
SECONDS = 900


def require(client: str) -> str:
    """Returns the interpreter of a client; skips the test where there is none."""
    variable = f"LOWBIT_INTEROP_{client.upper()}"
    interpreter = os.environ.get(variable)
    if not interpreter:
        pytest.skip(f"{variable} names no interpreter")
    if not Path(interpreter).exists():
        # What `make test-interop` says of an environment that could not be made.
        pytest.skip(interpreter)
    return interpreter


def ask(client: str, out: Path, **request: Any) -> dict[str, Tensor]:
    """Returns the tensors that a client answered with.

    Args:
        client: gptqmodel, llmcompressor, ...
        out: folder for the answer, and for what the client writes.
        **request: "do" is a function of `client_program.py`, the others are its arguments.
    """
    out.mkdir(parents=True, exist_ok=True)
    asked = {key: str(v) if isinstance(v, Path) else v for key, v in request.items()}
    asked |= {"out": str(out), "ids": IDS.tolist()}
    process = started(require(client))
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(asked) + "\n")
    process.stdin.flush()
    ready, _, _ = select.select([process.stdout], [], [], SECONDS)
    line = process.stdout.readline() if ready else ""
    if not line:
        process.kill()
        started.cache_clear()
        raise AssertionError(f"{client}: no answer, status {process.wait()}")
    assert json.loads(line) == "", json.loads(line)
    return load_file(out / "answer.safetensors")


@functools.cache
def started(interpreter: str) -> subprocess.Popen[str]:
    """Returns a client that waits for requests, one for all tests: importing takes longer."""
    process = subprocess.Popen(
        [interpreter, str(PROGRAM)],
        cwd=tempfile.gettempdir(),  # GPTQModel writes its logs where it runs
        env={
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # lowbit may be installed, and must stay out
            "GPTQMODEL_CPU_WORKERS": "2",  # its pool wants two, whatever the number of cores
            "TORCH_COMPILE_DISABLE": "1",  # minutes of g++ for models of milliseconds
            "CUDA_VISIBLE_DEVICES": "",
            "HOME": os.environ.get("HOME", ""),
            "PATH": os.pathsep.join([str(Path(interpreter).parent), os.environ.get("PATH", "")]),
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    atexit.register(process.kill)
    return process


def model(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Writes a small random Llama, with a tokenizer, and returns its folder."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    made = make_tiny("llama", dtype, **{**sizes, "vocab_size": VOCABULARY, **changes})
    made.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TOKENIZER / name).read_bytes())
    return folder


def exported(source: Path, folder: Path, scheme: str, to: str, **options: Any) -> Path:
    """Returns the folder of `source` under a scheme, in another format."""
    lowbit.quantize(
        source, folder / "quantized", scheme=scheme, algorithm="rtn", progress=False, **options
    )
    return lowbit.convert(folder / "quantized", folder / "exported", to, progress=False).path


def our_weights(loaded: torch.nn.Module) -> dict[str, Tensor]:
    """Returns the decoded weights of our quantized layers, float32 by module name."""
    return {
        name: module.dequantize(torch.float32)
        for name, module in loaded.named_modules()
        if isinstance(module, lowbit.QuantLinear)
    }


def their_weights(answer: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights in an answer."""
    return {n.removeprefix("weights."): t for n, t in answer.items() if n.startswith("weights.")}


def require_equal_weights(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], dtype: torch.dtype, count: int
) -> None:
    """Asserts that both have the same layers and numbers, rounded once to the client's dtype."""
    assert len(ours) == count
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight.to(dtype), theirs[name].to(dtype)), name


def relative(found: Tensor, expected: Tensor) -> float:
    """Returns the root mean square of a difference as a share of the deviation."""
    found, expected = found.float(), expected.float()
    return float((found - expected).square().mean().sqrt() / expected.std())
