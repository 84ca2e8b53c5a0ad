"""llama.cpp's k-quants and i-quants, through `ggml_quantize_chunk` of its own source.

Only the quantization of ggml is built (`build_ggml`), not the program. The importance matrix is
that of `llama-imatrix`: for every input channel of a layer, the mean of the squared activation over
the calibration tokens, of the 16-bit model computed in float32. Every layer gets the same type, a
"pure" quantization, so that a size means one format; llama.cpp's mixtures (`Q4_K_M`) give some
layers more bits.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scripts.peers.driver import (
    Job,
    Outcome,
    RefusedError,
    Stopwatch,
    parse_job,
    quantized_linears,
    refuse,
    report,
)

# enum ggml_type (ggml.h); the function that decodes a row is dequantize_row_<lower-case name>.
TYPES = {
    "Q2_K": 10, "Q3_K": 11, "Q4_K": 12,
    "IQ2_XS": 17, "IQ3_S": 21, "IQ2_S": 22, "IQ4_XS": 23,
}  # fmt: skip
BLOCK = 256  # weights in a super-block, in every one of these types
SDIST = "llama-cpp-python"
LIBRARY = "libggml-quants.so"
SOURCES = (
    "ggml.c", "ggml.cpp", "ggml-alloc.c", "ggml-quants.c", "ggml-threading.cpp",
    "ggml-backend.cpp", "ggml-backend-meta.cpp", "ggml-opt.cpp", "gguf.cpp",
)  # fmt: skip


def library_path() -> Path:
    """Returns where the library lies: beside the environment's other libraries."""
    return Path(sys.prefix) / "lib" / LIBRARY


def build_ggml() -> None:
    """Compiles ggml's quantization from the source that llama-cpp-python ships.

    Raises:
        RefusedError: no compiler, or the source does not compile.
    """
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise RefusedError("no C++ compiler to build llama.cpp's ggml with; install g++")
    folder = Path(sys.prefix) / "src"
    fetched = folder / "fetched"
    # Reused from an interrupted build; the index is slow and the archive large.
    if not list(fetched.glob("*.tar.gz")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", ":all:", "--no-build-isolation", SDIST, "-d", str(fetched)]
        subprocess.run(command, check=True)
    archive = next(fetched.glob("*.tar.gz"))
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    source = next(folder.glob("llama_cpp_python-*/vendor/llama.cpp/ggml"))
    (source / "src" / "ggml-version.h").write_text(
        f'#define GGML_VERSION "{archive.name}"\n#define GGML_COMMIT ""\n'
    )
    arguments = ["-O3", "-mavx2", "-mfma", "-mf16c"] if os.uname().machine == "x86_64" else ["-O3"]
    arguments += ["-fPIC", "-D_GNU_SOURCE", f"-I{source}/include", f"-I{source}/src"]
    objects = []
    for name in SOURCES:
        language = "c" if name.endswith(".c") else "c++"
        objects.append(str(folder / f"{name}.o"))
        command = [compiler, "-x", language, *arguments, "-c", str(source / "src" / name)]
        done = subprocess.run([*command, "-o", objects[-1]], capture_output=True, text=True)
        if done.returncode:
            raise RefusedError(f"{name} of ggml does not compile: {done.stderr.strip()[-400:]}")
    library = str(library_path())
    subprocess.run([compiler, "-shared", *objects, "-o", library, "-lm", "-lpthread"], check=True)


def importance(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Returns the mean squared input of every channel, float32 `[in_features]` by layer.

    Args:
        model: the 16-bit decoder in float32.
        ids: int64 `[samples, seqlen]`.
    """
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0].double().square().flatten(0, -2).sum(0)
            sums[name] = sums.get(name, 0) + squares

        return add

    handles = [
        layer.register_forward_pre_hook(hook(name))
        for name, layer in quantized_linears(model).items()
    ]
    with torch.inference_mode():
        for batch in ids.split(8):
            model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: (total / ids.numel()).float() for name, total in sums.items()}


class Ggml:
    """The two functions of ggml that are needed: quantize rows, dequantize a row."""

    def __init__(self, kind: str) -> None:
        self._library = ctypes.CDLL(str(library_path()))
        self._type = TYPES[kind]
        self._quantize = self._library.ggml_quantize_chunk
        self._quantize.restype = ctypes.c_size_t
        pointer = ctypes.c_void_p
        self._quantize.argtypes = [
            ctypes.c_int, pointer, pointer, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, pointer
        ]  # fmt: skip
        family, _, rest = kind.partition("_")
        name = f"{family.lower()}_{rest if rest == 'K' else rest.lower()}"
        self._dequantize = getattr(self._library, f"dequantize_row_{name}")
        self._dequantize.argtypes = [pointer, pointer, ctypes.c_int64]
        self._dequantize.restype = None

    def round_trip(self, weight: Tensor, channels: Tensor | None) -> tuple[Tensor, int]:
        """Returns the dequantized float32 weight and the bytes of its blocks."""
        rows, columns = weight.shape
        if columns % BLOCK:
            raise RefusedError(f"rows of {columns} weights are no multiple of {BLOCK}")
        source = np.ascontiguousarray(weight.numpy())
        blocks = np.empty(source.nbytes, dtype=np.uint8)
        matrix = None if channels is None else np.ascontiguousarray(channels.numpy())
        size = self._quantize(
            self._type, source.ctypes.data, blocks.ctypes.data, 0, rows, columns,
            None if matrix is None else matrix.ctypes.data,
        )  # fmt: skip
        result = np.empty_like(source)
        self._dequantize(blocks.ctypes.data, result.ctypes.data, rows * columns)
        return torch.from_numpy(result), int(size)


def run(job: Job) -> Outcome:
    """Returns the outcome of type `job.options["type"]`, with or without importance matrix."""
    kind, with_matrix = job.options["type"], job.options["imatrix"]
    model = job.load_model()
    outcome = Outcome({}, 0, 0.0, dict(job.options), Stopwatch())
    with outcome.watch:
        matrix = importance(model, job.input_ids()) if with_matrix else {}
        ggml = Ggml(kind)
        for name, layer in quantized_linears(model).items():
            restored, size = ggml.round_trip(layer.weight.detach(), matrix.get(name))
            outcome.weights[f"{name}.weight"] = restored
            outcome.stored_bytes += size
    outcome.dense_bits = 8.0 * outcome.stored_bytes
    archive = next((Path(sys.prefix) / "src" / "fetched").glob("*.tar.gz"))
    outcome.options["source"] = archive.name.removesuffix(".tar.gz")
    return outcome


def main() -> None:
    """Runs one job; builds the library first where it is missing."""
    job = parse_job()
    try:
        if not library_path().exists():
            build_ggml()
        outcome = run(job)
    except RefusedError as refusal:
        refuse(job, str(refusal), [])
    report(job, outcome, [])


if __name__ == "__main__":
    main()
