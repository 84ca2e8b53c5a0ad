"""What a checkpoint was made of, as far as its files tell: the hub's name, the licence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowbit.checkpoint.journal import MANIFEST_NAME
from lowbit.checkpoint.reader import read_json
from lowbit.errors import LowbitError
from lowbit.hf.loading import is_hub_name

CARD_NAME = "README.md"
# Key of the manifest.
ORIGIN = "origin"
# Of the source's card, what holds for what is made of it as well.
CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
MAX_CARD_BYTES = 1 << 20


def origin_of(source: Path, name: str | None = None) -> dict[str, Any]:
    """Returns what is to be recorded of the source of a checkpoint, JSON values.

    Args:
        source: folder of a checkpoint or a GGUF file. What one of ours records is taken over: the
            base of a conversion is that of its source.
        name: what the user called it.

    Returns:
        `name`; `base_model`, its name on the hub or None; and `metadata` of its card.
    """
    recorded = recorded_manifest(source).get(ORIGIN)
    if isinstance(recorded, dict) and isinstance(recorded.get("name"), str):
        return _sound(recorded)
    metadata = card_metadata(source)
    base = name if name is not None and is_hub_name(name) else _cached_name(source)
    # What another tool quantized names its own base.
    quantized = metadata.get("base_model_relation") == "quantized" and metadata.get("base_model")
    if quantized:
        base = quantized[0] if isinstance(quantized, list) else str(quantized)
    return {
        "name": base or source.resolve().name,
        "base_model": base,
        "metadata": {key: metadata[key] for key in CARRIED if key in metadata},
    }


def _sound(recorded: dict[str, Any]) -> dict[str, Any]:
    """Returns what a manifest records of its origin, without what it should not hold."""
    base, metadata = recorded.get("base_model"), recorded.get("metadata")
    carried = _plain(metadata) if isinstance(metadata, dict) else {}
    return {
        "name": recorded["name"],
        "base_model": base if isinstance(base, str) else None,
        "metadata": {key: carried[key] for key in CARRIED if key in carried},
    }


def recorded_manifest(source: Path) -> dict[str, Any]:
    """Returns the manifest of a checkpoint of ours, empty for any other."""
    file = source / MANIFEST_NAME
    try:
        return read_json(file, "") if file.is_file() else {}
    except LowbitError:
        return {}  # whoever needs it says so


def card_metadata(source: Path) -> dict[str, Any]:
    """Returns the YAML at the head of a checkpoint's card; empty if there is none that is sound."""
    from huggingface_hub.repocard import metadata_load

    file = source / CARD_NAME
    if not file.is_file() or file.stat().st_size > MAX_CARD_BYTES:
        return {}
    try:
        found = metadata_load(file)
    except Exception:  # of a YAML parser, on text that somebody wrote by hand
        return {}
    return _plain(found) if isinstance(found, dict) else {}


def _plain(metadata: dict[Any, Any]) -> dict[str, Any]:
    """Returns the entries that are strings or lists of strings."""
    return {
        key: value
        for key, value in metadata.items()
        if isinstance(key, str)
        and (
            isinstance(value, str)
            or (isinstance(value, list) and all(isinstance(item, str) for item in value))
        )
    }


def _cached_name(source: Path) -> str | None:
    """Returns `owner/name` of a folder in the hub's cache, `models--owner--name/snapshots/...`."""
    for part in source.absolute().parts:
        if part.startswith("models--") and part.count("--") >= 2:
            owner, name = part.removeprefix("models--").split("--", 1)
            return f"{owner}/{name}"
    return None
