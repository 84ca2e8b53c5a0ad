"""A weight as an engine sees it: its attributes, and its part on each of several GPUs.

Tensor parallelism cuts the layers that read the residual stream by their output features (columns)
and those that write it by their input features (rows).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lowbit.scheme import Scheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LINEAR, HEAD, EMBEDDING = "linear", "head", "embedding"
COLUMN, ROW, COPIED = "column", "row", "copied"

_COLUMNS = (
    "q_proj k_proj v_proj qkv_proj gate_proj up_proj gate_up_proj query key value query_key_value "
    "w1 w3 fc1 c_fc c_attn dense_h_to_4h q_b_proj kv_b_proj"
)
_ROWS = "o_proj down_proj w2 fc2 c_proj dense dense_4h_to_h out_proj"
# Last part of a name -> how engines cut it. Sources: the models of vLLM 0.33.0, and
# `base_model_tp_plan` of transformers 5.23.
ROLES: dict[str, str] = {
    **dict.fromkeys(_COLUMNS.split(), COLUMN),
    **dict.fromkeys(_ROWS.split(), ROW),
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), COPIED),
}
# Of these, GPUs beyond the number of key-value heads hold copies.
KEY_VALUE = ("k_proj", "v_proj", "key", "value")
_EXPERT = re.compile(r"^(.*\.experts)\.\d+\.(\w+)$")
_FUSED_FIRST = ("gate_proj", "up_proj", "w1", "w3")


@dataclass(frozen=True)
class Weight:
    """One weight.

    Args:
        name: of the module.
        scheme: None for one in 16 bits.
        shape: (out_features, in_features), None where it is not known.
        kind: LINEAR, HEAD or EMBEDDING.
        ordered: its columns are grouped in an order of their own (`desc_act`).
    """

    name: str
    scheme: Scheme | None
    shape: tuple[int, int] | None
    kind: str = LINEAR
    ordered: bool = False

    @property
    def leaf(self) -> str:
        """The last part of its name."""
        return self.name.rpartition(".")[2]

    @property
    def expert(self) -> bool:
        """Whether it is one of many experts."""
        return _EXPERT.match(self.name) is not None

    @property
    def role(self) -> str | None:
        """How it is cut: COLUMN, ROW, COPIED, or None where that is not known."""
        return ROLES.get(self.leaf)

    def attribute(self, name: str) -> Any:
        """Returns what a limit asks for, see `limits.ATTRIBUTES`."""
        if name in ("kind", "expert", "ordered"):
            return getattr(self, name)
        return getattr(self.scheme, name)

    def parts(self, tensor_parallel: int, kv_heads: int | None) -> int:
        """Returns among how many GPUs it is divided."""
        if self.leaf in KEY_VALUE and kv_heads is not None:
            return min(tensor_parallel, kv_heads)
        return tensor_parallel

    def on_rank(self, tensor_parallel: int, kv_heads: int | None) -> tuple[int, int] | None:
        """Returns its shape on one GPU, None where it is not known or not whole."""
        if self.shape is None:
            return None
        out_features, in_features = self.shape
        parts = self.parts(tensor_parallel, kv_heads)
        if self.kind != LINEAR or parts == 1 or self.role == COPIED:
            return self.shape
        if self.role == COLUMN:
            return None if out_features % parts else (out_features // parts, in_features)
        if self.role == ROW:
            return None if in_features % parts else (out_features, in_features // parts)
        return None


@dataclass(frozen=True)
class Model:
    """What `config.json` says of a model.

    Args:
        shapes: linear layer, head or embedding -> (out_features, in_features).
        head: name of the output head, None if the model has none.
        embedding: name of the input embedding.
        heads: attention heads, None if the config names none.
        kv_heads: key-value heads, likewise.
        experts: module that fuses experts -> (their intermediate size, the hidden size).
        dtype: of the weights that are not quantized, "bfloat16" for example; None if not named.
        conv1d: GPT-2's layers, which store their weight the other way round.
        model_type: of the config.
    """

    shapes: Mapping[str, tuple[int, int]]
    head: str | None = None
    embedding: str | None = None
    heads: int | None = None
    kv_heads: int | None = None
    experts: Mapping[str, tuple[int, int]] | None = None
    dtype: str | None = None
    conv1d: frozenset[str] = frozenset()
    model_type: str | None = None

    def kind(self, name: str) -> str:
        """Returns the kind of a module."""
        return {self.head: HEAD, self.embedding: EMBEDDING}.get(name, LINEAR)

    def shape(self, name: str) -> tuple[int, int] | None:
        """Returns (out_features, in_features), None for a module that is not known."""
        found = _EXPERT.match(name)
        sizes = (self.experts or {}).get(found[1]) if found else None
        if found is None or sizes is None:
            return self.shapes.get(name)
        return sizes if found[2] in _FUSED_FIRST else sizes[::-1]


def model_of(config: Mapping[str, Any]) -> Model:
    """Returns what a `config.json` says; nothing of shapes for a model that is not known here."""
    fields = {k: v for k, v in config.items() if not k.startswith(("quantization", "compression"))}
    return _model_of(json.dumps(fields, sort_keys=True))


@functools.lru_cache(maxsize=8)
def _model_of(text: str) -> Model:
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    from lowbit.errors import LowbitError
    from lowbit.models.foreign import one_sentence

    fields = json.loads(text)
    heads, kv_heads = _heads(fields)
    dtype = dtype_of(fields)
    try:
        with one_sentence("config.json", "model"):
            config = AutoConfig.for_model(**fields)
            with init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(
                    config, dtype=torch.bfloat16, trust_remote_code=False
                )
    except LowbitError:
        return Model({}, heads=heads, kv_heads=kv_heads, dtype=dtype)
    return replace(described(model), dtype=dtype)


def described(model: PreTrainedModel) -> Model:
    """Returns what a model says, which may be without weights."""
    from torch import nn

    from lowbit.nn.replace import module_name, weight_is_transposed, weight_shape

    shapes = {
        name: weight_shape(module)
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, nn.Embedding) or weight_is_transposed(module)
    }
    experts = {}
    for name, module in model.named_modules():
        down = getattr(module, "down_proj", None)
        if isinstance(down, nn.Parameter) and down.ndim == 3:
            one, other = down.shape[1:]
            hidden = model.config.get_text_config().hidden_size
            experts[name] = (other if one == hidden else one, hidden)
    return Model(
        shapes,
        module_name(model, model.get_output_embeddings()),
        module_name(model, model.get_input_embeddings()),
        *_heads(model.config.to_dict()),
        experts,
        conv1d=frozenset(n for n, m in model.named_modules() if weight_is_transposed(m)),
        model_type=model.config.model_type,
    )


def dtype_of(config: Mapping[str, Any]) -> str | None:
    """Returns the dtype that a `config.json` names, None if it names none."""
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, Mapping) else {}):
        found = part.get("dtype") or part.get("torch_dtype")
        if isinstance(found, str):
            return found
    return None


def _heads(config: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Returns the numbers of attention heads and of key-value heads, None where none is named."""
    inner = config.get("text_config")
    inner = inner if isinstance(inner, Mapping) else config
    heads = _count(inner, "num_attention_heads", "n_head")
    return heads, _count(inner, "num_key_value_heads") or heads


def _count(config: Mapping[str, Any], *names: str) -> int | None:
    found = next((config[name] for name in names if config.get(name) is not None), None)
    return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else None
