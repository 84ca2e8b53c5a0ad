"""The exact merge: a low-bit base of which nothing but integer zero points changes.

For adapters that were trained for it (`use_qalora`, see `lowbit/adapters/zero_point.py`). Files,
names, codes and scales stay as they are, so the result is the model that training saw, bit for bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from lowbit import __version__
from lowbit.checkpoint import ShardWriter, TensorEntry, write_json
from lowbit.checkpoint.journal import CHECKSUM, MANIFEST_NAME, Fingerprint, Journal, claim
from lowbit.checkpoint.reader import (
    IN_PROGRESS,
    INDEX_NAME,
    file_digest,
    read_json,
    read_quantized,
)
from lowbit.errors import LowbitError
from lowbit.formats.view import OwnView
from lowbit.inventory import module_schemes
from lowbit.merging.source import MergedCheckpoint
from lowbit.pipeline.output import side_files, write_index, write_side_files
from lowbit.pipeline.source import require_space
from lowbit.progress import RunProgress
from lowbit.scheme import Scheme

_ZERO_POINT = ".weight_zero_point"


def can_merge_exactly(source: MergedCheckpoint, scheme: Scheme) -> bool:
    """Returns whether a merge to `scheme` is one of zero points alone."""
    quantization = source.quantization or {}
    return source.adapter.config.use_qalora and quantization.get("scheme") == str(scheme)


def write_exact(
    source: MergedCheckpoint, directory: Path, resume: bool, bar: RunProgress
) -> dict[str, Any]:
    """Writes the merged model to `directory` and returns the manifest.

    Args:
        source: low-bit base and an adapter for its zero points.
        directory: new, empty, or with `resume` that of an unfinished run.
        resume: go on with what is there.
        bar: told about bytes.

    Raises:
        LowbitError: the adapter has trained a quantized weight as a whole, or does not fit.
    """
    base, adapter = source.base, source.adapter
    schemes = module_schemes(base)
    whole = [name for name in adapter.replaced if name not in base.entries]
    if whole:
        raise LowbitError(
            f"{adapter.path}: {whole[0]!r} was trained as a whole and is quantized or tied in "
            f"{base.path}, so the merge would not be exact; merge with --calibration, or to bf16"
        )
    recorded = base.path / MANIFEST_NAME
    # save_pretrained writes none, and that of another format is not of these tensors.
    own = recorded.exists() and not isinstance(base, OwnView)
    manifest = read_json(recorded, "") if own else {}
    total = sum(entry.end - entry.begin for entry in base.entries.values())
    bar.stage("checking weights", total)
    fingerprint = _fingerprint(source, manifest, source.verify(bar.advance))
    require_space(directory, total, "a merged model")
    files = base.files()

    reports: dict[str, dict[str, str]] = {}

    def merged(entry: TensorEntry) -> Tensor:
        module = entry.name.removesuffix(_ZERO_POINT)
        if entry.name in adapter.replaced:
            return adapter.replacement(entry.name).to(entry.dtype)
        if module == entry.name or module not in adapter.lora:
            return entry.read()
        stored = read_quantized(base.entries, module, *schemes[module])
        qweight = adapter.merged_zero_points(module, stored)
        assert qweight.zero_point is not None
        reports[module] = {CHECKSUM: qweight.checksum()}
        return qweight.zero_point

    with claim(directory, resume):
        journal = Journal.start(directory, fingerprint)
        content = {**manifest, "fingerprint": journal.fingerprint}
        if not journal.complete:
            _write_config(source, directory, {"status": IN_PROGRESS})
            bar.stage("merging", total)
            for file in files:
                entries = [entry for entry in base.entries.values() if entry.file == file]
                if file.name not in journal.parts:
                    reports.clear()
                    bound = ShardWriter.header_bound([entry.name for entry in entries])
                    with ShardWriter(directory / file.name, bound) as writer:
                        for entry in entries:
                            writer.add(entry.name, merged(entry))
                    journal.finish_part(file.name, directory / file.name, dict(reports))
                bar.advance(sum(entry.end - entry.begin for entry in entries))
            if (base.path / INDEX_NAME).exists():
                write_index(directory, [file.name for file in files])
            write_side_files(base.path, directory)
            write_json(directory / MANIFEST_NAME, _with_digests(content, journal))
            _write_config(source, directory, {"manifest": MANIFEST_NAME})
            journal.remove()
    return _with_digests(content, journal)


def _with_digests(manifest: dict[str, Any], journal: Journal) -> dict[str, Any]:
    """Returns the base's manifest with what its shards and modules are now."""
    digests = {part["file"]: part["sha256"] for part in journal.parts.values()}
    merged = {name: r for part in journal.parts.values() for name, r in part["modules"].items()}
    parts = {
        name: {
            **part,
            "sha256": digests.get(part["file"], part["sha256"]),
            "modules": {m: {**r, **merged.get(m, {})} for m, r in part["modules"].items()},
        }
        for name, part in manifest.get("parts", {}).items()
    }
    return {**manifest, "parts": parts or journal.parts}


def _fingerprint(
    source: MergedCheckpoint, manifest: dict[str, Any], weights: dict[str, str]
) -> Fingerprint:
    """Returns everything that the bytes of the result depend on, as JSON values."""
    content = {
        "versions": {"lowbit": __version__},
        # Of the 16-bit model, which statistics are of.
        "model": source.measured_model() if manifest else None,
        "base": {"weights": weights, "fingerprint": manifest.get("fingerprint")},
        "side_files": {f.name: file_digest(f) for f in side_files(source.path)},
        "derivation": source.derivation,
        "options": source.quantization,
    }
    return cast(Fingerprint, json.loads(json.dumps(content)))


def _write_config(source: MergedCheckpoint, directory: Path, state: dict[str, str]) -> None:
    kept = {k: v for k, v in (source.quantization or {}).items() if k not in ("status", "manifest")}
    write_json(
        directory / "config.json",
        {**source.base.config, "quantization_config": {**kept, **state}},
    )
