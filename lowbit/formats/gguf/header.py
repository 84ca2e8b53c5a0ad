"""The header of a GGUF file, read within bounds.

    "GGUF" | version u32 | tensors u64 | keys u64
    key, type u32, value                          for each key
    name, dimensions u32, sizes u64..., type u32, offset u64    for each tensor
    padding to the alignment, then the data; offsets count from here

A string is its length (u64) and UTF-8. Nothing is believed: every count and length is held against
the bytes that are left before anything is allocated for it.

Source: ggml `docs/gguf.md`, versions 2 and 3 (they differ in byte orders only).
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.errors import LowbitError
from lowbit.formats.gguf.types import BY_NUMBER, OTHER_TYPES, GgmlType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
# The largest vocabularies make headers of some 20 MB.
MAX_HEADER_BYTES = 100_000_000
MAX_KEYS = 1 << 16
MAX_NAME = 1 << 10
MAX_STRINGS = 1 << 21
MAX_DIMENSIONS = 4
READ_AHEAD = 1 << 20

# number -> (struct format, numpy dtype) of the values of fixed size
_FIXED = {
    0: ("<B", "<u1"), 1: ("<b", "<i1"), 2: ("<H", "<u2"), 3: ("<h", "<i2"), 4: ("<I", "<u4"),
    5: ("<i", "<i4"), 6: ("<f", "<f4"), 7: ("<B", "<u1"), 10: ("<Q", "<u8"), 11: ("<q", "<i8"),
    12: ("<d", "<f8"),
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9
# name, shape, type, offset
_Info = tuple[str, tuple[int, ...], int, int]


@dataclass(frozen=True)
class GgufTensor:
    """One tensor.

    Args:
        name: in the file.
        kind: its type.
        shape: outermost dimension first, as torch has it.
        begin: of its bytes in the file.
        end: after its bytes.
    """

    name: str
    kind: GgmlType
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class GgufHeader:
    """A checked header.

    Args:
        path: the file.
        metadata: key -> value: int, float, bool, str, list of str, or numpy array.
        tensors: by name, in the order of the header.
        data_begin: where the data begins.
        size: of the file.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    data_begin: int
    size: int


def read_gguf_header(path: str | Path) -> GgufHeader:
    """Returns the header of a GGUF file.

    Raises:
        LowbitError: naming the file, and the key or the tensor that is impossible.
    """
    path = Path(path)
    try:
        with path.open("rb") as handle:
            return _Reader(path, handle, path.stat().st_size).header()
    except FileNotFoundError:
        raise LowbitError(f"{path}: no such file; give a GGUF file") from None
    except OSError as error:
        raise LowbitError(f"{path}: cannot be read ({error.strerror})") from None


class _Reader:
    """Takes values off the front of a file."""

    def __init__(self, path: Path, handle: Any, size: int) -> None:
        self._path, self._handle, self._size = path, handle, size
        self._buffer, self._begin, self._at = b"", 0, 0

    def header(self) -> GgufHeader:
        """Returns the whole header."""
        if self._size < 24 or self._take(4, "the magic") != MAGIC:
            raise LowbitError(f"{self._path}: is no GGUF file; it must begin with the bytes GGUF")
        version = self._number("<I", "the version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            found = "big-endian" if swapped else f"of version {version}"
            raise LowbitError(
                f"{self._path}: is {found}; needed a little-endian GGUF of version 2 or 3"
            )
        tensors, keys = self._number("<Q", "counts"), self._number("<Q", "counts")
        self._require_count(tensors, 32, "tensors")
        self._require_count(keys, 13, "keys", MAX_KEYS)
        metadata = self._metadata(keys)
        infos = [self._info() for _ in range(tensors)]
        alignment = self._alignment(metadata)
        data_begin = -(-self._at // alignment) * alignment
        found_tensors = self._placed(infos, data_begin, alignment)
        return GgufHeader(self._path, metadata, found_tensors, data_begin, self._size)

    def _metadata(self, keys: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._string("the name of a key", MAX_NAME)
            if key in metadata:
                raise LowbitError(f"{self._path}: has the key {key!r} twice; fetch the file again")
            metadata[key] = self._value(self._number("<I", key), key)
        return metadata

    def _value(self, kind: int, key: str) -> Any:
        if kind in _FIXED:
            value = self._number(_FIXED[kind][0], key)
            return bool(value) if kind == _BOOL else value
        if kind == _STRING:
            return self._string(f"key {key!r}")
        if kind != _ARRAY:
            raise LowbitError(f"{self._path}: key {key!r} has the unknown type {kind}")
        kind, count = self._number("<I", key), self._number("<Q", key)
        if kind == _STRING:
            self._require_count(count, 8, f"strings in key {key!r}", MAX_STRINGS)
            return self._strings(count, key)
        if kind not in _FIXED:
            raise LowbitError(f"{self._path}: key {key!r} is an array of the unknown type {kind}")
        dtype = np.dtype(_FIXED[kind][1])
        self._require_count(count, dtype.itemsize, f"elements in key {key!r}")
        return np.frombuffer(self._take(count * dtype.itemsize, f"key {key!r}"), dtype)

    def _strings(self, count: int, key: str) -> list[str]:
        return [self._string(f"key {key!r}") for _ in range(count)]

    def _info(self) -> _Info:
        """Returns name, shape, type and offset of the next tensor."""
        name = self._string("the name of a tensor", MAX_NAME)
        where = f"tensor {name!r}"
        dimensions = self._number("<I", where)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise LowbitError(
                f"{self._path}: {where} has {dimensions} dimensions, needed 1 to {MAX_DIMENSIONS}"
            )
        sizes = struct.unpack(f"<{dimensions}Q", self._take(8 * dimensions, where))
        return name, sizes[::-1], self._number("<I", where), self._number("<Q", where)

    def _alignment(self, metadata: dict[str, Any]) -> int:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if (
            not isinstance(alignment, int)
            or not 1 <= alignment <= MAX_ALIGNMENT
            or alignment & (alignment - 1)
        ):
            raise LowbitError(
                f"{self._path}: general.alignment is {alignment!r}, needed a power of two"
            )
        return alignment

    def _placed(
        self,
        infos: Sequence[tuple[str, tuple[int, ...], int, int]],
        data_begin: int,
        alignment: int,
    ) -> dict[str, GgufTensor]:
        """Returns the tensors at their places in the file, after checking that they fit."""
        tensors: dict[str, GgufTensor] = {}
        for name, shape, number, offset in infos:
            where = f"{self._path}: tensor {name!r}"
            if name in tensors:
                raise LowbitError(f"{where} is there twice; fetch the file again")
            kind = BY_NUMBER.get(number)
            if kind is None:
                known = ", ".join(known.name for known in BY_NUMBER.values())
                found = OTHER_TYPES.get(number, f"the unknown type {number}")
                raise LowbitError(f"{where} is {found}, which is not decoded here; needed {known}")
            if 0 in shape or shape[-1] % kind.block:
                raise LowbitError(
                    f"{where} is {list(shape)}, but rows of {kind.name} are filled by blocks of "
                    f"{kind.block}"
                )
            begin = data_begin + offset
            end = begin + kind.row_bytes(shape[-1]) * math.prod(shape[:-1])
            if end > self._size:
                raise LowbitError(
                    f"{where} is {kind.name} {list(shape)} and ends at byte {end}, but the file "
                    f"has {self._size}; fetch it again"
                )
            if offset % alignment:
                raise LowbitError(f"{where} begins at {offset}, which {alignment} does not divide")
            tensors[name] = GgufTensor(name, kind, shape, begin, end)
        placed = sorted(tensors.values(), key=lambda tensor: tensor.begin)
        for first, second in itertools.pairwise(placed):
            if second.begin < first.end:
                raise LowbitError(
                    f"{self._path}: tensors {first.name!r} and {second.name!r} overlap; fetch the "
                    "file again"
                )
        return tensors

    def _require_count(
        self, count: int, least_bytes: int, what: str, limit: int | None = None
    ) -> None:
        """Refuses a count of things of which each takes at least `least_bytes` of the file."""
        left = min(self._size, MAX_HEADER_BYTES) - self._at
        most = left // least_bytes if limit is None else min(left // least_bytes, limit)
        if count > most:
            raise LowbitError(
                f"{self._path}: claims {count} {what}, but there is room for {most}; fetch the "
                "file again"
            )

    def _string(self, what: str, limit: int | None = None) -> str:
        length = self._number("<Q", what)
        self._require_count(length, 1, f"bytes in {what}", limit)
        try:
            return self._take(length, what).decode()
        except UnicodeDecodeError:
            raise LowbitError(f"{self._path}: {what} is not UTF-8; fetch the file again") from None

    def _number(self, form: str, what: str) -> Any:
        (value,) = struct.unpack(form, self._take(struct.calcsize(form), what))
        return value

    def _take(self, count: int, what: str) -> bytes:
        """Returns the next bytes."""
        start = self._at - self._begin
        if start + count > len(self._buffer):
            if self._at + count > min(self._size, MAX_HEADER_BYTES):
                raise LowbitError(
                    f"{self._path}: ends within {what}, or its header is longer than "
                    f"{MAX_HEADER_BYTES} bytes; fetch the file again"
                )
            self._handle.seek(self._at)
            self._begin, start = self._at, 0
            self._buffer = self._handle.read(max(count, READ_AHEAD))
            if len(self._buffer) < count:
                raise LowbitError(f"{self._path}: changed while it was read; try again")
        self._at += count
        return self._buffer[start : start + count]
