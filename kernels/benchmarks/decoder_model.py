"""A Llama of 8B's shape with random weights, made on the device, and its decoding step.

The quantized one is never there in 16 bits: random codes are what a checkpoint would hold, and are
prepared for the kernels like those of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from random_tensors import integers, normal
from torch import Tensor, nn

from lowbit import prepare_model
from lowbit.nn.linear import QuantLinear
from lowbit.quant import QuantizedWeight
from lowbit.scheme import Scheme

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
SMOKE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def build(scheme: str | None, device: str, smoke: bool) -> Any:
    """Returns a LlamaForCausalLM with random weights; the head and the embedding keep 16 bits.

    Args:
        scheme: of the linear layers in the blocks, None for 16 bits.
        device: where it is made.
        smoke: a tiny one in float32.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    dtype = torch.float32 if smoke else torch.bfloat16
    config = LlamaConfig(**(SMOKE if smoke else LLAMA_8B), dtype=dtype)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    if scheme is not None:
        _quantize(model, Scheme.parse(scheme), dtype, device)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(_random(parameter, device), requires_grad=False))
    # Its buffers are computed from the config, not stored.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    model = model.eval().requires_grad_(False)
    if scheme is not None:
        prepare_model(model)
    return model


def _quantize(model: nn.Module, scheme: Scheme, dtype: torch.dtype, device: str) -> None:
    linears = [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]
    for name, linear in linears:
        shape = linear.out_features, linear.in_features
        tensors = {
            key: _random_stored(key, size, stored, device)
            for key, (size, stored) in scheme.tensor_specs(shape).items()
        }
        qweight = QuantizedWeight.from_tensors(scheme, shape, tensors)
        layer = QuantLinear.from_quantized(qweight, None, dtype).eval()
        layer.prepare()  # one by one: the canonical codes of all would be there otherwise
        model.set_submodule(name, layer)


def _random_stored(key: str, size: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Returns random codes, or scales that keep activations at about their size."""
    if dtype == torch.int32:
        return integers(-(2**31), 2**31, size, device, dtype)
    if dtype == torch.uint8:
        return integers(0, 256, size, device, dtype)
    if key == "weight_scale_step":
        return torch.full(size, 2e-5, dtype=dtype, device=device)
    if dtype == torch.int64:
        return torch.zeros(size, dtype=dtype)
    return torch.full(size, 2e-3, dtype=dtype, device=device)


def _random(parameter: Tensor, device: str) -> Tensor:
    if parameter.dim() == 1:
        return torch.ones(parameter.shape, dtype=parameter.dtype, device=device)
    return normal(tuple(parameter.shape), device, parameter.dtype, 0.02)


@dataclass
class Decoding:
    """A batch that writes tokens into a static cache, one per `step`.

    Args:
        model: the decoder.
        ids: int64 `[batch, 1]`, the last tokens; replaced by the next ones.
        position: int64 `[1, 1]`, where they stand; counted up.
        cache: keys and values.
        length: positions in the cache.
        forward: what runs the model, `model` itself or compiled.
    """

    model: Any
    ids: Tensor
    position: Tensor
    cache: Any
    length: int
    forward: Callable[..., Any]

    @staticmethod
    def start(model: Any, batch: int, prompt: int, length: int) -> Decoding:
        """Returns a batch that has read `prompt` random tokens; all shapes are fixed from here."""
        from transformers import StaticCache

        device = model.device
        cache = StaticCache(config=model.config, max_cache_len=length)
        ids = integers(0, model.config.vocab_size, (batch, prompt), device.type)
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        position = torch.full((1, 1), prompt, device=device)
        return Decoding(model, ids[:, -1:].clone(), position, cache, length, model)

    def step(self) -> None:
        """Writes one token per sequence; nothing is read back and no shape changes.

        The mask is given whole, because the model would ask the cache for its length on the host.
        Not in inference mode: layers that share a launch count writes to their input, which such
        tensors do not.
        """
        with torch.no_grad():
            places = torch.arange(self.length, device=self.ids.device)
            mask = (places <= self.position)[None, None].expand(self.ids.shape[0], 1, 1, -1)
            logits = self.forward(
                input_ids=self.ids,
                attention_mask=mask,
                position_ids=self.position.expand(self.ids.shape[0], 1),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
            self.ids.copy_(logits[:, -1:].argmax(-1))
            self.position.add_(1)
