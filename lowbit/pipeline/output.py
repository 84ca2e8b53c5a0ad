"""The files of an output directory that are not shards, and the order that makes it valid.

    journal, config.json "in progress"   the directory is claimed; loading is refused
    shards, each followed by the journal
    index, tokenizer and other side files
    manifest                             everything measured and everything the result depends on
    config.json, final                   from here on the directory loads
    journal removed

Nothing in these files depends on when or how often a run was interrupted.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lowbit.checkpoint.journal import JOURNAL_NAME, MANIFEST_NAME, Journal
from lowbit.checkpoint.reader import INDEX_NAME, read_header
from lowbit.checkpoint.writer import write_bytes, write_json
from lowbit.scheme import Scheme

# Beside the weights, what a model needs to be used: tokenizer, templates, generation settings.
_SIDE_FILE_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
# What other tools keep their quantization in: GPTQModel believes such a file before config.json.
_QUANTIZATION_OF_OTHERS = ("quantize_config.json", "quant_config.json", "quantization_config.json")
_NOT_COPIED = (
    "config.json", MANIFEST_NAME, JOURNAL_NAME, "finetune.json", *_QUANTIZATION_OF_OTHERS,
)  # fmt: skip
# The largest tokenizers have 35 MB; what is far beyond that is a corpus.
_MAX_SIDE_FILE_BYTES = 1 << 26


def side_files(source: Path) -> list[Path]:
    """Returns the files of a checkpoint that are copied as they are."""
    return sorted(
        path
        for path in source.iterdir()
        if path.suffix in _SIDE_FILE_SUFFIXES
        and path.name not in _NOT_COPIED
        and not path.name.endswith(".index.json")
        and path.is_file()
        and path.stat().st_size <= _MAX_SIDE_FILE_BYTES
    )


def digest_json(content: Any) -> str:
    """Returns the SHA-256 of `content` as canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def shard_name(index: int, count: int) -> str:
    """Returns the file name of shard `index` (from 0) of `count`."""
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def write_index(directory: Path, files: list[str]) -> None:
    """Writes the index that maps every tensor of `files` to its file."""
    entries = [entry for name in files for entry in read_header(directory / name)]
    write_json(
        directory / INDEX_NAME,
        {
            "metadata": {"total_size": sum(entry.end - entry.begin for entry in entries)},
            "weight_map": {entry.name: entry.file.name for entry in entries},
        },
    )


def manifest(journal: Journal, schemes: dict[str, Scheme]) -> dict[str, Any]:
    """Returns the manifest: measured sizes, per-module reports, and the run's fingerprint."""
    reports = {name: r for part in journal.parts.values() for name, r in part["modules"].items()}
    weights = sum(report["weights"] for report in reports.values())
    stored = sum(report["stored_bytes"] for report in reports.values())
    fallbacks = {name: r["fallback"] for name, r in reports.items() if "fallback" in r}
    return {
        "fingerprint": journal.fingerprint,
        "summary": {
            "quantized_weights": weights,
            "quantized_bytes": stored,
            "bits_per_weight": 8 * stored / weights,
            "schemes": sorted({str(scheme) for scheme in schemes.values()}),
            "fallbacks": fallbacks,
        },
        "parts": journal.parts,
        **({"stages": journal.stages} if journal.stages else {}),
    }


def write_side_files(source: Path, directory: Path) -> None:
    """Copies the tokenizer and its like."""
    for file in side_files(source):
        write_bytes(directory / file.name, file.read_bytes())
