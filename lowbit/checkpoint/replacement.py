"""Exchanging tensors in finished shards, without a moment at which a kill would cost the run.

    1. the new tensors in one file of their own, atomically
    2. the journal learns the digest that each shard will have; from here on a shard may be either
    3. shard after shard is rewritten (temporary file, rename); one that is new already is left
    4. the journal forgets the old digests, then the file of step 1 goes

Killed before step 2, the tensors are found again, alike, for every step is deterministic. Killed
after it, `finish_replacement` goes on. New tensors have the shape and the dtype of those that they
replace, so every header stays, and nothing but their bytes changes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.checkpoint.journal import Journal
from lowbit.checkpoint.reader import HASH_CHUNK_BYTES, TensorEntry, file_digest, read_header
from lowbit.checkpoint.writer import (
    TEMPORARY_SUFFIX,
    ShardWriter,
    disk_errors,
    fsync_directory,
)

REPLACEMENT_NAME = "lowbit_replacement.safetensors"


def begin_replacement(
    journal: Journal, tensors: Mapping[str, Tensor], stage: str, report: dict[str, Any]
) -> None:
    """Records that `tensors` shall replace those of the same names in the finished shards.

    Args:
        journal: of a run whose shards are all finished.
        tensors: name -> tensor; may be empty, then only the report is recorded.
        stage: name of the step that made them.
        report: what the manifest says of it, JSON values.
    """
    file = journal.directory / REPLACEMENT_NAME
    digests: dict[str, str] = {}
    if tensors:
        with ShardWriter(file, ShardWriter.header_bound(list(tensors))) as writer:
            for name, tensor in tensors.items():
                writer.add(name, tensor)
        new = _new_tensors(journal.directory)
        for name, part in journal.parts.items():
            digest = hashlib.sha256()
            for chunk in _content(journal.directory / part["file"], new):
                digest.update(chunk)
            digests[name] = digest.hexdigest()
    journal.begin_stage(stage, report, digests)


def finish_replacement(journal: Journal) -> None:
    """Brings what `begin_replacement` recorded to the shards; does nothing where that is done."""
    directory, pending = journal.directory, journal.replacements()
    if pending:
        new = _new_tensors(directory)
        for file, digest in pending.items():
            if file_digest(directory / file) != digest:
                _rewrite(directory / file, new)
        journal.finish_stage()
    (directory / REPLACEMENT_NAME).unlink(missing_ok=True)


def _new_tensors(directory: Path) -> dict[str, TensorEntry]:
    return {entry.name: entry for entry in read_header(directory / REPLACEMENT_NAME)}


def _content(file: Path, new: Mapping[str, TensorEntry]) -> Iterator[bytes]:
    """Yields the bytes of the shard `file` with the tensors `new` in place of its own."""
    position = 0
    for entry in read_header(file):
        replacement = new.get(entry.name)
        if replacement is None:
            continue
        if (replacement.shape, replacement.dtype) != (entry.shape, entry.dtype):
            raise AssertionError(f"{entry.name}: a replacement must have its shape and dtype")
        yield from _chunks(file, position, entry.begin)
        yield from _chunks(replacement.file, replacement.begin, replacement.end)
        position = entry.end
    yield from _chunks(file, position, file.stat().st_size)


def _chunks(file: Path, begin: int, end: int) -> Iterator[bytes]:
    with file.open("rb") as handle:
        handle.seek(begin)
        while begin < end:
            chunk = handle.read(min(HASH_CHUNK_BYTES, end - begin))
            if not chunk:
                raise AssertionError(f"{file}: became shorter while it was read")
            begin += len(chunk)
            yield chunk


def _rewrite(file: Path, new: Mapping[str, TensorEntry]) -> None:
    temporary = file.with_name(file.name + TEMPORARY_SUFFIX)
    with disk_errors(file):
        try:
            with temporary.open("wb") as handle:
                for chunk in _content(file, new):
                    handle.write(chunk)
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(file)
            fsync_directory(file.parent)
        finally:
            temporary.unlink(missing_ok=True)
