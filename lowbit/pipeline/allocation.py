"""Bit allocation as part of a run: what is free to choose, what it costs, what was measured."""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lowbit import __version__
from lowbit.algorithms import GPTQ, Algorithm, algorithm_options
from lowbit.allocation.allocate import (
    Allocated,
    Allocation,
    Sizes,
    allocate,
    dynamic_rules,
    require_feasible,
)
from lowbit.allocation.budget import describe_bytes
from lowbit.allocation.fusion import fusion_groups
from lowbit.allocation.sensitivity import Sensitivities, SensitivityRun
from lowbit.calibration.tokens import CalibrationTokens, token_digest
from lowbit.checkpoint import write_json
from lowbit.checkpoint.reader import read_json
from lowbit.errors import LowbitError
from lowbit.hf.config import LowbitConfig
from lowbit.models.selection import select_modules
from lowbit.models.streaming import StreamedDecoder
from lowbit.nn.replace import weight_shape
from lowbit.pipeline.output import digest_json
from lowbit.pipeline.sizes import fixed_bytes, module_bytes, written_bytes
from lowbit.pipeline.source import split_batches
from lowbit.progress import RunProgress
from lowbit.scheme import Scheme

KIND = "sensitivities"


def make_allocation(
    allocation: Allocation | None,
    target_bits: float | None,
    target_size: int | str | None,
    has_text: bool,
) -> Allocation | None:
    """Returns the allocation that a user asked for in one of three ways, None for none.

    Args:
        allocation: with all its options.
        target_bits: or only this.
        target_size: or only this.
        has_text: there is calibration text to measure on.

    Raises:
        LowbitError: if several are given, or there is no text.
    """
    if target_bits is not None or target_size is not None:
        if allocation is not None:
            raise LowbitError(
                "an allocation and a target are both given; put the target into the allocation"
            )
        allocation = Allocation(target_bits, target_size)
    if allocation is not None and not has_text:
        raise LowbitError(
            "bit allocation measures how sensitive layers are by running the model, which needs "
            "calibration data (stored statistics do not do); give a text, JSONL or token file"
        )
    return allocation


def choose_schemes(
    allocation: Allocation,
    config: LowbitConfig,
    decoder: StreamedDecoder,
    tokens: CalibrationTokens,
    algorithm: Algorithm,
    progress: bool,
) -> dict[str, Any]:
    """Adds to `config` the rules that meet the budget, and returns what the manifest records.

    Layers of the blocks are free, except for those that a rule of the user names. Everything else
    keeps its scheme and counts.

    Args:
        allocation: budget and options.
        config: the user's choice; its `dynamic` gets further rules.
        decoder: the source, not loaded.
        tokens: to measure on.
        algorithm: what the run will use.
        progress: show a progress bar.

    Raises:
        LowbitError: if the budget cannot be met, or nothing is free.
    """
    selected = select_modules(decoder.model, config.selection())
    users = [re.compile(pattern) for pattern, _ in config.dynamic]
    free = [
        name
        for name in selected
        if name.startswith(decoder.layers_name + ".") and not any(u.search(name) for u in users)
    ]
    if not free:
        raise LowbitError("bit allocation: every layer has a scheme by `dynamic` already")
    sizes = _sizes(allocation, decoder, selected, free)
    groups = fusion_groups(free, allocation.fused)
    require_feasible(allocation, groups, sizes)  # before any work
    found = _sensitivities(allocation, decoder, tokens, groups, _measuring(algorithm), progress)
    allocated = allocate(allocation, found.groups, found.losses, sizes)
    rules = dynamic_rules(allocated.schemes, Scheme.parse(config.scheme), decoder.layers_name)
    config.dynamic = [*config.dynamic, *((pattern, str(scheme)) for pattern, scheme in rules)]
    _require_obeyed(decoder, config, allocated)
    return {**allocated.report, "guessed": found.guessed}


def require_budget(allocation: dict[str, Any], directory: Path, stored_bytes: int) -> None:
    """Raises unless the finished checkpoint in `directory` meets the budget that was reported.

    Args:
        allocation: what `choose_schemes` returned.
        directory: the output.
        stored_bytes: of all quantized modules, as the manifest counts them.
    """
    sized = allocation["target_size"] is not None
    found = written_bytes(directory) if sized else stored_bytes
    if found > allocation["budget_bytes"]:
        raise LowbitError(
            f"{directory}: holds {describe_bytes(found)}, above the budget of "
            f"{describe_bytes(allocation['budget_bytes'])}, because a step of the recipe stores "
            "more than was planned; choose a lower target, or a recipe without that step"
        )


def _measuring(algorithm: Algorithm) -> Algorithm:
    """Returns what weights are quantized by for measuring: what matters is how options compare."""
    return GPTQ(refit=False) if algorithm.needs_statistics else algorithm


def _sizes(
    allocation: Allocation, decoder: StreamedDecoder, selected: dict[str, Scheme], free: list[str]
) -> Sizes:
    shapes = {name: weight_shape(decoder.model.get_submodule(name)) for name in selected}
    others = {name: scheme for name, scheme in selected.items() if name not in set(free)}
    if allocation.target_size is not None:

        def of(name: str, scheme: Scheme) -> int:
            return module_bytes(name, shapes[name], scheme)

        fixed = fixed_bytes(decoder, selected) + sum(of(n, s) for n, s in others.items())
        return Sizes(of, fixed)
    weights = sum(math.prod(shape) for shape in shapes.values())
    fixed = sum(scheme.stored_bytes(shapes[name]) for name, scheme in others.items())
    return Sizes(lambda name, scheme: scheme.stored_bytes(shapes[name]), fixed, weights)


def _sensitivities(
    allocation: Allocation,
    decoder: StreamedDecoder,
    tokens: CalibrationTokens,
    groups: list[list[str]],
    algorithm: Algorithm,
    progress: bool,
) -> Sensitivities:
    """Returns sensitivities from the file, or measures them and writes it."""
    ids = tokens.ids[: allocation.samples]
    mask = None if tokens.mask is None else tokens.mask[: allocation.samples]
    seed = int(tokens.description.get("seed") or 0)
    with RunProgress(progress) as bar:
        file = None if allocation.sensitivities is None else Path(allocation.sensitivities)
        fingerprint: dict[str, Any] = {}
        if file is not None:
            entries = decoder.checkpoint.entries.values()
            bar.stage("checking weights", sum(entry.end - entry.begin for entry in entries))
            fingerprint = {
                "version of lowbit": __version__,
                "configuration": digest_json(decoder.checkpoint.config),
                "weights": decoder.checkpoint.verify(bar.advance),
                "tokens": token_digest(ids),
                "mask": None if mask is None else token_digest(mask.to(ids.dtype)),
                "seed": seed,
                "algorithm": {"name": algorithm.name, **algorithm_options(algorithm)},
            }
            if file.exists():
                return _read(file, fingerprint, groups, allocation.schemes)
        # Its own decoder, in the dtype that differences need; what measuring does to tied heads
        # and parameters ends with it.
        measured = StreamedDecoder(decoder.checkpoint, torch.float32, decoder.device)
        masks = None if mask is None else split_batches(mask)
        run = SensitivityRun(
            measured, split_batches(ids), masks, groups, allocation.schemes, algorithm, seed, bar
        )
        found = run.measure()
    if file is not None:
        write_json(file, {"kind": KIND, "fingerprint": fingerprint, **asdict(found)})
    return found


def _read(
    file: Path, fingerprint: dict[str, Any], groups: list[list[str]], options: tuple[Scheme, ...]
) -> Sensitivities:
    """Returns what `file` holds, if it is for this model, these tokens, layers and options."""
    stored = read_json(file, "")
    found = stored.get("fingerprint")
    if stored.get("kind") != KIND or not isinstance(found, dict):
        raise LowbitError(f"{file}: is no file of sensitivities; give another name")
    for key, value in fingerprint.items():
        if found.get(key) != value:
            raise LowbitError(
                f"{file}: was measured with other {key}; give another file to measure again"
            )
    losses = {tuple(g): row for g, row in zip(stored["groups"], stored["losses"], strict=True)}
    lacking = [" with ".join(group) for group in groups if tuple(group) not in losses]
    if not lacking:
        known = losses[tuple(groups[0])]
        lacking = [str(scheme) for scheme in options if str(scheme) not in known]
    if lacking:
        raise LowbitError(
            f"{file}: has no measurement of {lacking[0]}; give another file to measure again"
        )
    rows = [losses[tuple(group)] for group in groups]
    return Sensitivities(groups, rows, list(stored["guessed"]))


def _require_obeyed(decoder: StreamedDecoder, config: LowbitConfig, allocated: Allocated) -> None:
    """Holds the rules against the choice: they are what the checkpoint will be loaded by."""
    chosen = select_modules(decoder.model, config.selection())
    for name, scheme in allocated.schemes.items():
        if chosen.get(name) != scheme:
            raise AssertionError(f"{name}: the rules give {chosen.get(name)} instead of {scheme}")
