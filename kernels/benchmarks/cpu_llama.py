"""llama.cpp as a peer: its matrix product and its models, through `cpu_llama.cpp`."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from cpu_candidates import INT8, Candidate, Inputs
from cpu_timing import Call
from torch import Tensor

from lowbit.errors import LowbitError

SHIM_SOURCE = Path(__file__).with_name("cpu_llama.cpp")
SHIM, SOURCES, BUILD = "libbench.so", "llama.cpp", "build"
_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
# name -> (result, arguments), as in cpu_llama.cpp
_FUNCTIONS = {
    "type": (_INT, (ctypes.c_char_p,)),
    "row_bytes": (_LONG, (_INT, _LONG)),
    "quantize": (None, (_INT, _POINTER, _POINTER, _LONG, _LONG)),
    "decode": (None, (_INT, _POINTER, _POINTER, _LONG, _LONG)),
    "weight": (_POINTER, (_INT, _POINTER, _LONG, _LONG)),
    "buffer_name": (ctypes.c_char_p, (_POINTER,)),
    "free_weight": (None, (_POINTER,)),
    "product": (_POINTER, (_POINTER, _LONG)),
    "set_x": (_INT, (_POINTER, _POINTER)),
    "run": (_INT, (_POINTER, _INT)),
    "get_y": (_INT, (_POINTER, _POINTER)),
    "free_product": (None, (_POINTER,)),
    "model": (_POINTER, (ctypes.c_char_p, _INT, _INT)),
    "step": (_POINTER, (_POINTER, _POINTER, _INT)),
    "forget": (None, (_POINTER,)),
    "threads": (None, (_POINTER, _INT)),
}


class Library:
    """The functions of `cpu_llama.cpp`, by their names without `bench_`.

    Args:
        file: the compiled shim, beside the libraries of llama.cpp.
    """

    def __init__(self, file: Path) -> None:
        loaded = ctypes.CDLL(str(file))
        self.call = {}
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(loaded, f"bench_{name}")
            function.restype, function.argtypes = result, arguments
            self.call[name] = function

    @staticmethod
    @functools.cache
    def load(folder: str) -> Library:
        """Returns the library of a folder that llama.cpp was built in.

        Raises:
            LowbitError: it holds none.
        """
        file = Path(folder) / SHIM
        if not folder or not file.exists():
            raise LowbitError(f"llama.cpp is not built in {folder or 'any folder'}; see --llama")
        return Library(file)


class Weight:
    """A weight in llama.cpp's hands, freed with this object."""

    def __init__(
        self, library: Library, kind: int, packed: Tensor, rows: int, columns: int
    ) -> None:
        self._call, self.shape = library.call, (rows, columns)
        self.handle = library.call["weight"](kind, packed.data_ptr(), rows, columns)
        if not self.handle:
            raise LowbitError(f"ggml has no buffer for a weight [{rows}, {columns}] of type {kind}")

    @property
    def buffer(self) -> str:
        """The kind of buffer it is in: CPU, CPU_REPACK, AMX."""
        return str(self._call["buffer_name"](self.handle).decode())

    def __del__(self) -> None:
        if self.handle:
            self._call["free_weight"](self.handle)


class Product:
    """The product of a weight and some activations, freed with this object."""

    def __init__(self, library: Library, weight: Weight, x: Tensor, threads: int) -> None:
        self._call, self._weight, self._threads = library.call, weight, threads
        self._size = (x.shape[0], weight.shape[0])
        self.handle = library.call["product"](weight.handle, x.shape[0])
        if not self.handle:
            raise LowbitError(f"ggml cannot allocate a product of {x.shape[0]} tokens")
        library.call["set_x"](self.handle, x.data_ptr())

    def __call__(self) -> Product:
        if self._call["run"](self.handle, self._threads) != 0:
            raise LowbitError("ggml did not compute the product")
        return self

    def result(self) -> Tensor:
        """Returns float32 `[M, N]`."""
        y = torch.empty(self._size)
        self._call["get_y"](self.handle, y.data_ptr())
        return y

    def __del__(self) -> None:
        if self.handle:
            self._call["free_product"](self.handle)


def quantize(library: Library, kind: str, weight: Tensor) -> tuple[int, Tensor, Tensor]:
    """Returns (number of the ggml type, its bytes `[N, bytes of a row]`, decoded float32 `[N, K]`).

    Raises:
        LowbitError: ggml has no such type, or its blocks do not divide the rows.
    """
    number = library.call["type"](kind.encode())
    rows, columns = weight.shape
    block = 32 if kind.endswith("_0") else 256
    if number < 0 or columns % block:
        raise LowbitError(
            f"ggml type {kind} with {columns} columns: a known type and a multiple of {block} are "
            "needed"
        )
    packed = torch.empty(rows, library.call["row_bytes"](number, columns), dtype=torch.uint8)
    decoded = torch.empty(rows, columns)
    weight = weight.float().contiguous()
    library.call["quantize"](number, weight.data_ptr(), packed.data_ptr(), rows, columns)
    library.call["decode"](number, packed.data_ptr(), decoded.data_ptr(), rows, columns)
    return number, packed, decoded


def candidate(library: Library, kind: str, inputs: Inputs) -> Candidate:
    """Returns ggml's product with the weight of `inputs` in a ggml type."""
    number, packed, decoded = quantize(library, kind, inputs.weight)
    count = inputs.copies(packed.nbytes)
    weights = [Weight(library, number, packed, *inputs.shape) for _ in range(count)]

    def bind(x: Tensor, threads: int) -> Sequence[Call]:
        wide = x.float().contiguous()
        return [Product(library, weight, wide, threads) for weight in weights]

    return Candidate(
        f"llama.cpp {kind}",
        "peer",
        INT8,
        packed.nbytes,
        bind,
        inputs.expected(decoded),
        output=lambda product: product.result(),
        package="",
        note=f"in a buffer of kind {weights[0].buffer}",
    )


def compile_shim(folder: Path) -> Path:
    """Compiles `cpu_llama.cpp` against the llama.cpp that was built in `folder`; returns the file.

    Raises:
        LowbitError: there is no compiler, or it refuses.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise LowbitError("llama.cpp needs a C++ compiler; install one (Debian: apt install g++)")
    file, libraries = folder / SHIM, (folder / BUILD / "bin").resolve()
    include = [folder / SOURCES / "include", folder / SOURCES / "ggml" / "include"]
    command = [*compiler.split(), "-O2", "-std=c++17", "-shared", "-fPIC", str(SHIM_SOURCE)]
    command += [f"-I{path}" for path in include]
    command += ["-o", str(file), f"-L{libraries}", f"-Wl,-rpath,{libraries}"]
    command += ["-lllama", "-lggml", "-lggml-cpu", "-lggml-base"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise LowbitError(f"{compiler} cannot compile {SHIM_SOURCE.name}: {ran.stderr[-600:]}")
    return file
