"""Writing that is either complete or absent: temporary file, fsync, rename, fsync of the directory.

A shard is appended to tensor by tensor, so that a block never has to be held twice. safetensors
puts its header first, so the space is reserved and padded with blanks (which the format allows),
and filled in at the end. The format also wants every tensor aligned and no holes: tensors whose
size is a multiple of 8 bytes are written at once, the few others are kept until the end and
written by falling item size.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lowbit.checkpoint.reader import SAFETENSORS_DTYPES
from lowbit.errors import LowbitError

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_ALIGNMENT = 8
_WRITE_CHUNK_BYTES = 1 << 24
TEMPORARY_SUFFIX = ".tmp"


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns what the file system refuses into one sentence that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise LowbitError(
                f"{path}: the disk is full ({error.strerror}); free some space and run the same "
                "command with --resume, finished blocks are kept"
            ) from error
        raise LowbitError(
            f"{path}: cannot be written ({error.strerror}); choose another output directory"
        ) from error


def fsync_directory(directory: Path) -> None:
    """Makes renames inside `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(file: Path, content: bytes) -> None:
    """Replaces `file` by `content`, atomically and durably."""
    temporary = file.with_name(file.name + TEMPORARY_SUFFIX)
    with disk_errors(file):
        try:
            with temporary.open("wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(file)
            fsync_directory(file.parent)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Replaces `file` by `content` as JSON, atomically and durably; keys keep their order."""
    write_bytes(file, (json.dumps(content, indent=2) + "\n").encode())


class ShardWriter:
    """Appends tensors to one safetensors file, which appears under its name only when complete.

    Args:
        file: the final path.
        header_bytes: an upper bound for the header, see `header_bound`.
    """

    def __init__(self, file: Path, header_bytes: int) -> None:
        self.file = file
        self._temporary = file.with_name(file.name + TEMPORARY_SUFFIX)
        self._reserved = -(-header_bytes // _ALIGNMENT) * _ALIGNMENT
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._position = 0
        self._deferred: list[tuple[str, Tensor]] = []
        with disk_errors(file):
            self._handle: BinaryIO = self._temporary.open("wb")
            self._handle.seek(8 + self._reserved)

    @staticmethod
    def header_bound(names: list[str]) -> int:
        """Returns bytes that surely hold the header of tensors `names` of up to 4 dimensions.

        Rounded name by name, so that what a tensor adds to a file does not depend on the others
        and sizes of whole checkpoints can be known beforehand (see `pipeline/sizes.py`).
        """
        return 64 + sum(ShardWriter.header_bytes(name) for name in names)

    @staticmethod
    def header_bytes(name: str) -> int:
        """Returns what a tensor `name` adds to the reserved header, a multiple of 8."""
        return -(-(len(json.dumps(name)) + 160) // _ALIGNMENT) * _ALIGNMENT

    def add(self, name: str, tensor: Tensor) -> None:
        """Appends `tensor` under `name`."""
        if name in self._header or any(name == other for other, _ in self._deferred):
            raise AssertionError(f"{name} is written twice")
        if tensor.numel() * tensor.element_size() % _ALIGNMENT:
            self._deferred.append((name, tensor.detach().cpu()))
        else:
            self._append(name, tensor)

    def _append(self, name: str, tensor: Tensor) -> None:
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        with disk_errors(self.file):
            for start in range(0, flat.numel(), _WRITE_CHUNK_BYTES):
                self._handle.write(flat[start : start + _WRITE_CHUNK_BYTES].numpy().data)
        end = self._position + flat.numel()
        self._header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._position, end],
        }
        self._position = end

    def finish(self) -> None:
        """Writes what was kept, the header, and makes the file durable under its name."""
        for name, tensor in sorted(self._deferred, key=lambda item: -item[1].element_size()):
            self._append(name, tensor)
        header = json.dumps(self._header, separators=(",", ":")).encode()
        if len(header) > self._reserved:
            raise AssertionError(f"{self.file}: header of {len(header)} > {self._reserved} bytes")
        with disk_errors(self.file):
            self._handle.seek(0)
            self._handle.write(self._reserved.to_bytes(8, "little") + header.ljust(self._reserved))
            self._handle.flush()
            os.fsync(self._handle.fileno())
            self._handle.close()
            self._temporary.replace(self.file)
            fsync_directory(self.file.parent)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            # After a failure; the error that matters is on its way, not one from cleaning up.
            with suppress(OSError):
                self._handle.close()
            with suppress(OSError):
                self._temporary.unlink(missing_ok=True)
