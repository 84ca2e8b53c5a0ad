"""Compiles the kernels into one shared library.

Each instruction set is a file of its own, compiled with its own flags; the library picks one at
run time. The name holds a hash of sources, compiler and flags, so that a library is built once and
never mistaken for another.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
# Where an installed package has the library, beside this file.
LIBRARY_NAME = "liblowbit.so"
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fopenmp",
    # Rounding is part of the results: no contraction but where a kernel asks for it. Neither errno
    # nor traps are read.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
)
# GCC's own AVX-512 headers are not clean under -Wall.
AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma", "-mf16c"),
    *("-Wno-maybe-uninitialized", "-Wno-uninitialized"),
)
X86_FLAGS = {"avx512.cpp": AVX512, "avx2.cpp": ("-mavx2", "-mfma", "-mf16c")}


class BuildError(RuntimeError):
    """There is no compiler, or it refused the sources; the message says which."""


def find_compiler() -> str | None:
    """Returns the C++ compiler: CXX from the environment, c++, g++ or clang++; None without."""
    names = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def files() -> dict[str, tuple[str, ...]]:
    """Returns the files to compile for this processor, with the flags of each."""
    common: dict[str, tuple[str, ...]] = {"api.cpp": (), "portable.cpp": ()}
    on_x86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
    return {**common, **X86_FLAGS} if on_x86 else common


def build(directory: Path, extra: tuple[str, ...] = ()) -> Path:
    """Returns the library in `directory`, compiled if it is not there yet.

    Args:
        directory: made if it is missing.
        extra: flags for every file and for the linker, such as -Werror or -fsanitize=address.

    Raises:
        BuildError: without a compiler, or with what the compiler says.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler found; install g++ or clang++, or set CXX")
    library = directory / f"liblowbit-{_fingerprint(compiler, extra)}.so"
    if library.exists():
        return library
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        objects = {name: Path(folder) / f"{name}.o" for name in files()}

        def compile_file(name: str) -> None:
            flags = (*FLAGS, *extra, *files()[name])
            _run(compiler, *flags, "-c", str(SOURCES / name), "-o", str(objects[name]))

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_file, objects))
        finished = Path(folder) / "library.so"
        linked = [str(path) for path in objects.values()]
        _run(compiler, "-shared", "-fopenmp", *extra, "-o", str(finished), *linked)
        finished.replace(library)  # never half-written, whoever else builds
    return library


def _fingerprint(compiler: str, extra: tuple[str, ...]) -> str:
    digest = hashlib.sha256(repr((compiler, FLAGS, extra, files())).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
