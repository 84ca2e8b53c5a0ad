"""A GGUF file as a checkpoint: names, shapes and config.json of Hugging Face.

A tensor whose blocks one of our schemes holds exactly is left in blocks: its entry is uint8, and
`Gguf.read` (`layout.py`) makes a weight of it. All others are decoded when they are read. Rows of q
and k are put in the order of Hugging Face first; a row is whole bytes, so blocks can be moved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.checkpoint import Checkpoint
from lowbit.checkpoint.reader import TensorEntry, file_digest
from lowbit.errors import LowbitError
from lowbit.formats.gguf.architectures import ROPE_FACTORS, Architecture
from lowbit.formats.gguf.blocks import (
    CHUNK_WEIGHTS,
    decode_rows,
    scales_are_finite,
    unpack_blocks,
    zero_points,
)
from lowbit.formats.gguf.configuration import architecture_of_file, config_of_file
from lowbit.formats.gguf.digest import check_digest
from lowbit.formats.gguf.header import GgufHeader, GgufTensor, read_gguf_header
from lowbit.formats.gguf.types import GgmlType

SUFFIX = ".gguf"
FILE_NAME = f"model{SUFFIX}"  # in a folder of its own
QUANT_METHOD = "gguf"


@dataclass(frozen=True)
class GgufEntry(TensorEntry):
    """One tensor of a GGUF file under its name at Hugging Face.

    Args:
        name: at Hugging Face.
        file: the GGUF file.
        dtype: of what `read` returns; uint8 for blocks that stay blocks.
        shape: of what `read` returns.
        begin: of its bytes.
        end: after its bytes.
        kind: its type in the file.
        in_blocks: it is read as blocks, uint8 `[rows, bytes]`.
        heads: so many heads of rows are interleaved in the file; 0 for none.
    """

    kind: GgmlType
    in_blocks: bool = False
    heads: int = 0

    def read(self) -> Tensor:
        """Returns the tensor, its rows in the order of Hugging Face."""
        raw = self.raw_rows(0, self.rows)
        if self.heads:
            raw = raw.unflatten(0, (self.heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
        if self.in_blocks:
            return raw
        return decode_rows(raw, self.kind, self.dtype).view(self.shape)

    @property
    def rows(self) -> int:
        """Rows in the file; a vector whose parts are to be moved has one for each number."""
        if len(self.shape) > 1:
            return self.shape[0]
        return self.shape[0] if self.heads else 1

    def raw_rows(self, first: int, last: int) -> Tensor:
        """Returns rows `first ... last - 1` as they are in the file, uint8 `[rows, bytes]`."""
        width = (self.end - self.begin) // self.rows
        begin, size = self.begin + first * width, (last - first, width)
        plain = TensorEntry(self.name, self.file, torch.uint8, size, begin, begin + size[0] * width)
        return plain.read()


class GgufCheckpoint(Checkpoint):
    """A GGUF file. Construct it with `GgufCheckpoint.open_file`.

    Attributes:
        header: of the file.
        architecture: of the model.
        decoded: name of a type -> how many tensors of it are decoded to floats, for no scheme here
            has its values.
    """

    def __init__(self, header: GgufHeader) -> None:
        self.header = header
        self.architecture: Architecture = architecture_of_file(header)
        config = config_of_file(header, lambda: _floats(header, ROPE_FACTORS))
        # Of a file of floats too: it is no folder that transformers could load.
        config["quantization_config"] = {"quant_method": QUANT_METHOD}
        entries: dict[str, TensorEntry] = {}
        decoded: Counter[str] = Counter()
        for tensor in sorted(header.tensors.values(), key=lambda tensor: tensor.begin):
            name = self.architecture.hub_name(tensor.name)
            if name is None:
                continue  # the factors, which config.json has
            entry = _entry(header, tensor, name, self.architecture.heads(tensor.name, config))
            entries[name] = entry
            if tensor.kind.dtype is None and not entry.in_blocks:
                decoded[tensor.kind.name] += 1
        self.decoded = dict(decoded)
        super().__init__(header.path, config, entries)

    @staticmethod
    def open_file(path: str | Path) -> GgufCheckpoint:
        """Returns the checkpoint in a GGUF file after checking header and metadata.

        Raises:
            LowbitError: naming the file, and the key or the tensor that is impossible.
        """
        return GgufCheckpoint(read_gguf_header(path))

    def verify(self, advance: Callable[[int], None] | None = None) -> dict[str, str]:
        """Returns file name -> SHA-256, after looking at every float and every scale of a block.

        Raises:
            LowbitError: naming a tensor that holds NaN or Inf; data that are not what we wrote.
        """
        try:
            check_digest(self.header)
        except LowbitError as error:
            raise LowbitError(f"{self.path}: {error}") from None
        for entry in self.entries.values():
            assert isinstance(entry, GgufEntry)
            width = (entry.end - entry.begin) // entry.rows
            step = max(1, CHUNK_WEIGHTS // width)
            for first in range(0, entry.rows, step):
                raw = entry.raw_rows(first, min(first + step, entry.rows))
                if not scales_are_finite(raw, entry.kind):
                    raise LowbitError(
                        f"{entry.file}: tensor {entry.name!r} ({entry.kind.name}) holds NaN or "
                        "Inf; a model with such weights is broken, fetch it again"
                    )
                if advance is not None:
                    advance(raw.numel())
        return {self.path.name: file_digest(self.path)}

    def decoded_note(self) -> str | None:
        """Returns a sentence on the tensors that are decoded, None if there are none."""
        if not self.decoded:
            return None
        kinds = ", ".join(f"{count} of {kind}" for kind, count in sorted(self.decoded.items()))
        return (
            f"{self.path}: decoded to bf16 are tensors that no scheme here holds exactly ({kinds})"
        )


def _entry(header: GgufHeader, tensor: GgufTensor, name: str, heads: int) -> GgufEntry:
    """Returns the entry of a tensor; in blocks where a scheme has every value of them."""
    kind, place = tensor.kind, (tensor.begin, tensor.end)
    dtype = torch.bfloat16 if kind.dtype is None else kind.dtype
    decoded = GgufEntry(name, header.path, dtype, tensor.shape, *place, kind, False, heads)
    if kind.scheme is None or len(tensor.shape) != 2:
        return decoded
    blocks = (tensor.shape[0], kind.row_bytes(tensor.shape[1]))
    entry = GgufEntry(name, header.path, torch.uint8, blocks, *place, kind, True, heads)
    return entry if kind.scheme.symmetric or _has_zero_points(entry) else decoded


def _has_zero_points(entry: GgufEntry) -> bool:
    """Returns whether all minima of Q4_1 are whole steps of their scales; else seen at once."""
    step = max(1, CHUNK_WEIGHTS // entry.shape[1] // 8)
    for first in range(0, entry.rows, step):
        raw = entry.raw_rows(first, min(first + step, entry.rows))
        if zero_points(unpack_blocks(raw, entry.kind)) is None:
            return False
    return True


def _floats(header: GgufHeader, name: str) -> np.ndarray[Any, Any]:
    tensor = header.tensors[name]
    if tensor.kind.dtype is None or len(tensor.shape) != 1:
        raise LowbitError(f"{header.path}: tensor {name!r} is {tensor.kind.name}, needed F32")
    place = (tensor.begin, tensor.end)
    entry = GgufEntry(name, header.path, torch.float32, tensor.shape, *place, tensor.kind)
    return entry.read().numpy()
