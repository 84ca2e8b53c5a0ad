"""A tiny model with a tokenizer and data to fine-tune it on, for several test files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny_models import make_tiny
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

BOS, EOS, END = 1, 2, 3

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}\x03{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Returns a tokenizer whose ids are code points; 2 is EOS and 3 ends a turn."""
    inner = Tokenizer(WordLevel({chr(code): code for code in range(128)}, unk_token=chr(0)))
    inner.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=chr(EOS),
        additional_special_tokens=[chr(END)],
        chat_template=template,
    )


def build_base(
    path: Path, name: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Returns the folder of a tiny model with a tokenizer."""
    make_tiny(name, dtype, **changes).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """Returns the path of a JSONL file with `rows`."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Returns instruction and response of random letters, of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(97, 123, (2 * count, 24), generator=generator).tolist()
    lengths = torch.randint(3, 24, (2 * count,), generator=generator).tolist()
    text = ["".join(map(chr, word[:length])) for word, length in zip(words, lengths, strict=True)]
    return [
        {"instruction": asked, "response": answer}
        for asked, answer in zip(text[::2], text[1::2], strict=True)
    ]
