"""Runs the tests of the native CPU kernels under AddressSanitizer and UBSan: `make sanitize`.

The kernels are compiled with both, and with poisoned scratch memory (src/scratch.h). Python is not:
the sanitizers' runtime is loaded before it, and watches torch's allocations too, so that a kernel
that touches what lies beside a tensor is stopped. Arguments are pytest's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "kernels"))

from lowbit_kernels.cpu import build  # noqa: E402

FLAGS = (
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize-recover=all",  # an error ends the process
    "-fno-omit-frame-pointer",
    "-O1",  # at -O3 the checks take minutes to compile
    "-g1",  # lines in reports
    "-DLOWBIT_POISON",
)
TESTS = [
    *sorted((ROOT / "tests/kernels").glob("test_cpu*.py")),
    ROOT / "tests/kernels/test_strips.py",
]
FUZZ_SECONDS = "30"


def main() -> int:
    """Compiles, runs, and returns pytest's exit status."""
    directory = Path(tempfile.gettempdir()) / "lowbit-test-kernels"
    try:
        library = build.build(directory, FLAGS)
        preload = runtimes()
    except build.BuildError as error:
        print(f"sanitize: {error}", file=sys.stderr)
        return 2
    environment = {
        "LOWBIT_FUZZ_SECONDS": FUZZ_SECONDS,
        **os.environ,
        "LOWBIT_CPU_LIBRARY": str(library),
        "LD_PRELOAD": preload,
        # Python itself leaks at exit.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    # In one process, whose report then reaches the terminal; `-s`, because it is written as the
    # process dies.
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-s", "-q"]
    command += [*sys.argv[1:], *map(str, TESTS)]
    return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode


def runtimes() -> str:
    """Returns what must be loaded before Python, separated by spaces.

    They are AddressSanitizer and the C++ runtime, which Python does not load and whose throwing the
    sanitizer intercepts.

    Raises:
        build.BuildError: where there is none that can be loaded first.
    """
    sanitizers = [
        path
        for name in ("libasan.so", "libclang_rt.asan-x86_64.so", "libclang_rt.asan-aarch64.so")
        if (path := _file_of_compiler(name))
    ]
    standard = _file_of_compiler("libstdc++.so.6")
    if not sanitizers or standard is None:
        raise build.BuildError("the compiler has no AddressSanitizer to load first; set CXX=g++")
    return f"{sanitizers[0]} {standard}"


def _file_of_compiler(name: str) -> Path | None:
    compiler = build.find_compiler()
    assert compiler is not None
    command = [*compiler, f"-print-file-name={name}"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    # The bare name means that there is none.
    return Path(said).resolve() if Path(said).is_absolute() and Path(said).exists() else None


if __name__ == "__main__":
    sys.exit(main())
