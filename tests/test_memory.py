"""Memory while quantizing depends on the largest block, not on how many there are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# hidden 512, intermediate 1408: 3.2 M weights, 6.4 MB in bf16.
BLOCK_MB = 6.4
SHAPE = ["--hidden", "512", "--intermediate", "1408", "--heads", "8", "--vocab", "1000"]
QUANTIZE = """
import resource, sys
import lowbit
lowbit.quantize(sys.argv[1], sys.argv[2], scheme="W4A16_G64", algorithm="rtn", progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def peak_mb(blocks: int, directory: Path) -> float:
    """Returns the peak resident memory of quantizing a model of so many blocks."""
    model = directory / f"model-{blocks}"
    make = [sys.executable, ROOT / "scripts" / "make_random_llama.py", "--output", model]
    subprocess.run([*make, *SHAPE, "--blocks", str(blocks)], check=True, capture_output=True)
    command = [sys.executable, "-c", QUANTIZE, model, directory / f"out-{blocks}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_peak_memory_does_not_grow_with_the_number_of_blocks(tmp_path: Path) -> None:
    few, many = peak_mb(6, tmp_path), peak_mb(26, tmp_path)
    # Twenty more blocks; freed memory that is not given back would show as half a block each.
    assert many - few < 3 * BLOCK_MB
