"""Experts: rows of activations, each multiplied by one of many stacked weights.

    torch.ops.lowbit_kernels.experts_linear    out[r] = row_scale[r] * W[expert_of_row[r]] x[token]
    torch.ops.lowbit_kernels.experts_grad      its gradients

The rows may come in any order, and no step of it waits for the device: what depends on how many
rows an expert has is decided there (`grouped.py`). Shapes depend on the number of rows alone, so
calls can be captured in CUDA graphs. Results do not depend on the order in which programs run.

A stack is an ordinary weight in fragment order whose rows are those of all experts, one after the
other. Scales are never double-quantized here: stacking decodes them.

Shapes: E experts of N output and K input features; T activations; R rows that the router made of
them, T * top_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit_kernels.format import Format
from lowbit_kernels.gpu import matmul
from lowbit_kernels.gpu.routed import run_experts, run_grad, tile_for
from lowbit_kernels.gpu.stacked import StackedWeight
from lowbit_kernels.gpu.support import FLOAT_DTYPES, on_device_of_first
from lowbit_kernels.gpu.weight import STRIP, FragmentWeight

_STORED = "Tensor words, Tensor? plane, Tensor scale, Tensor? zero, Tensor counters, Tensor? table"
_ROWS = "Tensor expert_of_row, Tensor? token_of_row, Tensor? row_scale"
_SHAPE = "str format, int experts, int out_features, int in_features"
_library = torch.library.Library("lowbit_kernels", "FRAGMENT")
_library.define(f"experts_linear(Tensor x, {_STORED}, {_ROWS}, {_SHAPE}) -> Tensor")
_library.define(
    f"experts_grad(Tensor grad, Tensor? x, {_STORED}, {_ROWS}, {_SHAPE}, int tokens) "
    "-> (Tensor, Tensor)"
)


def experts_linear(
    x: Tensor,
    weight: StackedWeight,
    expert_of_row: Tensor,
    token_of_row: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """Returns `row_scale[r] * W[expert_of_row[r]] x[token_of_row[r]]`, `[R, N]` in x's dtype.

    Scaled in float32 and rounded once; differentiable in x and row_scale. Rows with an expert
    outside [0, E), which is how rows of other devices' experts are marked, and with a token
    outside [0, T) are zeros: whether there are any cannot be asked without waiting for the device.

    Args:
        x: fp16, bf16 or fp32 `[T, K]`.
        weight: the experts.
        expert_of_row: int32 or int64 `[R]`.
        token_of_row: int32 or int64 `[R]`; None where row r is x[r], and R = T.
        row_scale: floats `[R]`, such as the router's weights; None for 1.

    Raises:
        ValueError: for tensors of other shapes or dtypes.
    """
    result: Tensor = torch.ops.lowbit_kernels.experts_linear(
        x, *stored(weight), expert_of_row, token_of_row, row_scale, *shape(weight)
    )
    return result


def stored(weight: StackedWeight) -> tuple[Tensor | None, ...]:
    """Returns the tensors of `weight` in the order of the operators' schemas."""
    return matmul.stored(weight.weight)[:6]


def shape(weight: StackedWeight) -> tuple[str, int, int, int]:
    """Returns the arguments of the operators that are no tensors."""
    return weight.weight.format.text, weight.experts, weight.out_features, weight.in_features


def _stack(tensors: Sequence[Any], numbers: Sequence[Any]) -> StackedWeight:
    words, plane, scale, zero, counters, table = tensors
    form, experts, out_features, in_features = numbers
    weight = FragmentWeight(
        format=Format.parse(form),
        out_features=words.shape[0] * STRIP,
        in_features=in_features,
        words=words,
        plane=plane,
        scale=scale,
        zero=zero,
        counters=counters,
        table=table,
    )
    return StackedWeight(weight, experts, out_features)


def _check(
    x: Tensor,
    weight: StackedWeight,
    expert_of_row: Tensor,
    token_of_row: Tensor | None,
    row_scale: Tensor | None,
) -> None:
    if x.dim() != 2 or x.shape[1] != weight.in_features or x.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"experts_linear: x is {x.dtype} {list(x.shape)}, needed: fp16, bf16 or fp32 "
            f"[T, {weight.in_features}]"
        )
    R = expert_of_row.shape[0] if expert_of_row.dim() == 1 else -1
    for name, ids in (("expert_of_row", expert_of_row), ("token_of_row", token_of_row)):
        if ids is None:
            continue
        if ids.dtype not in (torch.int32, torch.int64) or ids.shape != (R,):
            size = "R" if R < 0 else R
            raise ValueError(
                f"experts_linear: {name} is {ids.dtype} {list(ids.shape)}, needed: int32 or int64 "
                f"[{size}]"
            )
    if token_of_row is None and x.shape[0] != R:
        raise ValueError(
            f"experts_linear: {R} rows of {x.shape[0]} activations; without token_of_row they must "
            "be as many"
        )
    if row_scale is not None and (row_scale.shape != (R,) or not row_scale.is_floating_point()):
        raise ValueError(
            f"experts_linear: row_scale is {row_scale.dtype} {list(row_scale.shape)}, needed: "
            f"floats [{R}]"
        )


def _experts_linear(x: Tensor, *arguments: Any) -> Tensor:
    weight = _stack(arguments[:6], arguments[9:])
    _check(x, weight, *arguments[6:9])
    expert_of_row, token_of_row, row_scale = _contiguous(arguments[6:9])
    if expert_of_row.shape[0] == 0:
        return x.new_zeros((0, weight.out_features))
    if x.stride(-1) != 1:
        x = x.contiguous()
    tile = tile_for(x, weight, expert_of_row.shape[0])
    return run_experts(x, weight, expert_of_row, token_of_row, row_scale, tile)


def _experts_grad(grad: Tensor, x: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x `[T, K]` and, if x is given, of row_scale, float32 `[R]`.

    grad[r] . (W x[token]) = (grad[r] W) . x[token], so that one product gives both.
    """
    *numbers, tokens = arguments[9:]
    weight = _stack(arguments[:6], numbers)
    expert, token, scale = _contiguous(arguments[6:9])
    if grad.shape[0] == 0 or tokens == 0:
        return _no_grads(grad, x, weight.in_features, tokens)
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    if x is None and token is None:
        rows = run_grad(grad, weight, expert, scale, grad.dtype)
        return rows, grad.new_empty(0, dtype=torch.float32)
    rows = run_grad(grad, weight, expert, scale if x is None else None, torch.float32)
    # Rows without a token are collected in a last one, which is dropped.
    slot = None
    if token is not None:
        slot = torch.where((token >= 0) & (token < tokens), token, tokens).long()
    grad_scale = grad.new_empty(0, dtype=torch.float32)
    if x is not None:
        grad_scale = _grad_scale(rows, x, slot)
        # A row of no expert is zero whatever its scale.
        rows *= torch.where((expert >= 0) & (expert < weight.experts), scale, 0.0)[:, None]
    if slot is None:
        return rows.to(grad.dtype), grad_scale
    sums = rows.new_zeros((tokens + 1, rows.shape[1]))
    # Sorts on CUDA, rather than adding in the order of arrival.
    sums.index_put_((slot,), rows, accumulate=True)
    return sums[:tokens].to(grad.dtype), grad_scale


def _grad_scale(rows: Tensor, x: Tensor, slot: Tensor | None) -> Tensor:
    """Returns the products of `rows` `[R, K]` with their activations, 0 for those without."""
    if slot is None:
        return (rows * x).sum(1)
    products = (rows * x[slot.clamp(max=x.shape[0] - 1)]).sum(1)
    return torch.where(slot < x.shape[0], products, 0.0)


def _contiguous(tensors: Sequence[Tensor | None]) -> Any:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _no_grads(grad: Tensor, x: Tensor | None, columns: int, tokens: int) -> tuple[Tensor, Tensor]:
    rows = 0 if x is None else grad.shape[0]
    return grad.new_zeros((tokens, columns)), grad.new_zeros(rows, dtype=torch.float32)


def _experts_linear_fake(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty((arguments[6].shape[0], arguments[11]))


def _experts_grad_fake(grad: Tensor, x: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    rows = 0 if x is None else grad.shape[0]
    return (
        grad.new_empty((arguments[13], arguments[12])),
        grad.new_empty(rows, dtype=torch.float32),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *rest = inputs
    ctx.scaled = ctx.needs_input_grad[9]
    # The activations are kept for the gradient of row_scale alone.
    ctx.save_for_backward(x if ctx.scaled else None, *rest[:9])
    ctx.numbers = (*rest[9:], x.shape[0])


def _experts_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, *tensors = ctx.saved_tensors
    grad_x, grad_scale = torch.ops.lowbit_kernels.experts_grad(grad, x, *tensors, *ctx.numbers)
    if not ctx.needs_input_grad[0]:
        grad_x = None
    grad_scale = grad_scale.to(tensors[8].dtype) if ctx.scaled else None
    return (grad_x, *(None,) * 8, grad_scale, *(None,) * 4)


def _autocast(x: Tensor, *arguments: Any) -> Tensor:
    """Casts x alone, as for `linear`."""
    with torch.autocast("cuda", enabled=False):
        lowered = x.to(torch.get_autocast_dtype("cuda"))
        result: Tensor = torch.ops.lowbit_kernels.experts_linear(lowered, *arguments)
        return result


_library.impl("experts_linear", on_device_of_first(_experts_linear), "CompositeExplicitAutograd")
_library.impl("experts_grad", on_device_of_first(_experts_grad), "CompositeExplicitAutograd")
torch.library.register_fake("lowbit_kernels::experts_linear", _experts_linear_fake, lib=_library)
torch.library.register_fake("lowbit_kernels::experts_grad", _experts_grad_fake, lib=_library)
torch.library.register_autograd(
    "lowbit_kernels::experts_linear",
    _experts_backward,
    setup_context=_save_for_backward,
    lib=_library,
)
_library.impl("experts_linear", _autocast, "AutocastCUDA")
