"""What the model of a checkpoint makes of the names in its files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from lowbit.checkpoint import Checkpoint
from lowbit.models.layers import find_decoder_layers
from lowbit.models.selection import MIN_OUT_FEATURES, fused_experts
from lowbit.models.streaming import meta_model
from lowbit.nn.replace import module_name, weight_is_transposed, weight_shape

LINEAR, CONV1D, EMBEDDING, OTHER = "linear layer", "Conv1D", "embedding", "other module"


@dataclass(frozen=True)
class ModuleView:
    """One module.

    Args:
        name: in the model; that of the file may be an older one.
        kind: LINEAR, CONV1D, EMBEDDING or OTHER.
        shape: (out_features, in_features), None for OTHER.
    """

    name: str
    kind: str
    shape: tuple[int, int] | None


class ModelView:
    """The model that `config.json` describes, without weights.

    Args:
        checkpoint: of any layout.
        dtype: of the model.

    Raises:
        LowbitError: if the config names no known model.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype = torch.bfloat16) -> None:
        self.model: PreTrainedModel = meta_model(checkpoint, dtype)
        self.head = module_name(self.model, self.model.get_output_embeddings())
        self.embedding = module_name(self.model, self.model.get_input_embeddings())
        mapping = get_model_conversion_mapping(self.model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._state = self.model.state_dict()
        self._modules = dict(self.model.named_modules())

    def module(self, name: str) -> ModuleView:
        """Returns what a module of the files is in the model."""
        key = f"{name}.weight"
        target, converter = rename_source_key(
            key, self._renamings, self._converters, self.model.base_model_prefix, self._state
        )
        target = key if target not in self._state and key in self._state else target
        found = target.removesuffix(".weight")
        module = self._modules.get(found)
        kind = OTHER if converter is not None else _kind(module)
        shape = None if kind == OTHER or module is None else weight_shape(module)
        return ModuleView(found, kind, shape)

    def plain_linears(self, quantized: Iterable[str]) -> list[str]:
        """Returns the linear layers of the blocks that are not `quantized` (names of the model)."""
        layers, _ = find_decoder_layers(self.model)
        known = set(quantized)
        return [
            name
            for name, module in self._modules.items()
            if name.startswith(f"{layers}.")
            and name not in known
            and _kind(module) in (LINEAR, CONV1D)
            and weight_shape(module)[0] >= MIN_OUT_FEATURES
        ]

    def experts(self) -> list[str]:
        """Returns what holds the fused experts of a layer, which are never quantized."""
        return list(fused_experts(self.model, find_decoder_layers(self.model)[0]))


def _kind(module: nn.Module | None) -> str:
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    if module is not None and weight_is_transposed(module):
        return CONV1D
    return LINEAR if type(module) is nn.Linear else OTHER
