"""Models by the names of llama.cpp and of Hugging Face: tensors, shapes, configuration.

Source: llama.cpp `gguf-py/gguf/tensor_mapping.py` and `constants.py`, `conversion/llama.py`,
`conversion/qwen.py`; transformers' configuration classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lowbit.errors import LowbitError

# leaf in the file -> module in a block of Hugging Face
_DENSE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_OUTSIDE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
# Beside the weights, factors of the rotary embedding that config.json says in numbers.
ROPE_FACTORS = "rope_freqs.weight"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_BLOCK = re.compile(r"blk\.(\d{1,6})\.(\w+)\.(weight|bias)")
_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.([\w.]+)\.(weight|bias)")


@dataclass(frozen=True)
class Architecture:
    """One family.

    Args:
        name: in `general.architecture`.
        model_types: of config.json that are written so; the first is what a file is read as.
        class_name: of the causal language model that is read.
        leaves: leaf in the file -> module in a block.
        interleaved: rows of q and k are in the order of a rotary embedding that turns neighbours.
        biases: leaves that always have a bias.
        optional_biases: leaves that may have one; all of a setting's or none.
    """

    name: str
    model_types: tuple[str, ...]
    class_name: str
    leaves: Mapping[str, str]
    interleaved: bool = False
    biases: tuple[str, ...] = ()
    optional_biases: Mapping[str, tuple[str, ...]] | None = None

    def heads(self, name: str, config: Mapping[str, Any]) -> int:
        """Returns the heads whose rows are interleaved in the tensor `name` of the file, or 0."""
        if not self.interleaved:
            return 0
        found = _BLOCK.fullmatch(name)
        key = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
        return int(config[key[found[2]]]) if found and found[2] in key else 0

    def shapes(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Returns name in the file -> shape of every tensor that the model has."""
        hidden, wide = config["hidden_size"], config["intermediate_size"]
        head = config["head_dim"]
        q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
        linear = {
            "attn_q": (q, hidden),
            "attn_k": (kv, hidden),
            "attn_v": (kv, hidden),
            "attn_output": (hidden, q),
            "ffn_gate": (wide, hidden),
            "ffn_up": (wide, hidden),
            "ffn_down": (hidden, wide),
        }
        norms = {leaf: (head,) if leaf in _HEAD_NORMS else (hidden,) for leaf in self.leaves}
        block: dict[str, tuple[int, ...]] = {
            f"{leaf}.weight": linear.get(leaf, norms[leaf]) for leaf in self.leaves
        }
        biased = [*self.biases]
        for setting, leaves in (self.optional_biases or {}).items():
            biased += leaves if config.get(setting) else ()
        block |= {f"{leaf}.bias": linear[leaf][:1] for leaf in biased}
        vocabulary = (config["vocab_size"], hidden)
        outside: dict[str, tuple[int, ...]] = {
            EMBEDDING: vocabulary,
            "output_norm.weight": (hidden,),
        }
        if not config.get("tie_word_embeddings"):
            outside[HEAD] = vocabulary
        return outside | {
            f"blk.{index}.{name}": shape
            for index in range(config["num_hidden_layers"])
            for name, shape in block.items()
        }

    def hub_name(self, name: str) -> str | None:
        """Returns the name that the tensor `name` of a file has at Hugging Face, None if none."""
        found = _BLOCK.fullmatch(name)
        if found:
            leaf = self.leaves.get(found[2])
            return leaf and f"model.layers.{int(found[1])}.{leaf}.{found[3]}"
        stem, _, suffix = name.rpartition(".")
        return f"{_OUTSIDE[stem]}.weight" if stem in _OUTSIDE and suffix == "weight" else None

    def file_name(self, name: str) -> str | None:
        """Returns the name in a file of Hugging Face's tensor `name`, None if it has none."""
        found = _LAYER.fullmatch(name)
        if found:
            leaf = {module: leaf for leaf, module in self.leaves.items()}.get(found[2])
            return leaf and f"blk.{int(found[1])}.{leaf}.{found[3]}"
        stem, _, suffix = name.rpartition(".")
        outside = {module: leaf for leaf, module in _OUTSIDE.items()}
        return f"{outside[stem]}.weight" if stem in outside and suffix == "weight" else None


_LLAMA_BIASES = {
    "attention_bias": ("attn_q", "attn_k", "attn_v", "attn_output"),
    "mlp_bias": ("ffn_gate", "ffn_up", "ffn_down"),
}
ARCHITECTURES: dict[str, Architecture] = {
    known.name: known
    for known in (
        Architecture(
            "llama",
            ("llama", "mistral"),
            "LlamaForCausalLM",
            _DENSE,
            interleaved=True,
            optional_biases=_LLAMA_BIASES,
        ),
        Architecture(
            "qwen2", ("qwen2",), "Qwen2ForCausalLM", _DENSE, biases=("attn_q", "attn_k", "attn_v")
        ),
        Architecture(
            "qwen3",
            ("qwen3",),
            "Qwen3ForCausalLM",
            {**_DENSE, **_HEAD_NORMS},
            optional_biases={"attention_bias": _LLAMA_BIASES["attention_bias"]},
        ),
    )
}


def architecture_of(model_type: str, where: str) -> Architecture:
    """Returns the architecture that models of a `model_type` are written as.

    Raises:
        LowbitError: naming those that there are.
    """
    for known in ARCHITECTURES.values():
        if model_type in known.model_types:
            return known
    raise LowbitError(
        f"{where}: models of type {model_type!r} are not written as GGUF here; needed one of "
        f"{', '.join(_model_types(ARCHITECTURES.values()))}"
    )


def _model_types(known: Iterable[Architecture]) -> list[str]:
    return [model_type for architecture in known for model_type in architecture.model_types]
