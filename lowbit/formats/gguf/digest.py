"""What a file of ours says of itself: the digest of its data, and how many tensors of each type."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from lowbit.checkpoint.reader import HASH_CHUNK_BYTES
from lowbit.errors import LowbitError
from lowbit.formats.gguf.header import GgufHeader, read_gguf_header

DIGEST_KEY, SUMMARY_KEY = "lowbit.data_sha256", "lowbit.summary"
NO_DIGEST = "0" * 64


def data_digest(file: Path) -> str:
    """Returns the SHA-256 of all bytes after the header."""
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        handle.seek(read_gguf_header(file).data_begin)
        while chunk := handle.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def check_digest(header: GgufHeader) -> str:
    """Returns the digest that a file says its data has, which it has, or that it says none.

    Raises:
        LowbitError: the data has another.
    """
    said = header.metadata.get(DIGEST_KEY)
    if said is None:
        return "the file has none"
    if said != data_digest(header.path):
        raise LowbitError("the data has changed since it was written; copy or write it again")
    return f"SHA-256 {str(said)[:12]}..."


def fill_in_digest(file: Path) -> None:
    """Replaces the zeros in the metadata by the digest of the data, and makes the file durable."""
    digest = data_digest(file)
    with file.open("r+b") as handle:
        header = handle.read(read_gguf_header(file).data_begin)
        place = header.index(NO_DIGEST.encode(), header.index(DIGEST_KEY.encode()))
        handle.seek(place)
        handle.write(digest.encode())
        handle.flush()
        os.fsync(handle.fileno())
