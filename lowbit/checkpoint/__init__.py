"""Checkpoints on disk: checked before use, read lazily, written atomically, resumed exactly."""

from lowbit.checkpoint.reader import Checkpoint, TensorEntry
from lowbit.checkpoint.writer import ShardWriter, write_json

__all__ = ["Checkpoint", "ShardWriter", "TensorEntry", "write_json"]
