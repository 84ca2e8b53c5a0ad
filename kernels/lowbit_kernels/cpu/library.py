"""Finds, loads and describes the compiled kernels.

The library has a C interface and no tie to a version of Python or torch. It is loaded after torch,
so that both share one OpenMP runtime and one pool of threads.

Environment variables, meant for tests: LOWBIT_CPU_LIBRARY is the path of another library (a path
where there is none: no library), LOWBIT_CPU_ISA the instruction set to use instead of the best.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch  # noqa: F401 - its OpenMP runtime must be in the process before the library

from lowbit_kernels.cpu.build import LIBRARY_NAME

ABI = 2
# By their numbers in src/api.cpp; each does what those before it do.
ISAS = ("portable", "avx2", "avx512", "avx512bf16", "amx")

_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class Library:
    """The functions of src/api.cpp.

    Attributes:
        path: the file.
        isa: number of the instruction set in use, an index of `ISAS`.
    """

    def __init__(self, path: Path) -> None:
        loaded = ctypes.CDLL(str(path))
        if loaded.lowbit_abi() != ABI:
            raise OSError(f"it has interface {loaded.lowbit_abi()}, this lowbit calls {ABI}")
        self.path, self.isa = path, _chosen_isa(loaded.lowbit_best_isa())
        self.linear = loaded.lowbit_linear
        self.linear.argtypes = (
            *(ctypes.c_char_p, _POINTER, _LONG, _INT, _INT, _POINTER, _POINTER, _INT),
            *(_INT, _FLOAT, _INT, _INT),
        )
        self.experts = loaded.lowbit_experts
        self.experts.argtypes = (
            *(ctypes.c_char_p, _INT, _POINTER, _POINTER, _POINTER, _POINTER, _LONG, _INT),
            *(_POINTER, _INT, _INT, _INT, _INT),
        )
        self.decode_rows = loaded.lowbit_decode_rows
        self.decode_rows.argtypes = (ctypes.c_char_p, _POINTER, _INT, _POINTER, _INT, _INT, _INT)
        self.decode = loaded.lowbit_decode
        self.decode.argtypes = (ctypes.c_char_p, _POINTER, _INT, _INT, _INT)

    @property
    def isa_name(self) -> str:
        """The instruction set in use, by name."""
        return ISAS[self.isa]


def library_path() -> Path:
    """Returns where the library is, or would be."""
    override = os.environ.get("LOWBIT_CPU_LIBRARY")
    return Path(override) if override else Path(__file__).parent / LIBRARY_NAME


@functools.cache
def load() -> Library | str:
    """Returns the library, or one sentence that says why there is none."""
    path = library_path()
    if not path.exists():
        return (
            f"the native kernels are not compiled ({path.name} is missing); install a C++ compiler "
            "(Debian: apt install g++) and run `python -m lowbit_kernels.cpu.build`"
        )
    try:
        return Library(path)
    except (OSError, AttributeError) as error:
        return (
            f"the native kernels cannot be loaded from {path}: {error}; run "
            "`python -m lowbit_kernels.cpu.build` to compile them again"
        )


def unavailable_reason() -> str | None:
    """Returns why there are no native kernels, or None if there are."""
    found = load()
    return found if isinstance(found, str) else None


def library() -> Library:
    """Returns the library.

    Raises:
        RuntimeError: where there is none.
    """
    found = load()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def _chosen_isa(best: int) -> int:
    wanted = os.environ.get("LOWBIT_CPU_ISA")
    if wanted is None:
        return best
    if wanted not in ISAS[: best + 1]:
        raise OSError(f"LOWBIT_CPU_ISA={wanted}: this processor has {', '.join(ISAS[: best + 1])}")
    return ISAS.index(wanted)
