"""Swapping quantized modules into a model, and what that does to tied weights.

A tied model has one matrix as input embedding and output head. Where the embedding is quantized,
the head multiplies by its stored tensors (`TiedQuantLinear`). Where only the head is quantized, the
two come apart: the head owns low-bit tensors, the embedding stays in 16 bits, and the config says
that nothing is tied any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowbit.errors import LowbitError
from lowbit.nn.embedding import QuantEmbedding
from lowbit.nn.linear import QuantLinear, TiedQuantLinear
from lowbit.nn.stored import StoredWeight
from lowbit.scheme import Scheme


def weight_is_transposed(module: nn.Module) -> bool:
    """Returns True for GPT-2's Conv1D, which stores its weight as `[in_features, out_features]`."""
    return type(module) is Conv1D


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """Returns (out_features, in_features) of a linear layer, Conv1D or embedding."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    assert isinstance(module, nn.Linear)
    return module.out_features, module.in_features


def module_name(model: nn.Module, wanted: nn.Module | None) -> str | None:
    """Returns the dotted name of `wanted` in `model`, None if it is not there."""
    return next((name for name, module in model.named_modules() if module is wanted), None)


def tied_head_name(model: PreTrainedModel) -> str | None:
    """Returns the name of the output head if its weight is the input embedding's, else None."""
    head = module_name(model, model.get_output_embeddings())
    embedding = module_name(model, model.get_input_embeddings())
    pair = {f"{head}.weight", f"{embedding}.weight"}
    tied = any({target, source} == pair for target, source in model.all_tied_weights_keys.items())
    return head if tied and head != embedding else None


def replace_modules(
    model: PreTrainedModel, selection: Mapping[str, Scheme], placeholder: bool, dtype: torch.dtype
) -> None:
    """Replaces every module named in `selection` by its quantized form, uninitialised on meta.

    Args:
        model: changed in place.
        selection: module name -> scheme.
        placeholder: give each module a 16-bit meta parameter `weight`, for a loader to aim at;
            whoever quantizes the weight removes it.
        dtype: compute dtype.
    """
    head = tied_head_name(model)
    embedding = module_name(model, model.get_input_embeddings())
    for name, scheme in selection.items():
        old = model.get_submodule(name)
        new = _quantized_like(old, scheme, dtype)
        new.plain_class = type(old)
        # A tied head finds no tensor of its own in a 16-bit checkpoint to aim at a placeholder.
        if placeholder and name != head:
            shape = weight_shape(old)[::-1] if weight_is_transposed(old) else weight_shape(old)
            empty = torch.empty(shape, dtype=dtype, device="meta")
            new._parameters["weight"] = nn.Parameter(empty, requires_grad=False)
        model.set_submodule(name, new)
    if head is not None and embedding in selection:
        bias = model.get_submodule(head).bias
        model.set_submodule(head, TiedQuantLinear(model.get_submodule(embedding), bias))
    if head is not None and (embedding in selection or head in selection):
        _forget_tie(model, head)
    if head is not None and head in selection and embedding not in selection:
        model.config.tie_word_embeddings = False
        model.config.get_text_config(decoder=True).tie_word_embeddings = False


def restore_modules(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replaces every quantized module of `model` by its original class with decoded weights.

    Args:
        model: changed in place.
        dtype: dtype of the decoded weights.
    """
    tied: list[str] = []
    for name, module in list(model.named_modules()):
        if isinstance(module, TiedQuantLinear):
            tied.append(name)
        elif isinstance(module, StoredWeight):
            model.set_submodule(name, plain_like(module, module.dequantize(dtype)))
    for name in tied:
        head = model.get_submodule(name)
        plain = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
        plain.weight, plain.bias = model.get_input_embeddings().weight, head.bias
        model.set_submodule(name, plain)
        # Uncovers the class's table, see `_forget_tie`.
        del model._tied_weights_keys
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def plain_like(module: StoredWeight, weight: Tensor) -> nn.Module:
    """Returns a module of the class that `module` replaced, with its bias and another weight.

    Args:
        module: the quantized one, left as it is.
        weight: float `[out_features, in_features]`; an embedding's table `[rows, columns]`.
    """
    plain: nn.Module
    plain_class: Any = module.plain_class
    if isinstance(module, QuantEmbedding):
        scale = module.scalar_embed_scale
        extra = {} if scale is None else {"embed_scale": scale}
        plain = plain_class(*module.logical_shape, module.padding_idx, **extra)
    elif plain_class is Conv1D:
        plain = Conv1D(*module.logical_shape)
        weight = weight.T.contiguous()
    else:
        out_features, in_features = module.logical_shape
        plain = nn.Linear(in_features, out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(weight)
    if not isinstance(module, QuantEmbedding):
        plain.bias = module.bias
    return plain


def _quantized_like(
    old: nn.Module, scheme: Scheme, dtype: torch.dtype
) -> QuantLinear | QuantEmbedding:
    out_features, in_features = weight_shape(old)
    if isinstance(old, nn.Embedding):
        return QuantEmbedding(
            out_features,
            in_features,
            scheme,
            dtype,
            padding_idx=old.padding_idx,
            embed_scale=getattr(old, "scalar_embed_scale", None),
            device="meta",
        )
    new = QuantLinear(in_features, out_features, False, scheme, dtype, "meta")
    new.bias = cast(nn.Parameter, old.bias)
    return new


def _forget_tie(model: PreTrainedModel, head: str) -> None:
    """Removes the head from transformers' tables of tied parameters.

    The instance attribute shadows the class's table, from which `tie_weights()` starts again.
    """
    if (model._tied_weights_keys or {}).keys() - {f"{head}.weight"}:
        raise LowbitError(
            f"{type(model).__name__} ties more weights than its embedding and head; quantizing "
            "either of them is not supported for it"
        )
    model._tied_weights_keys = None
    model.all_tied_weights_keys = {
        target: source
        for target, source in model.all_tied_weights_keys.items()
        if f"{head}.weight" not in (target, source)
    }
