"""Chooses tiles and the switch-over by measuring, and writes them beside the shipped tables.

For every kind of weight and every BLOCK_M a short list of tiles is timed on a few shapes, with the
largest number of tokens that BLOCK_M holds; the tile with the best geometric mean over the shapes
is taken. Then the fused kernel is timed against decoding the whole weight, for rising numbers of
tokens. The table has the format of `default.json`, with `measured` true.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import timing
import torch.nn.functional as F
import triton
from lowbit_kernels.gpu import configs, matmul
from lowbit_kernels.gpu.configs import Tile
from lowbit_kernels.gpu.weight import FragmentWeight
from model_shapes import activation_dtype, bytes_of, copy_of, random_weight
from parts import OutOfTimeError, Part, Settings
from random_tensors import normal
from torch import Tensor

# The scheme that stands for each kind.
KINDS = {
    "int4": "W4A16_G128",
    "codebook": "NF4_DQ",
    "int2": "W2A16_G64",
    "int3": "W3A16_G64",
    "int8": "W8A16",
}
# Schemes of the same kind, which will use the same tiles: they have to run, too.
RELATIVES = {
    "int4": ("W4A16_ASYM_G64", "W4A16_CHANNEL", "W4A16_G32"),
    "codebook": ("NF4_G32", "NF4_CHANNEL"),
    "int2": ("W2A16_ASYM_G32", "W2A16_CHANNEL"),
    "int3": ("W3A16_ASYM_G64", "W3A16_G32", "W3A16_CHANNEL"),
    "int8": ("W8A16_ASYM_G64", "W8A16_CHANNEL", "W8A16_G32"),
}
SHAPES, SMOKE_SHAPES = ((4096, 4096), (14336, 4096), (8192, 8192)), ((128, 512),)
BLOCKS, SMOKE_BLOCKS = (16, 32, 64, 128), (16,)
SWITCH_MS, SMOKE_SWITCH_MS = (128, 256, 512, 1024), (32,)
# (block_n, warps, stages); programs per multiprocessor are tried beside them where K is split.
SMALL = ((64, 4, 4), (128, 4, 3), (128, 4, 4), (128, 4, 5), (128, 8, 4))
LARGE = ((64, 4, 3), (128, 4, 3), (128, 8, 2), (128, 8, 3), (256, 8, 3))
PROGRAMS = {16: (2, 4), 32: (2, 3), 64: (1, 2), 128: (1,)}
SECONDS_PER_KIND = 10.0
WORKERS = 12


def candidates(block_m: int, smoke: bool) -> list[dict[str, int]]:
    """Returns the entries that are tried for one BLOCK_M, at most 20."""
    cuts = SMALL if block_m <= 32 else LARGE
    entries = [
        {"block_n": n, "warps": warps, "stages": stages, "programs_per_sm": programs}
        for n, warps, stages in cuts
        for programs in PROGRAMS[block_m]
    ]
    return entries[:2] if smoke else entries


def tile_of(entry: dict[str, int], block_m: int, weight: FragmentWeight) -> Tile | None:
    """Returns the tile that `configs.choose` makes of `entry`, None where it would make another."""
    rows, columns = weight.padded_rows, weight.words.shape[1] * 64
    if rows % entry["block_n"]:
        return None
    split = 1
    if block_m <= 64:
        wanted = configs._device(0)[1] * entry["programs_per_sm"]
        split = max(1, min(wanted // (rows // entry["block_n"]), columns // 128 // 4))
    return Tile(block_m, entry["block_n"], entry["warps"], entry["stages"], split)


def run(settings: Settings, part: Part) -> None:
    """Sets `table`, the file's content, and `times`, what it was chosen by; writes the file."""
    default = json.loads((configs.DIRECTORY / "default.json").read_text())
    name, _ = configs._device(0)
    version = ".".join(triton.__version__.split(".")[:2])
    table: dict[str, Any] = {
        "device": name,
        "triton": version,
        "measured": True,
        "note": "written by kernels/benchmarks/tune.py",
        "fused_up_to": dict(default["fused_up_to"]),
        "tiles": default["tiles"],
        "kinds": {},
    }
    part.results |= {"times": [], "left_out": []}
    kinds = list(KINDS)[:1] if settings.smoke else list(KINDS)
    if timing.on_gpu():
        _compile_in_parallel(settings, part)
    timing.warm_up()
    for kind in kinds:
        try:
            part.need(SECONDS_PER_KIND, f"tiles of {kind}")
            with part.guarded(kind):
                _tune_kind(kind, table, settings, part)
        except OutOfTimeError as out:
            part.say(str(out))
            part.results["left_out"].append(kind)
        part.set("table", table)
    file_name = re.sub(r"[^a-z0-9]+", "-", f"{name}-{version}".lower()) + ".json"
    part.set("file_name", file_name)
    if table["kinds"] and settings.write_tiles:
        (configs.DIRECTORY / file_name).write_text(json.dumps(table, indent=2) + "\n")


def _tune_kind(kind: str, table: dict[str, Any], settings: Settings, part: Part) -> None:
    sizes = SMOKE_SHAPES if settings.smoke else SHAPES
    weights = [_copies(KINDS[kind], size, settings) for size in sizes]
    chosen: dict[str, dict[str, int]] = {}
    for block_m in SMOKE_BLOCKS if settings.smoke else BLOCKS:
        times: dict[int, list[float]] = {}
        entries = candidates(block_m, settings.smoke)
        for copies in weights:
            for index, seconds in _times(entries, block_m, copies, part).items():
                times.setdefault(index, []).append(seconds)
        complete = {i: _mean(found) for i, found in times.items() if len(found) == len(weights)}
        ranked = sorted(complete, key=lambda index: complete[index])
        best = next(
            (
                i
                for i in ranked
                if _runs_on_relatives(kind, entries[i], block_m, settings.device, part)
            ),
            None,
        )
        if best is None:
            part.say(f"{kind}, BLOCK_M {block_m}: no tile ran on every shape")
            continue
        chosen[str(block_m)] = entries[best]
        for index, seconds in complete.items():
            part.add(
                "times",
                {
                    "kind": kind,
                    "block_m": block_m,
                    **entries[index],
                    "us": timing.significant(1e6 * seconds),
                },
            )
        part.say(f"{kind}, BLOCK_M {block_m}: {entries[best]}")
    table["kinds"][kind] = chosen
    table["fused_up_to"][kind] = _switch_over(kind, chosen, weights, settings, part)


def _runs_on_relatives(
    kind: str, entry: dict[str, int], block_m: int, device: str, part: Part
) -> bool:
    """Returns False for a tile with which one of the kind's other schemes does not run."""
    for scheme in RELATIVES[kind]:
        weight = random_weight(scheme, 256, 1024, device)
        tile = tile_of(entry, block_m, weight)
        x = normal((block_m, 1024), device, activation_dtype(device == "cpu"))
        try:
            if tile is None or not matmul.run_fused(x, weight, None, tile).isfinite().all():
                return False
        except Exception as error:
            part.add("failed", {"scheme": scheme, "block_m": block_m, **entry, "error": str(error)})
            return False
    return True


def _times(
    entries: list[dict[str, int]], block_m: int, weights: list[FragmentWeight], part: Part
) -> dict[int, float]:
    """Returns index of an entry -> seconds of a launch on `weights`, copies of one."""
    device = weights[0].words.device
    dtype = activation_dtype(device.type == "cpu")
    x = normal((block_m, weights[0].in_features), device.type, dtype)
    replays = {}
    for index, entry in enumerate(entries):
        tile = tile_of(entry, block_m, weights[0])
        if tile is None:
            continue
        calls = [partial(matmul.run_fused, x, weight, None, tile) for weight in weights]
        try:
            replays[str(index)] = timing.capture(calls)
        except Exception as error:  # too much shared memory, or a compiler that gives up
            part.add("failed", {"block_m": block_m, **entry, "error": str(error)[:200]})
    return {int(index): found.seconds for index, found in timing.measure(replays).items()}


def _switch_over(
    kind: str,
    chosen: dict[str, dict[str, int]],
    weights: list[list[FragmentWeight]],
    settings: Settings,
    part: Part,
) -> int:
    """Returns the largest number of tokens at which the fused kernel is the faster one."""
    largest = max((int(block_m) for block_m in chosen), default=0)
    limit = 64
    for tokens in SMOKE_SWITCH_MS if settings.smoke else SWITCH_MS:
        ratios = []
        for copies in weights:
            tile = tile_of(chosen[str(largest)], largest, copies[0]) if largest else None
            if tile is None:
                continue
            tile = Tile(tile.block_m, tile.block_n, tile.warps, tile.stages, 1)
            dtype = activation_dtype(settings.smoke)
            x = normal((tokens, copies[0].in_features), settings.device, dtype)
            fused = [partial(matmul.run_fused, x, weight, None, tile) for weight in copies]
            whole = [partial(_decoded, x, weight) for weight in copies]
            times = timing.measure({"f": timing.capture(fused), "w": timing.capture(whole)})
            ratios.append(times["f"].seconds / times["w"].seconds)
        ratio = _mean(ratios) if ratios else math.inf
        part.add(
            "switch_over",
            {"kind": kind, "M": tokens, "fused_over_decoded": ratio},
        )
        if ratio > 1:
            break
        limit = tokens
    return limit


def _decoded(x: Tensor, weight: FragmentWeight) -> Tensor:
    return F.linear(x, matmul.dequantize(weight, x.dtype))


def _copies(scheme: str, size: tuple[int, int], settings: Settings) -> list[FragmentWeight]:
    first = random_weight(scheme, *size, settings.device)
    number = timing.copies_needed(bytes_of(first))
    return [first, *(copy_of(first) for _ in range(number - 1))]


def _mean(values: list[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))


def _compile_in_parallel(settings: Settings, part: Part) -> None:
    """Fills Triton's cache on disk from several processes: compiling takes most of the time."""
    part.say("compiling the candidates")
    code = "import sys, json, tune; tune.compile_share(int(sys.argv[1]), int(sys.argv[2]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    number = min(WORKERS, os.cpu_count() or 1)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(i), str(number)],
            cwd=Path(__file__).parent,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for i in range(number)
    ]
    try:
        for worker in workers:
            worker.wait(timeout=max(1.0, part.remaining - SECONDS_PER_KIND * len(KINDS)))
    except subprocess.TimeoutExpired:
        part.say("some candidates are not compiled yet")
    finally:
        for worker in workers:
            worker.kill()
    part.say("compiled")


def compile_share(index: int, number: int) -> None:
    """Launches every `number`-th candidate, for the sake of Triton's cache."""
    launches = [
        (scheme, block_m, entry)
        for scheme in KINDS.values()
        for block_m in BLOCKS
        for entry in candidates(block_m, smoke=False)
    ]
    weights: dict[tuple[str, tuple[int, int]], FragmentWeight] = {}
    for scheme, block_m, entry in launches[index::number]:
        for size in SHAPES:
            key = (scheme, size)
            if key not in weights:
                weights[key] = random_weight(scheme, *size, "cuda")
            weight = weights[key]
            tile = tile_of(entry, block_m, weight)
            x = normal((block_m, size[1]), "cuda", activation_dtype(smoke=False))
            if tile is not None:
                try:
                    matmul.run_fused(x, weight, None, tile)
                except Exception:
                    continue
