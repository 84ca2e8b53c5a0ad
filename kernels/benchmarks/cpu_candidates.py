"""What is timed side by side: our kernels, torch's in 16 and 32 bits, the read ceiling.

Every candidate is compared with float64 before it is timed: with the product of the activations and
of the weight as *that candidate* stores it, so that the error is that of its arithmetic.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cpu_timing import Call
from cpu_units import BF16, FP32, READ
from lowbit_kernels.cpu.memory import empty
from torch import Tensor

from lowbit import backends
from lowbit.algorithms import RTN
from lowbit.errors import LowbitError
from lowbit.quant import QuantizedWeight
from lowbit.scheme import Scheme

STREAM_SOURCE = Path(__file__).with_name("cpu_stream.c")
MAX_TOKENS = 512
# The tokens that are compared with float64: first, last, and around what kernels count in.
CHECKED = (0, 1, 3, 15, 63, 255, 511)
# Rows of a weight that are float64 at a time.
ROW_BLOCK = 1024
STANDARD_DEVIATION = 0.02
FLOAT, INT8 = "float", "int8"
OURS = {FLOAT: "lowbit A16", INT8: "lowbit A8"}
# What a product reads; a prepared weight may hold more, for its way back to a checkpoint.
READ_TENSORS = ("codes", "high", "scale", "zero")


@dataclass
class Candidate:
    """One way to multiply.

    Args:
        name: in results.
        kind: "ours", "torch", "peer" or "ceiling".
        activations: "int8" where activations are rounded to 8 bits, "float" otherwise.
        weight_bytes: what one call reads of the weight, scales included.
        bind: (x bf16 `[M, K]`, threads) -> one call per copy of the weight.
        expected: float64 `[len(CHECKED), N]`, the products of those tokens; None: nothing to check.
        output: makes a tensor `[M, N]` of what a call returned.
        package: distribution whose version is recorded, "" for none.
        note: what else is worth knowing.
    """

    name: str
    kind: str
    activations: str
    weight_bytes: int
    bind: Callable[[Tensor, int], Sequence[Call]]
    expected: Tensor | None = None
    output: Callable[[Any], Tensor] = lambda result: result
    package: str = "torch"
    note: str = ""


@dataclass(frozen=True)
class Inputs:
    """What all candidates of a unit are given.

    Args:
        scheme: of the weight.
        qweight: the weight in it, by RTN without a search: what codes are does not matter here.
        weight: float32 `[N, K]`, what `qweight` decodes to.
        x: bf16 `[MAX_TOKENS, K]`.
        copies: weight bytes -> how many copies to rotate over.
        threads: numbers of threads that will be measured.
    """

    scheme: Scheme
    qweight: QuantizedWeight
    weight: Tensor
    x: Tensor
    copies: Callable[[int], int]
    threads: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows N and columns K."""
        return self.qweight.shape

    def expected(self, weight: Tensor | None = None) -> Tensor:
        """Returns float64 `[len(CHECKED), N]`: products with `weight`, by default the unit's."""
        if weight is None:
            return self._own_expected
        return products(self.x, weight)

    @functools.cached_property
    def _own_expected(self) -> Tensor:
        return products(self.x, self.weight)


def make_inputs(
    scheme: str,
    shape: tuple[int, int],
    copies: Callable[[int], int],
    threads: tuple[int, ...],
    tokens: int = MAX_TOKENS,
) -> Inputs:
    """Returns a random weight of `shape` in `scheme`, and random activations of `tokens` tokens."""
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(*shape, generator=generator) * STANDARD_DEVIATION
    parsed = Scheme.parse(scheme)
    quantized = RTN(search=False).quantize(original, parsed, None)
    qweight = QuantizedWeight.from_codes(quantized.codes, quantized.grid)
    weight = qweight.dequantize(torch.float32)
    x = torch.randn(tokens, shape[1], generator=generator).bfloat16()
    return Inputs(parsed, qweight, weight, x, copies, threads)


def products(x: Tensor, weight: Tensor) -> Tensor:
    """Returns `x[CHECKED] weight^T` in float64; tokens that x does not have are left out."""
    rows = [token for token in CHECKED if token < x.shape[0]]
    wanted = x[rows].double()
    return torch.cat([wanted @ block.double().T for block in weight.split(ROW_BLOCK)], dim=1)


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Returns |result - expected| / |expected| (Frobenius) over the checked tokens `result` has."""
    tokens = [token for token in CHECKED if token < result.shape[0]]
    wanted = expected[: len(tokens)]
    return float((result[tokens].double() - wanted).norm() / wanted.norm())


def own(inputs: Inputs) -> dict[str, Callable[[], Candidate]]:
    """Returns name -> what makes it: our candidates, and what is measured beside every scheme."""
    makers: dict[str, Callable[[], Candidate]] = {
        BF16: lambda: _torch(inputs, BF16, torch.bfloat16)
    }
    # A scheme with int8 activations has no other.
    kinds = (INT8,) if inputs.scheme.activations is not None else (FLOAT, INT8)
    for activations in kinds:
        makers[OURS[activations]] = functools.partial(_ours, inputs, activations)
    for streams in (1, 4):
        makers[f"{READ} {streams}"] = functools.partial(_read, inputs, streams)
    return makers


def single(inputs: Inputs) -> Candidate:
    """Returns torch's product in float32."""
    return _torch(inputs, FP32, torch.float32)


def _torch(inputs: Inputs, name: str, dtype: torch.dtype) -> Candidate:
    rounded = inputs.weight.to(dtype)
    count = inputs.copies(rounded.nbytes)
    weights = [rounded, *(rounded.clone() for _ in range(count - 1))]

    def bind(x: Tensor, threads: int) -> Sequence[Call]:
        x = x.to(dtype)
        return [functools.partial(torch.nn.functional.linear, x, weight) for weight in weights]

    return Candidate(name, "torch", FLOAT, rounded.nbytes, bind, inputs.expected(rounded))


def _ours(inputs: Inputs, activations: str) -> Candidate:
    """Returns our kernels: through the interface that everybody else has, nothing below it."""

    def prepare() -> backends.PreparedWeight:
        asked = FLOAT if inputs.scheme.activations is not None else activations
        prepared = backends.prepare(inputs.qweight, torch.bfloat16, activations=asked)
        if prepared is None:
            raise LowbitError(
                f"{inputs.scheme}: no kernels for this scheme here; backends.prepare returned None"
            )
        return prepared

    first = prepare()
    size = bytes_read(first)
    weights = [first, *(prepare() for _ in range(inputs.copies(size) - 1))]

    def bind(x: Tensor, threads: int) -> Sequence[Call]:
        return [functools.partial(weight.linear, x, None) for weight in weights]

    return Candidate(
        OURS[activations],
        "ours",
        activations,
        size,
        bind,
        inputs.expected(),
        package="lowbit",
        note=first.kernels,
    )


def bytes_read(prepared: backends.PreparedWeight) -> int:
    """Returns the bytes of a prepared weight that a product reads."""
    return sum(t.nbytes for name, t in prepared.tensors().items() if name in READ_TENSORS)


def _read(inputs: Inputs, streams: int) -> Candidate:
    """Returns a plain reading of as many bytes as our kernels read, at `streams` places at once."""
    size = bytes_read(_prepared_once(inputs)) // 64 * 64
    count = inputs.copies(size)
    buffers = [empty((size,), torch.uint8).fill_(1) for _ in range(count)]
    read = stream_library().bench_read

    def bind(x: Tensor, threads: int) -> Sequence[Call]:
        return [
            functools.partial(read, buffer.data_ptr(), size, streams, threads) for buffer in buffers
        ]

    return Candidate(f"{READ} {streams}", "ceiling", FLOAT, size, bind, package="")


def _prepared_once(inputs: Inputs) -> backends.PreparedWeight:
    prepared = backends.prepare(inputs.qweight, torch.bfloat16)
    if prepared is None:
        raise LowbitError(f"{inputs.scheme}: no kernels here, so nothing says how much they read")
    return prepared


@functools.cache
def stream_library() -> ctypes.CDLL:
    """Returns the compiled `cpu_stream.c`.

    Raises:
        LowbitError: there is no compiler, or it refuses.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise LowbitError(
            "the read ceiling needs a C compiler; install one (Debian: apt install gcc) or set CC"
        )
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "stream.so"
        command = [*compiler.split(), "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        command += [str(STREAM_SOURCE), "-o", str(library)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode != 0:
            raise LowbitError(f"{compiler} cannot compile {STREAM_SOURCE.name}: {ran.stderr[:400]}")
        loaded = ctypes.CDLL(str(library))
    loaded.bench_read.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int)
    loaded.bench_read.restype = ctypes.c_uint64
    return loaded
