"""`from_pretrained`, one piece of the model at a time.

The Hugging Face quantizer puts our modules into a meta model and holds the headers of the files
against it, transformers' own loader places the tensors, and what is loaded is prepared for the
kernels of the device; as when a whole model is loaded, but a block is freed before the next.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.checkpoint import Checkpoint, TensorEntry
from lowbit.checkpoint.computed import ComputedEntry
from lowbit.errors import LowbitError
from lowbit.formats.own import Bf16, Lowbit
from lowbit.formats.plan import ConversionPlan, plan_conversion
from lowbit.formats.reading import read_module
from lowbit.hf.config import LowbitConfig
from lowbit.hf.quantizer import LowbitHfQuantizer, restore_scale_dtypes
from lowbit.models.streaming import StreamedDecoder
from lowbit.nn.linear import TiedQuantLinear
from lowbit.nn.prepared import prepare_model
from lowbit.nn.stored import StoredWeight
from lowbit.verification.stored import Subject


class KernelDecoder(StreamedDecoder):
    """A quantized decoder on our kernels, whose pieces are loaded and freed on demand.

    Args:
        subject: a checkpoint of any layout with modules in it.
        dtype: dtype of computation.
        device: where loaded pieces live.

    Raises:
        LowbitError: the checkpoint cannot be run here, or headers and config disagree.
    """

    def __init__(self, subject: Subject, dtype: torch.dtype, device: torch.device) -> None:
        checkpoint, config = _as_ours(subject)
        files = checkpoint.files() if isinstance(subject.layout, Lowbit) else []
        self.hf_quantizer = LowbitHfQuantizer(config, pre_quantized=True)
        self._files = files
        super().__init__(checkpoint, dtype, device)

    def _empty_model(self) -> Any:
        model = super()._empty_model()
        quantizer = self.hf_quantizer
        quantizer._process_model_before_weight_loading(model, [str(f) for f in self._files])
        return model

    def load(self, targets: list[str]) -> None:
        """Gives the parameters `targets` their tensors, and prepares the modules they belong to."""
        super().load(targets)
        owners = {target.rpartition(".")[0] for target in targets}
        for name in owners:
            restore_scale_dtypes(self.model.get_submodule(name))
        for block in self._blocks(owners):
            prepare_model(block)

    def _blocks(self, owners: set[str]) -> list[nn.Module]:
        """Returns the modules to prepare: whole blocks, so that siblings are found, and others."""
        found: dict[str, nn.Module] = {}
        for owner in sorted(owners):
            index = owner.removeprefix(f"{self.layers_name}.").partition(".")[0]
            inside = owner.startswith(f"{self.layers_name}.")
            name = f"{self.layers_name}.{index}" if inside else owner
            found[name] = self.model.get_submodule(name)
        return list(found.values())

    def free(self, module: nn.Module) -> None:
        """Moves every parameter of `module` back to the meta device, and forgets kernels' order."""
        for part in module.modules():
            if isinstance(part, StoredWeight) and not isinstance(part, TiedQuantLinear):
                part.to("meta")
        super().free(module)


def _as_ours(subject: Subject) -> tuple[Checkpoint, LowbitConfig]:
    """Returns a checkpoint under our names, and the config that belongs to it."""
    checkpoint = subject.checkpoint
    if isinstance(subject.layout, Lowbit):
        quantization = checkpoint.config["quantization_config"]
        return checkpoint, LowbitConfig.from_dict(dict(quantization))
    if isinstance(subject.layout, Bf16):
        raise LowbitError("nothing is quantized")
    plan = plan_conversion(checkpoint, Lowbit.name, requantize=False)
    config = LowbitConfig.from_dict(plan.target.config(plan.written))
    return _Renamed(plan), config


class _Renamed(Checkpoint):
    """A checkpoint of another layout under the names that ours would have."""

    def __init__(self, plan: ConversionPlan) -> None:
        checkpoint = plan.checkpoint
        owned = {name for stored in plan.modules.values() for name in stored.tensors}
        entries: dict[str, TensorEntry] = {
            name: entry for name, entry in checkpoint.entries.items() if name not in owned
        }
        for module, stored in plan.modules.items():
            file = checkpoint.entries[stored.tensors[0]].file
            own = _Module(plan, module)
            for suffix, (size, dtype) in stored.scheme.tensor_specs(stored.shape).items():
                name = f"{plan.targets[module].view.name}.{suffix}"
                compute = functools.partial(own.tensor, suffix)
                entries[name] = ComputedEntry.like(name, file, dtype, size, compute)
        super().__init__(checkpoint.path, checkpoint.config, entries)


class _Module:
    """The tensors of one module, read together and given out one by one."""

    def __init__(self, plan: ConversionPlan, module: str) -> None:
        self._plan, self._module = plan, module
        self._tensors: dict[str, Tensor] = {}

    def tensor(self, suffix: str) -> Tensor:
        """Returns a tensor, and forgets it."""
        if suffix not in self._tensors:
            plan, stored = self._plan, self._plan.modules[self._module]
            read = read_module(plan.checkpoint, plan.source, self._module, stored)
            self._tensors = dict(read.tensors())
        return self._tensors.pop(suffix)
