"""A stored weight in fragment order, for the Triton kernels. It imports them; import it late.

The kernels know neither schemes nor `QuantizedWeight`; here the one becomes the other and back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lowbit_kernels.format import SCALE_BLOCK, decode_scales
from lowbit_kernels.gpu import matmul
from lowbit_kernels.gpu.weight import STRIP, FragmentWeight, concatenate
from torch import Tensor

from lowbit.backends.base import Joined, PreparedWeight
from lowbit.backends.formats import format_of, signed, unsigned
from lowbit.quant import Grid, QuantizedWeight, pack, unpack
from lowbit.scheme import Scheme

_TENSORS = (
    "words",
    "plane",
    "scale",
    "zero",
    "counters",
    "table",
    "scale_offset",
    "scale_step",
    "scale_codes",
)
# Rows packed at once when going back: packing makes a few int32 copies of what it packs.
_ROWS_PER_STEP = 4096

_library = torch.library.Library("lowbit", "FRAGMENT")
_library.define(
    "fragment_rows(Tensor rows, Tensor words, Tensor? plane, Tensor scale, Tensor? zero, "
    "Tensor? scale_offset, Tensor? scale_step, str scheme, int out_features, int in_features, "
    "ScalarType dtype) -> Tensor"
)


class FragmentPrepared(PreparedWeight):
    """A `FragmentWeight` that remembers its scheme.

    Args:
        scheme: how the weight is stored in a checkpoint.
        weight: the tensors that the kernels read.
    """

    backend = "triton"

    def __init__(self, scheme: Scheme, weight: FragmentWeight) -> None:
        self.scheme, self.weight = scheme, weight
        self.shape = weight.out_features, weight.in_features

    @staticmethod
    def of(qweight: QuantizedWeight) -> FragmentPrepared:
        """Returns `qweight` in fragment order, on its device."""
        scheme = qweight.scheme
        zero = None
        if qweight.zero_point is not None:
            signed = unpack(qweight.zero_point.T, scheme.bits, qweight.shape[0]).T
            zero = unsigned(signed, scheme)
        weight = FragmentWeight.from_codes(
            format_of(scheme),
            unsigned(qweight.codes(), scheme),
            qweight.scale,
            zero,
            qweight.scale_offset,
            qweight.scale_step,
        )
        return FragmentPrepared(scheme, weight)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors by the names of the fields of `FragmentWeight`."""
        named = {name: getattr(self.weight, name) for name in _TENSORS}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> FragmentPrepared:
        """Returns the same weight over `tensors`."""
        weight = FragmentWeight(
            format=self.weight.format,
            out_features=self.weight.out_features,
            in_features=self.weight.in_features,
            words=tensors["words"],
            plane=tensors.get("plane"),
            scale=tensors["scale"],
            zero=tensors.get("zero"),
            counters=tensors["counters"],
            table=tensors.get("table"),
            scale_offset=tensors.get("scale_offset"),
            scale_step=tensors.get("scale_step"),
            scale_codes=tensors.get("scale_codes"),
        )
        return FragmentPrepared(self.scheme, weight)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Returns `x w^T + bias`, `[..., N]` in x's dtype."""
        return matmul.linear(x, self.weight, bias)

    def grad_input(self, grad: Tensor) -> Tensor:
        """Returns `grad w`, `[..., K]` in grad's dtype."""
        return matmul.grad_input(grad, self.weight)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight `[N, K]` in `dtype`."""
        if dtype == torch.float64:  # not a dtype of the kernels; float32 is exact
            return matmul.dequantize(self.weight, torch.float32).double()
        return matmul.dequantize(self.weight, dtype)

    def dequantize_rows(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the weights of `rows` (int64 `[n]`), `[n, K]` in `dtype`."""
        held = self.weight
        result: Tensor = torch.ops.lowbit.fragment_rows(
            rows,
            held.words,
            held.plane,
            held.scale,
            held.zero,
            held.scale_offset,
            held.scale_step,
            str(self.scheme),
            *self.shape,
            dtype,
        )
        return result

    def canonical(self) -> QuantizedWeight:
        """Returns the tensors that the weight was prepared from, bit for bit."""
        held, bits = self.weight, self.scheme.bits
        rows = torch.arange(held.out_features, device=held.words.device).split(_ROWS_PER_STEP)
        packed = torch.cat([pack(signed(held.codes(part), self.scheme), bits) for part in rows])
        zero_point = None
        if held.zero is not None:
            zeros = signed(held.group_values(held.zero).clone(), self.scheme)
            zero_point = pack(zeros.T, bits).T.contiguous()
        scale = held.scale if held.scale_codes is None else held.scale_codes
        return QuantizedWeight(
            scheme=self.scheme,
            in_features=held.in_features,
            packed=packed,
            scale=held.group_values(scale).clone(),  # one group per row is no copy yet
            zero_point=zero_point,
            scale_offset=held.scale_offset,
            scale_step=held.scale_step,
        )

    def for_mode(self, training: bool) -> FragmentPrepared:
        """Returns the weight with coded scales for training, with decoded ones for inference."""
        held = self.weight
        changed = held.with_coded_scales() if training else held.with_decoded_scales()
        if changed.zero is not None and changed.zero.stride(0) != changed.scale.stride(0):
            # A part of a joined weight: its codes kept their stride, and kernels know one stride.
            changed = dataclasses.replace(changed, zero=changed.zero.contiguous())
        return self if changed is held else FragmentPrepared(self.scheme, changed)

    def join(self, others: Sequence[PreparedWeight]) -> Joined | None:
        """Returns all rows as one weight; None for another format or width, or coded scales."""
        parts = [part for part in (self, *others) if isinstance(part, FragmentPrepared)]
        held = [part.weight for part in parts]
        kinds = {(weight.format, weight.in_features, weight.scale.dtype) for weight in held}
        if len(parts) <= len(others) or len(kinds) > 1 or held[0].scale.dtype == torch.uint8:
            return None
        whole, start = concatenate(held), 0
        starts, views = [], []
        for part in parts:
            stop = start + part.weight.padded_rows
            views.append(FragmentPrepared(part.scheme, _over(part.weight, whole, start, stop)))
            starts.append(start)
            start = stop
        return Joined(FragmentPrepared(self.scheme, whole), tuple(views), tuple(starts))


def _over(part: FragmentWeight, whole: FragmentWeight, start: int, stop: int) -> FragmentWeight:
    """Returns `part` over the memory of the rows `start` to `stop` of `whole`.

    It keeps what counts from its own first row, the codes of its scales, and its own counters.
    """
    strips = slice(start // STRIP, stop // STRIP)
    return dataclasses.replace(
        part,
        words=whole.words[strips],
        plane=None if whole.plane is None else whole.plane[strips],
        scale=whole.scale[:, start:stop],
        zero=None if whole.zero is None else whole.zero[:, start:stop],
        table=whole.table,
    )


def _fragment_rows(rows: Tensor, *arguments: Any) -> Tensor:
    words, plane, scale, zero, offset, step, text, out_features, in_features, dtype = arguments
    scheme = Scheme.parse(text)
    form, groups = format_of(scheme), scale.shape[0]
    counters = words.new_empty(0)  # for kernels; none is launched
    held = FragmentWeight(form, out_features, in_features, words, plane, scale, zero, counters)
    scales, zeros = held.group_values(scale, rows), None
    if scale.dtype == torch.uint8:
        place = rows[:, None] * groups + torch.arange(groups, device=rows.device)
        block = place // SCALE_BLOCK
        scales = decode_scales(scales, offset[block], step[block], form)
    if zero is not None:
        zeros = signed(held.group_values(zero, rows), scheme).float()
    grid = Grid(scheme, in_features, scales.float(), zeros)
    return grid.dequantize(signed(held.codes(rows), scheme)).to(dtype)


def _fragment_rows_fake(rows: Tensor, words: Tensor, *arguments: Any) -> Tensor:
    return words.new_empty((*rows.shape, arguments[-2]), dtype=arguments[-1])


_library.impl("fragment_rows", _fragment_rows, "CompositeExplicitAutograd")
torch.library.register_fake("lowbit::fragment_rows", _fragment_rows_fake, lib=_library)
