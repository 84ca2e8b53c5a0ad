"""A stored weight in strips, for the native CPU kernels.

The kernels know neither schemes nor `QuantizedWeight`; here the one becomes the other and back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from lowbit_kernels.cpu import dispatch, matmul
from lowbit_kernels.cpu.library import library
from lowbit_kernels.cpu.weight import STRIP, StripWeight, concatenate, row_blocks
from torch import Tensor

from lowbit.backends.base import Joined, PreparedWeight
from lowbit.backends.formats import format_of, signed, unsigned
from lowbit.errors import unknown_name
from lowbit.quant import QuantizedWeight, pack, unpack
from lowbit.quant.packing import words_per_row
from lowbit.scheme import Scheme

# How kernels round activations, by what the scheme says of them.
_ROUNDING: dict[str | None, str] = {
    "int8": dispatch.INT8_TOKEN,
    "int8_static": dispatch.INT8_STATIC,
}
_TENSORS = ("codes", "high", "scale", "zero", "scale_codes", "scale_offset", "scale_step")


class StripPrepared(PreparedWeight):
    """A `StripWeight` that remembers its scheme.

    Args:
        scheme: how the weight is stored in a checkpoint.
        weight: the tensors that the kernels read.
        input_scale: float32 `[1]`, the scale of activations where the scheme has one for all.
        activations: "float" or "int8", for a scheme that leaves them as they are.
    """

    backend = "cpu"

    def __init__(
        self,
        scheme: Scheme,
        weight: StripWeight,
        input_scale: Tensor | None = None,
        activations: str = dispatch.FLOAT,
    ) -> None:
        self.scheme, self.weight, self.input_scale = scheme, weight, input_scale
        self.activations = activations
        self.shape = weight.out_features, weight.in_features

    @staticmethod
    def of(qweight: QuantizedWeight) -> StripPrepared:
        """Returns `qweight` in strips."""
        scheme, (rows, columns) = qweight.scheme, qweight.shape
        zero = None
        if qweight.zero_point is not None:
            zero = unsigned(unpack(qweight.zero_point.T, scheme.bits, rows).T, scheme)
        weight = StripWeight.from_codes(
            format_of(scheme),
            qweight.shape,
            lambda start, stop: unsigned(
                unpack(qweight.packed[start:stop], scheme.bits, columns), scheme
            ),
            qweight.scale,
            zero,
            qweight.scale_offset,
            qweight.scale_step,
        )
        return StripPrepared(scheme, weight, qweight.input_scale)

    @property
    def kernels(self) -> str:
        """The backend and the instruction set."""
        return f"{self.backend} ({library().isa_name})"

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors by the names of the fields of `StripWeight`."""
        named = {name: getattr(self.weight, name) for name in _TENSORS}
        named["input_scale"] = self.input_scale
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> StripPrepared:
        """Returns the same weight over `tensors`."""
        named = {name: tensors.get(name) for name in _TENSORS}
        weight = dataclasses.replace(self.weight, **named)  # type: ignore[arg-type]
        return self._with(weight, tensors.get("input_scale"))

    def with_activations(self, activations: str) -> StripPrepared:
        """Returns the same weight, multiplied by "float" or by "int8" activations."""
        if activations not in (dispatch.FLOAT, dispatch.INT8):
            raise unknown_name("activations", activations, (dispatch.FLOAT, dispatch.INT8))
        return StripPrepared(self.scheme, self.weight, self.input_scale, activations)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Returns `x w^T + bias`, `[..., N]` in x's dtype."""
        activations = _ROUNDING.get(self.scheme.activations, self.activations)
        return matmul.linear(x, self.weight, bias, activations, self.input_scale)

    def grad_input(self, grad: Tensor) -> Tensor:
        """Returns `grad w`, `[..., K]` in grad's dtype."""
        return matmul.grad_input(grad, self.weight)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight `[N, K]` in `dtype`."""
        if dtype == torch.float64:  # no dtype of the kernels; float32 is exact
            return matmul.dequantize(self.weight, torch.float32).double()
        return matmul.dequantize(self.weight, dtype)

    def dequantize_rows(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the weights of `rows` (int64 `[n]`), `[n, K]` in `dtype`."""
        if dtype == torch.float64:
            return matmul.dequantize_rows(rows, self.weight, torch.float32).double()
        return matmul.dequantize_rows(rows, self.weight, dtype)

    def canonical(self) -> QuantizedWeight:
        """Returns the tensors that the weight was prepared from, bit for bit."""
        held, bits, (rows, columns) = self.weight, self.scheme.bits, self.shape
        packed = torch.empty(rows, words_per_row(columns, bits), dtype=torch.int32)
        for start, stop in row_blocks(rows, columns):
            packed[start:stop] = pack(signed(held.codes_of(start, stop), self.scheme), bits)
        zero_point = None
        if held.zero is not None:
            zeros = signed(held.group_values(held.zero), self.scheme)
            zero_point = pack(zeros.T, bits).T.contiguous()
        scale = held.group_values(held.scale) if held.scale_codes is None else held.scale_codes
        return QuantizedWeight(
            scheme=self.scheme,
            in_features=columns,
            packed=packed,
            scale=scale,
            zero_point=zero_point,
            scale_offset=held.scale_offset,
            scale_step=held.scale_step,
            input_scale=self.input_scale,
        )

    def join(self, others: Sequence[PreparedWeight]) -> Joined | None:
        """Returns all rows as one weight; None for another format, width or activations."""
        parts = [part for part in (self, *others) if isinstance(part, StripPrepared)]
        held = [part.weight for part in parts]
        kinds = {(part.weight.format, part.shape[1], part._rounding) for part in parts}
        if len(parts) <= len(others) or len(kinds) > 1:
            return None
        whole, start = concatenate(held), 0
        starts, views = [], []
        for part in parts:
            stop = start + part.weight.strips
            views.append(part._over(whole.strip_range(start, stop)))
            starts.append(start * STRIP)
            start = stop
        return Joined(self._with(whole, self.input_scale), tuple(views), tuple(starts))

    def _over(self, view: StripWeight) -> StripPrepared:
        """Returns the weight over the memory of `view`; what only a checkpoint needs is kept."""
        weight = dataclasses.replace(
            self.weight, codes=view.codes, high=view.high, scale=view.scale, zero=view.zero
        )
        return self._with(weight, self.input_scale)

    def _with(self, weight: StripWeight, input_scale: Tensor | None) -> StripPrepared:
        return StripPrepared(self.scheme, weight, input_scale, self.activations)

    @property
    def _rounding(self) -> tuple[str | None, str, float | None]:
        """What happens to activations: the same for all parts of a joined weight."""
        scale = None if self.input_scale is None else float(self.input_scale)
        return self.scheme.activations, self.activations, scale
