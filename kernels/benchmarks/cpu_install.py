"""Installs the peers: packages into a folder of their own, llama.cpp compiled from its sources.

Packages go into a plain folder that is put behind everything else on `sys.path` of the processes
that measure, so that all candidates run in one process on one torch, and no environment changes.
llama.cpp comes with the sources of llama-cpp-python and is compiled for this very processor.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from cpu_llama import BUILD, SHIM, SOURCES, compile_shim

from lowbit.errors import LowbitError

PACKAGES = {
    "bitsandbytes": "bitsandbytes==0.50.2",
    "openvino": "openvino==2026.4.1",
    "torchao": "torchao==0.18.0",
    "gguf": "gguf==0.19.0",
}
# What a package needs beyond torch and numpy, which are there.
ALSO = {"openvino": ("openvino-telemetry==2025.2.0",)}
LLAMA = "llama-cpp-python==0.3.36"
SECONDS = {"install": 900, "build": 5400}
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", "-DGGML_NATIVE=ON", "-DGGML_OPENMP=ON",
    "-DLLAMA_BUILD_COMMON=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_TOOLS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_OPENSSL=OFF",
)  # fmt: skip
# g++ 12 moves the stores of the tile configuration behind the instruction that reads them, and the
# AMX kernels crash; they are worth measuring.
AMX_FILE = "ggml/src/ggml-cpu/amx/mmq.cpp"
AMX_LINE = "    _tile_loadconfig(&tc);\n"
AMX_BARRIER = '    asm volatile("" ::: "memory");\n'


def install_packages(folder: Path) -> dict[str, str]:
    """Installs the packages that `folder` lacks; returns package -> why it is not there."""
    failed = {}
    for package, requirement in PACKAGES.items():
        if list(folder.glob(f"{package}-*.dist-info")):
            continue
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        command += [str(folder), requirement, *ALSO.get(package, ())]
        try:
            _run(command, folder, SECONDS["install"])
        except LowbitError as error:
            failed[package] = str(error)
    return failed


def build_llama(folder: Path, jobs: int) -> str | None:
    """Makes llama.cpp and the shim in `folder` where they are missing; returns why they are not.

    Args:
        folder: may hold `llama.cpp` (sources) and `build` (compiled) from before.
        jobs: compilers at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if not (folder / BUILD / "bin" / "libllama.so").exists():
            if not (folder / SOURCES).exists():
                _download(folder)
            _patch(folder / SOURCES / AMX_FILE)
            _compile(folder, jobs)
        if not (folder / SHIM).exists() or _older(folder / SHIM):
            compile_shim(folder)
    except LowbitError as error:
        return str(error)
    return None


def _older(shim: Path) -> bool:
    from cpu_llama import SHIM_SOURCE

    return shim.stat().st_mtime < SHIM_SOURCE.stat().st_mtime


def _download(folder: Path) -> None:
    name = LLAMA.partition("==")[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    _run([*command, "--no-binary", name, LLAMA, "-d", str(folder)], folder, SECONDS["install"])
    [archive] = folder.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as sources:
        sources.extractall(folder, filter="data")
    (folder / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp").rename(
        folder / SOURCES
    )


def _patch(file: Path) -> None:
    text = file.read_text()
    if AMX_LINE not in text:
        raise LowbitError(f"{file}: not the sources that the patch for AMX is for; see {__file__}")
    if AMX_BARRIER not in text:
        file.write_text(text.replace(AMX_LINE, AMX_BARRIER + AMX_LINE))


def _compile(folder: Path, jobs: int) -> None:
    if shutil.which("cmake") is None:
        raise LowbitError("llama.cpp needs cmake; install it (Debian: apt install cmake)")
    build = folder / BUILD
    configure = ["cmake", "-S", str(folder / SOURCES), "-B", str(build), *OPTIONS]
    _run(configure, folder, SECONDS["install"])
    make = ["cmake", "--build", str(build), "--target", "llama", "--parallel", str(jobs)]
    _run(make, folder, SECONDS["build"])


def _run(command: Sequence[str], folder: Path, seconds: float) -> None:
    """Runs a command at low priority; its output is kept in `folder/install.log`.

    Raises:
        LowbitError: it failed or took too long.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "install.log"
    with log.open("ab") as output:
        try:
            ran = subprocess.run(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                check=False,
                preexec_fn=lambda: os.nice(5),
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise LowbitError(f"{' '.join(command[:5])} ...: {error}") from error
    if ran.returncode != 0:
        last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
        raise LowbitError(f"{' '.join(command[:5])} ... failed: {last[:300]} (see {log})")
