"""Holding the headers of safetensors files against the model that config.json describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from lowbit.checkpoint.reader import read_header
from lowbit.errors import LowbitError
from lowbit.models.sources import MISMATCH, Source, map_sources
from lowbit.scheme import Scheme


def check_quantized(
    model: PreTrainedModel, selected: Mapping[str, Scheme], files: Sequence[Path]
) -> None:
    """Raises unless `files` hold every stored tensor of `selected`, and none of other modules.

    Args:
        model: on meta, with its quantized modules in place.
        selected: module name -> scheme.
        files: safetensors files; nothing is checked if there are none.

    Raises:
        LowbitError: naming the tensor.
    """
    if not files:
        return
    entries = {name: source.entries[0] for name, source in _sources(model, files).items()}
    for name, scheme in selected.items():
        shape = model.get_submodule(name).logical_shape
        for suffix, (size, dtype) in scheme.tensor_specs(shape).items():
            entry = entries.get(f"{name}.{suffix}")
            if entry is None:
                raise LowbitError(
                    f"{files[0].parent}: tensor '{name}.{suffix}' is missing, config.json says "
                    f"that {name} is stored as {scheme}; {MISMATCH}"
                )
            if (entry.shape, entry.dtype) != (size, dtype):
                raise LowbitError(
                    f"{entry.file}: tensor {entry.name!r} is {entry.dtype} {list(entry.shape)}, "
                    f"but {scheme} of a {list(shape)} weight needs {dtype} {list(size)}; "
                    f"{MISMATCH}"
                )
            # Rows are padded to whole words, so the packed shape alone does not tell in_features.
            if suffix == "weight_shape" and tuple(entry.read().tolist()) != shape:
                raise LowbitError(
                    f"{entry.file}: {entry.name!r} says {entry.read().tolist()}, but the model has "
                    f"a {list(shape)} weight there; {MISMATCH}"
                )
    modules = dict(model.named_modules())
    for key, entry in entries.items():
        name, _, suffix = key.rpartition(".")
        if suffix == "weight_packed" and name in modules and name not in selected:
            raise LowbitError(
                f"{entry.file}: {name} is quantized, but config.json does not say so; {MISMATCH}"
            )


def check_full_precision(
    model: PreTrainedModel, selected: Mapping[str, Scheme], files: Sequence[Path]
) -> None:
    """Raises unless every weight to quantize that `files` hold as one tensor has the right shape.

    Args:
        model: on meta, with placeholders in place.
        selected: module name -> scheme.
        files: safetensors files.

    Raises:
        LowbitError: naming the tensor.
    """
    sources = _sources(model, files)
    for name in selected:
        placeholder = model.get_submodule(name)._parameters.get("weight")
        source = sources.get(f"{name}.weight")
        if source is None or placeholder is None or source.converted:
            continue
        entry = source.entries[0]
        if entry.shape != tuple(placeholder.shape):
            raise LowbitError(
                f"{entry.file}: tensor {entry.name!r} is {list(entry.shape)}, but the model has a "
                f"{list(placeholder.shape)} weight there; {MISMATCH}"
            )


def _sources(model: PreTrainedModel, files: Sequence[Path]) -> dict[str, Source]:
    return map_sources(model, (entry for file in files for entry in read_header(file)))
