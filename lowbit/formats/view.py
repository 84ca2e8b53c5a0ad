"""A checkpoint in any layout, seen as one of ours: our names, tensors made when they are read.

What works on checkpoints of ours (merging, counting, forecasts) works on such a view, and knows of
no other layout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lowbit.checkpoint import Checkpoint, TensorEntry
from lowbit.checkpoint.computed import ComputedEntry
from lowbit.formats.own import Bf16, Lowbit
from lowbit.formats.plan import ConversionPlan, plan_conversion
from lowbit.formats.reading import open_checkpoint, read_module
from lowbit.formats.table import layout_of


class OwnView(Checkpoint):
    """A foreign checkpoint under our names. Construct it with `open_as_own`.

    Attributes:
        base: the checkpoint as it is on disk.
    """

    def __init__(self, plan: ConversionPlan) -> None:
        self.base = plan.checkpoint
        quantization = plan.target.config(plan.written)
        dropped = ("quantization_config", "compression_config")
        config = {key: value for key, value in self.base.config.items() if key not in dropped}
        super().__init__(
            self.base.path, {**config, "quantization_config": quantization}, _entries(plan)
        )

    def files(self) -> list[Path]:
        """Returns the files on disk."""
        return self.base.files()

    def verify(self, advance: Callable[[int], None] | None = None) -> dict[str, str]:
        """Returns file name -> SHA-256 of the files on disk, every weight read."""
        return self.base.verify(advance)

    def scan(
        self, advance: Callable[[int], None] | None = None, stop: bool = False
    ) -> tuple[dict[str, str], list[tuple[TensorEntry, str]]]:
        """Returns the same, and the tensors that hold NaN or Inf."""
        return self.base.scan(advance, stop)


def open_as_own(path: str | Path) -> Checkpoint:
    """Returns a checkpoint in any layout as one of ours; one in 16 bits as it is.

    Args:
        path: see `open_checkpoint`.

    Raises:
        LowbitError: it is damaged, or holds what no kernel here runs.
    """
    checkpoint = open_checkpoint(path)
    layout = layout_of(checkpoint)
    if isinstance(layout, (Lowbit, Bf16)) or not layout.modules(checkpoint):
        return checkpoint
    return OwnView(plan_conversion(checkpoint, Lowbit.name, requantize=False))


def _entries(plan: ConversionPlan) -> dict[str, TensorEntry]:
    """Returns name -> entry as a checkpoint of ours has them, in the order of the files."""
    owner = {tensor: name for name, stored in plan.modules.items() for tensor in stored.tensors}

    @functools.lru_cache(maxsize=1)  # the tensors of a module are asked for one after the other
    def tensors(module: str) -> Mapping[str, Tensor]:
        return read_module(plan.checkpoint, plan.source, module, plan.modules[module]).tensors()

    found: dict[str, TensorEntry] = {}
    seen: set[str] = set()
    for name, entry in plan.checkpoint.entries.items():
        module = owner.get(name)
        if module is None:
            found[name] = entry
        elif module not in seen:
            seen.add(module)
            found |= _own_entries(plan, module, entry.file, tensors)
    file = next(iter(plan.checkpoint.entries.values())).file
    for name, tensor in plan.target.markers(plan.written).items():
        found[name] = ComputedEntry.like(
            name, file, tensor.dtype, tuple(tensor.shape), tensor.clone
        )
    return found


def _own_entries(
    plan: ConversionPlan,
    module: str,
    file: Path,
    tensors: Callable[[str], Mapping[str, Tensor]],
) -> dict[str, TensorEntry]:
    """Returns our tensors of one module."""
    stored, own = plan.modules[module], plan.targets[module].view.name
    found: dict[str, TensorEntry] = {}
    for suffix, (shape, dtype) in stored.scheme.tensor_specs(stored.shape).items():

        def take(suffix: str = suffix) -> Tensor:
            # Shapes are read of every module before anything is decoded.
            if suffix == "weight_shape":
                return torch.tensor(stored.shape, dtype=torch.int64)
            return tensors(module)[suffix]

        found[f"{own}.{suffix}"] = ComputedEntry.like(f"{own}.{suffix}", file, dtype, shape, take)
    return found
