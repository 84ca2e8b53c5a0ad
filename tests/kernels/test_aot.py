"""What the compilers make of the kernels, for six kinds of GPU that are not here.

Each target is compiled in a process of its own: this one interprets kernels, and a compiler that
aborts takes its process along.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "kernels/benchmarks/inspect_kernels.py"
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def inspect(target: str, folder: Path) -> tuple[list[dict[str, Any]], str]:
    """Returns the entries of `target` and what the script printed."""
    file = folder / "kernels.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--target", target, "--json", str(file)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr[-2000:]
    assert file.exists(), done.stderr[-2000:]
    return json.loads(file.read_text())["kernels"], done.stdout


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_without_spills_and_within_its_budget(
    target: str, tmp_path: Path
) -> None:
    entries, printed = inspect(target, tmp_path)
    assert len(entries) >= 6
    assert [entry for entry in entries if entry["faults"]] == [], printed
    if target == "sm_90":
        fused = [entry for entry in entries if entry["instructions_per_weight"] is not None]
        assert len(fused) >= 12
        assert all(entry["multiplies_from_registers"] for entry in fused)
