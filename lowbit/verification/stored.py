"""What is checked of files, headers and configuration, before a weight is decoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowbit.checkpoint import Checkpoint, TensorEntry
from lowbit.checkpoint.manifest import changed_side_files, check_shards, side_files_of
from lowbit.checkpoint.reader import INDEX_NAME, read_json
from lowbit.errors import LowbitError
from lowbit.formats.base import Layout, StoredAs, quantization_of
from lowbit.formats.hub_names import HubNames
from lowbit.formats.model_view import ModelView
from lowbit.formats.own import Lowbit
from lowbit.hf.config import LowbitConfig
from lowbit.models.selection import select_modules
from lowbit.verification.expected import left_out
from lowbit.verification.report import listed


@dataclass(frozen=True)
class Subject:
    """A checkpoint with everything that its headers say.

    Args:
        checkpoint: the files.
        layout: their format.
        modules: module name -> how it is stored.
        manifest: of the run of ours that wrote it, None for any other.
    """

    checkpoint: Checkpoint
    layout: Layout
    modules: Mapping[str, StoredAs]
    manifest: Mapping[str, Any] | None

    @property
    def reports(self) -> dict[str, dict[str, Any]]:
        """Module name -> what the manifest says of it."""
        parts = (self.manifest or {}).get("parts", {})
        return {name: r for part in parts.values() for name, r in part.get("modules", {}).items()}


def check_files(checkpoint: Checkpoint, manifest: Mapping[str, Any] | None) -> str:
    """Returns a count; `Checkpoint.open` has checked every header, this checks the index.

    Raises:
        LowbitError: for a tensor that the index lacks, so that no loader would find it, and for a
            shard of ours that nothing names.
    """
    index = checkpoint.path / INDEX_NAME
    if index.exists():
        known = read_json(index, "")["weight_map"]
        unknown = [name for name in checkpoint.entries if name not in known]
        if unknown:
            raise LowbitError(f"{index}: lacks {listed(unknown)}, so no loader finds them")
    files = {file.name for file in checkpoint.files()}
    stray = sorted(f.name for f in checkpoint.path.glob("*.safetensors") if f.name not in files)
    if stray and manifest is not None:
        raise LowbitError(f"{checkpoint.path}: {listed(stray)} belongs to no shard of the index")
    beside = f"; not part of the model: {listed(stray)}" if stray else ""
    return f"{len(checkpoint.entries)} tensors in {len(files)} files{beside}"


def check_hashes(
    checkpoint: Checkpoint, manifest: Mapping[str, Any], digests: Mapping[str, str]
) -> str:
    """Returns a count of the files whose SHA-256 is the one that the manifest has.

    Args:
        checkpoint: the files.
        manifest: what they should be.
        digests: shard -> SHA-256.

    Raises:
        LowbitError: naming a file that is another.
    """
    shards = check_shards(manifest, digests)
    changed = changed_side_files(checkpoint.path, manifest)
    if changed:
        raise LowbitError(changed[0])
    return f"{shards} shards and {len(side_files_of(manifest))} other files are what was written"


def check_quantized(subject: Subject, view: ModelView) -> str:
    """Returns what is quantized; everything that should be is.

    Raises:
        LowbitError: for a layer that is in 16 bits and should not be, one that is quantized and
            should not be, and a scheme that is another than config or manifest say.
    """
    names = {view.module(name).name: name for name in subject.modules}
    if isinstance(subject.layout, Lowbit):
        _check_selection(subject, view, names)
    else:
        _check_left_out(subject, view, names)
    for name, report in subject.reports.items():
        if report.get("scheme") in (None, "bf16"):
            continue
        stored = subject.modules.get(name)
        if stored is None:
            raise LowbitError(f"{name}: the manifest has it as {report['scheme']}, but it is plain")
        if (str(stored.scheme), list(stored.shape)) != (report["scheme"], report.get("shape")):
            raise LowbitError(
                f"{name}: is {stored.scheme} {list(stored.shape)}, the manifest has "
                f"{report['scheme']} {report.get('shape')}"
            )
    unknown = [name for name in subject.modules if name not in subject.reports]
    # Only a manifest with a summary has every module.
    if unknown and "summary" in (subject.manifest or {}):
        raise LowbitError(f"{listed(unknown)}: quantized, but not in the manifest")
    schemes = sorted({str(stored.scheme) for stored in subject.modules.values()})
    return (
        f"{len(subject.modules)} weights: {', '.join(schemes)}" if schemes else "16 bits, as said"
    )


def _check_selection(subject: Subject, view: ModelView, names: Mapping[str, str]) -> None:
    """Holds a checkpoint of ours against the choice that its config records."""
    config = LowbitConfig.from_dict(dict(quantization_of(subject.checkpoint)))
    expected = select_modules(view.model, config.selection(), require_matches=False)
    for name, scheme in expected.items():
        if name not in names:
            raise LowbitError(f"{name}: config.json says {scheme}, but it is not quantized")
        found = subject.modules[names[name]].scheme
        if found != scheme:
            raise LowbitError(f"{name}: config.json says {scheme}, it is stored as {found}")
    surplus = [name for name in names if name not in expected]
    if surplus:
        raise LowbitError(f"{surplus[0]}: is quantized, but config.json leaves it in 16 bits")


def _check_left_out(subject: Subject, view: ModelView, names: Mapping[str, str]) -> None:
    """Holds a checkpoint of another layout against the exceptions that its config lists."""
    if not subject.modules:
        return
    quantization = quantization_of(subject.checkpoint)
    is_left_out = left_out(subject.layout.name, quantization)
    hub = HubNames(view.model)  # the names that other tools, and we for them, write
    silent = [
        name
        for name in view.plain_linears(names)
        if not is_left_out(name) and not is_left_out(hub.module(name))
    ]
    if silent:
        raise LowbitError(f"{listed(silent)}: in 16 bits, but config.json does not say so")
    surplus = [name for name in subject.modules if is_left_out(name)]
    if surplus:
        raise LowbitError(f"{listed(surplus)}: quantized, but config.json leaves it in 16 bits")


def not_finite(broken: list[tuple[TensorEntry, str]]) -> list[str]:
    """Returns a sentence for each tensor that holds no numbers."""
    return [f"{entry.file.name}: tensor {entry.name!r} holds {kind}" for entry, kind in broken]
