"""What a checkpoint weighs, counted from the headers of its files; no tensor is loaded.

Bits per weight are measured, not computed from a scheme: codes, padding, scales, zero points and
the stored shape all count, and a head that stayed 16-bit shows in the bits per parameter.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lowbit.checkpoint.reader import Checkpoint, TensorEntry

# The suffixes of one quantized weight's tensors, as `lowbit.scheme` names them.
PACKED, SHAPE = "weight_packed", "weight_shape"

# Formats whose packed tensors are the ones above; another's cannot be told from plain integers.
KNOWN_METHODS = (None, "lowbit", "compressed-tensors")


@dataclass(frozen=True)
class CheckpointSize:
    """Bytes and bits of a checkpoint on disk.

    Args:
        bytes_on_disk: its safetensors files, headers included.
        parameters: weights of the model, each quantized one counted once and not by its words;
            tied weights count as often as they are stored. None for an unknown format.
        bits_per_parameter: bits of all tensors by `parameters`.
        quantized_weights: weights stored in low bits, 0 for a 16-bit checkpoint.
        quantized_bits_per_weight: bits stored for those by their number.
    """

    bytes_on_disk: int
    parameters: int | None
    bits_per_parameter: float | None
    quantized_weights: int
    quantized_bits_per_weight: float | None


def measure_size(path: str | Path) -> CheckpointSize:
    """Returns the size of the local checkpoint at `path`.

    Raises:
        LowbitError: it is no checkpoint, or a file is truncated or missing.
    """
    checkpoint = Checkpoint.open(path)
    bytes_on_disk = sum(file.stat().st_size for file in checkpoint.files())
    quantization = checkpoint.config.get("quantization_config") or {}
    if quantization.get("quant_method") not in KNOWN_METHODS:
        return CheckpointSize(bytes_on_disk, None, None, 0, None)
    modules: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
    for name, entry in checkpoint.entries.items():
        module, _, suffix = name.rpartition(".")
        modules[module][suffix] = entry
    quantized_weights = quantized_bytes = plain_parameters = 0
    for tensors in modules.values():
        parts: dict[str, TensorEntry] = {}
        if PACKED in tensors and SHAPE in tensors:
            parts = {name: entry for name, entry in tensors.items() if name.startswith("weight_")}
            # Two integers are read: a packed row is padded, so its width does not tell.
            quantized_weights += math.prod(tensors[SHAPE].read().tolist())
            quantized_bytes += _stored(parts.values())
        plain_parameters += sum(
            math.prod(entry.shape) for name, entry in tensors.items() if name not in parts
        )
    parameters = plain_parameters + quantized_weights
    return CheckpointSize(
        bytes_on_disk=bytes_on_disk,
        parameters=parameters,
        bits_per_parameter=8 * _stored(checkpoint.entries.values()) / max(parameters, 1),
        quantized_weights=quantized_weights,
        quantized_bits_per_weight=8 * quantized_bytes / quantized_weights
        if quantized_weights
        else None,
    )


def _stored(entries: Iterable[TensorEntry]) -> int:
    """Returns the bytes of the tensors."""
    return sum(entry.end - entry.begin for entry in entries)
