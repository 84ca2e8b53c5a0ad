"""Tile sizes, split and switch-over per device and Triton version, from the JSON files beside this.

A file names the device and the Triton version it was measured with. The best match is read: device
and version, then device, then the device's family ("mma.sync" for NVIDIA before Hopper and consumer
Blackwell, "amd"), then `default.json`. Nothing is tuned while a model runs.

    fused_up_to   kind -> largest M that the fused kernel takes; above it the weight is decoded into
                  a buffer and multiplied by cuBLAS
    tiles         BLOCK_M -> tile; the smallest BLOCK_M that holds M is used, the largest repeated
    kinds         kind -> entries that replace those of `tiles`

A kind is "int2", "int3", "int4", "int8" or "codebook".
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

DIRECTORY = Path(__file__).parent


@dataclass(frozen=True)
class Tile:
    """How the fused kernel cuts up one product.

    Args:
        block_m: activations per program.
        block_n: weight rows per program.
        warps: warps of a program.
        stages: steps of K in flight.
        split: programs that share an output tile along K.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    split: int


@functools.cache
def table(device_name: str, triton_version: str, family: str = "any") -> dict[str, Any]:
    """Returns the contents of the file that fits best."""
    best: dict[str, Any] = {}
    best_score = -1
    for file in sorted(DIRECTORY.glob("*.json")):
        entry: dict[str, Any] = json.loads(file.read_text())
        if entry["device"] not in ("any", family, device_name):
            continue
        same_version = entry["triton"] == ".".join(triton_version.split(".")[:2])
        closeness = ("any", family, device_name).index(entry["device"])
        score = 2 * closeness + same_version
        if score > best_score:
            best, best_score = entry, score
    return best


@functools.cache
def _device(index: int) -> tuple[str, int]:
    """Returns name and number of multiprocessors; fixed values where Triton interprets."""
    if not torch.cuda.is_available():
        return "any", 4
    properties = torch.cuda.get_device_properties(index)
    return properties.name, properties.multi_processor_count


@functools.cache
def _family(index: int) -> str:
    if torch.version.hip is not None:
        return "amd"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability(index)[0] in (9, 10):
        return "any"
    return "mma.sync"


@functools.lru_cache(maxsize=4096)
def choose(
    device_index: int, kind: str, block_m_holds: int, rows: int, columns: int
) -> Tile | None:
    """Returns the tile for a product, or None where decoding the whole weight is faster.

    Args:
        device_index: of the CUDA device.
        kind: see the head of this file.
        block_m_holds: M, rounded up to a power of two, at least 16.
        rows: stored rows of the weight.
        columns: stored columns.
    """
    entry = _entry(device_index)
    limits = entry["fused_up_to"]
    if block_m_holds > limits.get(kind, limits["default"]):
        return None
    return _tile(device_index, kind, block_m_holds, rows, columns, 1)


@functools.lru_cache(maxsize=4096)
def choose_for_experts(
    device_index: int, kind: str, block_m_holds: int, rows: int, columns: int, experts: int
) -> Tile:
    """Returns the tile for products with many weights in one launch, which are never decoded whole.

    Args:
        device_index, kind, columns: as for `choose`.
        block_m_holds: activations per expert, rounded up likewise.
        rows: stored rows of one expert.
        experts: how many have activations, at most.
    """
    return _tile(device_index, kind, block_m_holds, rows, columns, experts)


def _entry(device_index: int) -> dict[str, Any]:
    return table(_device(device_index)[0], triton.__version__, _family(device_index))


def _tile(
    device_index: int, kind: str, block_m_holds: int, rows: int, columns: int, weights: int
) -> Tile:
    entry = _entry(device_index)
    tiles = {**entry["tiles"], **entry["kinds"].get(kind, {})}
    block_m = min((int(m) for m in tiles if int(m) >= block_m_holds), default=0)
    block_m = block_m or max(int(m) for m in tiles)
    chosen = tiles[str(block_m)]
    block_n = chosen["block_n"] if rows % chosen["block_n"] == 0 else 64
    split = 1
    if block_m_holds <= min(block_m, 64):
        wanted = _device(device_index)[1] * chosen["programs_per_sm"]
        # No more programs than run at once: the rest would be a second, nearly empty wave. A step
        # is 128 columns; a program should have a few to keep loads in flight.
        split = max(1, min(wanted // (weights * rows // block_n), columns // 128 // 4))
    return Tile(block_m, block_n, chosen["warps"], chosen["stages"], split)
