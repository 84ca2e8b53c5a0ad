"""Multiplying by a weight in strips: the operators.

    torch.ops.lowbit_cpu.linear              x W^T + bias
    torch.ops.lowbit_cpu.linear_grad_input   grad W
    torch.ops.lowbit_cpu.dequantize          W
    torch.ops.lowbit_cpu.dequantize_rows     some rows of W

All are opaque to `torch.compile`. A decoded weight exists a block of rows at a time, in memory that
each thread keeps; besides it, a call allocates its result only. Which way a product goes is decided
by `dispatch`.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit_kernels.cpu import dispatch
from lowbit_kernels.cpu.library import library
from lowbit_kernels.cpu.weight import STRIP, TYPES, StripWeight
from lowbit_kernels.format import Format

_STORED = "Tensor codes, Tensor? high, Tensor scale, Tensor? zero"
_SHAPE = "str format, int out_features, int in_features"
_library = torch.library.Library("lowbit_cpu", "DEF")
_library.define(
    f"linear(Tensor x, {_STORED}, Tensor? bias, Tensor? input_scale, {_SHAPE}, str activations) "
    "-> Tensor"
)
_library.define(f"linear_grad_input(Tensor grad, {_STORED}, {_SHAPE}) -> Tensor")
_library.define(f"dequantize({_STORED}, {_SHAPE}, ScalarType dtype) -> Tensor")
_library.define(f"dequantize_rows(Tensor rows, {_STORED}, {_SHAPE}, ScalarType dtype) -> Tensor")

# A decoded block of a weight stays in the cache until it is multiplied.
BLOCK_BYTES = 8 << 20
# Below this many products, starting threads takes longer than the work.
_PRODUCTS_PER_THREAD = 1 << 18
_ERRORS = {
    1: "the native kernels got no memory for their scratch space",
    2: "the native kernels have no such product on this processor",
}
_buffers = threading.local()


def linear(
    x: Tensor,
    weight: StripWeight,
    bias: Tensor | None = None,
    activations: str = dispatch.FLOAT,
    input_scale: Tensor | None = None,
) -> Tensor:
    """Returns `x W^T + bias`, `[..., N]` in x's dtype; differentiable in x and bias.

    Args:
        x: `[..., K]`, float32, bfloat16 or float16.
        weight: the weight `[N, K]`.
        bias: `[N]` or None.
        activations: what x is rounded to first: one of `dispatch.ACTIVATIONS`. Gradients are those
            without rounding.
        input_scale: float32 `[1]`, the unit of "int8_static".
    """
    result: Tensor = torch.ops.lowbit_cpu.linear(
        x, *stored(weight), bias, input_scale, *shape(weight), activations
    )
    return result


def grad_input(grad: Tensor, weight: StripWeight) -> Tensor:
    """Returns `grad W`, `[..., K]` in grad's dtype."""
    result: Tensor = torch.ops.lowbit_cpu.linear_grad_input(grad, *stored(weight), *shape(weight))
    return result


def dequantize(weight: StripWeight, dtype: torch.dtype) -> Tensor:
    """Returns the weight `[N, K]` in `dtype` (float16, bfloat16 or float32), rounded once."""
    result: Tensor = torch.ops.lowbit_cpu.dequantize(*stored(weight), *shape(weight), dtype)
    return result


def dequantize_rows(rows: Tensor, weight: StripWeight, dtype: torch.dtype) -> Tensor:
    """Returns the weights of `rows` (int64 `[n]`), `[n, K]` in `dtype`."""
    result: Tensor = torch.ops.lowbit_cpu.dequantize_rows(
        rows, *stored(weight), *shape(weight), dtype
    )
    return result


def stored(weight: StripWeight) -> tuple[Tensor | None, ...]:
    """Returns the tensors of `weight` in the order of the operators' schemas."""
    return weight.codes, weight.high, weight.scale, weight.zero


def shape(weight: StripWeight) -> tuple[str, int, int]:
    """Returns the arguments of the operators that are no tensors."""
    return weight.format.text, weight.out_features, weight.in_features


def _weight(arguments: tuple[Any, ...]) -> StripWeight:
    codes, high, scale, zero, form, out_features, in_features = arguments
    return StripWeight(Format.parse(form), out_features, in_features, codes, high, scale, zero)


def threads_for(products: int) -> int:
    """Returns how many threads a product of so many multiplications is worth."""
    return max(1, min(torch.get_num_threads(), products // _PRODUCTS_PER_THREAD))


def check(status: int) -> None:
    """Raises RuntimeError unless a native function returned 0."""
    if status:
        raise RuntimeError(_ERRORS[status])


def _linear(x: Tensor, *arguments: Any) -> Tensor:
    codes, high, scale, zero, bias, input_scale, form, N, K, activations = arguments
    weight = _weight((codes, high, scale, zero, form, N, K))
    out = product(x.reshape(-1, K), weight, bias, activations, input_scale)
    # Models write to products in place, which autograd forbids for a view made in here.
    result: Tensor = torch.ops.aten._unsafe_view(out, (*x.shape[:-1], N))
    return result


def product(
    x: Tensor,
    weight: StripWeight,
    bias: Tensor | None,
    activations: str = dispatch.FLOAT,
    input_scale: Tensor | None = None,
) -> Tensor:
    """Returns `x W^T + bias`, `[M, N]` in x's dtype, the way that is fastest here."""
    native = library()
    mode = dispatch.choose(native.isa_name, x.dtype, x.shape[0], weight.format, activations)
    if mode == dispatch.DECODE:
        return decoded_linear(x, weight, bias)
    step = {dispatch.INT8_TOKEN: -1.0}.get(activations, 0.0)
    if activations == dispatch.INT8_STATIC:
        if input_scale is None:
            raise ValueError("int8_static activations need an input_scale")
        step = float(input_scale)
    return native_linear(x, weight, bias, mode, step)


def native_linear(
    x: Tensor, weight: StripWeight, bias: Tensor | None, planes: int, step: float = 0.0
) -> Tensor:
    """Returns `x W^T + bias`, `[M, N]`, by the kernels for `planes` (see `dispatch`).

    `step` is the unit of 8-bit activations: see `Activations` in src/weight.h.
    """
    native, (tokens, K), N = library(), x.shape, weight.out_features
    if tokens and x.stride(1) != 1:
        x = x.contiguous()
    if bias is not None:
        bias = bias.float().contiguous()
    out = x.new_empty((tokens, N))
    status = native.linear(
        weight.header(),
        x.data_ptr(),
        x.stride(0),
        TYPES[x.dtype],
        tokens,
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        TYPES[x.dtype],
        planes,
        step,
        threads_for(N * K * tokens),
        native.isa,
    )
    check(status)
    return out


def decoded_linear(x: Tensor, weight: StripWeight, bias: Tensor | None) -> Tensor:
    """Returns `x W^T + bias`, `[M, N]`, by decoding blocks of rows and torch's own matmul."""
    bias = None if bias is None else bias.to(x.dtype)
    blocks = _blocks(weight, x.dtype)
    if len(blocks) == 1:
        return F.linear(x, _decode_into_buffer(weight, x.dtype), bias)
    out = x.new_empty((x.shape[0], weight.out_features))
    for start, stop in blocks:
        rows = slice(start * STRIP, min(stop * STRIP, weight.out_features))
        decoded = _decode_into_buffer(weight.strip_range(start, stop), x.dtype)
        out[:, rows] = F.linear(x, decoded, None if bias is None else bias[rows])
    return out


def _linear_grad_input(grad: Tensor, *arguments: Any) -> Tensor:
    weight = _weight(arguments)
    out = grad_product(grad.reshape(-1, weight.out_features), weight)
    return out.view(*grad.shape[:-1], weight.in_features)


def grad_product(grad: Tensor, weight: StripWeight) -> Tensor:
    """Returns `grad W`, `[M, K]` in grad's dtype."""
    blocks = _blocks(weight, grad.dtype)
    if len(blocks) == 1:
        return grad @ _decode_into_buffer(weight, grad.dtype)
    # Partial sums over blocks of rows are kept in float32, as one matmul would keep them.
    total = grad.new_zeros((grad.shape[0], weight.in_features), dtype=torch.float32)
    for start, stop in blocks:
        rows = slice(start * STRIP, min(stop * STRIP, weight.out_features))
        total += grad[:, rows] @ _decode_into_buffer(weight.strip_range(start, stop), grad.dtype)
    return total.to(grad.dtype)


def _blocks(weight: StripWeight, dtype: torch.dtype) -> list[tuple[int, int]]:
    """Returns the (start, stop) strips of blocks that fit `BLOCK_BYTES` decoded."""
    step = max(1, BLOCK_BYTES // (STRIP * weight.in_features * dtype.itemsize))
    return [(a, min(a + step, weight.strips)) for a in range(0, weight.strips, step)]


def _decode_into_buffer(weight: StripWeight, dtype: torch.dtype) -> Tensor:
    """Returns the weight in memory of this thread, valid until the next call."""
    size = weight.out_features * weight.in_features * dtype.itemsize
    buffer: Tensor | None = getattr(_buffers, "decoded", None)
    if buffer is None or buffer.numel() < size:
        buffer = _buffers.decoded = torch.empty(size, dtype=torch.uint8)
    return _decode(weight, buffer[:size].view(dtype).view(weight.out_features, weight.in_features))


def _decode(weight: StripWeight, out: Tensor) -> Tensor:
    """Fills `out` `[N, K]` with the weight, and returns it."""
    native = library()
    threads = threads_for(out.numel())
    status = native.decode(weight.header(), out.data_ptr(), TYPES[out.dtype], threads, native.isa)
    check(status)
    return out


def _dequantize(*arguments: Any) -> Tensor:
    *stored_and_shape, dtype = arguments
    weight = _weight(tuple(stored_and_shape))
    return _decode(weight, torch.empty((weight.out_features, weight.in_features), dtype=dtype))


def _dequantize_rows(rows: Tensor, *arguments: Any) -> Tensor:
    *stored_and_shape, dtype = arguments
    weight, native = _weight(tuple(stored_and_shape)), library()
    out = torch.empty((rows.shape[0], weight.in_features), dtype=dtype)
    if not rows.numel():
        return out
    first, last = int(rows.min()), int(rows.max())
    if first < 0 or last >= weight.out_features:
        wrong = first if first < 0 else last
        raise IndexError(f"row {wrong} of a weight with {weight.out_features} rows")
    rows = rows.long().contiguous()
    status = native.decode_rows(
        weight.header(),
        rows.data_ptr(),
        rows.shape[0],
        out.data_ptr(),
        TYPES[dtype],
        threads_for(STRIP * out.numel()),
        native.isa,
    )
    check(status)
    return out


def _linear_fake(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], arguments[7]))


def _grad_fake(grad: Tensor, *arguments: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], arguments[-1]))


def _dequantize_fake(codes: Tensor, *arguments: Any) -> Tensor:
    *_, out_features, in_features, dtype = arguments
    return codes.new_empty((out_features, in_features), dtype=dtype)


def _rows_fake(rows: Tensor, codes: Tensor, *arguments: Any) -> Tensor:
    *_, in_features, dtype = arguments
    return codes.new_empty((rows.shape[0], in_features), dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors, bias, _scale, form, out_features, in_features, _activations = inputs
    ctx.save_for_backward(*tensors)
    ctx.shape = (form, out_features, in_features)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.lowbit_cpu.linear_grad_input(grad, *ctx.saved_tensors, *ctx.shape)
    if ctx.needs_input_grad[5]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return (grad_x, None, None, None, None, grad_bias, None, None, None, None, None)


for _name, _kernel, _fake in (
    ("linear", _linear, _linear_fake),
    ("linear_grad_input", _linear_grad_input, _grad_fake),
    ("dequantize", _dequantize, _dequantize_fake),
    ("dequantize_rows", _dequantize_rows, _rows_fake),
):
    _library.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"lowbit_cpu::{_name}", _fake, lib=_library)
torch.library.register_autograd("lowbit_cpu::linear", _backward, setup_context=_save, lib=_library)
