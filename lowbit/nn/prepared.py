"""Preparing a model: every quantized weight in the order that the kernels of its device read."""

from __future__ import annotations

from collections import Counter

from torch import nn

from lowbit.backends import PreparedWeight
from lowbit.memory import release_freed_memory
from lowbit.nn.siblings import fuse_siblings
from lowbit.nn.stored import StoredWeight


def prepare_model(model: nn.Module, activations: str | None = None) -> int:
    """Rearranges the quantized weights of `model` for the backends that run them.

    `from_pretrained` calls this, and moving a model to another type of device prepares it for that;
    only modules put together by hand need it. One module is rearranged after the other, so the peak
    is one weight above what the model takes. Offloaded modules, and devices whose backend reads the
    canonical tensors, are left as they are. Layers that see the same activations run as one launch
    while a model generates, see `nn/siblings.py`. Call it again at any time.

    Args:
        model: changed in place.
        activations: "int8" rounds activations to 8 bits while multiplying, which is faster for
            several tokens and loses accuracy: measure it (`lowbit eval --activations int8`).
            "float" goes back; None leaves it as it is. For native CPU kernels only; it is not
            stored with the model.

    Returns:
        How many modules hold a prepared weight.

    Raises:
        LowbitError: for `activations` that the kernels here do not have.
    """
    stored = [module for module in model.modules() if isinstance(module, StoredWeight)]
    if activations is not None:
        for module in stored:
            if module.multiplies:
                module.round_activations(activations)
    prepared = 0
    for module in stored:
        if module.prepare():
            prepared += 1
            release_freed_memory()
    fuse_siblings(model)
    release_freed_memory()
    return prepared


def kernels_of(model: nn.Module) -> dict[str, int]:
    """Returns what multiplies by the quantized weights of `model` -> how many weights."""
    held = [
        module.operand
        for module in model.modules()
        if isinstance(module, StoredWeight) and module.multiplies and module._names()
    ]
    return dict(Counter(w.kernels if isinstance(w, PreparedWeight) else "dequantize" for w in held))
