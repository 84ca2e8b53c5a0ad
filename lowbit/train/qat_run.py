"""The result of a QAT run: the model of Trainer's checkpoint, packed.

The model is built again from the base and the checkpoint, so that a run that was killed while it
published does the same once more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.reader import TensorEntry, read_header
from lowbit.checkpoint.writer import write_json
from lowbit.errors import LowbitError
from lowbit.hf.loading import choose_device
from lowbit.train.run_folder import RESULT_NAME, RunFolder
from lowbit.train.settings import QatSettings, Settings
from lowbit.train.trainable import prepare_trainable

_GRID = (".log_factor", ".zero_shift")


def publish_qat(
    folder: RunFolder, base: str, settings: Settings, precision: str, result: Mapping[str, Any]
) -> None:
    """Writes the packed checkpoint of a run to its folder, and last what is recorded of it.

    Args:
        folder: of the run.
        base: the model that it began with.
        settings: of the run.
        precision: of the activations.
        result: what is recorded; its `step` says which checkpoint counts.

    Raises:
        LowbitError: the checkpoint does not fit, or something in it is NaN.
    """
    from lowbit.pipeline.source import local_directory
    from lowbit.train.qat import save_qat

    assert settings.qat is not None
    device = choose_device(settings.base.device)
    model = prepare_trainable(base, settings, precision, device)
    step = result["step"]
    _load(model, _entries(folder.checkpoint(step)), folder.checkpoint(step))
    training = {"step": step, "data": result["fingerprint"]["data"]}
    save_qat(model.eval(), local_directory(base), folder.path, training)
    write_json(folder.path / RESULT_NAME, dict(result))


def trained_parameters(checkpoint: Path, settings: QatSettings) -> int:
    """Returns the number of parameters that a run with this checkpoint trains."""
    entries = _entries(checkpoint)
    fake = {name.removesuffix(_GRID[0]) for name in entries if name.endswith(_GRID[0])}
    total = 0
    for name, entry in entries.items():
        owner, _, attribute = name.rpartition(".")
        of_weights = len(entry.shape) == 1 or (owner in fake and attribute == "weight")
        if name.endswith(_GRID) or (settings.mode == "weights" and of_weights):
            total += math.prod(entry.shape)
    return total


def _entries(checkpoint: Path) -> dict[str, TensorEntry]:
    files = sorted(checkpoint.glob("model*.safetensors"))
    return {entry.name: entry for file in files for entry in read_header(file)}


def _load(model: torch.nn.Module, entries: dict[str, TensorEntry], checkpoint: Path) -> None:
    """Puts the stored tensors in place, one at a time."""
    state: dict[str, Tensor] = dict(model.state_dict())
    for name, entry in entries.items():
        target = state.get(name)
        if target is None or tuple(target.shape) != entry.shape:
            raise LowbitError(f"{checkpoint}: {name!r} does not fit the model; start again")
        target.copy_(entry.read())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    missing = sorted(trained - entries.keys())
    if missing:
        raise LowbitError(f"{checkpoint}: lacks {missing[0]!r}; start again in a new directory")
