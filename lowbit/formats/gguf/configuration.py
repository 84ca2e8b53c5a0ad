"""`config.json` out of the metadata of a GGUF file, and the metadata out of `config.json`.

Every number of the file is held against the shapes of its tensors before a model is built of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lowbit.errors import LowbitError
from lowbit.formats.gguf.architectures import (
    ARCHITECTURES,
    EMBEDDING,
    HEAD,
    ROPE_FACTORS,
    Architecture,
)
from lowbit.formats.gguf.header import GgufHeader

# key after the name of the architecture -> config.json
SIZES = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
LARGEST = 1 << 31
TOKEN_IDS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "padding_token_id": "pad_token_id",
}
_ROPE_KEYS = ("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings")
# Rotary scaling of Llama 3 by (factor, low, high, positions), as their checkpoints have it.
_LLAMA3 = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192))


def architecture_of_file(header: GgufHeader) -> Architecture:
    """Returns the architecture of a file.

    Raises:
        LowbitError: for one that is not read, for experts, and for a part of a split file.
    """
    name = header.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise LowbitError(
            f"{header.path}: its architecture is {str(name)[:60]!r}, read are "
            f"{', '.join(ARCHITECTURES)}"
        )
    if header.metadata.get("split.count", 1) not in (0, 1):
        raise LowbitError(
            f"{header.path}: is a part of a split file; put it together with "
            "`llama-gguf-split --merge`"
        )
    if header.metadata.get(f"{name}.expert_count", 0) != 0:
        raise LowbitError(f"{header.path}: has experts, which are not read from GGUF")
    return ARCHITECTURES[str(name)]


def config_of_file(header: GgufHeader, rope_factors: Callable[[], np.ndarray]) -> dict[str, Any]:
    """Returns config.json of the model in a file.

    Args:
        header: of the file.
        rope_factors: returns float32 `[head_dim / 2]`, the tensor `rope_freqs.weight`; called only
            if there is one.

    Raises:
        LowbitError: naming the key or the tensor that does not fit.
    """
    architecture = architecture_of_file(header)
    prefix = architecture.name
    config: dict[str, Any] = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_types[0],
        **{hub: _integer(header, f"{prefix}.{key}") for key, hub in SIZES.items()},
    }
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    config["head_dim"] = _integer(header, f"{prefix}.attention.key_length", hidden // heads)
    if config["head_dim"] % 2:
        raise LowbitError(f"{header.path}: heads of {config['head_dim']} have no two halves")
    for key in ("attention.value_length", "rope.dimension_count"):
        if _integer(header, f"{prefix}.{key}", config["head_dim"]) != config["head_dim"]:
            raise LowbitError(f"{header.path}: {prefix}.{key} is not that of a whole head")
    embedding = header.tensors.get(EMBEDDING)
    if embedding is None:
        raise LowbitError(f"{header.path}: tensor {EMBEDDING!r} is missing; fetch the file again")
    config |= {
        "vocab_size": embedding.shape[0],
        "rms_norm_eps": _number(header, f"{prefix}.attention.layer_norm_rms_epsilon", 0.0, 1.0),
        "rope_parameters": _rope(header, prefix, config, rope_factors),
        "tie_word_embeddings": HEAD not in header.tensors,
        "dtype": _dtype(header),
    }
    for key, hub in TOKEN_IDS.items():
        token = header.metadata.get(f"tokenizer.ggml.{key}")
        config[hub] = _token_id(token, config["vocab_size"])
    for setting, leaves in (architecture.optional_biases or {}).items():
        config[setting] = any(f"blk.0.{leaf}.bias" in header.tensors for leaf in leaves)
    _require_tensors(header, architecture, config)
    return config


def metadata_of_config(config: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """Returns key -> int or float, what a file says of a model.

    Raises:
        LowbitError: for a rotary embedding that the architecture does not have.
    """
    prefix = architecture.name
    found: dict[str, Any] = {f"{prefix}.{key}": int(config[hub]) for key, hub in SIZES.items()}
    head_dim = head_dim_of(config)
    found |= {
        f"{prefix}.attention.key_length": head_dim,
        f"{prefix}.attention.value_length": head_dim,
        f"{prefix}.rope.dimension_count": head_dim,
        f"{prefix}.vocab_size": int(config["vocab_size"]),
        f"{prefix}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
    }
    rope = rope_of(config)
    found[f"{prefix}.rope.freq_base"] = float(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    whole = ("partial_rotary_factor", 1.0)
    unknown = [
        key
        for key, value in rope.items()
        if key not in _ROPE_KEYS and value is not None and (key, value) != whole
    ]
    if kind != "llama3" and unknown:
        raise LowbitError(
            f"config.json: {unknown[0]} of the rotary embedding is {str(rope[unknown[0]])[:60]}, "
            "which is not written as GGUF here"
        )
    if kind in ("linear", "yarn"):
        found[f"{prefix}.rope.scaling.type"] = kind
        found[f"{prefix}.rope.scaling.factor"] = float(rope["factor"])
        if kind == "yarn":
            original = rope.get("original_max_position_embeddings")
            positions = int(original or config["max_position_embeddings"])
            found[f"{prefix}.rope.scaling.original_context_length"] = positions
    elif kind not in ("default", "llama3"):
        raise LowbitError(f"config.json: rotary scaling {kind!r} is not written as GGUF here")
    return found


def head_dim_of(config: Mapping[str, Any]) -> int:
    """Returns the width of a head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of the rotary embedding, of an older config too."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope.setdefault("rope_type", rope.get("type", "default"))
    return rope


def llama3_factors(
    head_dim: int, theta: float, rope: tuple[float, float, float, int]
) -> np.ndarray:
    """Returns what the frequencies are divided by, float32 `[head_dim / 2]`.

    Args:
        head_dim: width of a head.
        theta: base of the frequencies.
        rope: factor, factors of the low and the high frequency, positions of the training before.

    Reference: llama.cpp `conversion/llama.py`; the rule is that of transformers' `llama3`.
    """
    factor, low, high, positions = rope
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (positions / wavelength - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(wavelength > positions / low, factor, between)
    return np.where(wavelength < positions / high, 1.0, factors).astype(np.float32)


def _rope(
    header: GgufHeader,
    prefix: str,
    config: Mapping[str, Any],
    rope_factors: Callable[[], np.ndarray],
) -> dict[str, Any]:
    theta = _number(header, f"{prefix}.rope.freq_base", 1.0, 1e12, 10000.0)
    kind = header.metadata.get(f"{prefix}.rope.scaling.type", "none")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if kind in ("linear", "yarn"):
        factor = _number(header, f"{prefix}.rope.scaling.factor", 0.0, 1e6)
        rope |= {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            key = f"{prefix}.rope.scaling.original_context_length"
            rope["original_max_position_embeddings"] = _integer(header, key)
    elif kind != "none":
        raise LowbitError(f"{header.path}: rotary scaling {str(kind)[:60]!r} is not read from GGUF")
    if ROPE_FACTORS not in header.tensors:
        return rope
    found = rope_factors()
    for known in _LLAMA3:
        expected = llama3_factors(config["head_dim"], theta, known)
        if found.shape == expected.shape and np.allclose(found, expected, rtol=1e-4):
            keys = ("factor", "low_freq_factor", "high_freq_factor")
            scaling = dict(zip(keys, known, strict=False))
            positions = {"original_max_position_embeddings": known[3]}
            return {"rope_type": "llama3", "rope_theta": theta, **scaling, **positions}
    raise LowbitError(
        f"{header.path}: tensor {ROPE_FACTORS!r} holds other factors than those of Llama 3, which "
        "config.json has no words for"
    )


def _require_tensors(
    header: GgufHeader, architecture: Architecture, config: Mapping[str, Any]
) -> None:
    """Refuses tensors that are missing, unknown, or of another shape than the metadata says."""
    if config["num_hidden_layers"] > len(header.tensors):
        raise LowbitError(
            f"{header.path}: says {config['num_hidden_layers']} blocks, but has only "
            f"{len(header.tensors)} tensors; fetch the file again"
        )
    expected = architecture.shapes(config)
    for name, shape in expected.items():
        tensor = header.tensors.get(name)
        if tensor is None:
            raise LowbitError(f"{header.path}: tensor {name!r} is missing; fetch the file again")
        if tensor.shape != shape:
            raise LowbitError(
                f"{header.path}: tensor {name!r} is {list(tensor.shape)}, but its metadata "
                f"describes {list(shape)}; they do not belong together"
            )
        if len(shape) == 1 and tensor.kind.dtype is None:
            raise LowbitError(f"{header.path}: tensor {name!r} is {tensor.kind.name}, needed F32")
    unknown = next((name for name in header.tensors if name not in expected), None)
    if unknown not in (None, ROPE_FACTORS):
        raise LowbitError(
            f"{header.path}: tensor {unknown!r} has no place in a model of type "
            f"{config['model_type']}"
        )


def _dtype(header: GgufHeader) -> str:
    """Returns the dtype of a model: of its matrices if they are floats, else bfloat16."""
    kinds = {tensor.kind.name for tensor in header.tensors.values() if len(tensor.shape) > 1}
    return {frozenset({"F32"}): "float32", frozenset({"F16"}): "float16"}.get(
        frozenset(kinds), "bfloat16"
    )


def _token_id(value: Any, size: int) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if 0 <= value < size else None


def _integer(header: GgufHeader, key: str, default: int | None = None) -> int:
    value = header.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < LARGEST:
        raise LowbitError(f"{header.path}: {key} is {str(value)[:60]}, needed a positive integer")
    return value


def _number(
    header: GgufHeader, key: str, above: float, below: float, default: float | None = None
) -> float:
    value = header.metadata.get(key, default)
    if not isinstance(value, (int, float)) or not above <= value <= below:
        raise LowbitError(
            f"{header.path}: {key} is {str(value)[:60]}, needed a number from {above} to {below}"
        )
    return float(value)
