"""Checkpoints of other tools in miniature."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lowbit.checkpoint import Checkpoint


def checkpoint_of(
    path: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]
) -> Checkpoint:
    """Returns a checkpoint of `tensors` after writing it to `path`."""
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path / "model.safetensors")
    config = {"model_type": "llama", "quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(path)
