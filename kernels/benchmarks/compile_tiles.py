"""Launches tiles from several processes, so that Triton's cache on disk has them.

Compiling is most of the work of tuning, and only one core of a process does it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timing
from lowbit_kernels.gpu import configs, matmul
from lowbit_kernels.gpu.configs import Tile
from lowbit_kernels.gpu.weight import FragmentWeight
from model_shapes import activation_dtype, random_weight
from random_tensors import normal

WORKERS = 12
Entry = dict[str, int]


@dataclass(frozen=True)
class Launch:
    """One entry of a table, on a weight of one scheme and shape.

    Args:
        scheme: of the weight.
        shape: its rows and columns.
        block_m: tokens of the product, and the key of the entry.
        entry: block_n, warps, stages, programs_per_sm.
    """

    scheme: str
    shape: tuple[int, int]
    block_m: int
    entry: Entry

    def run(self, device: str) -> bool:
        """Returns whether it compiles, fits the chip and gives finite results."""
        weight = random_weight(self.scheme, *self.shape, device)
        tile = tile_of(self.entry, self.block_m, weight)
        x = normal((self.block_m, self.shape[1]), device, activation_dtype(device == "cpu"))
        if tile is None:
            return False
        return bool(matmul.run_fused(x, weight, None, tile).isfinite().all())


def tile_of(entry: Entry, block_m: int, weight: FragmentWeight) -> Tile | None:
    """Returns the tile that `configs.choose` makes of `entry`, None where it would make another."""
    rows, columns = weight.padded_rows, weight.words.shape[1] * 64
    if rows % entry["block_n"]:
        return None
    split = 1
    if block_m <= 64:
        wanted = configs._device(0)[1] * entry["programs_per_sm"]
        split = max(1, min(wanted // (rows // entry["block_n"]), columns // 128 // 4))
    return Tile(block_m, entry["block_n"], entry["warps"], entry["stages"], split)


def compile_all(launches: Sequence[Launch], seconds: float) -> bool:
    """Runs `launches` in worker processes; returns False if they were not done in time.

    What does not compile is left for whoever launches it next to find out.
    """
    if not timing.on_gpu():
        return True
    number = max(1, min(WORKERS, os.cpu_count() or 1, len(launches)))
    code = "import sys, compile_tiles; compile_tiles.work(*sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "launches.json"
        file.write_text(json.dumps([asdict(launch) for launch in launches]))
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(file), str(i), str(number)],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for i in range(number)
        ]
        try:
            for worker in workers:
                worker.wait(timeout=max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
        finally:
            for worker in workers:
                worker.kill()
    return True


def work(file: str, index: str, number: str, device: str = "cuda") -> int:
    """Runs every `number`-th launch in `file` from `index` on, and returns how many ran."""
    described: list[dict[str, Any]] = json.loads(Path(file).read_text())
    done = 0
    for fields in described[int(index) :: int(number)]:
        launch = Launch(**{**fields, "shape": tuple(fields["shape"])})
        try:
            done += launch.run(device)
        except Exception:  # compiling is a favour; whoever measures reports what fails
            continue
    return done
