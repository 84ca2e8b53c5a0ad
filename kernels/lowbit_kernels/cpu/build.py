"""Compiles the kernels into one shared library: `python -m lowbit_kernels.cpu.build`.

Each instruction set is a file of its own, compiled with its own flags; the library picks one at
run time. A hash of sources, compiler and flags tells libraries apart, so that each is compiled once
and never mistaken for another. Only the standard library is needed: the wheel's build runs this
file where neither torch nor lowbit is installed.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = HERE / "src"
# Where an installed package has the library, beside this file.
LIBRARY_NAME = "liblowbit.dylib" if sys.platform == "darwin" else "liblowbit.so"
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    # Rounding is part of the results: no contraction but where a kernel asks for it. Neither errno
    # nor traps are read.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
)
# GCC's own AVX-512 headers are not clean under -Wall. (Clang does not know the first warning.)
AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma", "-mf16c"),
    *("-Wno-unknown-warning-option", "-Wno-maybe-uninitialized", "-Wno-uninitialized"),
)
AVX512_BF16 = (*AVX512, "-mavx512bf16", "-mavx512vbmi")
# From the oldest to the newest, as they are linked: of a function that several files define the
# linker keeps the first, so that no processor meets code for a newer one.
X86_FLAGS = {
    "avx2.cpp": ("-mavx2", "-mfma", "-mf16c"),
    "avx512.cpp": AVX512,
    "avx512bf16.cpp": AVX512_BF16,
    "amx.cpp": (*AVX512_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
}
# What compilers older than their processors leave out (GCC before 10 or 11), and what says so to
# api.cpp. Without the first there is neither.
OPTIONAL = {"avx512bf16.cpp": "-DLOWBIT_NO_BF16", "amx.cpp": "-DLOWBIT_NO_AMX"}
OPENMP = "-fopenmp"
_LINES_OF_ERRORS = 20  # the first ones are the cause


class BuildError(RuntimeError):
    """There is no compiler, or it refused the sources; the message says which."""


def find_compiler() -> tuple[str, ...] | None:
    """Returns the command of the C++ compiler; None without.

    It is CXX from the environment (with arguments, as in "ccache g++"), or else the first of c++,
    g++ and clang++. Another one is never taken for a CXX that does not exist.
    """
    chosen = shlex.split(os.environ.get("CXX", ""))
    commands = [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]
    for name, *arguments in commands:
        if path := shutil.which(name):
            return (path, *arguments)
    return None


def files() -> dict[str, tuple[str, ...]]:
    """Returns the files to compile for this processor, with the flags of each."""
    common: dict[str, tuple[str, ...]] = {"api.cpp": (), "portable.cpp": ()}
    on_x86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
    return {**common, **X86_FLAGS} if on_x86 else common


@functools.cache
def left_out(compiler: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the files whose instruction set `compiler` does not know, of those that may lack."""
    missing = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("")
        for name in OPTIONAL.keys() & files().keys():
            command = (*compiler, *files()[name], "-fsyntax-only", str(source))
            try:
                _run(*command)
            except BuildError:
                missing.append(name)
    return tuple(sorted(missing))


def build(directory: Path, extra: tuple[str, ...] = ()) -> Path:
    """Returns the library in `directory`, compiled if it is not there yet.

    Args:
        directory: made if it is missing.
        extra: flags for every file and for the linker, such as -Werror or -fsanitize=address.

    Raises:
        BuildError: without a compiler, or with what the compiler says.
    """
    compiler = _compiler()
    fingerprint = _fingerprint(compiler, extra)
    library = directory / f"liblowbit-{fingerprint}.so"
    if not library.exists():
        _compile(compiler, extra, fingerprint, library)
    return library


def install(directory: Path = HERE) -> Path:
    """Returns the library where an installed package has it, `directory / LIBRARY_NAME`.

    Nothing is compiled if the one that is there is of these sources, compiler and flags.

    Raises:
        BuildError: without a compiler, or with what the compiler says.
        OSError: if nothing can be written there.
    """
    compiler = _compiler()
    fingerprint = _fingerprint(compiler, ())
    library = directory / LIBRARY_NAME
    if not (library.exists() and _mark(fingerprint).encode() in library.read_bytes()):
        _compile(compiler, (), fingerprint, library)
    return library


def has_openmp(compiler: tuple[str, ...]) -> bool:
    """Returns whether `compiler` links OpenMP. Without it (Apple's), kernels have one thread."""
    return OPENMP in _openmp(compiler)


def main() -> int:
    """Compiles the library of this package in place; returns the exit status."""
    try:
        library = install()
        compiler = _compiler()
        notes = "" if has_openmp(compiler) else " (one thread: the compiler has no OpenMP)"
        if missing := left_out(compiler):
            notes += f" (without {', '.join(missing)}: the compiler is too old for it)"
    except (BuildError, OSError) as error:
        print(f"The native CPU kernels were not compiled: {error}", file=sys.stderr)
        return 2
    print(f"{library}{notes}")
    return 0


def _compile(
    compiler: tuple[str, ...], extra: tuple[str, ...], fingerprint: str, library: Path
) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    openmp, missing = _openmp(compiler), left_out(compiler)
    used = {name: flags for name, flags in files().items() if name not in missing}
    used["api.cpp"] = (
        *(OPTIONAL[name] for name in missing),
        f'-DLOWBIT_MARK="{_mark(fingerprint)}"',
    )
    # In the same folder, and so on the same file system: renaming is atomic.
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".lowbit-") as folder:
        objects = {name: Path(folder) / f"{name}.o" for name in used}

        def compile_file(name: str) -> None:
            flags = (*FLAGS, *openmp, *extra, *used[name])
            _run(*compiler, *flags, "-c", str(SOURCES / name), "-o", str(objects[name]))

        with ThreadPoolExecutor(_processors()) as pool:
            list(pool.map(compile_file, objects))
        finished = Path(folder) / "library.so"
        linked = [str(path) for path in objects.values()]
        _run(*compiler, "-shared", *openmp, *extra, "-o", str(finished), *linked)
        finished.replace(library)  # never half-written, whoever else builds


def _compiler() -> tuple[str, ...]:
    if sys.platform == "win32":
        raise BuildError("the kernels are not ported to Windows; use lowbit in WSL for them")
    compiler = find_compiler()
    if compiler is None and (chosen := os.environ.get("CXX")):
        raise BuildError(f"CXX is {chosen}, which is not found; set it to a C++ compiler")
    if compiler is None:
        raise BuildError("no C++ compiler found; install g++ or clang++, or set CXX")
    return compiler


@functools.cache
def _openmp(compiler: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the flags for OpenMP, or without it those that accept its pragmas."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <omp.h>\nint probe() { return omp_get_max_threads(); }\n")
        command = (*compiler, OPENMP, "-shared", "-fPIC", str(source))
        try:
            _run(*command, "-o", str(source.with_suffix(".so")))
        except BuildError:
            return ("-Wno-unknown-pragmas",)
    return (OPENMP,)


@functools.cache
def _version(compiler: tuple[str, ...]) -> str:
    return _run(*compiler, "--version")


def _fingerprint(compiler: tuple[str, ...], extra: tuple[str, ...]) -> str:
    found = (_version(compiler), _openmp(compiler), left_out(compiler))
    parts = (compiler, *found, FLAGS, extra, files())
    digest = hashlib.sha256(repr(parts).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _mark(fingerprint: str) -> str:
    """Returns what the library's file contains, so that it is recognised without loading it."""
    return f"lowbit-build-{fingerprint}"


def _processors() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        said = done.stderr.strip().splitlines()
        kept = "\n".join(said[:_LINES_OF_ERRORS])
        more = len(said) - _LINES_OF_ERRORS
        left_out = f"\n({more} more lines)" if more > 0 else ""
        raise BuildError(f"{shlex.join(command)} failed:\n{kept}{left_out}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
