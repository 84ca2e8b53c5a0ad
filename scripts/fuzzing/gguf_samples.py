"""Small sound GGUF files, written byte by byte, and damage that knows where their fields are.

"GGUF", version u32, tensors u64, keys u64
for each key     length u64, text, type u32, value
for each tensor  length u64, name, dimensions u32, sizes u64 each (innermost first), type u32,
                 offset u64
data, each tensor at a multiple of 32
"""

from __future__ import annotations

import random
import re
import struct
from typing import Any

from lowbit.formats.gguf.types import GGML_TYPES
from scripts.fuzzing.files import Files
from scripts.fuzzing.junk import INTEGERS

ALIGNMENT = 32
U32, F32, STRING, ARRAY = 4, 6, 8, 9
LEAVES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
VOCABULARY = 8
# Texts in a header, which is where fields can be told by their surroundings.
_TEXT = re.compile(rb"[a-z_0-9.]{6,}")


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(item: Any) -> bytes:
    if isinstance(item, int):
        return struct.pack("<II", U32, item)
    if isinstance(item, float):
        return struct.pack("<If", F32, item)
    if isinstance(item, str):
        return struct.pack("<I", STRING) + _string(item)
    kind = STRING if isinstance(item[0], str) else F32
    texts = kind == STRING
    body = b"".join(_string(each) if texts else struct.pack("<f", each) for each in item)
    return struct.pack("<IIQ", ARRAY, kind, len(item)) + body


def model(width: int, kinds: tuple[str, ...]) -> Files:
    """Returns a Llama of one block.

    Args:
        width: of everything, a multiple of the types' blocks.
        kinds: types that its matrices have in turn.
    """
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "llama.block_count": 1,
        "llama.embedding_length": width,
        "llama.feed_forward_length": width,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [f"t{index}" for index in range(VOCABULARY)],
        "tokenizer.ggml.scores": [0.0] * VOCABULARY,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    matrices = {f"blk.0.{leaf}.weight": (width, width) for leaf in LEAVES}
    matrices |= {"token_embd.weight": (VOCABULARY, width), "output.weight": (VOCABULARY, width)}
    vectors = ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight")
    tensors = {
        name: (kinds[index % len(kinds)], shape)
        for index, (name, shape) in enumerate(matrices.items())
    }
    return {"model.gguf": _file(metadata, tensors | dict.fromkeys(vectors, ("F32", (width,))))}


def _file(metadata: dict[str, Any], tensors: dict[str, tuple[str, tuple[int, ...]]]) -> bytes:
    chance = random.Random(0)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(_string(key) + _value(item) for key, item in metadata.items())
    body = b""
    for name, (kind_name, shape) in tensors.items():
        kind = GGML_TYPES[kind_name]
        rows = shape[0] if len(shape) > 1 else 1
        # No byte that makes a half-precision scale NaN, Inf or large.
        content = bytes(chance.randrange(1, 0x30) for _ in range(rows * kind.row_bytes(shape[-1])))
        head += _string(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", kind.number, len(body))
        body += content + bytes(-len(content) % ALIGNMENT)
    return head + bytes(-len(head) % ALIGNMENT) + body


def mutated_gguf(content: bytes, chance: random.Random) -> bytes:
    """Returns the file with a field of its header changed, or a text in it."""
    reach = content.find(bytes(64)) if chance.random() < 0.5 else len(content)
    texts = list(_TEXT.finditer(content, 0, reach if reach > 0 else len(content)))
    if not texts:
        return content[: chance.randrange(len(content) + 1)]
    text, other = chance.choice(texts), chance.choice(texts)
    kind = chance.randrange(6)
    if kind == 0:
        return content[: text.start()] + other.group() + content[text.end() :]
    if kind == 1:
        same = other.group()[: len(text.group())].ljust(len(text.group()), b"x")
        return content[: text.start()] + same + content[text.end() :]
    if kind == 2:
        return _overwritten(content, chance.choice((4, 8, 16)), 8, chance)  # version and counts
    if kind == 3:
        return _overwritten(content, max(0, text.start() - 8), 8, chance)
    # Behind a text: the type and the value of a key; dimensions, type and offset of a tensor.
    place = text.end() + chance.choice((0, 4, 8, 12, 20, 24))
    return _overwritten(content, place, chance.choice((4, 4, 8)), chance)


def _overwritten(content: bytes, place: int, width: int, chance: random.Random) -> bytes:
    value = chance.choice((*INTEGERS, *range(16), len(content), -32))
    field = (value % (1 << 8 * width)).to_bytes(width, "little")
    return content[:place] + field + content[place + width :]
