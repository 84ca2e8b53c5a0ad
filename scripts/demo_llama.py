"""A Llama decoder in plain torch whose `state_dict` is a Hugging Face checkpoint.

The modules carry the names of the Hugging Face implementation, so nothing is renamed on the way to
`AutoModelForCausalLM`; a test holds the logits of both together. Written for training only: there
is no cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.errors import LowbitError

RMS_EPSILON = 1e-6
ROPE_BASE = 10_000.0


@dataclass(frozen=True)
class Shape:
    """The sizes of a model.

    Args:
        vocab_size: tokens.
        hidden_size: width of the residual stream, `heads * head_dim`.
        intermediate_size: width inside the MLP.
        blocks: decoder blocks.
        heads: query heads.
        kv_heads: key-value heads, a divisor of `heads`.
        context: tokens in a training window.
    """

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 768
    blocks: int = 4
    heads: int = 4
    kv_heads: int = 2
    context: int = 512

    def __post_init__(self) -> None:
        smallest = min(self.hidden_size, self.intermediate_size, self.blocks, self.kv_heads)
        if smallest < 1 or self.context < 2:
            raise LowbitError("the sizes must be at least 1, and the context at least 2 tokens")
        if self.hidden_size % (2 * self.heads) or self.heads % self.kv_heads:
            raise LowbitError(
                f"hidden {self.hidden_size} must be a multiple of twice the {self.heads} heads, "
                f"and these a multiple of the {self.kv_heads} key-value heads"
            )
        if self.vocab_size < 300:
            raise LowbitError(
                f"a vocabulary of {self.vocab_size} has no room for 256 bytes, 3 special tokens "
                "and some merges; use 300 or more"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.heads

    def config(self, bos: int, eos: int) -> dict[str, Any]:
        """Returns the Hugging Face config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.context,
            "rms_norm_eps": RMS_EPSILON,
            "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_BASE},
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "dtype": "bfloat16",
        }


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        width = shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Returns `[batch, tokens, hidden]`."""

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        attended = F.scaled_dot_product_attention(
            rotate(heads(self.q_proj(x)), rope),
            rotate(heads(self.k_proj(x)), rope),
            heads(self.v_proj(x)),
            is_causal=True,
            enable_gqa=True,
        )
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns `[batch, tokens, hidden]`."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape)
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=RMS_EPSILON)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=RMS_EPSILON)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Returns `[batch, tokens, hidden]`."""
        x = x + self.self_attn(self.input_layernorm(x), rope)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A decoder whose parameters are named as in a Hugging Face checkpoint."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(shape.vocab_size, shape.hidden_size),
                "layers": nn.ModuleList(Block(shape) for _ in range(shape.blocks)),
                "norm": nn.RMSNorm(shape.hidden_size, eps=RMS_EPSILON),
            }
        )
        # Layers that write to the residual stream start smaller, so that its variance does not
        # grow with depth (GPT-2, section 2.3).
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * shape.blocks) if writes else 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Returns the logits `[batch, tokens, vocabulary]` of int64 ids `[batch, tokens]`."""
        rope = rotations(ids.shape[1], self.shape.head_dim, ids.device)
        x = self.model["embed_tokens"](ids)
        for block in self.model["layers"]:
            x = block(x, rope)
        return F.linear(self.model["norm"](x), self.model["embed_tokens"].weight)


def rotations(tokens: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns cos and sin `[tokens, head_dim]` of the rotary angles, float32.

    Reference:
        Su et al., RoFormer (2021), eq. 15, in the layout of Llama checkpoints: dimension i is
        paired with i + head_dim / 2, not with its neighbour.
    """
    exponents = torch.arange(0, head_dim, 2, device=device).float() / head_dim
    angles = torch.outer(torch.arange(tokens, device=device).float(), ROPE_BASE**-exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Returns `x` `[batch, heads, tokens, head_dim]`, each pair of dimensions turned."""
    first, second = x.chunk(2, dim=-1)
    turned = x * rope[0] + torch.cat((-second, first), dim=-1) * rope[1]
    return turned.to(x.dtype)
