"""The commands that made a checkpoint, from what its manifest records.

Not the line that was typed: that has the paths of somebody's machine and perhaps `--resume`. What
the bytes depend on is in the manifest, and so is what these lines say.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lowbit.model_card.origin import ORIGIN
from lowbit.recipe import FOLDING, PRESETS, Recipe
from lowbit.scheme import Scheme


def commands(manifest: Mapping[str, Any]) -> list[str]:
    """Returns the commands, the first one first; empty for a manifest that does not tell.

    What a source's manifest says came from anywhere, so it may be something else than it should.
    """
    try:
        return _commands(manifest)
    except (LookupError, TypeError, ValueError, AttributeError):
        return []


def _commands(manifest: Mapping[str, Any]) -> list[str]:
    fingerprint = manifest.get("fingerprint") or {}
    name = (manifest.get(ORIGIN) or {}).get("name", "MODEL")
    if "to" in fingerprint:
        chosen = manifest.get("quantized")
        before = _commands({**chosen, ORIGIN: manifest.get(ORIGIN)}) if chosen else []
        parts = ["convert", "QUANTIZED" if before else name, "OUTPUT", "--to", fingerprint["to"]]
        last = [*parts, "--requantize"] if fingerprint.get("requantize") else parts
        return [line.replace(" OUTPUT", " QUANTIZED") for line in before] + [_line(last)]
    if "derivation" in fingerprint:
        return [_line(["merge", name, "ADAPTER", "OUTPUT", *_merge(fingerprint)])]
    options = fingerprint.get("options")
    if not isinstance(options, Mapping):
        return []
    if "qat" in fingerprint:
        mode = str((fingerprint["qat"] or {}).get("mode"))
        given = ["--data", "DATA", "--qat", str(options.get("scheme")), "--qat-mode", mode]
        return [_line(["finetune", name, *given, "--output", "OUTPUT"])]
    return [_line(["quantize", name, "OUTPUT", *_quantize(manifest, options)])]


def method(options: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the option that chooses how codes were chosen, and its value.

    `--quality` or `--algorithm` where one of ours did exactly that, else the algorithm alone.
    """
    own = (options.get("algorithm"), options.get("algorithm_options"), options.get("recipe") or {})
    for option, table in (("--quality", PRESETS), ("--algorithm", FOLDING)):
        for name, recipe in table.items():
            if own == _recorded(recipe):
                return option, name
    return "--algorithm", str(options.get("algorithm", "rtn"))


def _recorded(recipe: Recipe) -> tuple[str, Any, Any]:
    """Returns what a manifest has of a recipe; tuples have become lists there."""
    made = json.dumps([recipe.algorithm_options(), recipe.surroundings()], default=str)
    options, surroundings = json.loads(made)
    return recipe.algorithm.name, options, surroundings


def _quantize(manifest: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[str]:
    allocation = manifest.get("allocation")
    yield from ("--scheme", str(options.get("scheme")))
    option, value = method(options)
    yield from (option, value)
    yield from _calibration((manifest["fingerprint"]).get("calibration"))
    if isinstance(allocation, Mapping):
        for key in ("target_bits", "target_size"):
            if allocation.get(key) is not None:
                yield from (f"--{key.replace('_', '-')}", str(allocation[key]))
    else:
        for pattern, scheme in options.get("dynamic", ()):
            yield from ("--dynamic", f"{pattern}={'none' if scheme is None else scheme}")
    for kept in options.get("modules_to_not_convert", ()):
        yield from ("--keep", kept)
    for key in ("quantize_lm_head", "quantize_embeddings"):
        if options.get(key):
            yield f"--{key.replace('_', '-')}"


def _calibration(found: Any) -> Iterator[str]:
    if not isinstance(found, Mapping):
        return
    if "statistics" in found:
        yield from ("--stats", "STATISTICS")
        return
    yield from ("--calibration", str(found.get("source")))
    for key in ("samples", "seqlen", "seed", "text_field"):
        if key in found:
            yield from (f"--{key.replace('_', '-')}", str(found[key]))
    if "loss_mask" in found:
        yield "--loss-mask"


def _merge(fingerprint: Mapping[str, Any]) -> Iterator[str]:
    options = fingerprint.get("options")
    if not isinstance(options, Mapping):
        yield from ("--to", str(fingerprint.get("target", "bf16")))
        return
    yield from ("--to", str(Scheme.parse(options.get("scheme", ""))))
    if "base" not in fingerprint:  # the exact merge chooses no codes
        yield from _calibration(fingerprint.get("calibration"))
        option, value = method(options)
        yield from (option, value)


def _line(parts: list[str]) -> str:
    return " ".join(["lowbit", *(shlex.quote(_plain(part)) for part in parts)])


def _plain(part: str) -> str:
    """Returns a path without its folders: they are of somebody's machine."""
    return Path(part).name if Path(part).is_absolute() else part
