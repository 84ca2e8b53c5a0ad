"""Where a decoder keeps its blocks."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from lowbit.errors import LowbitError


def find_decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Returns the dotted name of the list of decoder blocks, and the list.

    It is the `ModuleList` as long as the config's `num_hidden_layers` whose modules are of a class
    that the model must not split over devices; that class alone tells a vision tower of equal
    depth from the decoder.

    Raises:
        LowbitError: if the model has no such list.
    """
    depth = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 0)
    block_classes = set(model._no_split_modules or ())
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth > 0
    ]
    for name, layers in candidates:
        if type(layers[0]).__name__ in block_classes:
            return name, layers
    if not candidates:
        raise LowbitError(
            f"{type(model).__name__}: found no list of {depth} decoder blocks; only decoders whose "
            "blocks are one ModuleList can be quantized"
        )
    return candidates[0]
