"""What a file of ours says of itself: the digest of its data, and how many tensors of each type."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from lowbit.checkpoint.reader import HASH_CHUNK_BYTES
from lowbit.formats.gguf.header import read_gguf_header

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
