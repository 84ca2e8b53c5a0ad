"""One thread per test process: the models are tiny, and pytest runs a process per core.

Two threads that wait for each other on a busy core are many times slower than one.

Without a GPU, Triton kernels run in Triton's interpreter, on CPU tensors. Triton reads the variable
when a kernel is defined, so it is set before anything is imported.

The native kernels are compiled from the sources at hand, whatever is installed, and with warnings
as errors. Without a compiler there are none, and the tests that are about them are skipped.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Also for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from lowbit_kernels.cpu import build

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)

# Shared by the processes of a test run, and by runs: names hold a hash of the sources.
KERNELS = Path(tempfile.gettempdir()) / "lowbit-test-kernels"
if "LOWBIT_CPU_LIBRARY" not in os.environ:
    compiled = KERNELS / "none"
    if build.find_compiler() is not None:
        flags = ("-Wall", "-Wextra", "-Werror", "-DLOWBIT_POISON")  # src/scratch.h
        compiled = build.build(KERNELS, flags)
    os.environ["LOWBIT_CPU_LIBRARY"] = str(compiled)


@pytest.fixture
def reference_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Multiplies by decoded weights with torch's own matmul, here and in processes started here.

    For what must be equal bit for bit to a model whose weights were decoded beforehand.
    """
    from lowbit import backends

    monkeypatch.setattr(backends, "BACKENDS", [b for b in backends.BACKENDS if b.name != "cpu"])
    monkeypatch.setenv("LOWBIT_CPU_LIBRARY", str(KERNELS / "none"))
    backends.select.cache_clear()
    yield
    backends.select.cache_clear()
