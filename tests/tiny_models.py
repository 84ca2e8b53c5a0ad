"""Tiny random decoders of many families, small enough to quantize in milliseconds.

Four blocks where layers differ by kind (sliding windows), else three. 168 is no multiple of any
group size of 32 or more, so some group is always short.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 168,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_UNTIED = {"tie_word_embeddings": False}
_TIED = {"tie_word_embeddings": True}
_SLIDING = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_NO_GQA = {key: value for key, value in _SIZES.items() if key != "num_key_value_heads"}
_OPT = {key: value for key, value in _NO_GQA.items() if key != "intermediate_size"}
_IDS = {key: value for key, value in _SIZES.items() if key.endswith("_token_id")}

# name -> (model_type, arguments of its config)
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_SIZES, **_UNTIED}),
    "llama_tied": ("llama", {**_SIZES, **_TIED}),
    "mistral": ("mistral", {**_SIZES, **_UNTIED, "sliding_window": 8}),
    "qwen2": ("qwen2", {**_SIZES, **_TIED}),
    "qwen3": ("qwen3", {**_SIZES, **_TIED, "head_dim": 16}),
    "gemma2": ("gemma2", {**_SIZES, **_SLIDING, **_TIED}),
    "gemma3_text": ("gemma3_text", {**_SIZES, **_SLIDING, **_TIED}),
    "phi3": ("phi3", {**_SIZES, **_UNTIED}),
    "olmo2": ("olmo2", {**_SIZES, **_UNTIED}),
    "gpt_neox": ("gpt_neox", {**_NO_GQA, **_UNTIED}),
    "opt": ("opt", {**_OPT, **_TIED, "ffn_dim": 168, "word_embed_proj_dim": 64}),
    "gpt2": (
        "gpt2",
        {**_IDS, **_TIED, "vocab_size": 256, "n_positions": 128, "n_embd": 64, "n_layer": 3,
         "n_head": 4, "n_inner": 168},
    ),
}  # fmt: skip


def tiny_config(name: str, **changes: Any) -> PreTrainedConfig:
    """Returns the config of family `name`, with `changes` of its arguments."""
    model_type, arguments = TINY[name]
    return CONFIG_MAPPING[model_type](**{**arguments, **changes})


def make_tiny(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """Returns the model of family `name` with the same random weights on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(name, **changes), dtype=dtype)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(0, 0.08)
                elif "bias" in parameter_name:
                    parameter.normal_(0, 0.02)
    return model.eval()


def build_tiny(
    name: str, path: Path, dtype: torch.dtype = torch.float32, **save_options: Any
) -> PreTrainedModel:
    """Returns the model of family `name` after saving it to `path`.

    Args:
        name: a key of `TINY`.
        path: directory to write.
        dtype: dtype of the weights.
        **save_options: for `save_pretrained`, for example `max_shard_size="80KB"`.
    """
    model = make_tiny(name, dtype)
    model.save_pretrained(path, **save_options)
    return model
