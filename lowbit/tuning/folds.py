"""Where a decoder block can be rescaled without changing what it computes.

A norm, or a linear layer that no nonlinearity follows, puts out channels that some linear layers
read and nothing else does. Dividing a channel by s there and multiplying the columns that read it
by s changes both weights and no output:

    input norm           -> q, k, v
    v                    -> o           a channel of v is read by every query head of its group
    norm before the MLP  -> gate, up
    up                   -> down        up(x) enters a product, or a ReLU, which s > 0 passes

Which of these exist differs by family: OLMo 2 normalises after its layers only, GPT-2 has a GELU
between its two MLP layers, in OPT-350m the residual reads the norm as well. `FOLDS` is that
knowledge, one tuple for each class of block; a class that is not there has no folds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError
from lowbit.nn.replace import weight_is_transposed, weight_shape


@dataclass(frozen=True)
class FoldPoint:
    """One place where a block can be rescaled; names are those of modules inside the block.

    Args:
        source: the norm or linear layer whose output channels are divided.
        readers: all linear layers that read these channels.
        inside: the module whose output shows what rounding the readers costs.
        rows: which outputs of `source` the channels are: "all", "last_half" (a fused gate and up),
            "value" (a fused q, k, v, one after the other) or "value_of_head" (q, k, v of one head
            after the other).
        head_dim: attribute that holds the size of a head, where query heads share channels.
        offset: a norm multiplies by offset + weight.
        requires: attribute that must be true, or a module that must be a ReLU, for the point to
            exist.
    """

    source: str
    readers: tuple[str, ...]
    inside: str
    rows: str = "all"
    head_dim: str | None = None
    offset: float = 0.0
    requires: str | None = None


_QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_ATTENTION_NORM = FoldPoint("input_layernorm", _QKV, "self_attn")
_MLP_NORM = FoldPoint("post_attention_layernorm", _GATE_UP, "mlp")
_VALUE = FoldPoint(
    "self_attn.v_proj", ("self_attn.o_proj",), "self_attn.o_proj", head_dim="self_attn.head_dim"
)
_UP = FoldPoint("mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj")
_LLAMA = (_ATTENTION_NORM, _VALUE, _MLP_NORM, _UP)
_GEMMA = (
    replace(_ATTENTION_NORM, offset=1.0),
    _VALUE,
    replace(_MLP_NORM, source="pre_feedforward_layernorm", offset=1.0),
    _UP,
)

# Class of a decoder block -> its folds, in the order in which the block runs.
FOLDS: dict[str, tuple[FoldPoint, ...]] = {
    "LlamaDecoderLayer": _LLAMA,
    "MistralDecoderLayer": _LLAMA,
    "Qwen2DecoderLayer": _LLAMA,
    "Qwen3DecoderLayer": _LLAMA,
    "Gemma2DecoderLayer": _GEMMA,
    "Gemma3DecoderLayer": _GEMMA,
    "Olmo2DecoderLayer": (_VALUE, _UP),
    "Phi3DecoderLayer": (
        replace(_ATTENTION_NORM, readers=("self_attn.qkv_proj",)),
        replace(_VALUE, source="self_attn.qkv_proj", rows="value"),
        replace(_MLP_NORM, readers=("mlp.gate_up_proj",)),
        replace(_UP, source="mlp.gate_up_proj", rows="last_half"),
    ),
    "GPTNeoXLayer": (
        FoldPoint("input_layernorm", ("attention.query_key_value",), "attention"),
        FoldPoint(
            "attention.query_key_value",
            ("attention.dense",),
            "attention.dense",
            rows="value_of_head",
            head_dim="attention.head_size",
        ),
        FoldPoint("post_attention_layernorm", ("mlp.dense_h_to_4h",), "mlp"),
        FoldPoint(
            "mlp.dense_h_to_4h", ("mlp.dense_4h_to_h",), "mlp.dense_4h_to_h", requires="mlp.act"
        ),
    ),
    "OPTDecoderLayer": (
        FoldPoint("self_attn_layer_norm", _QKV, "self_attn", requires="do_layer_norm_before"),
        FoldPoint("self_attn.v_proj", ("self_attn.out_proj",), "self_attn.out_proj"),
        FoldPoint("final_layer_norm", ("fc1",), "fc1", requires="do_layer_norm_before"),
        FoldPoint("fc1", ("fc2",), "fc2", requires="activation_fn"),
    ),
    "GPT2Block": (
        FoldPoint("ln_1", ("attn.c_attn",), "attn"),
        FoldPoint("attn.c_attn", ("attn.c_proj",), "attn.c_proj", rows="value"),
        FoldPoint("ln_2", ("mlp.c_fc",), "mlp"),
        FoldPoint("mlp.c_fc", ("mlp.c_proj",), "mlp.c_proj", requires="mlp.act"),
    ),
}


@dataclass(frozen=True)
class Fold:
    """A fold point of one block.

    Args:
        point: what it is.
        source: the module whose outputs are divided.
        readers: the modules whose inputs are multiplied.
        rows: int64 `[channels]`, the outputs of `source`.
        columns: int64 `[channels, uses]`, the inputs of every reader that a channel becomes.
    """

    point: FoldPoint
    source: nn.Module
    readers: tuple[nn.Module, ...]
    rows: Tensor
    columns: Tensor

    def parameters(self) -> list[str]:
        """Returns the names, inside the block, of the parameters that folding changes."""
        source = self.point.source
        biased = getattr(self.source, "bias", None) is not None
        own = [f"{source}.weight", *([f"{source}.bias"] if biased else [])]
        return own + [f"{reader}.weight" for reader in self.point.readers]

    def scale_of_inputs(self, scales: Tensor) -> Tensor:
        """Returns the factor `[in_features]` on each input column of a reader."""
        per_input = torch.empty(self.columns.numel(), dtype=scales.dtype, device=scales.device)
        columns = self.columns.to(scales.device)
        per_input[columns] = scales[:, None].expand(columns.shape)
        return per_input

    def over_channels(self, values: Tensor) -> Tensor:
        """Returns the mean `[channels]` of `values` `[in_features]` over a channel's uses."""
        return values[self.columns.to(values.device)].mean(1)

    def storable(self, scales: Tensor) -> Tensor:
        """Returns factors next to `scales` `[channels]`, all > 0, by which a norm divides exactly.

        What a norm multiplies with after the division is first rounded to bfloat16, which bfloat16,
        float32 and (from 2^-17 up) float16 hold exactly; the factor is then what the rounded
        weight stands for, so storing the norm in 16 bits loses nothing. Its bias, and rows of a
        linear layer, are exact only where the factor is a power of two.
        """
        if isinstance(self.source, nn.Linear) or weight_is_transposed(self.source):
            return scales
        weight = _tensor(self.source, "weight").to(torch.float64)
        gain = weight + self.point.offset
        divided = (gain / scales.to(gain) - self.point.offset).bfloat16().to(
            gain
        ) + self.point.offset
        # A gain of zero, or one that vanishes beside the offset, says nothing of the factor.
        usable = (gain * divided > 0) & (gain / divided).isfinite()
        return torch.where(usable, gain / divided, 1.0).to(scales.dtype)

    def apply(self, scales: Tensor) -> None:
        """Divides the source and multiplies the readers by `scales` `[channels]`, float, > 0."""
        weight, bias = _tensor(self.source, "weight"), getattr(self.source, "bias", None)
        rows = self.rows.to(weight.device)
        with torch.no_grad():
            if weight.ndim == 1:
                # In float64, so that a quotient that bfloat16 holds comes out as that very value.
                gain = weight.double() + self.point.offset
                weight.copy_(gain / scales.to(gain) - self.point.offset)
            else:
                oriented = weight.T if weight_is_transposed(self.source) else weight
                wide = _wide(oriented[rows])
                oriented[rows] = (wide / scales.to(wide)[:, None]).to(weight.dtype)
            if bias is not None:
                wide = _wide(bias[rows])
                bias[rows] = (wide / scales.to(wide)).to(bias.dtype)
            factors = self.scale_of_inputs(scales)
            for reader in self.readers:
                weight = _tensor(reader, "weight")
                wide = _wide(weight)
                per_input = factors.to(wide)
                wide *= per_input[:, None] if weight_is_transposed(reader) else per_input
                weight.copy_(wide)


def find_folds(block: nn.Module) -> list[Fold]:
    """Returns the folds of a decoder block, in the order in which the block runs.

    Empty for a class that `FOLDS` does not know; a point whose modules are missing, replaced by
    another kind, or without weight (a norm without parameters) is left out.
    """
    points = FOLDS.get(type(block).__name__, ())
    found = (_bind(block, point) for point in points)
    return [fold for fold in found if fold is not None]


def _bind(block: nn.Module, point: FoldPoint) -> Fold | None:
    modules = dict(block.named_modules())
    if not {point.source, point.inside, *point.readers} <= modules.keys():
        return None
    if point.requires is not None and not _holds(_attribute(block, point.requires)):
        return None
    source, readers = modules[point.source], tuple(modules[name] for name in point.readers)
    if not all(_is_linear(reader) for reader in readers):
        return None
    weight = getattr(source, "weight", None)
    if not isinstance(weight, Tensor) or not (weight.ndim == 1 or _is_linear(source)):
        return None
    inputs = {weight_shape(reader)[1] for reader in readers}
    if len(inputs) != 1:
        return None
    in_features = inputs.pop()
    head_dim = None if point.head_dim is None else _attribute(block, point.head_dim)
    outputs = weight.shape[0] if weight.ndim == 1 else weight_shape(source)[0]
    rows = _rows(point, outputs, in_features, head_dim)
    # Heads that share a channel follow one another: columns are [group, head of group, head_dim].
    size = len(rows) if head_dim is None else int(head_dim)
    if len(rows) == 0 or in_features % len(rows) or len(rows) % size:
        raise LowbitError(
            f"{type(block).__name__}.{point.source}: {len(rows)} channels in heads of {size} do "
            f"not fit the {in_features} inputs of {point.readers[0]}; quantize without folding"
        )
    columns = torch.arange(in_features).view(-1, in_features // len(rows), size)
    return Fold(point, source, readers, rows, columns.transpose(1, 2).reshape(len(rows), -1))


def _rows(point: FoldPoint, outputs: int, in_features: int, head_dim: int | None) -> Tensor:
    """Returns which of the outputs of a source a point is about, int64 `[channels]`."""
    rows = torch.arange(outputs)
    if point.rows == "all":
        return rows
    if point.rows == "last_half":
        return rows[outputs // 2 :]
    if point.rows == "value":
        # q has as many outputs as o has inputs; k and v share the rest.
        return rows[outputs - (outputs - in_features) // 2 :]
    assert point.rows == "value_of_head"
    assert head_dim is not None
    return rows.view(-1, 3, head_dim)[:, 2].reshape(-1)


def _attribute(block: nn.Module, path: str) -> Any:
    value: Any = block
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _holds(value: Any) -> bool:
    """Returns whether a required attribute is true; an activation must let factors through."""
    return type(value) is nn.ReLU if isinstance(value, nn.Module) else bool(value)


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or weight_is_transposed(module)


def _tensor(module: nn.Module, name: str) -> Tensor:
    tensor = getattr(module, name)
    assert isinstance(tensor, Tensor)
    return tensor


def _wide(tensor: Tensor) -> Tensor:
    """Returns a copy in which a factor is applied before one rounding to the tensor's dtype."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
