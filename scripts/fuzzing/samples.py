"""Small sound files of every format: what damage starts from. The same on every call."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from lowbit.checkpoint.journal import MANIFEST_NAME
from lowbit.checkpoint.reader import INDEX_NAME, SINGLE_NAME
from lowbit.formats.base import Written
from lowbit.formats.bnb import NESTED_LEVELS, STATE
from lowbit.formats.table import LAYOUTS
from lowbit.pipeline.stored_statistics import KIND, pack_triangle
from lowbit.quant import Grid, QuantizedWeight
from lowbit.scheme import INT8_STATIC, Scheme
from scripts.fuzzing.files import Files

WIDTH, INNER, VOCABULARY = 32, 64, 40
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
BLOCK = "model.layers.0"
LINEARS: dict[str, tuple[int, int]] = {
    **{f"{BLOCK}.self_attn.{p}_proj": (WIDTH, WIDTH) for p in "qkvo"},
    **{f"{BLOCK}.mlp.{p}_proj": (INNER, WIDTH) for p in ("gate", "up")},
    f"{BLOCK}.mlp.down_proj": (WIDTH, INNER),
}
HEAD = "lm_head"
# They have exceptions for single modules, found by patterns or names.
RULED = ("lowbit", "compressed-tensors", "gptq", "gptq_v2")


def plain_tensors(generator: torch.Generator) -> dict[str, Tensor]:
    """Returns everything of the model that is not quantized."""
    return {
        "model.embed_tokens.weight": torch.randn(VOCABULARY, WIDTH, generator=generator),
        f"{BLOCK}.input_layernorm.weight": torch.ones(WIDTH),
        f"{BLOCK}.post_attention_layernorm.weight": torch.ones(WIDTH),
        "model.norm.weight": torch.ones(WIDTH),
        f"{HEAD}.weight": torch.randn(VOCABULARY, WIDTH, generator=generator),
    }


def random_weight(
    scheme: Scheme, shape: tuple[int, int], generator: torch.Generator
) -> QuantizedWeight:
    """Returns random codes on a random grid that every format can hold."""
    low, high = scheme.code_min, scheme.code_max + 1
    codes = torch.randint(low, high, shape, generator=generator).to(torch.int8)
    size = (shape[0], scheme.groups(shape[1]))
    scales = (torch.rand(size, generator=generator) + 0.1) * 0.01
    zeros = None
    if not scheme.symmetric:
        zeros = torch.randint(low + 1, high, size, generator=generator).float()
    static = torch.tensor([0.02]) if scheme.activations == INT8_STATIC else None
    return QuantizedWeight.from_codes(codes, Grid.storable(scheme, shape[1], scales, zeros), static)


def checkpoint(
    layout_name: str,
    scheme_name: str,
    change: Callable[[str, dict[str, Tensor]], dict[str, Tensor]] | None = None,
    shards: int = 1,
) -> Files:
    """Returns a whole quantized model of one block.

    Args:
        layout_name: a name of `LAYOUTS`.
        scheme_name: of all linear layers, one that the layout holds.
        change: told the name of a module and its tensors, returns other ones.
        shards: number of files.
    """
    generator = torch.Generator().manual_seed(0)
    layout, schemes = LAYOUTS[layout_name], dict.fromkeys(LINEARS, Scheme.parse(scheme_name))
    if layout_name in RULED:
        schemes[f"{BLOCK}.mlp.down_proj"] = Scheme.parse(scheme_name.replace("G32", "G64"))
    tensors: dict[str, Tensor] = {}
    for name, shape in LINEARS.items():
        made = layout.tensors(name, random_weight(schemes[name], shape, generator))
        tensors |= change(name, made) if change else made
    tensors |= plain_tensors(generator)
    written = Written(schemes, (HEAD,), HEAD, "model.embed_tokens")
    tensors |= layout.markers(written)
    config = {**CONFIG, "quantization_config": layout.config(written)}
    return {"config.json": json.dumps(config).encode(), **_weights(tensors, shards)}


def unquantized() -> Files:
    """Returns the same model in 16 bits, in two files."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.weight": 0.1 * torch.randn(shape, generator=generator)
        for name, shape in LINEARS.items()
    }
    tensors |= plain_tensors(generator)
    return {"config.json": json.dumps(CONFIG).encode(), **_weights(tensors, 2)}


def _weights(tensors: dict[str, Tensor], shards: int) -> Files:
    if shards == 1:
        return {SINGLE_NAME: save(tensors)}
    names = list(tensors)
    files: Files = {}
    index = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        mine = names[number::shards]
        files[file] = save({name: tensors[name] for name in mine})
        index |= dict.fromkeys(mine, file)
    content = {"metadata": {"total_size": 0}, "weight_map": index}
    return {INDEX_NAME: json.dumps(content).encode(), **files}


def in_act_order(_: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of GPTQ with groups that are no neighbours."""
    generator = torch.Generator().manual_seed(1)

    def shuffled(indices: Tensor) -> Tensor:
        return indices[torch.randperm(len(indices), generator=generator)]

    return {n: shuffled(t) if n.endswith("g_idx") else t for n, t in tensors.items()}


def nested(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of bitsandbytes with statistics that are quantized themselves."""
    generator = torch.Generator().manual_seed(1)
    absmax, key = f"{name}.weight.absmax", f"{name}.{STATE}nf4"
    count = tensors[absmax].numel()
    state = json.loads(bytes(tensors[key].tolist()))
    state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.01}
    codes = torch.randint(0, NESTED_LEVELS, (count,), generator=generator, dtype=torch.uint8)
    return {
        **tensors,
        absmax: codes,
        f"{name}.weight.nested_absmax": torch.rand(-(-count // 256), generator=generator) * 0.01,
        f"{name}.weight.nested_quant_map": torch.linspace(-1, 1, NESTED_LEVELS),
        key: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def adapter(**options: Any) -> Files:
    """Returns a LoRA adapter of the model, as PEFT saves it."""
    generator = torch.Generator().manual_seed(0)
    rank, prefix = 4, "base_model.model."
    tensors: dict[str, Tensor] = {}
    for name, (rows, columns) in LINEARS.items():
        inputs = columns // 32 if options.get("use_qalora") else columns
        tensors[f"{prefix}{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
        tensors[f"{prefix}{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
        if options.get("use_dora"):
            tensors[f"{prefix}{name}.lora_magnitude_vector"] = torch.ones(rows)
    embedding = f"{prefix}model.embed_tokens"
    if not options:
        tensors[f"{embedding}.lora_embedding_A"] = torch.randn(
            rank, VOCABULARY, generator=generator
        )
        tensors[f"{embedding}.lora_embedding_B"] = torch.randn(WIDTH, rank, generator=generator)
        tensors[f"{prefix}model.norm.weight"] = torch.ones(WIDTH)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 8,
        "rank_pattern": {"layers.9.mlp.up_proj": 8},
        "alpha_pattern": {"q_proj": 16},
        "base_model_name_or_path": "base",
        "target_modules": ["q_proj"],
        **options,
    }
    return {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": save(tensors),
    }


def tokens(kind: str) -> Files:
    """Returns a file of token ids, `kind` its suffix."""
    rows = np.arange(64, dtype=np.int32).reshape(4, 16)
    if kind == "safetensors":
        return {"tokens.safetensors": save({"input_ids": torch.from_numpy(rows)})}
    buffer = io.BytesIO()
    np.save(buffer, rows)
    return {"tokens.npy": buffer.getvalue()}


def statistics() -> Files:
    """Returns a folder of statistics of one block."""
    generator = torch.Generator().manual_seed(0)
    tensors, groups = {}, {}
    for name, (_, columns) in LINEARS.items():
        inputs = torch.randn(4 * columns, columns, generator=generator)
        tensors[f"{name}.hessian"] = pack_triangle(inputs.T @ inputs)
        tensors[f"{name}.mean_magnitude"] = inputs.abs().mean(0)
        tensors[f"{name}.input_scale"] = torch.tensor([0.02])
        counts = {"in_features": columns, "tokens": len(inputs), "dropped": 0}
        groups[name] = {"members": [name], **counts}
    file = "stats-00001-of-00001.safetensors"
    manifest = {
        "fingerprint": {
            "kind": KIND,
            "model": {"config": "x", "weights": {SINGLE_NAME: "x"}},
            "calibration": {"samples": 4, "seqlen": 16},
        },
        "parts": {BLOCK: {"file": file, "sha256": "", "modules": groups}},
    }
    files: Files = {file: save(tensors), MANIFEST_NAME: json.dumps(manifest).encode()}
    return with_true_digests(files)


def with_true_digests(files: Files) -> Files:
    """Returns `files` with the digest of each shard in the manifest, as whoever forged it would."""
    content = files.get(MANIFEST_NAME)
    try:
        manifest = json.loads(content or b"")
        for part in manifest["parts"].values():
            shard = files.get(part["file"])
            if shard is not None:
                part["sha256"] = hashlib.sha256(shard).hexdigest()
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return files  # damaged there already
    return {**files, MANIFEST_NAME: json.dumps(manifest).encode()}
