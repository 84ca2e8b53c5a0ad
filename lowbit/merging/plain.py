"""A merged model as an ordinary 16-bit checkpoint, which stock transformers loads without lowbit.

Tensor after tensor is computed, rounded once and appended to a shard; a shard is durable before the
journal names it. What was killed goes on with the next shard.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lowbit.checkpoint import ShardWriter, TensorEntry, write_json
from lowbit.checkpoint.journal import MANIFEST_NAME, Fingerprint, Journal, claim
from lowbit.checkpoint.reader import IN_PROGRESS, file_digest
from lowbit.errors import LowbitError
from lowbit.memory import release_freed_memory
from lowbit.merging.source import MergedCheckpoint
from lowbit.models.streaming import StreamedDecoder
from lowbit.pipeline.output import shard_name, side_files, write_index, write_side_files
from lowbit.pipeline.source import require_space, weights_fingerprint
from lowbit.progress import RunProgress

# What save_pretrained takes for a shard, small enough for any file system.
SHARD_BYTES = 5_000_000_000


def write_plain(
    source: MergedCheckpoint,
    directory: Path,
    dtype: torch.dtype,
    resume: bool,
    bar: RunProgress,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Writes the merged model to `directory` in `dtype` and returns the manifest.

    Tensors that the base stores in a wider dtype than its model's keep that: a model that has some
    in float32 has a reason.

    Args:
        source: base and adapter.
        directory: new, empty, or with `resume` that of an unfinished run.
        dtype: float32, bfloat16 or float16.
        resume: go on with what is there.
        bar: told about bytes.
        shard_bytes: at most so many in a file, but for a tensor that is larger.

    Raises:
        LowbitError: the two do not fit, or a weight overflows `dtype`.
    """
    decoder = StreamedDecoder(source, source.dtype, torch.device("cpu"))
    wanted = [entry for found in decoder.sources.values() for entry in found.entries]
    dtypes = {entry.name: _target_dtype(entry, source.dtype, dtype) for entry in wanted}
    shards = _shards(wanted, dtypes, shard_bytes)
    total = sum(_bytes(entry, dtypes[entry.name]) for entry in wanted)
    bar.stage("checking weights", sum(e.end - e.begin for e in source.base.entries.values()))
    fingerprint = _fingerprint(decoder, source.verify(bar.advance), dtype)
    written = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    require_space(directory, total - written, "a merged model")
    with claim(directory, resume):
        journal = Journal.start(directory, fingerprint)
        if not journal.complete:
            _write_config(source, directory, dtype, {"status": IN_PROGRESS})
            bar.stage("merging", total)
            files = []
            for index, entries in enumerate(shards):
                file = directory / shard_name(index, len(shards))
                if file.name not in journal.parts:
                    _write_shard(file, entries, dtypes, bar)
                    journal.finish_part(file.name, file, {})
                else:
                    bar.advance(sum(_bytes(entry, dtypes[entry.name]) for entry in entries))
                files.append(file.name)
            write_index(directory, files)
            write_side_files(source.path, directory)
            write_json(directory / MANIFEST_NAME, _manifest(journal))
            _write_config(source, directory, dtype, None)
            journal.remove()
        return _manifest(journal)


def _write_shard(
    file: Path, entries: list[TensorEntry], dtypes: dict[str, torch.dtype], bar: RunProgress
) -> None:
    bound = ShardWriter.header_bound([entry.name for entry in entries])
    with ShardWriter(file, bound) as writer:
        for entry in entries:
            bar.describe(f"merging {entry.name:<40.40}")
            writer.add(entry.name, _rounded(entry, dtypes[entry.name]))
            bar.advance(_bytes(entry, dtypes[entry.name]))
            release_freed_memory()


def _rounded(entry: TensorEntry, dtype: torch.dtype) -> Tensor:
    exact = entry.exact()
    rounded = exact.to(dtype)
    if rounded.is_floating_point() and not bool(rounded.isfinite().all()):
        name = str(dtype).removeprefix("torch.")
        raise LowbitError(
            f"{entry.name!r} has weights of up to {float(exact.abs().max()):.3g}, too large for "
            f"{name}; merge to bf16"
        )
    return rounded


def _target_dtype(entry: TensorEntry, model: torch.dtype, target: torch.dtype) -> torch.dtype:
    if not entry.dtype.is_floating_point or entry.dtype.itemsize > model.itemsize:
        return entry.dtype
    return target


def _bytes(entry: TensorEntry, dtype: torch.dtype) -> int:
    return torch.Size(entry.shape).numel() * dtype.itemsize


def _shards(
    entries: list[TensorEntry], dtypes: dict[str, torch.dtype], limit: int
) -> list[list[TensorEntry]]:
    """Returns the entries of each shard, in the order of the model."""
    shards: list[list[TensorEntry]] = [[]]
    size = 0
    for entry in entries:
        own = _bytes(entry, dtypes[entry.name])
        if shards[-1] and size + own > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += own
    return shards


def _fingerprint(
    decoder: StreamedDecoder, weights: dict[str, str], dtype: torch.dtype
) -> Fingerprint:
    """Returns everything that the bytes of the result depend on, as JSON values."""
    source = decoder.checkpoint
    content = weights_fingerprint(decoder, weights)
    content["model"]["side_files"] = {f.name: file_digest(f) for f in side_files(source.path)}
    content["derivation"] = source.derivation
    content["target"] = str(dtype).removeprefix("torch.")
    return cast(Fingerprint, json.loads(json.dumps(content)))


def _manifest(journal: Journal) -> dict[str, Any]:
    return {"fingerprint": journal.fingerprint, "parts": journal.parts}


def _write_config(
    source: MergedCheckpoint, directory: Path, dtype: torch.dtype, state: dict[str, str] | None
) -> None:
    """Writes the base's `config.json` with `dtype`; while the run goes on, loading is refused."""
    content = dict(source.config)
    key = "torch_dtype" if "torch_dtype" in content and "dtype" not in content else "dtype"
    content[key] = str(dtype).removeprefix("torch.")
    if state is not None:
        content["quantization_config"] = {"quant_method": "lowbit", **state}
    write_json(directory / "config.json", content)
