"""Holding the headers of safetensors files against the model that config.json describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from lowbit.checkpoint.reader import TensorEntry, read_header
from lowbit.errors import LowbitError
from lowbit.scheme import Scheme

_MISMATCH = "config.json and the weights do not belong together"


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
    entries, _ = _entries_by_model_name(model, files)
    for name, scheme in selected.items():
        shape = model.get_submodule(name).logical_shape
        for suffix, (size, dtype) in scheme.tensor_specs(shape).items():
            entry = entries.get(f"{name}.{suffix}")
            if entry is None:
                raise LowbitError(
                    f"{files[0].parent}: tensor '{name}.{suffix}' is missing, config.json says "
                    f"that {name} is stored as {scheme}; {_MISMATCH}"
                )
            if (entry.shape, entry.dtype) != (size, dtype):
                raise LowbitError(
                    f"{entry.file}: tensor {entry.name!r} is {entry.dtype} {list(entry.shape)}, "
                    f"but {scheme} of a {list(shape)} weight needs {dtype} {list(size)}; "
                    f"{_MISMATCH}"
                )
            # Rows are padded to whole words, so the packed shape alone does not tell in_features.
            if suffix == "weight_shape" and tuple(entry.read().tolist()) != shape:
                raise LowbitError(
                    f"{entry.file}: {entry.name!r} says {entry.read().tolist()}, but the model has "
                    f"a {list(shape)} weight there; {_MISMATCH}"
                )
    modules = dict(model.named_modules())
    for key, entry in entries.items():
        name, _, suffix = key.rpartition(".")
        if suffix == "weight_packed" and name in modules and name not in selected:
            raise LowbitError(
                f"{entry.file}: {name} is quantized, but config.json does not say so; {_MISMATCH}"
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
    entries, converted = _entries_by_model_name(model, files)
    for name in selected:
        key = f"{name}.weight"
        placeholder = model.get_submodule(name)._parameters.get("weight")
        entry = entries.get(key)
        if entry is None or placeholder is None or key in converted:
            continue
        if entry.shape != tuple(placeholder.shape):
            raise LowbitError(
                f"{entry.file}: tensor {entry.name!r} is {list(entry.shape)}, but the model has a "
                f"{list(placeholder.shape)} weight there; {_MISMATCH}"
            )


def _entries_by_model_name(
    model: PreTrainedModel, files: Sequence[Path]
) -> tuple[dict[str, TensorEntry], set[str]]:
    """Returns the model's name -> header entry, and the names that are made of several tensors."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    entries: dict[str, TensorEntry] = {}
    converted: set[str] = set()
    for file in files:
        for entry in read_header(file):
            key, pattern = rename_source_key(
                entry.name, renamings, converters, model.base_model_prefix, state
            )
            key = entry.name if key not in state and entry.name in state else key
            entries[key] = entry
            if pattern is not None:
                converted.add(key)
    return entries, converted
