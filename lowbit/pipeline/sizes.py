"""The bytes of a checkpoint before it is written: of its safetensors files, headers included.

    file = 8 bytes + reserved header + data
    reserved header = 64 bytes + for each name what `ShardWriter.header_bytes` says

Every tensor adds the same whatever else is in its file, so the size of a checkpoint is what is
fixed plus one number for each quantized module and scheme. Index, tokenizer and manifest are JSON
of a few kilobytes beside the weights, and not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lowbit.checkpoint.writer import ShardWriter
from lowbit.hf.config import sentinel_key
from lowbit.models.streaming import StreamedDecoder
from lowbit.pipeline.pieces import plan_pieces
from lowbit.scheme import Scheme

# What stands before the header in a safetensors file: its length.
_LENGTH_BYTES = 8


def module_bytes(name: str, shape: tuple[int, int], scheme: Scheme) -> int:
    """Returns what the quantized module `name` with a weight `[out, in]` adds to a file."""
    headers = (ShardWriter.header_bytes(f"{name}.{key}") for key in scheme.tensor_specs(shape))
    return scheme.stored_bytes(shape) + sum(headers)


def fixed_bytes(decoder: StreamedDecoder, selected: Mapping[str, Scheme]) -> int:
    """Returns the bytes of all shards without what quantized modules add.

    Args:
        decoder: the source.
        selected: module name -> scheme; which scheme makes no difference.
    """
    total = 0
    sentinel = sentinel_key(selected)
    for piece in plan_pieces(decoder, dict(selected)):
        # The header of a shard has room for the names of the float weights as well.
        total += _LENGTH_BYTES + ShardWriter.header_bound([*piece.targets, sentinel])
        for target in piece.targets:
            if target.removesuffix(".weight") not in piece.modules:
                total += _stored_bytes(decoder, target)
    return total


def _stored_bytes(decoder: StreamedDecoder, target: str) -> int:
    """Returns the bytes of parameter `target` in the dtype of the checkpoint."""
    dtype = decoder.sources[target].entries[0].dtype
    return int(decoder.model.get_parameter(target).numel()) * dtype.itemsize


def written_bytes(directory: Path) -> int:
    """Returns the bytes of all safetensors files in `directory`."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))
