"""GGUF files written byte by byte, and the models they stand for."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import gguf_oracles as oracle
import numpy as np
import torch
from tiny_models import make_tiny
from transformers import PreTrainedModel

NUMBERS = {
    "F32": 0, "F16": 1, "BF16": 30, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q8_0": 8, "IQ4_NL": 20,
    "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14,
}  # fmt: skip
LEAVES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
# name -> (type, shape outermost first, bytes)
Tensors = dict[str, tuple[int, tuple[int, ...], bytes]]


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(item: Any) -> bytes:
    """Returns type and content of a metadata value."""
    if isinstance(item, bool):
        return struct.pack("<IB", 7, item)
    if isinstance(item, int):
        return struct.pack("<II", 4, item)
    if isinstance(item, float):
        return struct.pack("<If", 6, item)
    if isinstance(item, str):
        return struct.pack("<I", 8) + string(item)
    if item and isinstance(item[0], str):
        return struct.pack("<IIQ", 9, 8, len(item)) + b"".join(map(string, item))
    kind, code = (6, "f") if isinstance(item[0], float) else (5, "i")
    return struct.pack("<IIQ", 9, kind, len(item)) + struct.pack(f"<{len(item)}{code}", *item)


def file_bytes(metadata: dict[str, Any], tensors: Tensors, version: int = 3) -> bytes:
    """Returns a whole file, its tensors one after the other."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(string(key) + value(item) for key, item in metadata.items())
    offset, body = 0, b""
    for name, (kind, shape, content) in tensors.items():
        head += string(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *shape[::-1]) + struct.pack("<IQ", kind, offset)
        body += content + bytes(-len(content) % 32)
        offset = len(body)
    return head + bytes(-len(head) % 32) + body


def metadata_of(model: PreTrainedModel, arch: str) -> dict[str, Any]:
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "general.architecture": arch,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.value_length": head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def file_name(name: str) -> str:
    """Returns the name that llama.cpp has for a tensor of Hugging Face."""
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, suffix = name.rpartition(".")
    if stem in outside:
        return f"{outside[stem]}.{suffix}"
    _, _, index, leaf = stem.split(".", 3)
    return f"blk.{index}.{LEAVES[leaf]}.{suffix}"


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Returns rows as llama.cpp has those of Llama's q and k: one of each half in turn."""
    return np.concatenate(
        [
            head[[i // 2 + (i % 2) * (len(head) // 2) for i in range(len(head))]]
            for head in np.split(rows, heads)
        ]
    )


def write_model(
    path: Path, family: str, kinds: str | list[str], rng: np.random.Generator, **changes: Any
) -> PreTrainedModel:
    """Writes a model of random blocks and returns it with the weights that they decode to.

    Args:
        path: the file.
        family: a key of `tiny_models.TINY`.
        kinds: type of all matrices, or types that they have in turn.
        rng: for blocks.
        **changes: of the config.
    """
    model = make_tiny(family, **changes)
    config = model.config
    arch = "llama" if config.model_type == "mistral" else config.model_type
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    kinds = [kinds] if isinstance(kinds, str) else kinds
    tensors: Tensors = {}
    state = dict(model.named_parameters())
    for index, (name, parameter) in enumerate(state.items()):
        target, kind = file_name(name), kinds[index % len(kinds)]
        if parameter.ndim == 1 or kind in ("F32", "F16", "BF16"):
            kind = "F32" if parameter.ndim == 1 else kind
            dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
            parameter.data = parameter.data.to(dtype).float()
            stored = parameter.data.to(dtype).contiguous()
            rows = stored.view(torch.uint8).reshape(len(stored), -1).numpy()
        else:
            block = oracle.ORACLES[kind][0]
            rows = oracle.random_rows(rng, kind, parameter.shape[0], parameter.shape[1] // block)
            decoded = torch.from_numpy(oracle.decode(kind, rows)).float()
            # What no scheme has is decoded to bf16; the others are exact.
            exact = kind in ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "Q3_K", "Q6_K")
            parameter.data = decoded if exact else decoded.bfloat16().float()
        leaf = target.split(".")[2] if target.startswith("blk.") else ""
        if arch == "llama" and leaf in heads:
            rows = interleaved(rows, heads[leaf])
        tensors[target] = (NUMBERS[kind], tuple(parameter.shape), rows.tobytes())
        assert len(tensors[target][2]) * oracle.ORACLES.get(kind, (1,))[0] >= math.prod(
            parameter.shape
        )
    path.write_bytes(file_bytes(metadata_of(model, arch), tensors))
    return model.eval()
