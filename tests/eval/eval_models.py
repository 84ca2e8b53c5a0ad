"""A random llama of a few thousand weights with a byte tokenizer, in memory or as a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

BOS, EOS = 256, 257
VOCABULARY = 258


def tiny_llama(seed: int = 0, **overrides: Any) -> Any:
    """Returns a llama in float32 whose predictions are far from uniform."""
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**fields, **overrides})).eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of one token a byte that puts one BOS before a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(
        [AddedToken("<s>", special=True), AddedToken("</s>", special=True)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def save_checkpoint(path: Path, seed: int = 0, tokenizer: bool = True, **overrides: Any) -> Path:
    """Returns `path` after writing a tiny llama there."""
    tiny_llama(seed, **overrides).save_pretrained(path)
    if tokenizer:
        byte_tokenizer().save_pretrained(path)
    return path


def logits_of(model: Any, ids: Tensor) -> NDArray[np.float64]:
    """Returns float64 logits `[seqlen, vocabulary]` of one window, from a plain call."""
    with torch.no_grad():
        logits: NDArray[np.float64] = model(ids[None]).logits[0].double().numpy()
    return logits
