"""The manifest of a finished run of ours, and whether the files are still what it says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowbit.checkpoint.journal import MANIFEST_NAME
from lowbit.checkpoint.reader import file_digest, read_json
from lowbit.errors import LowbitError


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """Returns the manifest, None if there is none.

    Raises:
        LowbitError: it is not one.
    """
    file = directory / MANIFEST_NAME
    if not file.exists():
        return None
    manifest = read_json(file, "")
    parts = manifest.get("parts")
    sound = isinstance(parts, dict) and all(
        isinstance(part, dict)
        and isinstance(part.get("file"), str)
        and isinstance(part.get("modules", {}), dict)
        and all(isinstance(report, dict) for report in part.get("modules", {}).values())
        for part in parts.values()
    )
    if not sound:
        raise LowbitError(f"{file}: is corrupt, its parts name no files")
    return manifest


def check_shards(manifest: Mapping[str, Any], digests: Mapping[str, str]) -> int:
    """Returns how many shards there are; each has the SHA-256 that the manifest has.

    Args:
        manifest: of `read_manifest`.
        digests: shard -> SHA-256 of what is there.

    Raises:
        LowbitError: naming a shard that is another, missing or too many.
    """
    written = {part["file"]: part.get("sha256") for part in manifest["parts"].values()}
    for name, digest in written.items():
        if name not in digests:
            raise LowbitError(f"{name}: is in the manifest, but no shard of the checkpoint")
        if digests[name] != digest:
            raise LowbitError(f"{name}: is not the file that was written (its SHA-256 differs)")
    for name in digests:
        if name not in written:
            raise LowbitError(f"{name}: is a shard, but not in the manifest")
    return len(written)


def require_written(directory: Path, digests: Mapping[str, str]) -> None:
    """Refuses shards that are not those of the manifest beside them, if there is one.

    What is made of them would get a manifest of its own, and their damage would be seen no more.

    Args:
        directory: of a checkpoint.
        digests: shard -> SHA-256 of what is there.

    Raises:
        LowbitError: naming the shard.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        return
    try:
        check_shards(manifest, digests)
    except LowbitError as error:
        raise LowbitError(
            f"{directory}: {error}; copy the checkpoint again, or make it again"
        ) from None


def side_files_of(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Returns tokenizer files and their like -> SHA-256, as far as they were recorded."""
    fingerprint = manifest.get("fingerprint")
    whole = fingerprint if isinstance(fingerprint, dict) else {}
    for found in (whole.get("model"), whole.get("source"), whole):
        if isinstance(found, dict) and isinstance(found.get("side_files"), dict):
            return dict(found["side_files"])
    return {}


def changed_side_files(directory: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for each tokenizer file or its like that is not what was copied."""
    found = []
    for name, digest in side_files_of(manifest).items():
        file = directory / Path(name).name
        if not file.is_file():
            found.append(f"{file.name}: is missing")
        elif file_digest(file) != digest:
            found.append(f"{file.name}: is not the file that was copied (its SHA-256 differs)")
    return found
