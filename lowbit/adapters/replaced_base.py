"""A base whose stored weights are exchanged under its adapters, and written without them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from lowbit.adapters.layer import QuantLoraLinear
from lowbit.checkpoint.journal import refuse_occupied
from lowbit.errors import LowbitError
from lowbit.nn import QuantLinear
from lowbit.nn.linear import TiedQuantLinear
from lowbit.pipeline.output import side_files
from lowbit.quant import QuantizedWeight

_UNFINISHED = ".unfinished"


def require_replaceable(base: nn.Module, output: Path) -> None:
    """Refuses a base that cannot be written without its adapters, and an output in use.

    Raises:
        LowbitError: naming the module, or what is in the way.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    refuse_occupied(output, resume=False)
    for name, module in base.named_modules():
        if isinstance(module, QuantLoraLinear):
            if isinstance(module.quantized, TiedQuantLinear):
                raise LowbitError(
                    f"{name}: shares its weight with the embedding, which requantizing would "
                    "change as well; leave the head out of target_modules, or use 1 iteration"
                )
        elif isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            raise LowbitError(
                f"{name}: only low-bit layers may have adapters where the base is requantized; "
                "use 1 iteration"
            )


def replace_weight(layer: QuantLinear, weight: QuantizedWeight) -> None:
    """Exchanges the stored tensors of `layer`, which is prepared again if it was."""
    prepared, device = layer._prepared is not None, layer.qweight.device
    layer.restore()
    moved = {name: tensor.to(device) for name, tensor in weight.tensors().items()}
    layer._register_stored(moved)
    if prepared:
        layer.prepare()


def save_base(base: Any, output: Path, source: Path) -> None:
    """Writes the low-bit base to `output`, without adapters, with the side files of `source`.

    The folder gets its name when it is complete.
    """
    unfinished = output.with_name(output.name + _UNFINISHED)
    if unfinished.exists():
        shutil.rmtree(unfinished)
    with _without_adapters(base):
        base.save_pretrained(unfinished)
    for file in side_files(source):
        if not (unfinished / file.name).exists():
            shutil.copyfile(file, unfinished / file.name)
    if output.exists():
        output.rmdir()  # it is empty, see `require_replaceable`
    unfinished.rename(output)


@contextmanager
def _without_adapters(base: Any) -> Iterator[None]:
    """Puts the quantized layers in the place of the adapted ones for a while."""
    layers = {n: m for n, m in base.named_modules() if isinstance(m, QuantLoraLinear)}
    loaded = getattr(base, "_hf_peft_config_loaded", False)
    for name, layer in layers.items():
        base.set_submodule(name, layer.quantized)
    base._hf_peft_config_loaded = False
    try:
        yield
    finally:
        base._hf_peft_config_loaded = loaded
        for name, layer in layers.items():
            base.set_submodule(name, layer)
