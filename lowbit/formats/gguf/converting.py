"""One tensor of a source as the bytes of a GGUF file, checked by reading them again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.algorithms.base import Statistics
from lowbit.errors import LowbitError
from lowbit.formats.gguf.blocks import decode_rows
from lowbit.formats.gguf.layout import Gguf
from lowbit.formats.gguf.packing import float_rows, pack_q4_1
from lowbit.formats.gguf.plan import EXACT, FLOAT, GgufPlan, WrittenTensor
from lowbit.formats.gguf.search import quantize_rows
from lowbit.formats.reading import read_module
from lowbit.formats.regrid import regrid, requantized
from lowbit.pipeline.stored_statistics import StoredStatistics
from lowbit.quant import QuantizedWeight

# Types of which a scheme has every value.
_SCHEMES = ("Q4_0", "Q4_1", "Q8_0")


class Converter:
    """Makes the tensors of a plan.

    Args:
        plan: of the file.
        requantize: codes may change where values cannot be kept.
        statistics: of the source, for GPTQ; None rounds to nearest.
        device: where codes are searched.
    """

    def __init__(
        self,
        plan: GgufPlan,
        requantize: bool,
        statistics: StoredStatistics | None,
        device: torch.device,
    ) -> None:
        self.plan, self.requantize, self.device = plan, requantize, device
        self.statistics = None if statistics is None else _Measured(statistics, device)

    def rows(self, tensor: WrittenTensor) -> tuple[Tensor, dict[str, Any] | None]:
        """Returns a tensor as it is in the file, and what is to be said of it.

        Returns:
            uint8 `[rows, bytes]`, and for weights that were quantized, or are now, `type`, `exact`
            and what else is known (`relative_error`, `algorithm`); None for floats that stay.

        Raises:
            LowbitError: for values that the type does not have, unless codes may change.
        """
        report: dict[str, Any] | None
        if tensor.module is not None:
            raw, report = self._of_module(tensor, tensor.module)
        else:
            assert tensor.entry is not None
            raw, report = self._of_floats(tensor, tensor.entry.read())
        if tensor.heads:
            raw = raw.unflatten(0, (tensor.heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        return raw.contiguous(), report

    def _of_floats(
        self, tensor: WrittenTensor, values: Tensor
    ) -> tuple[Tensor, dict[str, Any] | None]:
        if tensor.kind.dtype is not None:
            if values.ndim == 1:
                # A vector whose parts are moved has one row for each number.
                values = values[:, None] if tensor.heads else values[None]
            return float_rows(values, tensor.kind), None
        module = tensor.hub_name.removesuffix(".weight")
        measured = None if self.statistics is None else self.statistics.of(module)
        raw, report = quantize_rows(values.to(self.device), tensor.kind, measured)
        return raw.cpu(), {"type": tensor.kind.name, "exact": False, **report}

    def _of_module(self, tensor: WrittenTensor, module: str) -> tuple[Tensor, dict[str, Any]]:
        plan, stored, kind = self.plan, self.plan.modules[module], tensor.kind
        weight = read_module(plan.checkpoint, plan.source, module, stored)
        if tensor.how == EXACT:
            return self._kept(tensor, weight)
        order = stored.input_order
        said = {"type": kind.name, "from": str(stored.scheme)}
        if kind.scheme is not None and kind.name in _SCHEMES:
            held, error = requantized(weight, kind.scheme, order)
            raw, rounding = self._packed(tensor, held)
            error = error or rounding
            return raw, {**said, "exact": error == 0.0, "relative_error": error}
        values = weight.dequantize()
        if order is not None:
            values = values[:, torch.argsort(order)]
        if tensor.how == FLOAT:
            raw = float_rows(values, kind)
            return raw, {**said, "exact": False, "relative_error": _error(raw, tensor, values)}
        raw, report = quantize_rows(values.to(self.device), kind, None)
        return raw.cpu(), {**said, "exact": False, **report}

    def _kept(
        self, tensor: WrittenTensor, weight: QuantizedWeight
    ) -> tuple[Tensor, dict[str, Any]]:
        """Returns the blocks of the source's own codes."""
        scheme = tensor.kind.scheme
        assert scheme is not None
        held, error = regrid(weight, scheme), 0.0
        if held is None:
            if not self.requantize:
                raise LowbitError(
                    f"{self.plan.checkpoint.path}: scales of {tensor.kind.name} are fp16, which do "
                    f"not hold those of {tensor.module} ({weight.scheme}) exactly; --requantize "
                    f"rounds to {scheme}"
                )
            held, error = requantized(weight, scheme)
        raw, rounding = self._packed(tensor, held)
        error = error or rounding
        said = {"type": tensor.kind.name, "from": str(weight.scheme), "exact": error == 0.0}
        return raw, {**said, "relative_error": error}

    def _packed(self, tensor: WrittenTensor, held: QuantizedWeight) -> tuple[Tensor, float]:
        """Returns the blocks of a weight, read again and compared, and their relative error.

        That is zero unless minima of Q4_1 had to be rounded to fp16.
        """
        grid, name = held.grid(), tensor.module or tensor.name
        values = held.dequantize()
        if grid.zeros is not None and self.requantize:
            minima = (grid.scales * (grid.zeros + 8)).half().float()
            raw = pack_q4_1(held.codes().short() + 8, grid.scales, minima)
            return raw, _error(raw, tensor, values)
        try:
            (raw,) = Gguf().tensors(name, held).values()
        except LowbitError as error:
            raise LowbitError(
                f"{self.plan.checkpoint.path}: {error}; --requantize rounds such minima and keeps "
                "the codes"
            ) from None
        if not torch.equal(decode_rows(raw, tensor.kind, torch.float32), values):
            raise AssertionError(f"{name}: gguf does not decode to what was written")
        return raw, 0.0


class _Measured:
    """Statistics by layer; the last ones are kept, for layers with the same input."""

    def __init__(self, stored: StoredStatistics, device: torch.device) -> None:
        self._stored, self._device = stored, device
        self._members = {
            member: (part, tuple(group["members"]))
            for part, content in stored.manifest["parts"].items()
            for group in content["modules"].values()
            for member in group["members"]
        }
        self._last: tuple[tuple[str, ...], Statistics | None] = ((), None)

    def of(self, module: str) -> Statistics | None:
        """Returns the statistics of a layer's inputs, None if nothing ever reached it."""
        if module not in self._members:
            return None
        part, members = self._members[module]
        if self._last[0] != members:
            self._last = ((), None)  # as large as the next one
            for found, statistics in self._stored.groups(part, list(members), self._device):
                if module in found:
                    self._last = (members, statistics)
        return self._last[1]


def _error(raw: Tensor, tensor: WrittenTensor, values: Tensor) -> float:
    """Returns how far the blocks `raw` are from `values`, as a share of their norm."""
    decoded = decode_rows(raw, tensor.kind, torch.float32)
    error = torch.linalg.vector_norm(decoded - values)
    return float(error / torch.linalg.vector_norm(values).clamp_min(1e-30))
