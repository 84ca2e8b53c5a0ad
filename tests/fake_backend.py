"""A backend with an order of its own that runs on a CPU, for testing what holds prepared weights.

It stores codes as int8 `[in_features, padded rows]`, so that rows are columns, neighbours in a
joined weight, and views of it are strided. Each call of an operator is counted, as a launch.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit import backends
from lowbit.backends import Joined, PreparedWeight, Request
from lowbit.backends.dequantize import DequantizeBackend
from lowbit.quant import Grid, QuantizedWeight
from lowbit.quant.double_quant import DoubleQuantizedScales
from lowbit.scheme import Scheme

LAUNCHES: Counter[str] = Counter()
PADDING = 8

_library = torch.library.Library("lowbit_fake", "DEF")
_WEIGHT = (
    "Tensor codes, Tensor scale, Tensor? zero, Tensor? offset, Tensor? step, str scheme, int rows"
)
_library.define(f"linear(Tensor x, {_WEIGHT}, Tensor? bias) -> Tensor")
_library.define(f"grad_input(Tensor grad, {_WEIGHT}) -> Tensor")
_library.define(f"dequantize({_WEIGHT}, ScalarType dtype) -> Tensor")


def _decode(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    offset: Tensor | None,
    step: Tensor | None,
    text: str,
    rows: int,
) -> Tensor:
    scheme = Scheme.parse(text)
    scales = scale[:, :rows].T
    if scale.dtype == torch.uint8:
        assert offset is not None
        assert step is not None
        double = DoubleQuantizedScales(scales, offset, step, scheme.signed_scales)
        scales = double.decode(scheme.torch_scale_dtype)
    zeros = None if zero is None else zero[:, :rows].T.float()
    return Grid(scheme, codes.shape[0], scales.float(), zeros).dequantize(
        codes[:, :rows].T.contiguous()
    )


def _linear(x: Tensor, *arguments: Any) -> Tensor:
    LAUNCHES["linear"] += 1
    *weight, bias = arguments
    return F.linear(x, _decode(*weight).to(x.dtype), None if bias is None else bias.to(x.dtype))


def _grad_input(grad: Tensor, *weight: Any) -> Tensor:
    LAUNCHES["grad_input"] += 1
    return grad @ _decode(*weight).to(grad.dtype)


def _dequantize(*arguments: Any) -> Tensor:
    LAUNCHES["dequantize"] += 1
    return _decode(*arguments[:-1]).to(arguments[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors, scheme, rows, _bias = inputs
    ctx.save_for_backward(*tensors)
    ctx.rest = (scheme, rows)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = torch.ops.lowbit_fake.grad_input(grad, *ctx.saved_tensors, *ctx.rest)
    bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[8] else None
    return (grad_x, *[None] * 7, bias)


for _name, _kernel, _fake in (
    ("linear", _linear, lambda x, *rest: x.new_empty((*x.shape[:-1], rest[6]))),
    ("grad_input", _grad_input, lambda g, c, *_: g.new_empty((*g.shape[:-1], c.shape[0]))),
    (
        "dequantize",
        _dequantize,
        lambda c, *rest: c.new_empty((rest[5], c.shape[0]), dtype=rest[6]),
    ),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lowbit_fake::{_name}", _fake, lib=_library)
torch.library.register_autograd("lowbit_fake::linear", _backward, setup_context=_save, lib=_library)


class FakePrepared(PreparedWeight):
    """See the head of the file. `scale_codes` are kept beside decoded scales."""

    def __init__(
        self, backend: str, scheme: Scheme, shape: tuple[int, int], tensors: Mapping[str, Tensor]
    ) -> None:
        self.backend, self.scheme, self.shape = backend, scheme, shape
        self._tensors = dict(tensors)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self._tensors)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> FakePrepared:
        return FakePrepared(self.backend, self.scheme, self.shape, tensors)

    def _arguments(self) -> tuple[Any, ...]:
        names = ("codes", "scale", "zero", "offset", "step")
        tensors = (self._tensors.get(name) for name in names)
        return (*tensors, str(self.scheme), self.shape[0])

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.lowbit_fake.linear(x, *self._arguments(), bias)

    def grad_input(self, grad: Tensor) -> Tensor:
        return torch.ops.lowbit_fake.grad_input(grad, *self._arguments())

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return torch.ops.lowbit_fake.dequantize(*self._arguments(), dtype)

    def dequantize_rows(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        return self.dequantize(dtype)[rows]

    def canonical(self) -> QuantizedWeight:
        rows = self.shape[0]
        held = {
            name: t[:, :rows].T.contiguous() if t.dim() == 2 else t
            for name, t in self._tensors.items()
        }
        zeros = held["zero"].float() if "zero" in held else None
        scales, double = held["scale"], None
        if self.scheme.double_quant:
            codes = held.get("scale_codes", scales)
            double = DoubleQuantizedScales(
                codes, held["offset"], held["step"], self.scheme.signed_scales
            )
        grid = Grid(self.scheme, self.shape[1], scales, zeros, double)
        return QuantizedWeight.from_codes(held["codes"], grid)

    def for_mode(self, training: bool) -> FakePrepared:
        tensors = dict(self._tensors)
        if not self.scheme.double_quant or ("scale_codes" not in tensors) == training:
            return self
        if training:
            tensors["scale"] = tensors.pop("scale_codes")
            return self.with_tensors(tensors)
        codes = tensors["scale"]
        double = DoubleQuantizedScales(
            codes[:, : self.shape[0]].T,
            tensors["offset"],
            tensors["step"],
            self.scheme.signed_scales,
        )
        decoded = double.decode(self.scheme.torch_scale_dtype).to(self.scheme.torch_scale_dtype)
        padded = F.pad(decoded, (0, 0, 0, codes.shape[1] - self.shape[0]))
        return self.with_tensors({**tensors, "scale": padded.T.contiguous(), "scale_codes": codes})

    def join(self, others: Sequence[PreparedWeight]) -> Joined | None:
        parts = [self, *others]
        if self._tensors["scale"].dtype == torch.uint8:
            return None
        names = [name for name in ("codes", "scale", "zero") if name in self._tensors]
        whole = {name: torch.cat([p._tensors[name] for p in parts], 1) for name in names}
        sizes = [part._tensors["codes"].shape[1] for part in parts]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        views = [
            part.with_tensors(
                {
                    **part._tensors,
                    **{name: whole[name][:, start : start + size] for name in names},
                }
            )
            for part, start, size in zip(parts, starts, sizes, strict=True)
        ]
        weight = FakePrepared(self.backend, self.scheme, (sum(sizes), self.shape[1]), whole)
        weight.scheme = dataclasses.replace(self.scheme, double_quant=False)
        return Joined(weight, tuple(views), tuple(starts))


class FakeBackend(DequantizeBackend):
    """Runs prepared weights on the devices of type `device`, in every dtype but float64."""

    def __init__(self, name: str = "fake", device: str = "cpu") -> None:
        self.name, self.device = name, device
        self.prepared: list[tuple[int, int]] = []

    def refusal(self, request: Request) -> str | None:
        if request.device.type != self.device:
            return f"runs on {self.device} only"
        if request.dtype == torch.float64:
            return "no float64"
        return None if request.prepared else "the weight is not prepared"

    def prepare(self, qweight: QuantizedWeight) -> FakePrepared:
        rows, columns = qweight.shape
        self.prepared.append(qweight.shape)
        padding = -rows % PADDING
        zero = None if qweight.zero_point is None else qweight.grid().zeros
        tensors = {
            "codes": F.pad(qweight.codes(), (0, 0, 0, padding), value=1).T.contiguous(),
            "scale": F.pad(qweight.scale, (0, 0, 0, padding)).T.contiguous(),
        }
        if zero is not None:
            tensors["zero"] = F.pad(zero.to(torch.int8), (0, 0, 0, padding)).T.contiguous()
        if qweight.scale_offset is not None and qweight.scale_step is not None:
            tensors |= {"offset": qweight.scale_offset, "step": qweight.scale_step}
        return FakePrepared(self.name, qweight.scheme, (rows, columns), tensors)


def kernel_names(module: nn.Module) -> set[str]:
    """Returns the names of all tensors of prepared weights in `module`."""
    return {name for name, _ in module.named_buffers() if "kernel_" in name}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBackend]:
    """Puts the fake backend before all others, with fresh counts."""
    backend = FakeBackend()
    monkeypatch.setattr(backends, "BACKENDS", [backend, *backends.BACKENDS])
    backends.select.cache_clear()
    LAUNCHES.clear()
    yield backend
    backends.select.cache_clear()
