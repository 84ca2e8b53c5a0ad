"""What a checkpoint holds, in whatever layout it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from lowbit.checkpoint import Checkpoint
from lowbit.formats.base import Layout
from lowbit.formats.own import Bf16, Lowbit
from lowbit.formats.reading import open_checkpoint, read_module
from lowbit.formats.table import layout_of
from lowbit.inventory import InventoryRow, plain_row, relative_error, row_of, rows


def listing(path: str | Path, against: str | Path | None = None) -> list[InventoryRow]:
    """Returns a row per parameter of a checkpoint in any layout, in the order of its files.

    Bytes are those of the files: codes, scales, and whatever else a layout stores with them.

    Args:
        path: see `open_checkpoint`.
        against: the original in 16 bits, to measure the error of every quantized weight.

    Raises:
        LowbitError: it is damaged, or `against` lacks a weight or has another shape.
    """
    checkpoint = open_checkpoint(path)
    layout = layout_of(checkpoint)
    original = None if against is None else open_checkpoint(against)
    if isinstance(layout, (Lowbit, Bf16)):
        return list(rows(checkpoint, original))
    return list(_rows(checkpoint, layout, original))


def _rows(
    checkpoint: Checkpoint, layout: Layout, original: Checkpoint | None
) -> Iterator[InventoryRow]:
    modules = layout.modules(checkpoint)
    owner = {tensor: name for name, stored in modules.items() for tensor in stored.tensors}
    seen: set[str] = set()
    for name, entry in checkpoint.entries.items():
        module = owner.get(name)
        if module is None:
            yield plain_row(entry)
        elif module not in seen:
            seen.add(module)
            stored = modules[module]
            parts = [checkpoint.entries[tensor] for tensor in stored.tensors]
            error = None
            if original is not None:
                decoded = read_module(checkpoint, layout, module, stored).dequantize()
                if stored.input_order is not None:
                    decoded = decoded[:, torch.argsort(stored.input_order)]
                error = relative_error(original, module, decoded)
            size = sum(part.end - part.begin for part in parts)
            yield row_of(module, f"{layout.name} {stored.scheme}", stored.shape, size, error)
