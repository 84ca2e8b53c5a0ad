"""Memory: of a run it depends on the largest block, and mapped files do not stay resident."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lowbit.memory import drop_mapped_pages

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


def mapped_bytes() -> int:
    """Returns how many bytes of files are resident in this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssFile"))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/pagemap")
def test_mapped_pages_are_dropped_and_read_again(tmp_path: Path) -> None:
    expected = torch.randn(4 << 20, generator=torch.Generator().manual_seed(0))
    save_file({"weight": expected}, tmp_path / "weights.safetensors")
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        weight = file.get_tensor("weight")
    assert torch.equal(weight, expected)
    before = mapped_bytes()
    assert drop_mapped_pages(weight)
    assert before - mapped_bytes() > 0.9 * weight.nbytes
    assert torch.equal(weight, expected)


def test_what_only_this_process_has_is_kept(tmp_path: Path) -> None:
    expected = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    allocated = expected.clone()
    assert not drop_mapped_pages(allocated)
    assert torch.equal(allocated, expected)
    save_file({"weight": expected}, tmp_path / "weights.safetensors")
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        changed = file.get_tensor("weight")
    changed[5000] = 7.0  # a page of its own now, which the file does not have
    assert not drop_mapped_pages(changed)
    assert float(changed[5000]) == 7.0
    assert not drop_mapped_pages(expected[::2])
