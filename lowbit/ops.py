"""The operators: `torch.ops.lowbit.linear`, `linear_grad_input`, `dequantize`, `embedding`.

Each of these takes the stored tensors of one weight (see `quant/qweight.py`) and the scheme's
string, is opaque to `torch.compile`, and asks `backends` who runs it. Backward needs the stored
tensors only: no 16-bit weight outlives a forward pass. The functions here also take a prepared
weight, and then call the operator of the backend that prepared it.

Shapes: `x_MK` activations with any leading dimensions, `w_NK` the weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit import backends
from lowbit.backends import PreparedWeight
from lowbit.errors import LowbitError
from lowbit.quant import QuantizedWeight
from lowbit.scheme import Scheme

_STORED = (
    "Tensor packed, Tensor scale, Tensor? zero_point, Tensor? scale_offset, Tensor? scale_step, "
    "Tensor? input_scale"
)
_library = torch.library.Library("lowbit", "DEF")
_library.define(f"linear(Tensor x, {_STORED}, Tensor? bias, str scheme, int in_features) -> Tensor")
_library.define(f"linear_grad_input(Tensor grad, {_STORED}, str scheme, int in_features) -> Tensor")
_library.define(f"dequantize({_STORED}, str scheme, int in_features, ScalarType dtype) -> Tensor")
_library.define(
    f"embedding(Tensor ids, {_STORED}, str scheme, int in_features, ScalarType dtype) -> Tensor"
)
_library.define("version_probe(Tensor x) -> Tensor")


def linear(
    x: Tensor, weight: QuantizedWeight | PreparedWeight, bias: Tensor | None = None
) -> Tensor:
    """Returns `x w^T + bias`, `[..., out_features]` in x's dtype; differentiable in x and bias."""
    if isinstance(weight, PreparedWeight):
        _check_width(x, weight.shape[1])
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return weight.linear(x, bias)
    result: Tensor = torch.ops.lowbit.linear(
        x, *_stored(weight), bias, str(weight.scheme), weight.in_features
    )
    return result


def dequantize(weight: QuantizedWeight | PreparedWeight, dtype: torch.dtype) -> Tensor:
    """Returns the weight `[out_features, in_features]` in `dtype`."""
    if isinstance(weight, PreparedWeight):
        return weight.dequantize(dtype)
    result: Tensor = torch.ops.lowbit.dequantize(
        *_stored(weight), str(weight.scheme), weight.in_features, dtype
    )
    return result


def embedding(ids: Tensor, weight: QuantizedWeight | PreparedWeight, dtype: torch.dtype) -> Tensor:
    """Returns the rows `ids` of the weight, `[*ids.shape, in_features]` in `dtype`."""
    if isinstance(weight, PreparedWeight):
        if not torch.compiler.is_compiling():
            _check_ids(ids)
        return weight.dequantize_rows(ids.flatten(), dtype).view(*ids.shape, weight.shape[1])
    result: Tensor = torch.ops.lowbit.embedding(
        ids, *_stored(weight), str(weight.scheme), weight.in_features, dtype
    )
    return result


def version_probe(x: Tensor) -> Tensor:
    """Returns a tensor whose length counts the writes to x; two-dimensional where nobody counts.

    For code that `torch.compile` traces, where `x._version` is unknown: the shape of a result is
    known, and made from the version that x has at this point of the trace. The tensor itself is not
    used, so that compilers remove it.
    """
    result: Tensor = torch.ops.lowbit.version_probe(x)
    return result


def _check_width(x: Tensor, in_features: int) -> None:
    if x.shape[-1] != in_features:
        raise LowbitError(
            f"lowbit.linear: x is {list(x.shape)}, but the weight has {in_features} input features"
        )


def _check_ids(ids: Tensor) -> None:
    if ids.device.type == "cpu" and ids.numel() and int(ids.min()) < 0:
        raise IndexError(f"embedding: id {int(ids.min())} is out of range")  # as nn.Embedding


def _stored(qweight: QuantizedWeight) -> tuple[Tensor | None, ...]:
    """Returns the tensors of `qweight` in the order of the schemas."""
    return (
        qweight.packed,
        qweight.scale,
        qweight.zero_point,
        qweight.scale_offset,
        qweight.scale_step,
        qweight.input_scale,
    )


def _qweight(stored: tuple[Any, ...], scheme: str, in_features: int) -> QuantizedWeight:
    return QuantizedWeight(Scheme.parse(scheme), in_features, *stored)


def _backend(x: Tensor, qweight: QuantizedWeight) -> backends.Backend:
    return backends.select(backends.Request(qweight.scheme, x.device, x.dtype, *qweight.shape))


def _linear(x: Tensor, *arguments: Any) -> Tensor:
    *stored, bias, scheme, in_features = arguments
    _check_width(x, in_features)
    qweight = _qweight(tuple(stored), scheme, in_features)
    return _backend(x, qweight).linear(x, qweight, bias)


def _linear_grad_input(grad: Tensor, *arguments: Any) -> Tensor:
    *stored, scheme, in_features = arguments
    qweight = _qweight(tuple(stored), scheme, in_features)
    return _backend(grad, qweight).grad_input(grad, qweight)


def _dequantize(*arguments: Any) -> Tensor:
    *stored, scheme, in_features, dtype = arguments
    return _qweight(tuple(stored), scheme, in_features).dequantize(dtype)


def _embedding(ids: Tensor, *arguments: Any) -> Tensor:
    *stored, scheme, in_features, dtype = arguments
    _check_ids(ids)
    rows = _qweight(tuple(stored), scheme, in_features).dequantize_rows(ids.flatten(), dtype)
    return rows.view(*ids.shape, in_features)


def _version_probe(x: Tensor) -> Tensor:
    return x.new_empty((0, 0) if x.is_inference() else (x._version,))


def _linear_fake(x: Tensor, packed: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def _linear_grad_input_fake(grad: Tensor, *arguments: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], arguments[-1]))


def _dequantize_fake(packed: Tensor, *arguments: Any) -> Tensor:
    return packed.new_empty((packed.shape[0], arguments[-2]), dtype=arguments[-1])


def _embedding_fake(ids: Tensor, packed: Tensor, *arguments: Any) -> Tensor:
    return packed.new_empty((*ids.shape, arguments[-2]), dtype=arguments[-1])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *stored, bias, scheme, in_features = inputs
    ctx.save_for_backward(*stored)
    ctx.scheme, ctx.in_features = scheme, in_features
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.lowbit.linear_grad_input(
            grad, *ctx.saved_tensors, ctx.scheme, ctx.in_features
        )
    if ctx.needs_input_grad[7]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return (grad_x, *[None] * 6, grad_bias, None, None)


def _autocast_linear(device: str) -> Any:
    """Returns the kernel that runs under `torch.autocast` on `device`.

    `torch.library.register_autocast` would cast every float argument, the fp16 scales too, and
    that to one dtype fixed here; only x follows the dtype that is in force.
    """

    def kernel(x: Tensor, *arguments: Any) -> Tensor:
        with torch.autocast(device, enabled=False):
            lowered = x.to(torch.get_autocast_dtype(device))
            result: Tensor = torch.ops.lowbit.linear(lowered, *arguments)
            return result

    return kernel


for _name, _kernel, _fake in (
    ("linear", _linear, _linear_fake),
    ("linear_grad_input", _linear_grad_input, _linear_grad_input_fake),
    ("dequantize", _dequantize, _dequantize_fake),
    ("embedding", _embedding, _embedding_fake),
    ("version_probe", _version_probe, _version_probe),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lowbit::{_name}", _fake, lib=_library)
torch.library.register_autograd(
    "lowbit::linear", _linear_backward, setup_context=_save_for_backward, lib=_library
)
_library.impl("linear", _autocast_linear("cpu"), "AutocastCPU")
_library.impl("linear", _autocast_linear("cuda"), "AutocastCUDA")
