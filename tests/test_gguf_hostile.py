"""Damaged and hostile GGUF files end in one sentence, at once and in little memory."""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import file_bytes, string, write_model

import lowbit
from lowbit.errors import LowbitError
from lowbit.formats.gguf import verify_file
from lowbit.formats.gguf.checkpoint import GgufCheckpoint
from lowbit.formats.gguf.header import read_gguf_header
from lowbit.formats.gguf.tokenizer import tokenizer_of

RNG = np.random.default_rng()
HUGE = (1 << 62) - 1
ROW = bytes(18 * 2)  # two blocks of Q4_0
EMBEDDING = {"token_embd.weight": (2, (4, 64), ROW * 4)}
LLAMA = {
    "general.architecture": "llama",
    "llama.context_length": 64,
    "llama.block_count": 1,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 32,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}


def header(tensors: int, keys: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def info(name: str | bytes, shape: tuple[int, ...], kind: int = 2, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *shape[::-1])
    return string(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


def key(name: str | bytes, kind: int, content: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + content


# name -> (bytes of a file, what the sentence says)
FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is no GGUF file"),
    "another magic": (b"GGML" + bytes(60), "is no GGUF file"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(60), "big-endian"),
    "version 1": (header(0, 0, bytes(40), version=1), "of version 1"),
    "version 999": (header(0, 0, bytes(40), version=999), "of version 999"),
    "tensors without end": (header(HUGE, 0, bytes(64)), f"claims {HUGE} tensors"),
    "keys without end": (header(0, HUGE, bytes(64)), f"claims {HUGE} keys"),
    "a key of terabytes": (header(0, 1, struct.pack("<Q", HUGE) + bytes(64)), "the name of a key"),
    "a string of terabytes": (
        header(0, 1, key("a", 8, struct.pack("<Q", HUGE)) + bytes(64)),
        "bytes in key 'a'",
    ),
    "an array of terabytes": (
        header(0, 1, key("a", 9, struct.pack("<IQ", 4, HUGE)) + bytes(64)),
        "elements in key 'a'",
    ),
    "strings without end": (
        header(0, 1, key("a", 9, struct.pack("<IQ", 8, HUGE)) + bytes(64)),
        "strings in key 'a'",
    ),
    "an array of arrays": (
        header(0, 1, key("a", 9, struct.pack("<IQ", 9, 1)) + bytes(64)),
        "array of the unknown type 9",
    ),
    "a value of no type": (header(0, 1, key("a", 77, b"") + bytes(64)), "unknown type 77"),
    "a key twice": (header(0, 2, key("a", 4, bytes(4)) * 2 + bytes(64)), "'a' twice"),
    "a key that is no text": (header(0, 1, key(b"\xff", 4, bytes(4)) + bytes(64)), "not UTF-8"),
    "no header to the end": (header(2, 0, bytes(80))[:60], "claims 2 tensors"),
    "cut": (header(1, 0, info("a", (4, 64)))[:-4] + b"", "ends within"),
    "an alignment of 3": (
        header(0, 1, key("general.alignment", 4, struct.pack("<I", 3)) + bytes(64)),
        "power of two",
    ),
    "no dimensions": (header(1, 0, info("a", ()) + bytes(64)), "0 dimensions"),
    "too many dimensions": (header(1, 0, info("a", (1,) * 9) + bytes(64)), "9 dimensions"),
    "a tensor of terabytes": (header(1, 0, info("a", (HUGE, 64)) + bytes(64)), "the file has"),
    "a product that wraps": (
        header(1, 0, info("a", (1 << 32, 1 << 32)) + bytes(64)),
        "the file has",
    ),
    "rows that blocks do not fill": (header(1, 0, info("a", (4, 40)) + bytes(200)), "blocks of 32"),
    "no rows": (header(1, 0, info("a", (0, 64)) + bytes(200)), "[0, 64]"),
    "an unknown type": (header(1, 0, info("a", (4, 64), 999) + bytes(400)), "unknown type 999"),
    "a type that is not decoded": (header(1, 0, info("a", (4, 64), 29) + bytes(400)), "IQ1_M"),
    "outside of the file": (header(1, 0, info("a", (4, 64), 2, 4096) + bytes(400)), "the file has"),
    "an offset of terabytes": (
        header(1, 0, info("a", (4, 64), 2, HUGE) + bytes(400)),
        "the file has",
    ),
    "not aligned": (header(1, 0, info("a", (4, 64), 2, 7) + bytes(400)), "begins at 7"),
    "overlapping": (
        header(2, 0, info("a", (4, 64)) + info("b", (4, 64), 2, 32) + bytes(400)),
        "'a' and 'b' overlap",
    ),
    "a tensor twice": (header(2, 0, info("a", (4, 64)) * 2 + bytes(400)), "twice"),
    "another architecture": (
        file_bytes({"general.architecture": "mamba"}, EMBEDDING),
        "its architecture is 'mamba'",
    ),
    "no architecture": (file_bytes({}, EMBEDDING), "its architecture is 'None'"),
    "a part of a split file": (file_bytes({**LLAMA, "split.count": 3}, EMBEDDING), "a split file"),
    "experts": (file_bytes({**LLAMA, "llama.expert_count": 8}, EMBEDDING), "experts"),
    "blocks without end": (
        file_bytes({**LLAMA, "llama.block_count": 1 << 30}, EMBEDDING),
        "says 1073741824 blocks",
    ),
    "a huge width": (
        file_bytes({**LLAMA, "llama.embedding_length": 1 << 30}, EMBEDDING),
        "describes [4, 1073741824]",
    ),
    "no heads": (
        file_bytes({**LLAMA, "llama.attention.head_count": 0}, EMBEDDING),
        "head_count is 0",
    ),
    "text for a number": (
        file_bytes({**LLAMA, "llama.context_length": "many"}, EMBEDDING),
        "context_length is many",
    ),
    "epsilon is NaN": (
        file_bytes({**LLAMA, "llama.attention.layer_norm_rms_epsilon": float("nan")}, EMBEDDING),
        "rms_epsilon is nan",
    ),
    "missing tensors": (file_bytes(LLAMA, EMBEDDING), "is missing"),
    "no embedding": (file_bytes(LLAMA, {}), "'token_embd.weight' is missing"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_one_sentence(name: str, tmp_path: Path) -> None:
    content, reason = FILES[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    start = time.monotonic()
    with pytest.raises(LowbitError) as caught:
        GgufCheckpoint.open_file(path)
    assert time.monotonic() - start < 1
    assert tracemalloc.get_traced_memory()[1] < 1 << 23
    tracemalloc.stop()
    assert str(caught.value).startswith(str(path))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not verify_file(path)[0][1]
    with pytest.raises(LowbitError):
        lowbit.load(path)


def changed(path: Path, change: Callable[[Any], None]) -> Path:
    """Returns a file with its metadata and tensors, as a dict each, changed."""
    found = read_gguf_header(path)
    content = path.read_bytes()
    metadata = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in found.metadata.items()}
    tensors = {
        t.name: (t.kind.number, t.shape, content[t.begin : t.end]) for t in found.tensors.values()
    }
    change((metadata, tensors))
    out = path.with_name("changed.gguf")
    out.write_bytes(file_bytes(metadata, tensors))
    return out


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    write_model(path, "llama", "Q4_0", RNG, intermediate_size=160, head_dim=16, num_hidden_layers=1)
    return path


def test_tensors_that_a_model_lacks_or_has_too_many_are_named(model: Path) -> None:
    changes = {
        "'blk.0.attn_q.weight' is missing": lambda f: f[1].pop("blk.0.attn_q.weight"),
        "'blk.0.attn_x.weight' has no place": lambda f: f[1].update(
            {"blk.0.attn_x.weight": (0, (1,), bytes(4))}
        ),
        "'output_norm.weight' is [32]": lambda f: f[1].update(
            {"output_norm.weight": (0, (32,), bytes(128))}
        ),
        "'rope_freqs.weight' holds other factors": lambda f: f[1].update(
            {"rope_freqs.weight": (0, (8,), struct.pack("<8f", *range(1, 9)))}
        ),
        "'rope_freqs.weight' is Q4_0": lambda f: f[1].update(
            {"rope_freqs.weight": (2, (2, 32), bytes(36))}
        ),
        "of 15 have no two halves": lambda f: f[0].update({"llama.attention.key_length": 15}),
        "rope.dimension_count is not": lambda f: f[0].update({"llama.rope.dimension_count": 8}),
        "'longrope' is not read": lambda f: f[0].update({"llama.rope.scaling.type": "longrope"}),
    }
    for reason, change in changes.items():
        with pytest.raises(LowbitError, match=reason.replace("[", r"\[")):
            GgufCheckpoint.open_file(changed(model, change))


def test_nan_in_a_scale_is_named_with_its_tensor(model: Path, tmp_path: Path) -> None:
    def spoil(found: Any) -> None:
        kind, shape, content = found[1]["blk.0.ffn_up.weight"]
        spoiled = content[:18] + struct.pack("<e", float("nan")) + content[20:]
        found[1]["blk.0.ffn_up.weight"] = kind, shape, spoiled

    path = changed(model, spoil)
    name = r"model\.layers\.0\.mlp\.up_proj\.weight"
    with pytest.raises(LowbitError, match=f"{name}.*NaN"):
        lowbit.convert(path, tmp_path / "out", "lowbit", progress=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(LowbitError, match=f"changed.gguf: .*{name}.*NaN"):
        lowbit.load(path)
    assert [name for name, passed, _ in verify_file(path) if not passed] == ["scales"]


VOCABULARY = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b", "ab"]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokenizer.ggml.tokens": ["a", "a", "b"]}, "a token twice"),
        ({"tokenizer.ggml.tokens": "abc"}, "no list of strings"),
        ({"tokenizer.ggml.merges": ["a c"]}, "no list of pairs"),
        ({"tokenizer.ggml.merges": ["ab"]}, "no list of pairs"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "not a number for each of 3"),
        ({"tokenizer.ggml.model": "wordpiece"}, "tokenizer cannot be loaded"),
        ({"tokenizer.ggml.scores": [1.0]}, "not a number for each of 3"),
    ],
)
def test_an_impossible_vocabulary_is_one_sentence(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    metadata = {**LLAMA, **VOCABULARY, "tokenizer.ggml.merges": ["a b"], **change}
    path = tmp_path / "x.gguf"
    path.write_bytes(file_bytes(metadata, EMBEDDING))
    with pytest.raises(LowbitError, match=reason):
        tokenizer_of(read_gguf_header(path))


def test_a_file_cut_anywhere_is_refused(model: Path, tmp_path: Path) -> None:
    content = model.read_bytes()
    path = tmp_path / "x.gguf"
    for length in [*RNG.integers(0, len(content) - 32, 40), 4, 8, 24]:
        path.write_bytes(content[: int(length)])
        with pytest.raises(LowbitError, match=str(path)):
            GgufCheckpoint.open_file(path)


def test_flipped_bytes_are_refused_or_decoded(model: Path, tmp_path: Path) -> None:
    """Whatever is in the header: a sentence, or a model of the size of the file."""
    content = model.read_bytes()
    begin = read_gguf_header(model).data_begin
    path = tmp_path / "x.gguf"
    for _ in range(150):
        broken = bytearray(content)
        for place in RNG.integers(0, begin, RNG.integers(1, 4)):
            broken[place] = RNG.integers(0, 256)
        path.write_bytes(bytes(broken))
        try:
            checkpoint = GgufCheckpoint.open_file(path)
            for entry in checkpoint.entries.values():
                assert isinstance(entry.read(), torch.Tensor)
        except LowbitError:
            pass
