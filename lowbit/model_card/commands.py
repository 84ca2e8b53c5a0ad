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

from lowbit.algorithms import algorithm_options, make_algorithm
from lowbit.allocation.allocate import OPTIONS
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
        if chosen and not before:
            return []  # nobody could start with the second
        parts = ["convert", "QUANTIZED" if before else name, "OUTPUT", "--to", fingerprint["to"]]
        last = [*parts, *_conversion(fingerprint)]
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


def _conversion(fingerprint: Mapping[str, Any]) -> Iterator[str]:
    if "type" in fingerprint:
        yield from ("--gguf-type", str(fingerprint["type"]))
    if "statistics" in fingerprint:
        yield from ("--stats", "STATISTICS")
    if fingerprint.get("requantize"):
        yield "--requantize"


def method(options: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the option that chooses how codes were chosen, and its value.

    `--quality` or `--algorithm` where one of ours did exactly that, else the algorithm alone.
    """
    return _named(options) or ("--algorithm", str(options.get("algorithm", "rtn")))


def _named(options: Mapping[str, Any]) -> tuple[str, str] | None:
    """Returns the option and the name of the recipe of ours that did exactly that, if one did."""
    own = (options.get("algorithm"), options.get("algorithm_options"), options.get("recipe") or {})
    for option, table in (("--quality", PRESETS), ("--algorithm", FOLDING)):
        for name, recipe in table.items():
            if own == _recorded(recipe):
                return option, name
    return None


def _recorded(recipe: Recipe) -> tuple[str, Any, Any]:
    """Returns what a manifest has of a recipe; tuples have become lists there."""
    made = json.dumps([recipe.algorithm_options(), recipe.surroundings()], default=str)
    options, surroundings = json.loads(made)
    return recipe.algorithm.name, options, surroundings


def _quantize(manifest: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[str]:
    allocation = manifest.get("allocation")
    yield from ("--scheme", str(options.get("scheme")))
    yield from _chosen(options)
    yield from _calibration((manifest["fingerprint"]).get("calibration"))
    if isinstance(allocation, Mapping):
        for key in ("target_bits", "target_size"):
            if allocation.get(key) is not None:
                yield from (f"--{key.replace('_', '-')}", str(allocation[key]))
        choices = allocation.get("options", OPTIONS)
        for choice in choices if set(choices) != set(OPTIONS) else ():
            yield from ("--choice", str(choice))
        if allocation.get("fused") is False:
            yield "--unfused"
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
        yield from _chosen(options, is_merge=True)


def _chosen(options: Mapping[str, Any], is_merge: bool = False) -> Iterator[str]:
    """Yields the options that choose codes in the same way, those of the algorithm as well.

    Raises:
        ValueError: there are none; a recipe may be anything in Python, and merging takes no
            options of algorithms.
    """
    option, value = method(options)
    yield from (option, value)
    if _named(options) is not None:
        return
    given = options.get("algorithm_options") or {}
    defaults = json.loads(json.dumps(algorithm_options(make_algorithm(value)), default=str))
    changed = {key: found for key, found in given.items() if defaults.get(key) != found}
    if options.get("recipe") or (changed and is_merge):
        raise ValueError("no command has these options")
    for key, found in changed.items():
        yield from ("--option", f"{key}={found if isinstance(found, str) else json.dumps(found)}")


def _line(parts: list[str]) -> str:
    return " ".join(["lowbit", *(shlex.quote(_plain(part)) for part in parts)])


def _plain(part: str) -> str:
    """Returns a path without its folders: they are of somebody's machine."""
    return Path(part).name if Path(part).is_absolute() else part
