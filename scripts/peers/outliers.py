"""Outlier channels put into a decoder without changing its function.

Large models have a few channels with activations many times the others', which is what
activation-aware algorithms are about and what a small model lacks. Here some channels are scaled
up and the columns that read them scaled down by the same power of two: every product is the same to
the last bit, but the inputs of linear layers have outliers and their weights have small columns.

    input_layernorm           -> q_proj, k_proj, v_proj
    post_attention_layernorm  -> gate_proj, up_proj
    up_proj (rows)            -> down_proj

Synthetic outliers are labelled so wherever results are shown: where they sit and how large they are
is chosen here, not learned.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError

FACTOR = 32.0  # a power of two: scaling by it is exact
SHARE = 0.02  # of the channels

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}


def add_outliers(model: nn.Module, seed: int = 0) -> int:
    """Scales channels of every block of a Llama-like decoder in place; returns how many.

    Raises:
        LowbitError: a block lacks one of the modules that `READERS` names.
    """
    generator = torch.Generator().manual_seed(seed)
    scaled = 0
    blocks: Any = getattr(getattr(model, "model", None), "layers", None)
    if blocks is None:
        raise LowbitError("outliers need a decoder with `model.layers`, such as Llama or Qwen")
    with torch.no_grad():
        for index, block in enumerate(blocks):
            modules = dict(block.named_modules())
            for source, readers in READERS.items():
                missing = [name for name in (source, *readers) if name not in modules]
                if missing:
                    raise LowbitError(
                        f"block {index} has no {', '.join(missing)}; outliers are known for "
                        "decoders with Llama's module names only"
                    )
                channels = modules[source].weight.shape[0]
                chosen = torch.randperm(channels, generator=generator)[: _count(channels)]
                _scale(modules[source], [modules[name] for name in readers], chosen)
                scaled += len(chosen)
    return scaled


def _count(channels: int) -> int:
    return max(1, round(SHARE * channels))


def _scale(source: nn.Module, readers: list[nn.Module], channels: Tensor) -> None:
    """Multiplies what `source` puts out in `channels` and divides the columns that read it."""
    source.weight[channels] *= FACTOR  # type: ignore[index,operator]
    bias = getattr(source, "bias", None)
    if bias is not None:
        bias[channels] *= FACTOR
    for reader in readers:
        reader.weight[:, channels] /= FACTOR  # type: ignore[index,operator]


def _logits(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model.float()(input_ids=ids, use_cache=False).logits
        return logits


def write_outlier_model(source: Path, output: Path, seed: int = 0) -> Path:
    """Writes the decoder of `source` with outliers to `output`, unless it is there; returns it."""
    from transformers import AutoModelForCausalLM

    if (output / "config.json").exists():
        return output
    partial = output.with_name(output.name + ".partial")
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    ids = torch.arange(64)[None] % model.config.get_text_config().vocab_size
    dtype = model.dtype
    before = _logits(model, ids)
    add_outliers(model, seed)
    difference = float((_logits(model, ids) - before).abs().max())
    if difference > 1e-3 * float(before.abs().max()):
        # Gemma's norms multiply by 1 + weight, others normalise between `up` and `down`.
        raise LowbitError(
            f"{source}: outliers changed the logits by up to {difference:.3g}, so this family's "
            "modules are no plain scales; compare it without --outliers"
        )
    model.to(dtype).save_pretrained(partial)
    for file in source.glob("tokenizer*"):
        shutil.copyfile(file, partial / file.name)
    partial.rename(output)
    return output
