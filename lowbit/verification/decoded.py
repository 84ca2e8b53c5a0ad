"""A quantized checkpoint as one of float32 weights, decoded when somebody asks for them.

Nothing of our modules or kernels is in here: layout -> codes and grid -> float32. As each weight
comes by, it is looked at: scales, padding, and the checksum of what was in memory when it was
written.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowbit.checkpoint import Checkpoint, TensorEntry
from lowbit.checkpoint.computed import ComputedEntry
from lowbit.checkpoint.journal import CHECKSUM
from lowbit.errors import LowbitError
from lowbit.formats.model_view import CONV1D, ModelView
from lowbit.formats.own import Lowbit
from lowbit.formats.reading import read_module
from lowbit.models.streaming import StreamedDecoder
from lowbit.quant import QuantizedWeight, weight_checksum
from lowbit.verification.stored import Subject

# What layouts call their tensors of scales.
SCALES = ("weight_scale", "scales", "absmax")
# Times a code of 8 bits less a zero point, still a float32. Looking at scales instead of weights
# takes as little as there are fewer of them.
LARGEST_SCALE = torch.finfo(torch.float32).max / 512
# Weights that go into a checksum at a time, so that they are still in the cache.
ROWS_WEIGHTS = 1 << 18


@dataclass
class Inspector:
    """Looks at every weight that is decoded.

    Args:
        subject: the checkpoint.
        bad_values: a sentence for each module with impossible values.
        changed: modules that decode to other weights than were written.
        seen: modules that were decoded.
        compared: how many of them were held against a checksum.
        input_scales: module -> its calibrated scale of activations.
    """

    subject: Subject
    bad_values: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    compared: int = 0
    input_scales: dict[str, Tensor] = field(default_factory=dict)

    def decoded(self, module: str) -> Tensor:
        """Returns the weight float32 `[out, in]`, its columns in the order of the activations.

        Raises:
            LowbitError: it cannot be read.
        """
        subject, stored = self.subject, self.subject.modules[module]
        first = module not in self.seen
        self.seen.add(module)
        try:
            qweight = read_module(subject.checkpoint, subject.layout, module, stored)
        except LowbitError as error:
            if first:
                self.bad_values.append(str(error))
            raise
        if qweight.input_scale is not None:
            self.input_scales[module] = qweight.input_scale
        weight = qweight.dequantize()
        if stored.input_order is not None:
            weight = weight[:, torch.argsort(stored.input_order)]
        if first:
            self._look_at(module, qweight, weight)
        return weight

    def look_at_the_rest(self) -> None:
        """Decodes what nobody asked for."""
        for module in self.subject.modules:
            if module not in self.seen:
                try:
                    self.decoded(module)
                except LowbitError:
                    continue  # it is noted

    def _look_at(self, module: str, qweight: QuantizedWeight, weight: Tensor) -> None:
        scales = qweight.grid().scales
        zero = bool((scales == 0).any()) or self._stores_zero(module)
        if not bool(torch.isfinite(scales).all()):
            self.bad_values.append(f"{module}: a scale is NaN or Inf")
        elif zero:
            self.bad_values.append(f"{module}: a scale is zero")
        elif float(scales.abs().max()) > LARGEST_SCALE:
            self.bad_values.append(f"{module}: a scale is so large that weights are Inf")
        if qweight.input_scale is not None and not bool(qweight.input_scale.item() > 0):
            self.bad_values.append(f"{module}: the scale of its activations is not positive")
        if isinstance(self.subject.layout, Lowbit) and not qweight.padding_is_zero():
            self.bad_values.append(f"{module}: bits are set beyond the last code of a row")
        report = self.subject.reports.get(module, {})
        if CHECKSUM in report:
            self.compared += 1
            rows = max(1, ROWS_WEIGHTS // weight.shape[1])
            same = weight_checksum(weight.split(rows)) == report[CHECKSUM]
            if qweight.input_scale is not None:
                same &= report.get("input_scale", qweight.input_scale.item()) == (
                    qweight.input_scale.item()
                )
            if not same:
                self.changed.append(module)

    def _stores_zero(self, module: str) -> bool:
        """Returns whether a scale is zero as it is stored.

        Other tools write that for groups of zeros, which readers know; we never do.
        """
        if self.subject.manifest is None:
            return False
        names = [name for name in self.subject.modules[module].tensors if name.endswith(SCALES)]
        entries = [self.subject.checkpoint.entries[name] for name in names]
        return any(e.dtype.is_floating_point and bool((e.read() == 0).any()) for e in entries)


class DecodedCheckpoint(Checkpoint):
    """The same checkpoint with `<module>.weight` in place of what each module stores.

    Args:
        subject: what is decoded.
        view: its model.
        inspector: reads the weights.
    """

    def __init__(self, subject: Subject, view: ModelView, inspector: Inspector) -> None:
        checkpoint = subject.checkpoint
        owner = {t: name for name, stored in subject.modules.items() for t in stored.tensors}
        entries: dict[str, TensorEntry] = {}
        for name, entry in checkpoint.entries.items():
            module = owner.get(name)
            if module is not None:
                weight = f"{module}.weight"
                if weight not in entries:
                    entries[weight] = _entry(subject, view, inspector, module, entry)
            elif all(entry.shape) or not isinstance(subject.layout, Lowbit):
                # A tensor of no elements is the mark of our own checkpoints.
                entries[name] = entry
        config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
        super().__init__(checkpoint.path, config, entries)


class DecodedDecoder(StreamedDecoder):
    """The decoded checkpoint in the stock layers of the model that `view` has made already."""

    def __init__(self, decoded: DecodedCheckpoint, view: ModelView, device: torch.device) -> None:
        self._view = view
        super().__init__(decoded, torch.float32, device)

    def _empty_model(self) -> PreTrainedModel:
        return self._view.model


def _entry(
    subject: Subject, view: ModelView, inspector: Inspector, module: str, first: TensorEntry
) -> ComputedEntry:
    shape = subject.modules[module].shape
    compute = functools.partial(inspector.decoded, module)
    if view.module(module).kind == CONV1D:
        shape = (shape[1], shape[0])
        compute = functools.partial(_transposed, compute)
    return ComputedEntry.like(f"{module}.weight", first.file, torch.float32, shape, compute)


def _transposed(compute: functools.partial[Tensor]) -> Tensor:
    return compute().T.contiguous()
