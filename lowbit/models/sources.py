"""Which tensors of a checkpoint become which parameter of a model, and whether they fit.

transformers renames tensors on loading (old names, prefixes) and builds some parameters out of
several (experts). Both are its own tables, so a checkpoint is read here as `from_pretrained` reads
it; unlike there, a tensor that finds no place is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from lowbit.checkpoint import Checkpoint, TensorEntry
from lowbit.errors import LowbitError

# Saved once, recomputed today; old checkpoints of GPT-NeoX and Llama still hold them.
BUFFERS_OF_OLD_VERSIONS = (r"rotary_emb\.inv_freq$", r"\.(attn|attention)\.(masked_)?bias$")
MISMATCH = "config.json and the weights do not belong together"


@dataclass(frozen=True)
class Source:
    """What a parameter is made of.

    Args:
        entries: the tensors of the checkpoint, one unless `converted`.
        converted: transformers computes the parameter from them; otherwise it is the tensor.
    """

    entries: tuple[TensorEntry, ...]
    converted: bool


def map_sources(model: PreTrainedModel, entries: Iterable[TensorEntry]) -> dict[str, Source]:
    """Returns the model's name for each tensor -> its source, names that it lacks included."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    found: dict[str, Source] = {}
    for entry in entries:
        target, converter = rename_source_key(
            entry.name, renamings, converters, model.base_model_prefix, state
        )
        target = entry.name if target not in state and entry.name in state else target
        before = found.get(target, Source((), False))
        found[target] = Source((*before.entries, entry), before.converted or converter is not None)
    return found


def parameter_sources(
    model: PreTrainedModel, checkpoint: Checkpoint
) -> tuple[dict[str, Source], list[str]]:
    """Returns the source of every parameter of `model`, and the tensors that nothing needs.

    A tied parameter has no source of its own: the one it is tied to has.

    Raises:
        LowbitError: naming a tensor that is missing, has no place, or has another shape or kind of
            dtype than the model.
    """
    found = map_sources(model, checkpoint.entries.values())
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    for copy, original in tied.items():
        _settle_tie(found, copy, original, checkpoint)
    state = model.state_dict()
    missing = [name for name in state if name not in found and name not in tied]
    if missing:
        raise LowbitError(
            f"{checkpoint.path}: tensor {missing[0]!r} is missing ({len(missing)} in all); "
            f"{MISMATCH}"
        )
    known = {name: source for name, source in found.items() if name in state and name not in tied}
    for name, source in known.items():
        _check_fit(checkpoint, source, state[name])
    strange = {name: s for name, s in found.items() if name not in known and name not in tied}
    _require_harmless(model, checkpoint, strange)
    ignored = [e.name for name, s in found.items() if name not in known for e in s.entries]
    return known, sorted(ignored)


def require_shapes(
    model: PreTrainedModel, checkpoint: Checkpoint, quantized: Iterable[str] = ()
) -> None:
    """Refuses a checkpoint that lacks a parameter, or has one of another shape.

    transformers makes up what is missing, in the size that config.json says, before it tells; so
    this is asked first, and no more is allocated than there are weights.

    Args:
        model: on meta, its modules not quantized yet.
        checkpoint: whose tensors it is to get.
        quantized: names in the model of modules, or of parameters, that are stored otherwise.

    Raises:
        LowbitError: naming the first tensor.
    """
    found = map_sources(model, checkpoint.entries.values())
    other = {*quantized, *(f"{name}.weight" for name in quantized)}
    other |= dict(getattr(model, "all_tied_weights_keys", None) or {}).keys()
    optional = [re.compile(p) for p in model._keys_to_ignore_on_load_missing or ()]
    for name, parameter in model.state_dict().items():
        source = found.get(name)
        if name in other or (source is None and any(p.search(name) for p in optional)):
            continue
        if source is None:
            raise LowbitError(f"{checkpoint.path}: tensor {name!r} is missing; {MISMATCH}")
        held = sum(math.prod(entry.shape) for entry in source.entries)
        entry = source.entries[0]
        if source.converted and held < parameter.numel():
            raise LowbitError(
                f"{checkpoint.path}: tensors like {entry.name!r} have {held} weights, but "
                f"config.json needs {parameter.numel()}; {MISMATCH}"
            )
        if not source.converted and entry.shape != tuple(parameter.shape):
            raise LowbitError(_other_shape(checkpoint, entry, parameter))


def _other_shape(checkpoint: Checkpoint, entry: TensorEntry, parameter: torch.Tensor) -> str:
    return (
        f"{checkpoint.path}: tensor {entry.name!r} has the shape {list(entry.shape)}, but "
        f"config.json needs {list(parameter.shape)}; {MISMATCH}"
    )


def _settle_tie(found: dict[str, Source], copy: str, original: str, checkpoint: Checkpoint) -> None:
    """Accepts a checkpoint that stores a tied weight under either name, or twice alike."""
    if copy not in found:
        return
    if original not in found:
        found[original] = found.pop(copy)
        return
    values = [found[name].entries[0].read() for name in (copy, original)]
    if not torch.equal(values[0], values[1]):
        raise LowbitError(
            f"{checkpoint.path}: config.json ties {copy!r} to {original!r}, but their values "
            'differ; set "tie_word_embeddings": false in config.json'
        )


def _check_fit(checkpoint: Checkpoint, source: Source, parameter: torch.Tensor) -> None:
    entry = source.entries[0]
    if parameter.is_floating_point() != entry.dtype.is_floating_point:
        raise LowbitError(
            f"{checkpoint.path}: tensor {entry.name!r} is {entry.dtype}, but the model needs "
            "floats; weights that another tool quantized cannot be quantized again"
        )
    if not source.converted and entry.shape != tuple(parameter.shape):
        raise LowbitError(_other_shape(checkpoint, entry, parameter))


def _require_harmless(
    model: PreTrainedModel, checkpoint: Checkpoint, strange: dict[str, Source]
) -> None:
    """Refuses tensors that the model does not know: to leave them out would be silent damage."""
    own = model._keys_to_ignore_on_load_unexpected or ()
    harmless = [re.compile(pattern) for pattern in (*own, *BUFFERS_OF_OLD_VERSIONS)]
    names = [e.name for source in strange.values() for e in source.entries]
    unknown = [name for name in names if not any(p.search(name) for p in harmless)]
    if unknown:
        raise LowbitError(
            f"{checkpoint.path}: the {type(model).__name__} of config.json has no place for tensor "
            f"{unknown[0]!r} ({len(unknown)} in all); {MISMATCH}"
        )
