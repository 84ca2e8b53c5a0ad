"""Writes a Llama that lowbit quantized as GGUF, with the very same weights.

A Q4_0 block is 32 codes of 4 bits that mean (code - 8) d, with d in float16. A symmetric W4A16
scheme with float16 scales means the same, over groups of 32 weights or a multiple: its scale is
repeated in every block of the group, and nothing is rounded. Likewise Q8_0 and W8A16.

    Q4_0, 18 bytes:  d (2) | byte j: code j in the low bits, code j + 16 in the high ones (16)
    Q8_0, 34 bytes:  d (2) | 32 signed codes
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.reader import Checkpoint
from lowbit.errors import LowbitError
from lowbit.quant import unpack

BLOCK = 32
# Within a block of the decoder, Hugging Face's name -> GGUF's.
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def gguf_name(module: str) -> str:
    """Returns the GGUF name of a module of Hugging Face's Llama, without `.weight`.

    Raises:
        LowbitError: it has no counterpart.
    """
    if module in OUTER:
        return OUTER[module]
    parts = module.split(".", 3)
    if len(parts) == 4 and parts[:2] == ["model", "layers"] and parts[3] in NAMES:
        return f"blk.{parts[2]}.{NAMES[parts[3]]}"
    raise LowbitError(f"{module}: the GGUF writer knows the modules of Llama without biases only")


def blocks_of(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Returns the bytes of a weight in Q4_0 or Q8_0, uint8 `[N, bytes of a row]`.

    Args:
        codes: int8 `[N, K]`, signed.
        scale: float16 `[N, groups]`, of equal groups of a multiple of 32 weights.
        bits: 4 or 8.

    Raises:
        LowbitError: groups are no multiple of 32 weights, or scales are not float16.
    """
    rows, columns = codes.shape
    width = columns // scale.shape[1]
    if width * scale.shape[1] != columns or width % BLOCK or scale.dtype != torch.float16:
        raise LowbitError(
            f"{scale.shape[1]} {scale.dtype} scales for {columns} weights: GGUF blocks need "
            "float16 scales of equal groups of a multiple of 32"
        )
    each = scale.repeat_interleave(width // BLOCK, dim=1).contiguous()
    head = each.view(torch.uint8).view(rows, -1, 2)
    body = codes.view(rows, -1, BLOCK)
    if bits == 4:
        low, high = (body + 8).to(torch.uint8).split(BLOCK // 2, dim=2)
        body = low | high << 4
    else:
        body = body.contiguous().view(torch.uint8)
    return torch.cat((head, body), dim=2).view(rows, -1)


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Returns the rows of a query or key projection in the order of llama.cpp's rotation.

    Hugging Face rotates feature i of a head with i + half, llama.cpp its neighbours 2i and 2i + 1.
    """
    return rows.view(heads, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def tensors_of(folder: Path) -> Iterator[tuple[str, Tensor, int]]:
    """Yields (GGUF name, tensor, bits) of a checkpoint: bytes of 4 or 8 bits, float32 for 32.

    Raises:
        LowbitError: a weight is stored in a way that GGUF has no counterpart for.
    """
    checkpoint = Checkpoint.open(folder)
    heads = {
        "q_proj": checkpoint.config["num_attention_heads"],
        "k_proj": checkpoint.config["num_key_value_heads"],
    }
    for name, entry in checkpoint.entries.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight_zero_point" or kind == "bias":
            raise LowbitError(f"{name}: Q4_0 and Llama have none; quantize with W4A16")
        # A quantized module has an empty weight too, which stops loaders that do not know lowbit.
        if kind == "weight" and f"{module}.weight_packed" not in checkpoint.entries:
            yield f"{gguf_name(module)}.weight", entry.read().float(), 32
        if kind == "weight_packed":
            packed = entry.read()
            scale, size = (checkpoint.entries[f"{module}.weight_{k}"] for k in ("scale", "shape"))
            columns = int(size.read()[1])
            bits = packed.shape[1] * 32 // columns
            body = blocks_of(unpack(packed, bits, columns), scale.read(), bits)
            if (projection := module.rpartition(".")[2]) in heads:
                body = interleaved(body, heads[projection])
            yield f"{gguf_name(module)}.weight", body, bits


def write(folder: Path, file: Path) -> None:
    """Writes the checkpoint in `folder` to `file`; its vocabulary has no tokens, only a size.

    Raises:
        LowbitError: see `tensors_of`.
    """
    import gguf  # type: ignore[import-not-found]

    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    kinds = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(str(file), "llama")
    heads = config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_rope_freq_base(rope_theta(config))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, tensor, bits in tensors_of(folder):
        quantized = {4: kinds.Q4_0, 8: kinds.Q8_0}.get(bits)
        writer.add_tensor(name, tensor.contiguous().numpy(), raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rope_theta(config: dict[str, Any]) -> float:
    """Returns the base of the rotation.

    Raises:
        LowbitError: the rotation is scaled, which this writer does not write.
    """
    rope = config.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    if kind != "default" or config.get("rope_scaling"):
        raise LowbitError(f"rope type {kind}: the GGUF writer writes plain rotations only")
    return float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
