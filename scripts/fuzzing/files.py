"""The files of a case, and safetensors taken apart, so that damage can be made consistent.

A case is `Files`: name -> content. A name may have one folder in it; None is an empty directory of
that name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Files = dict[str, bytes | None]


@dataclass
class Part:
    """One tensor of a safetensors file.

    Args:
        dtype: its name in the header.
        shape: that the header gives it.
        content: the bytes.
    """

    dtype: str
    shape: list[int]
    content: bytes


def write_files(files: Files, folder: Path) -> None:
    """Writes a case to `folder`, which is made."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if content is None:
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(content)


def split_header(content: bytes) -> tuple[dict[str, Any], bytes] | None:
    """Returns header and payload of a safetensors file, None if it is none any more."""
    length = int.from_bytes(content[:8], "little")
    if length > len(content) - 8:
        return None
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError):
        return None
    return (header, content[8 + length :]) if isinstance(header, dict) else None


def join_header(header: Any, payload: bytes) -> bytes:
    """Returns a safetensors file, whatever the header says."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


def take_apart(content: bytes) -> dict[str, Part] | None:
    """Returns the tensors of a safetensors file, None if it is damaged already."""
    found = split_header(content)
    if found is None:
        return None
    header, payload = found
    parts = {}
    for name, fields in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
            sound = all(type(n) is int and 0 <= n <= len(payload) for n in (*shape, begin, end))
        except (KeyError, TypeError, ValueError):
            return None
        if not sound or not isinstance(dtype, str):
            return None
        parts[name] = Part(dtype, list(shape), payload[begin:end])
    return parts


def put_together(parts: dict[str, Part]) -> bytes:
    """Returns the safetensors file of `parts`, end to end."""
    header, payload = {}, b""
    for name, part in parts.items():
        offsets = [len(payload), len(payload) + len(part.content)]
        header[name] = {"dtype": part.dtype, "shape": part.shape, "data_offsets": offsets}
        payload += part.content
    return join_header(header, payload)
