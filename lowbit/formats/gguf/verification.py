"""What can be checked of a GGUF file by itself."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from lowbit.errors import LowbitError
from lowbit.formats.gguf.blocks import CHUNK_WEIGHTS, scales_are_finite, zero_scales
from lowbit.formats.gguf.checkpoint import GgufCheckpoint, GgufEntry
from lowbit.formats.gguf.digest import DIGEST_KEY, SUMMARY_KEY, check_digest
from lowbit.formats.gguf.header import MAX_ALIGNMENT, GgufHeader

# name, passed, detail
Check = tuple[str, bool, str]


def verify_file(path: str | Path) -> list[Check]:
    """Returns the checks of a GGUF file: name, whether it passed, and what was found.

    The first one is of header and metadata; where that fails nothing else can be checked. A file
    that another tool wrote has no digest, and may have scales of zero.
    """
    try:
        checkpoint = GgufCheckpoint.open_file(path)
    except LowbitError as error:
        return [("header", False, str(error))]
    header = checkpoint.header
    ours = DIGEST_KEY in header.metadata
    count = len(header.tensors)
    checks = [
        ("header", True, f"{count} tensors of {checkpoint.architecture.name}, none missing"),
        _named("placement", lambda: _placement(header)),
        _named("scales", lambda: _scales(checkpoint, ours)),
        _named("types", lambda: _types(header)),
        _named("tokenizer", lambda: _tokenizer(checkpoint)),
    ]
    return [*checks, _named("digest", lambda: check_digest(header))]


def _named(name: str, check: Callable[[], str]) -> Check:
    try:
        return name, True, check()
    except LowbitError as error:
        return name, False, str(error)


def _placement(header: GgufHeader) -> str:
    """Checks that nothing but padding is between tensors and after them."""
    end = header.data_begin
    alignment = header.metadata.get("general.alignment", 32)
    for tensor in sorted(header.tensors.values(), key=lambda tensor: tensor.begin):
        if tensor.begin - end >= alignment:
            raise LowbitError(f"{tensor.begin - end} bytes before {tensor.name!r} belong to none")
        end = tensor.end
    if header.size - end >= min(alignment, MAX_ALIGNMENT):
        raise LowbitError(f"{header.size - end} bytes after the last tensor belong to none")
    return "every byte belongs to one tensor"


def _scales(checkpoint: GgufCheckpoint, ours: bool) -> str:
    """Checks every fp16 of blocks and every float."""
    empty = 0
    for entry in checkpoint.entries.values():
        assert isinstance(entry, GgufEntry)
        step = max(1, CHUNK_WEIGHTS // max(1, (entry.end - entry.begin) // entry.rows))
        for first in range(0, entry.rows, step):
            raw = entry.raw_rows(first, min(first + step, entry.rows))
            if not scales_are_finite(raw, entry.kind):
                raise LowbitError(f"{entry.name!r} ({entry.kind.name}) holds NaN or Inf")
            if entry.kind.dtype is None:
                empty += int(torch.count_nonzero(zero_scales(raw, entry.kind)))
    if empty and ours:
        raise LowbitError(f"{empty} blocks have the scale 0, which is never written")
    return "no NaN, no Inf" + (f", {empty} blocks of zeros" if empty else ", no zero")


def _types(header: GgufHeader) -> str:
    """Checks that as many tensors are of each type as the file says of itself."""
    found = Counter(t.kind.name for t in header.tensors.values() if len(t.shape) > 1)
    said = header.metadata.get(SUMMARY_KEY)
    text = ", ".join(f"{count} {name}" for name, count in sorted(found.items()))
    if said is None:
        return text
    if said != json.dumps(dict(found), sort_keys=True):
        raise LowbitError(f"holds {text}, but was written with {str(said)[:200]}")
    return text


def _tokenizer(checkpoint: GgufCheckpoint) -> str:
    from lowbit.formats.gguf.tokenizer import TOKENS, tokenizer_of

    rows = checkpoint.config["vocab_size"]
    tokenizer = tokenizer_of(checkpoint.header)
    if tokenizer is None:
        return "none: the file takes token ids"
    tokens = len(checkpoint.header.metadata[TOKENS])
    if tokens != rows:
        raise LowbitError(f"{tokens} tokens, but the embedding has {rows} rows")
    return f"{tokens} tokens"
