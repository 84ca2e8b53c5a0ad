"""What follows every save: its origin is recorded, it is checked, and it gets a card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.checkpoint import write_json
from lowbit.checkpoint.journal import CHECKSUM, MANIFEST_NAME, module_reports
from lowbit.checkpoint.reader import read_json
from lowbit.formats.gguf.checkpoint import FILE_NAME
from lowbit.model_card.card import write_card, write_gguf_card
from lowbit.model_card.origin import ORIGIN, origin_of, recorded_manifest


def after_save(
    directory: Path,
    source: Path,
    name: str | None = None,
    verify: bool = True,
    progress: bool = True,
    device: torch.device | None = None,
    model: nn.Module | None = None,
) -> dict[str, Any]:
    """Returns the manifest of a checkpoint that was just written, after all that a save entails.

    Args:
        directory: of the checkpoint, complete.
        source: folder (or GGUF file) of what it was made of.
        name: what the user called that; a hub name becomes the card's base model.
        verify: check it, and mark it as bad if that fails.
        progress: show a progress bar on standard error.
        device: where the check runs; the CPU by default.
        model: the model that was saved, where it is in memory.

    Raises:
        VerificationError: it fails a check; nothing is deleted.
    """
    from lowbit.verification import gate  # it reads formats, which import what saves

    manifest = read_json(directory / MANIFEST_NAME, "every run of ours writes it")
    before = recorded_manifest(source)
    if ORIGIN not in manifest:
        manifest[ORIGIN] = origin_of(source, name)
        # The codes of a conversion were chosen by the run that made its source.
        chosen = {k: v for k, v in before.items() if k not in ("parts", ORIGIN, "quantized")}
        if before and "to" in manifest.get("fingerprint", {}):
            manifest.setdefault("quantized", before.get("quantized", chosen))
        write_json(directory / MANIFEST_NAME, manifest)
    if verify:
        gate(directory, model=model, device=device, progress=progress)
    write_card(directory)
    return manifest


def after_gguf(
    file: Path, manifest: dict[str, Any], source: Path, verify: bool = True, progress: bool = True
) -> dict[str, Any]:
    """Returns the manifest of a GGUF file that was just written, after all that a save entails.

    A card is written where the file has a folder of its own.

    Args:
        file: complete.
        manifest: of the run that wrote it; it is in no file.
        source: of the checkpoint that it was made of.
        verify: check it, and rename it if that fails.
        progress: show a progress bar on standard error.

    Raises:
        VerificationError: it fails a check; nothing is deleted.
    """
    from lowbit.verification import gate

    before = recorded_manifest(source)
    manifest = {**manifest, ORIGIN: origin_of(source)}
    if before:
        chosen = {k: v for k, v in before.items() if k not in ("parts", ORIGIN, "quantized")}
        manifest["quantized"] = before.get("quantized", chosen)
    if verify:
        gate(file, written=_kept(manifest, source), progress=progress)
    if file.name == FILE_NAME:
        write_gguf_card(file, manifest)
    return manifest


def _kept(manifest: dict[str, Any], source: Path) -> dict[str, str]:
    """Returns module -> checksum of the weights that a GGUF file has taken over bit for bit."""
    reports = module_reports(source)
    return {
        name: reports[name][CHECKSUM]
        for name, report in manifest["modules"].items()
        if report["exact"] and CHECKSUM in reports.get(name, {})
    }
