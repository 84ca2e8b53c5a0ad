"""Chooses tiles and the switch-over by measuring, and writes them beside the shipped tables.

For every kind of weight and every BLOCK_M a short list of tiles is timed on a few shapes, with the
largest number of tokens that BLOCK_M holds; the tile with the best geometric mean over the shapes
is taken. Then the fused kernel is timed against decoding the whole weight, for rising numbers of
tokens. The table has the format of `default.json`, with `measured` true.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import timing
import torch.nn.functional as F
import triton
from compile_tiles import Entry, Launch, compile_all, tile_of
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
# Of the time that is left, for compiling.
COMPILE_SHARE = 0.6
RELATIVE_SHAPE, SMOKE_RELATIVE_SHAPE = (1024, 4096), (64, 128)


def candidates(block_m: int, smoke: bool) -> list[Entry]:
    """Returns the entries that are tried for one BLOCK_M, at most 20."""
    cuts = SMALL if block_m <= 32 else LARGE
    entries = [
        {"block_n": n, "warps": warps, "stages": stages, "programs_per_sm": programs}
        for n, warps, stages in cuts
        for programs in PROGRAMS[block_m]
    ]
    return entries[:2] if smoke else entries


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
    _compile(_candidate_launches(kinds), COMPILE_SHARE, part)
    timing.warm_up()
    ranked: dict[str, dict[int, list[Entry]]] = {}
    for kind in kinds:
        with _as_far_as_time_goes(kind, part), part.guarded(kind):
            part.need(SECONDS_PER_KIND, f"tiles of {kind}")
            ranked[kind] = _rank(kind, settings, part)
    _compile(_relative_launches(ranked), COMPILE_SHARE / 2, part)
    for kind, order in ranked.items():
        with _as_far_as_time_goes(kind, part), part.guarded(kind):
            chosen = _choose(kind, order, settings, part)
            table["kinds"][kind] = {str(block_m): entry for block_m, entry in chosen.items()}
            table["fused_up_to"][kind] = _switch_over(kind, chosen, settings, part)
        part.set("table", table)
    file_name = re.sub(r"[^a-z0-9]+", "-", f"{name}-{version}".lower()) + ".json"
    part.set("file_name", file_name)
    if table["kinds"] and settings.write_tiles:
        (configs.DIRECTORY / file_name).write_text(json.dumps(table, indent=2) + "\n")


@contextmanager
def _as_far_as_time_goes(kind: str, part: Part) -> Iterator[None]:
    """Leaves `kind` out if time runs out: the table of the others is worth having."""
    try:
        yield
    except OutOfTimeError as out:
        part.say(str(out))
        part.results["left_out"].append(kind)


def _compile(launches: list[Launch], share: float, part: Part) -> None:
    part.say(f"compiling {len(launches)} tiles")
    done = compile_all(launches, share * part.remaining)
    part.say("compiled" if done else "some are not compiled yet")


def _candidate_launches(kinds: list[str]) -> list[Launch]:
    return [
        Launch(KINDS[kind], shape, block_m, entry)
        for kind in kinds
        for block_m in BLOCKS
        for entry in candidates(block_m, smoke=False)
        for shape in SHAPES
    ]


def _relative_launches(ranked: dict[str, dict[int, list[Entry]]]) -> list[Launch]:
    """Returns the two best tiles of each kind on every other scheme of the kind."""
    return [
        Launch(scheme, RELATIVE_SHAPE, block_m, entry)
        for kind, order in ranked.items()
        for block_m, entries in order.items()
        for entry in entries[:2]
        for scheme in RELATIVES[kind]
    ]


def _rank(kind: str, settings: Settings, part: Part) -> dict[int, list[Entry]]:
    """Returns BLOCK_M -> entries that run on every shape, the fastest first."""
    weights = _weights(kind, settings)
    order: dict[int, list[Entry]] = {}
    for block_m in SMOKE_BLOCKS if settings.smoke else BLOCKS:
        times: dict[int, list[float]] = {}
        entries = candidates(block_m, settings.smoke)
        for copies in weights:
            for index, seconds in _times(entries, block_m, copies, part).items():
                times.setdefault(index, []).append(seconds)
        complete = {i: _mean(found) for i, found in times.items() if len(found) == len(weights)}
        order[block_m] = [entries[i] for i in sorted(complete, key=lambda i: complete[i])]
        for index, seconds in complete.items():
            entry = {"kind": kind, "block_m": block_m, **entries[index]}
            part.add("times", {**entry, "us": timing.significant(1e6 * seconds)})
        part.say(f"{kind}, BLOCK_M {block_m}: {order[block_m][:1]}")
        part.save()
    return order


def _choose(
    kind: str, order: dict[int, list[Entry]], settings: Settings, part: Part
) -> dict[int, Entry]:
    """Returns BLOCK_M -> the fastest entry with which every scheme of the kind runs."""
    chosen: dict[int, Entry] = {}
    for block_m, entries in order.items():
        for entry in entries:
            part.need(0.0, f"the other schemes of {kind}")
            if _runs_on_relatives(kind, entry, block_m, settings, part):
                chosen[block_m] = entry
                break
    return chosen


def _runs_on_relatives(
    kind: str, entry: Entry, block_m: int, settings: Settings, part: Part
) -> bool:
    shape = SMOKE_RELATIVE_SHAPE if settings.smoke else RELATIVE_SHAPE
    for scheme in RELATIVES[kind]:
        try:
            if not Launch(scheme, shape, block_m, entry).run(settings.device):
                return False
        except Exception as error:
            part.add("failed", {"scheme": scheme, "block_m": block_m, **entry, "error": str(error)})
            return False
    return True


def _weights(kind: str, settings: Settings) -> list[list[FragmentWeight]]:
    sizes = SMOKE_SHAPES if settings.smoke else SHAPES
    return [_copies(KINDS[kind], size, settings) for size in sizes]


def _times(
    entries: list[Entry], block_m: int, weights: list[FragmentWeight], part: Part
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


def _switch_over(kind: str, chosen: dict[int, Entry], settings: Settings, part: Part) -> int:
    """Returns the largest number of tokens at which the fused kernel is the faster one."""
    largest = max(chosen, default=0)
    limit = 64
    weights = _weights(kind, settings)
    for tokens in SMOKE_SWITCH_MS if settings.smoke else SWITCH_MS:
        ratios = []
        for copies in weights:
            tile = tile_of(chosen[largest], largest, copies[0]) if largest else None
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
