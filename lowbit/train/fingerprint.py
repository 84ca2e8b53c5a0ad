"""What the result of a run depends on, so that a run is resumed as it was started or not at all."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowbit.formats.reading import open_checkpoint
from lowbit.hf.loading import is_hub_name, load_config
from lowbit.pipeline.output import digest_json
from lowbit.train.settings import Settings

if TYPE_CHECKING:
    from transformers import TrainingArguments

_SAMPLE_BYTES = 1 << 20
_SAMPLES = 5


def run_fingerprint(
    base: str,
    settings: Settings,
    data: dict[str, Any],
    arguments: TrainingArguments,
    precision: str,
) -> dict[str, Any]:
    """Returns everything that decides the result, JSON values.

    Args:
        base: the checkpoint.
        settings: of the run.
        data: its description, with digests.
        arguments: Trainer's, for the number of processes.
        precision: of the activations.
    """
    return {
        "versions": {
            name: version(name)
            for name in ("lowbit", "torch", "transformers", "peft", "accelerate")
        },
        "base": base_identity(base),
        "data": data,
        "settings": settings.to_dict(),
        "precision": precision,
        "device": arguments.device.type,
        "processes": arguments.world_size,
        # How a sum is split over threads decides its last bits.
        "threads": torch.get_num_threads(),
    }


def base_identity(base: str) -> dict[str, Any]:
    """Returns what tells a base from another one.

    Hashing every byte of a large base takes longer than loading it; sizes and samples from all over
    each file tell models apart that were trained or quantized differently.
    """
    if is_hub_name(base):
        return {"name": base, "commit": getattr(load_config(base), "_commit_hash", None)}
    checkpoint = open_checkpoint(base)
    files = sorted({entry.file for entry in checkpoint.entries.values()})
    return {
        "config": digest_json(checkpoint.config),
        "weights": {file.name: _sampled_digest(file) for file in files},
    }


def _sampled_digest(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with file.open("rb") as handle:
        for index in range(_SAMPLES):
            handle.seek(max(0, size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
            digest.update(handle.read(_SAMPLE_BYTES))
    return digest.hexdigest()
