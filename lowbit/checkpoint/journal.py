"""What a run has finished, so that it can be killed at any moment and go on.

The output directory of an unfinished run holds finished shards, this journal and a `config.json`
that says "in progress" (loading refuses it). The journal is replaced atomically after each shard
is durable, so a shard it names is always whole; a shard it does not name is written again. When
the run is complete the manifest is written, then the final config, and the journal is removed.

A journal starts with the run's fingerprint: everything that the result depends on. Resuming with
another fingerprint is refused, naming the first field that differs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lowbit.checkpoint.reader import file_digest, read_json
from lowbit.checkpoint.writer import TEMPORARY_SUFFIX, disk_errors, write_json
from lowbit.errors import LowbitError

JOURNAL_NAME = "lowbit_journal.json"
MANIFEST_NAME = "lowbit_manifest.json"
MAX_THREADS = 1024

Fingerprint = dict[str, Any]


class Journal:
    """The journal of one output directory. Construct it with `Journal.start`.

    Attributes:
        fingerprint: what the result depends on, JSON values only.
        parts: part name -> {"file", "sha256", "modules": reports}, in the order of completion.
    """

    def __init__(self, directory: Path, fingerprint: Fingerprint) -> None:
        self.directory = directory
        self.fingerprint = fingerprint
        self.parts: dict[str, dict[str, Any]] = {}

    @staticmethod
    def start(directory: Path, fingerprint: Fingerprint, resume: bool) -> Journal:
        """Returns the journal for `directory`, created if need be, with the finished parts.

        Raises:
            LowbitError: if the directory holds something else, an unfinished run without `resume`,
                a run with another fingerprint, or a finished shard that has changed.
        """
        with disk_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            present = sorted(path.name for path in directory.iterdir())
        journal = Journal(directory, fingerprint)
        source = next((name for name in (JOURNAL_NAME, MANIFEST_NAME) if name in present), None)
        if present and not (resume and source):
            _refuse_occupied(directory, present, source, resume)
        if source is None:
            journal._write()
            return journal
        # A finished run has a manifest with the same two fields, so resuming it is a check.
        stored = read_json(directory / source, "")
        _compare(directory, stored.get("fingerprint", {}), fingerprint)
        journal.parts = stored.get("parts", {})
        for part in journal.parts.values():
            file = directory / part["file"]
            if not file.exists() or file_digest(file) != part["sha256"]:
                raise LowbitError(
                    f"{file}: this finished shard is missing or has changed since it was written; "
                    "choose a new output directory and start again"
                )
        for name in present:
            if name.endswith(TEMPORARY_SUFFIX):
                (directory / name).unlink()
        return journal

    def finish_part(self, name: str, file: Path, modules: dict[str, Any]) -> None:
        """Records that the durable shard `file` completes part `name`."""
        self.parts[name] = {"file": file.name, "sha256": file_digest(file), "modules": modules}
        self._write()

    def remove(self) -> None:
        """Removes the journal file: the run is complete."""
        (self.directory / JOURNAL_NAME).unlink(missing_ok=True)

    def _write(self) -> None:
        content = {"fingerprint": self.fingerprint, "parts": self.parts}
        write_json(self.directory / JOURNAL_NAME, content)


def restore_threads(directory: Path) -> None:
    """Takes the thread count of the unfinished run in `directory`, if there is one."""
    journal = directory / JOURNAL_NAME
    if journal.exists():
        threads = read_json(journal, "").get("fingerprint", {}).get("threads")
        if isinstance(threads, int) and 0 < threads <= MAX_THREADS:
            torch.set_num_threads(threads)


def _refuse_occupied(directory: Path, present: list[str], source: str | None, resume: bool) -> None:
    if source == JOURNAL_NAME:
        raise LowbitError(f"{directory}: holds an unfinished run; add --resume to go on with it")
    if source == MANIFEST_NAME:
        raise LowbitError(f"{directory}: already holds a quantized model; choose another output")
    reason = "no journal to resume from, and is not empty" if resume else "is not empty"
    raise LowbitError(
        f"{directory}: {'has ' if resume else ''}{reason} (it holds {present[0]}); choose an "
        "empty or new directory"
    )


def _compare(directory: Path, stored: Fingerprint, current: Fingerprint, prefix: str = "") -> None:
    """Raises naming the first field in which two fingerprints differ."""
    for key in dict.fromkeys([*current, *stored]):
        before, now = stored.get(key), current.get(key)
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            _compare(directory, before, now, f"{prefix}{key}.")
        raise LowbitError(
            f"{directory}: cannot resume, {prefix}{key} differs: the run was started with "
            f"{_short(before)}, this command has {_short(now)}; give the same or start in a new "
            "directory"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
