"""A packed checkpoint as a model whose scales can be trained while its codes stay as they are.

What is in memory is what is on disk: codes stay packed, and each product decodes its weight in
slices of rows, in the forward pass and again in the backward pass. Of a product nothing is kept
between the two but its input, and of a block (`checkpoint_blocks`) nothing but the block's input.

Shapes: `x_MK` activations with any leading dimensions, `w_NK` the weight, `scales_NG`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, pad
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lowbit.checkpoint import TensorEntry
from lowbit.checkpoint.reader import read_quantized
from lowbit.errors import LowbitError
from lowbit.models.streaming import StreamedDecoder
from lowbit.nn.replace import weight_shape
from lowbit.quant import Grid, QuantizedWeight
from lowbit.quant.grid import decode
from lowbit.quant.packing import unpack
from lowbit.scheme import Scheme

# Weights decoded at a time: 64 MB in fp32, few of which are alive together.
_SLICE_WEIGHTS = 1 << 24


class ScaledWeight(nn.Module):
    """A quantized weight whose scales are `stored scale * exp(log_factor)`.

    The exponential keeps the sign of every scale, and makes a step of the optimizer a relative one.

    Args:
        name: of the module in the model.
        stored: its tensors.
        device: where it is needed.
    """

    def __init__(self, name: str, stored: QuantizedWeight, device: torch.device) -> None:
        super().__init__()
        moved = {key: tensor.to(device) for key, tensor in stored.tensors().items()}
        qweight = QuantizedWeight.from_tensors(stored.scheme, stored.shape, moved, name)
        self.name, self.qweight = name, qweight
        self.start = qweight.grid()
        self.log_factor = nn.Parameter(torch.zeros_like(self.start.scales))

    @property
    def scheme(self) -> Scheme:
        """How the weight is stored."""
        return self.qweight.scheme

    def grid(self) -> Grid:
        """Returns the grid as it would be stored now."""
        if not bool(self.log_factor.any()):
            return self.start  # a second double quantization need not give the first again
        scales = self.start.scales * self.log_factor.detach().exp()
        return Grid.storable(self.scheme, self.start.in_features, scales, self.start.zeros)

    def scales(self) -> Tensor:
        """Returns the scales as stored, float32 `[N, G]`, with the gradient of unrounded ones."""
        exact = self.start.scales * self.log_factor.exp()
        return exact + (self.grid().scales - exact.detach())

    def levels(self, rows: Tensor | slice) -> Tensor:
        """Returns what is multiplied by the scales for `rows`, float32 `[rows, K]`."""
        codes = unpack(self.qweight.packed[rows], self.scheme.bits, self.qweight.in_features)
        zeros = self.start.zeros
        zeros = None if zeros is None else self.start.per_column(zeros[rows])
        return decode(codes, torch.ones((), device=codes.device), zeros, self.scheme)

    def slices(self) -> Iterator[slice]:
        """Yields the rows that are decoded together."""
        rows, columns = self.qweight.shape
        step = max(1, _SLICE_WEIGHTS // columns)
        yield from (slice(start, start + step) for start in range(0, rows, step))

    def tensors(self) -> dict[str, Tensor]:
        """Returns stored name -> tensor of all that may differ from the start."""
        grid = self.grid()
        dq = grid.double_quantized
        if dq is not None:
            stored = {"scale": dq.codes, "scale_offset": dq.offset, "scale_step": dq.step}
        else:
            stored = {"scale": grid.scales.to(self.scheme.torch_scale_dtype)}
        return {f"{self.name}.weight_{key}": tensor.cpu() for key, tensor in stored.items()}


class _Product(torch.autograd.Function):
    """`x w^T`, differentiable in x and in the scales of w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Tensor, weight: ScaledWeight) -> Tensor:
        ctx.save_for_backward(x, scales)
        ctx.weight = weight
        parts = [x @ _decoded(weight, scales, rows, x.dtype)[1].T for rows in weight.slices()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scales = ctx.saved_tensors
        (grad,) = gradients
        x_MK, grad_MN = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x, grad_scales = torch.zeros_like(x_MK), torch.empty_like(scales)
        for rows in ctx.weight.slices():
            levels, w_NK = _decoded(ctx.weight, scales, rows, x.dtype)
            if ctx.needs_input_grad[0]:
                grad_x.addmm_(grad_MN[:, rows], w_NK)
            grad_w_NK = (grad_MN[:, rows].T @ x_MK).float()
            grad_scales[rows] = _group_sums(grad_w_NK.mul_(levels), ctx.weight.start)
        return grad_x.view(x.shape), grad_scales, None


def _decoded(
    weight: ScaledWeight, scales: Tensor, rows: slice, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns levels (float32) and weights (`dtype`) of `rows`, `[rows, K]` each."""
    levels = weight.levels(rows)
    return levels, (levels * weight.start.per_column(scales[rows])).to(dtype)


def _group_sums(values: Tensor, grid: Grid) -> Tensor:
    """Returns the sums of `values` `[N, K]` over the groups of `grid`, `[N, G]`."""
    width = grid.scheme.group_width(grid.in_features)
    missing = -values.shape[1] % width
    padded = pad(values, (0, missing)) if missing else values
    return padded.view(len(values), -1, width).sum(2)


class ScaledLinear(nn.Module):
    """`x w^T + bias`, in place of a linear layer, a Conv1D or a tied head."""

    bias: nn.Parameter | None

    def __init__(self, weight: ScaledWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.scaled = weight
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Returns `[..., out_features]` in x's dtype."""
        product: Tensor = _Product.apply(x, self.scaled.scales(), self.scaled)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias


class ScaledEmbedding(nn.Module):
    """A table of quantized rows; what model code reads of an embedding is there too."""

    def __init__(self, weight: ScaledWeight, like: nn.Embedding, dtype: torch.dtype) -> None:
        super().__init__()
        self.scaled, self.dtype = weight, dtype
        self.num_embeddings, self.embedding_dim = like.num_embeddings, like.embedding_dim
        self.padding_idx = like.padding_idx
        self.factor = getattr(like, "scalar_embed_scale", None)

    @property
    def weight(self) -> Tensor:
        """A stand-in with the dtype and the device of the decoded table."""
        return torch.empty(0, dtype=self.dtype, device=self.scaled.qweight.packed.device)

    def forward(self, ids: Tensor) -> Tensor:
        """Returns `[*ids.shape, embedding_dim]`."""
        flat = ids.flatten()
        scales = self.scaled.start.per_column(embedding(flat, self.scaled.scales()))
        rows = (self.scaled.levels(flat) * scales).to(self.dtype).view(*ids.shape, -1)
        if self.factor is None:
            return rows
        return rows * torch.tensor(self.factor, dtype=rows.dtype, device=rows.device)


def packed_model(
    source: StreamedDecoder, entries: Mapping[str, TensorEntry], selected: Mapping[str, Scheme]
) -> tuple[PreTrainedModel, list[ScaledWeight]]:
    """Returns the model that the tensors `entries` store, and its quantized weights.

    Args:
        source: gives architecture, dtype and device; its own model is not touched.
        entries: name -> tensor of every shard.
        selected: module name -> scheme of what is quantized.

    Raises:
        LowbitError: if a tensor is missing or does not fit.
    """
    fresh = StreamedDecoder(source.checkpoint, source.dtype, source.device)
    model, head = fresh.model, fresh.head_name
    tied = dict(model.all_tied_weights_keys)
    weights: dict[str, ScaledWeight] = {}
    for name, scheme in selected.items():
        old = model.get_submodule(name)
        stored = read_quantized(entries, name, scheme, weight_shape(old))
        weights[name] = ScaledWeight(name, stored, source.device)
        model.set_submodule(name, _scaled_like(old, weights[name], source.dtype))
    if head is not None and f"{head}.weight" in tied and fresh.embedding_name in selected:
        shared = weights[fresh.embedding_name]
        model.set_submodule(head, ScaledLinear(shared, model.get_submodule(head).bias))
    for name in dict(model.state_dict()):
        if name in entries:
            _put(model, name, entries[name].read().to(source.device), source.dtype)
    for copy, original in tied.items():
        if copy in model.state_dict() and copy not in entries:
            owner, _, attribute = copy.rpartition(".")
            setattr(model.get_submodule(owner), attribute, model.get_parameter(original))
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if missing:
        raise LowbitError(f"{missing[0]}: is in none of the shards; start in a new directory")
    return model.requires_grad_(False), list(weights.values())


def _scaled_like(old: nn.Module, weight: ScaledWeight, dtype: torch.dtype) -> nn.Module:
    if isinstance(old, nn.Embedding):
        return ScaledEmbedding(weight, old, dtype)
    return ScaledLinear(weight, cast(nn.Parameter, old.bias))


def _put(model: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Puts a parameter or buffer in place, floats in the dtype of computation."""
    owner_name, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if tensor.is_floating_point():
        tensor = tensor.to(dtype)
    if attribute in owner._parameters:
        owner._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[attribute] = tensor


def checkpoint_blocks(layers: nn.ModuleList) -> None:
    """Makes every block run again in the backward pass instead of keeping what is inside it.

    Not by the model's own switch, which works in training mode only and would bring dropout.
    """
    for layer in layers:
        layer.forward = functools.partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )
