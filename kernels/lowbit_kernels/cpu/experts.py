"""Experts: rows of activations, each multiplied by one of many stacked weights.

    torch.ops.lowbit_cpu.experts_linear    out[r] = row_scale[r] * W[expert_of_row[r]] x[token]
    torch.ops.lowbit_cpu.experts_grad      its gradients

What `gpu.experts` does on a GPU. Experts with few rows run in one call of the native kernels, so
that threads meet once; each of the others is a product of its own.

Shapes: E experts of N output and K input features; T activations; R rows that the router made of
them, T * top_k.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit_kernels.cpu import dispatch, matmul
from lowbit_kernels.cpu.library import library
from lowbit_kernels.cpu.weight import STRIP, TYPES, StripWeight, concatenate
from lowbit_kernels.format import Format

_STORED = "Tensor codes, Tensor? high, Tensor scale, Tensor? zero"
_ROWS = "Tensor expert_of_row, Tensor? token_of_row, Tensor? row_scale"
_SHAPE = "str format, int experts, int out_features, int in_features"
_library = torch.library.Library("lowbit_cpu", "FRAGMENT")
_library.define(f"experts_linear(Tensor x, {_STORED}, {_ROWS}, {_SHAPE}) -> Tensor")
_library.define(
    f"experts_grad(Tensor grad, Tensor? x, {_STORED}, {_ROWS}, {_SHAPE}, int tokens) "
    "-> (Tensor, Tensor)"
)


@dataclass(frozen=True)
class StackedWeight:
    """The weights of E experts.

    Args:
        weight: all experts' strips, one after the other.
        experts: E.
        out_features: rows that count in each expert, N.
    """

    weight: StripWeight
    experts: int
    out_features: int

    @property
    def in_features(self) -> int:
        """Columns, K."""
        return self.weight.in_features

    def expert(self, index: int) -> StripWeight:
        """Returns a view of one expert's weight `[N, K]`."""
        strips = -(-self.out_features // STRIP)
        return self.weight.strip_range(index * strips, (index + 1) * strips, self.out_features)


def stack(weights: Sequence[StripWeight]) -> StackedWeight:
    """Returns one weight per expert as a stack.

    Raises:
        ValueError: for no weights, and for weights of different format, width or number of rows.
    """
    if not weights:
        raise ValueError("a stack needs the weight of one expert at least, got none")
    sizes = sorted({weight.out_features for weight in weights})
    if len(sizes) > 1:
        raise ValueError(f"experts have {sizes} output features; all of a stack need the same")
    return StackedWeight(concatenate(weights), len(weights), sizes[0])


def experts_linear(
    x: Tensor,
    weight: StackedWeight,
    expert_of_row: Tensor,
    token_of_row: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """Returns `row_scale[r] * W[expert_of_row[r]] x[token_of_row[r]]`, `[R, N]` in x's dtype.

    Scaled in float32 and rounded once; differentiable in x and row_scale. Rows with an expert
    outside [0, E) and with a token outside [0, T) are zeros.

    Args:
        x: fp16, bf16 or fp32 `[T, K]`.
        weight: the experts.
        expert_of_row: int32 or int64 `[R]`.
        token_of_row: int32 or int64 `[R]`; None where row r is x[r], and R = T.
        row_scale: floats `[R]`, such as the router's weights; None for 1.

    Raises:
        ValueError: for tensors of other shapes or dtypes.
    """
    held = weight.weight
    result: Tensor = torch.ops.lowbit_cpu.experts_linear(
        x,
        *matmul.stored(held),
        expert_of_row,
        token_of_row,
        row_scale,
        held.format.text,
        weight.experts,
        weight.out_features,
        held.in_features,
    )
    return result


def _stack(tensors: Sequence[Any], numbers: Sequence[Any]) -> StackedWeight:
    codes, high, scale, zero = tensors
    form, experts, out_features, in_features = numbers
    rows = codes.shape[0] * STRIP
    held = StripWeight(Format.parse(form), rows, in_features, codes, high, scale, zero)
    return StackedWeight(held, experts, out_features)


@dataclass(frozen=True)
class _Routing:
    """Rows by expert.

    Args:
        rows: int64, the rows that count, those of one expert together.
        tokens: int64, the activations of each.
        counts: rows of each expert.
        parts: where they are among `rows`.
    """

    rows: Tensor
    tokens: Tensor
    counts: list[int]
    parts: list[slice]

    @staticmethod
    def of(expert: Tensor, token: Tensor | None, experts: int, tokens: int) -> _Routing:
        if token is None:
            token = torch.arange(expert.shape[0])
        inside = (expert >= 0) & (expert < experts) & (token >= 0) & (token < tokens)
        rows = inside.nonzero().flatten()
        rows = rows[expert[rows].argsort(stable=True)]
        counts = torch.bincount(expert[rows], minlength=experts).tolist()
        stops = itertools.accumulate(counts)
        parts = [slice(stop - n, stop) for n, stop in zip(counts, stops, strict=True)]
        return _Routing(rows, token[rows].long(), counts, parts)


def _experts_linear(x: Tensor, *arguments: Any) -> Tensor:
    weight = _stack(arguments[:4], arguments[7:])
    expert, token, scale = arguments[4:7]
    _check(x, weight, expert, token, scale)
    if x.stride(-1) != 1:
        x = x.contiguous()
    routing = _Routing.of(expert, token, weight.experts, x.shape[0])
    dtype = x.dtype if scale is None else torch.float32
    size = (expert.shape[0], weight.out_features)
    whole = routing.rows.shape[0] == expert.shape[0]
    out = x.new_empty(size, dtype=dtype) if whole else x.new_zeros(size, dtype=dtype)
    form, isa = weight.weight.format, library().isa_name
    ways = [dispatch.choose(isa, x.dtype, n, form, dispatch.FLOAT) for n in routing.counts]
    together = [way == dispatch.TWO_PLANES for way in ways]
    grouped = [n * same for n, same in zip(routing.counts, together, strict=True)]
    if sum(grouped):
        _run_together(x, weight, routing, grouped, out)
    for index, part in enumerate(routing.parts):
        if not together[index] and routing.counts[index]:
            found = matmul.product(x[routing.tokens[part]], weight.expert(index), None)
            out[routing.rows[part]] = found.to(dtype)
    return out if scale is None else out.mul_(scale.float()[:, None]).to(x.dtype)


def _run_together(
    x: Tensor, weight: StackedWeight, routing: _Routing, counts: list[int], out: Tensor
) -> None:
    """Fills the rows of the experts with `counts` above zero, in one call."""
    parts = [part for part, count in zip(routing.parts, counts, strict=True) if count]
    rows = torch.cat([routing.rows[part] for part in parts]).to(torch.int32)
    tokens = torch.cat([routing.tokens[part] for part in parts]).to(torch.int32)
    offsets = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    native = library()
    products = weight.out_features * weight.in_features * rows.shape[0]
    first = weight.expert(0)
    matmul.check(
        native.experts(
            first.header(),
            weight.experts,
            offsets.data_ptr(),
            tokens.data_ptr(),
            rows.data_ptr(),
            x.data_ptr(),
            x.stride(0),
            TYPES[x.dtype],
            out.data_ptr(),
            TYPES[out.dtype],
            dispatch.TWO_PLANES,
            matmul.threads_for(products),
            native.isa,
        )
    )


def _experts_grad(grad: Tensor, x: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x `[T, K]` and, if x is given, of row_scale, float32 `[R]`.

    grad[r] . (W x[token]) = (grad[r] W) . x[token], so that one product gives both.
    """
    *numbers, tokens = arguments[7:]
    weight = _stack(arguments[:4], numbers)
    expert, token, scale = arguments[4:7]
    routing = _Routing.of(expert, token, weight.experts, tokens)
    sums = grad.new_zeros((tokens, weight.in_features), dtype=torch.float32)
    grad_scale = grad.new_zeros(0 if x is None else expert.shape[0], dtype=torch.float32)
    for index, part in enumerate(routing.parts):
        if not routing.counts[index]:
            continue
        rows, of = routing.rows[part], routing.tokens[part]
        found = matmul.grad_product(grad[rows], weight.expert(index)).float()
        if x is not None:
            grad_scale[rows] = (found * x[of].float()).sum(1)
        if scale is not None:
            found = found * scale[rows].float()[:, None]
        sums.index_add_(0, of, found)
    return sums.to(grad.dtype), grad_scale


def _check(
    x: Tensor,
    weight: StackedWeight,
    expert_of_row: Tensor,
    token_of_row: Tensor | None,
    row_scale: Tensor | None,
) -> None:
    if x.dim() != 2 or x.shape[1] != weight.in_features or x.dtype not in TYPES:
        raise ValueError(
            f"experts_linear: x is {x.dtype} {list(x.shape)}, needed: fp16, bf16 or fp32 "
            f"[T, {weight.in_features}]"
        )
    R = expert_of_row.shape[0] if expert_of_row.dim() == 1 else -1
    for name, ids in (("expert_of_row", expert_of_row), ("token_of_row", token_of_row)):
        if ids is not None and (ids.dtype not in (torch.int32, torch.int64) or ids.shape != (R,)):
            raise ValueError(
                f"experts_linear: {name} is {ids.dtype} {list(ids.shape)}, needed: int32 or int64 "
                f"[{'R' if R < 0 else R}]"
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


def _linear_fake(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty((arguments[4].shape[0], arguments[9]))


def _grad_fake(grad: Tensor, x: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    rows = 0 if x is None else grad.shape[0]
    return (
        grad.new_empty((arguments[11], arguments[10])),
        grad.new_empty(rows, dtype=torch.float32),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *rest = inputs
    ctx.scaled = ctx.needs_input_grad[7]
    # The activations are kept for the gradient of row_scale alone.
    ctx.save_for_backward(x if ctx.scaled else None, *rest[:7])
    ctx.numbers = (*rest[7:], x.shape[0])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, *tensors = ctx.saved_tensors
    grad_x, grad_scale = torch.ops.lowbit_cpu.experts_grad(grad, x, *tensors, *ctx.numbers)
    if not ctx.needs_input_grad[0]:
        grad_x = None
    grad_scale = grad_scale.to(tensors[6].dtype) if ctx.scaled else None
    return (grad_x, *(None,) * 6, grad_scale, *(None,) * 4)


_library.impl("experts_linear", _experts_linear, "CPU")
_library.impl("experts_grad", _experts_grad, "CPU")
torch.library.register_fake("lowbit_cpu::experts_linear", _linear_fake, lib=_library)
torch.library.register_fake("lowbit_cpu::experts_grad", _grad_fake, lib=_library)
torch.library.register_autograd(
    "lowbit_cpu::experts_linear", _backward, setup_context=_save_for_backward, lib=_library
)
