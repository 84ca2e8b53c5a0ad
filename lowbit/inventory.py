"""What a checkpoint holds, tensor by tensor, counted from its headers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.reader import Checkpoint, TensorEntry, read_quantized
from lowbit.errors import LowbitError
from lowbit.hf.config import LowbitConfig
from lowbit.models.selection import scheme_for
from lowbit.scheme import Scheme

_PACKED = ".weight_packed"


@dataclass(frozen=True)
class InventoryRow:
    """One parameter of the model.

    Args:
        name: the module for a quantized weight, the tensor otherwise.
        stored_as: scheme or dtype.
        shape: of the weight, unpacked.
        weights: number of weights.
        bytes: everything stored for it.
        bits_per_weight: 8 * bytes / weights.
        relative_error: ||decoded - original|| / ||original||, None where it was not measured.
    """

    name: str
    stored_as: str
    shape: tuple[int, ...]
    weights: int
    bytes: int
    bits_per_weight: float
    relative_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the row as JSON values."""
        return asdict(self)


def inventory(path: Path, against: Path | None = None) -> list[InventoryRow]:
    """Returns a row per parameter of the checkpoint at `path`, in the order of the files.

    Args:
        path: a checkpoint of ours, or in 16 bits; see `lowbit.formats.listing` for all others.
        against: the original, to measure the error of every quantized weight.

    Raises:
        LowbitError: as `Checkpoint.open`, or if `against` lacks a weight or has another shape.
    """
    return list(rows(Checkpoint.open(path), Checkpoint.open(against) if against else None))


def rows(checkpoint: Checkpoint, original: Checkpoint | None) -> Iterator[InventoryRow]:
    """Yields the same of checkpoints that are open."""
    schemes = module_schemes(checkpoint)
    parts = {
        f"{name}.{key}" for name, (s, shape) in schemes.items() for key in s.tensor_specs(shape)
    }
    for key, entry in checkpoint.entries.items():
        name = key.removesuffix(_PACKED)
        if key.endswith(_PACKED) and name in schemes:
            scheme, shape = schemes[name]
            error = None
            if original is not None:
                decoded = read_quantized(checkpoint.entries, name, scheme, shape).dequantize()
                error = relative_error(original, name, decoded)
            yield row_of(name, str(scheme), shape, scheme.stored_bytes(shape), error)
        elif key not in parts and all(entry.shape):
            yield plain_row(entry)


def plain_row(entry: TensorEntry) -> InventoryRow:
    """Returns the row of a tensor that is no part of a quantized weight."""
    dtype = str(entry.dtype).removeprefix("torch.")
    return row_of(entry.name, dtype, entry.shape, entry.end - entry.begin)


def row_of(
    name: str, stored_as: str, shape: tuple[int, ...], size: int, error: float | None = None
) -> InventoryRow:
    """Returns a row; `size` is in bytes, the rest as in `InventoryRow`."""
    weights = torch.Size(shape).numel()
    return InventoryRow(name, stored_as, shape, weights, size, 8 * size / weights, error)


def module_schemes(checkpoint: Checkpoint) -> dict[str, tuple[Scheme, tuple[int, int]]]:
    """Returns module name -> (scheme, shape) of every quantized weight of a checkpoint of ours.

    Raises:
        LowbitError: if a stored shape is not one.
    """
    quantization = checkpoint.config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "lowbit":
        return {}
    selection = LowbitConfig.from_dict(quantization).selection()
    found: dict[str, tuple[Scheme, tuple[int, int]]] = {}
    for key, entry in checkpoint.entries.items():
        if not key.endswith(_PACKED):
            continue
        name = key.removesuffix(_PACKED)
        scheme = scheme_for(name, selection)
        stored = checkpoint.entries.get(f"{name}.weight_shape")
        if scheme is None or stored is None or stored.shape != (2,):
            raise LowbitError(
                f"{entry.file}: {name!r} is quantized, but the config gives it no scheme or its "
                "weight_shape is missing; config.json and weights do not belong together"
            )
        rows, columns = (int(size) for size in stored.read())
        _require_specs(checkpoint, name, scheme, (rows, columns))
        found[name] = (scheme, (rows, columns))
    return found


def _require_specs(
    checkpoint: Checkpoint, name: str, scheme: Scheme, shape: tuple[int, int]
) -> None:
    specs = scheme.tensor_specs(shape) if min(shape) > 0 else {"weight_shape": ((0,), None)}
    for suffix, (size, dtype) in specs.items():
        entry = checkpoint.entries.get(f"{name}.{suffix}")
        if entry is None or (entry.shape, entry.dtype) != (size, dtype):
            raise LowbitError(
                f"{checkpoint.path}: '{name}.{suffix}' does not fit {scheme} of a {list(shape)} "
                "weight; config.json and weights do not belong together"
            )


def relative_error(original: Checkpoint, name: str, decoded: Tensor) -> float:
    """Returns ||decoded - weight|| / ||weight|| for the weight of module `name`.

    Raises:
        LowbitError: if `original` lacks it or has another shape.
    """
    entry = original.entries.get(f"{name}.weight")
    if entry is None:
        raise LowbitError(f"{original.path}: has no tensor '{name}.weight' to compare with")
    weight: Tensor = entry.read().float()
    if weight.shape != decoded.shape and weight.T.shape == decoded.shape:
        weight = weight.T  # GPT-2 stores [in, out]
    if weight.shape != decoded.shape:
        raise LowbitError(
            f"{original.path}: '{name}.weight' is {list(weight.shape)}, the quantized one "
            f"{list(decoded.shape)}; give the model it was made from"
        )
    return float(torch.linalg.vector_norm(decoded - weight) / torch.linalg.vector_norm(weight))
