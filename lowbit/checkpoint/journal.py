"""What a run has finished, so that it can be killed at any moment and go on.

The output directory of an unfinished run holds finished shards, this journal and a `config.json`
that says "in progress" (loading refuses it). The journal is replaced atomically after each shard
is durable, so a shard it names is always whole; a shard it does not name is written again. When
the run is complete the manifest is written, then the final config, and the journal is removed.

A journal starts with the run's fingerprint: everything that the result depends on. Resuming with
another fingerprint is refused, naming the first field that differs.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lowbit.checkpoint.reader import file_digest, read_json
from lowbit.checkpoint.writer import TEMPORARY_SUFFIX, disk_errors, write_json
from lowbit.errors import LowbitError

JOURNAL_NAME = "lowbit_journal.json"
MANIFEST_NAME = "lowbit_manifest.json"
# In the report of a quantized module: `QuantizedWeight.checksum` of what was in memory.
CHECKSUM = "decoded_crc32"
MAX_THREADS = 1024

Fingerprint = dict[str, Any]


class Journal:
    """The journal of one output directory. Construct it with `Journal.start`.

    Attributes:
        fingerprint: what the result depends on, JSON values only.
        parts: part name -> {"file", "sha256", "modules": reports}, in the order of completion.
        stages: name of a step that came after all parts -> its report.
        complete: the run has ended and its directory loads.
    """

    def __init__(self, directory: Path, fingerprint: Fingerprint) -> None:
        self.directory = directory
        self.fingerprint = fingerprint
        self.parts: dict[str, dict[str, Any]] = {}
        self.stages: dict[str, Any] = {}
        self.complete = False

    @staticmethod
    def start(directory: Path, fingerprint: Fingerprint) -> Journal:
        """Returns the journal for the claimed `directory` (see `claim`), with the finished parts.

        Raises:
            LowbitError: if the run in the directory has another fingerprint, or a finished shard
                has changed.
        """
        journal = Journal(directory, fingerprint)
        stored = stored_run(directory)
        if stored is None:
            journal._write()
            return journal
        _compare(directory, stored["fingerprint"], fingerprint)
        journal.parts, journal.stages = stored["parts"], stored.get("stages", {})
        # The journal goes last, so a manifest without one belongs to a finished run.
        journal.complete = not (directory / JOURNAL_NAME).exists()
        for part in journal.parts.values():
            file = directory / part["file"]
            # Between the two steps of a replacement a shard may be the old one or the new one.
            whole = (part["sha256"], part.get("replacement"))
            if not file.exists() or file_digest(file) not in whole:
                raise LowbitError(
                    f"{file}: this finished shard is missing or has changed since it was written; "
                    "choose a new output directory and start again"
                )
        for file in directory.glob(f"*{TEMPORARY_SUFFIX}"):
            file.unlink()
        return journal

    def finish_part(self, name: str, file: Path, modules: dict[str, Any], **whole: Any) -> None:
        """Records that the durable shard `file` completes part `name`.

        Args:
            name: of the part.
            file: the shard.
            modules: module name -> report.
            **whole: what is to be recorded of the part as a whole, JSON values.
        """
        digest = file_digest(file)
        self.parts[name] = {"file": file.name, "sha256": digest, "modules": modules, **whole}
        self._write()

    def begin_stage(self, name: str, report: dict[str, Any], digests: dict[str, str]) -> None:
        """Records that the step `name` is done, up to rewriting shards.

        Args:
            name: of the step.
            report: what is to be recorded of it, JSON values.
            digests: part name -> SHA-256 that its shard will have.
        """
        self.stages[name] = report
        for part, digest in digests.items():
            self.parts[part]["replacement"] = digest
        self._write()

    def replacements(self) -> dict[str, str]:
        """Returns file name -> SHA-256 of the shards that are to be rewritten, or were just."""
        parts = self.parts.values()
        return {part["file"]: part["replacement"] for part in parts if "replacement" in part}

    def finish_stage(self) -> None:
        """Records that all shards are rewritten."""
        for part in self.parts.values():
            part["sha256"] = part.pop("replacement", part["sha256"])
        self._write()

    def remove(self) -> None:
        """Removes the journal file: the run is complete."""
        (self.directory / JOURNAL_NAME).unlink(missing_ok=True)

    def _write(self) -> None:
        content = {"fingerprint": self.fingerprint, "parts": self.parts}
        if self.stages:
            content["stages"] = self.stages
        write_json(self.directory / JOURNAL_NAME, content)


def stored_run(directory: Path) -> dict[str, Any] | None:
    """Returns the fingerprint and parts of the run in `directory`, None if there is none.

    They come from its journal, or from the manifest of a finished run, which has both fields too.
    """
    for name in (JOURNAL_NAME, MANIFEST_NAME):
        if not (directory / name).exists():
            continue
        stored = read_json(directory / name, "")
        if not all(isinstance(stored.get(field), dict) for field in ("fingerprint", "parts")):
            raise LowbitError(f"{directory / name}: is corrupt; start again in a new directory")
        return stored
    return None


def module_reports(directory: Path) -> dict[str, dict[str, Any]]:
    """Returns module name -> what the manifest of the finished run in `directory` says of it.

    Empty where there is no manifest: nobody recorded anything.

    Raises:
        LowbitError: the manifest is corrupt.
    """
    if not (directory / MANIFEST_NAME).exists():
        return {}
    try:
        parts = read_json(directory / MANIFEST_NAME, "")["parts"].values()
        found = {name: dict(report) for part in parts for name, report in part["modules"].items()}
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        if isinstance(error, LowbitError):
            raise
        raise LowbitError(f"{directory / MANIFEST_NAME}: is corrupt; fetch it again") from None
    return found


@contextmanager
def threads_of_run(directory: Path) -> Iterator[None]:
    """Computes with the thread count of the run in `directory`, if there is one.

    How a sum is split over threads decides its last bits.
    """
    stored = stored_run(directory)
    threads = stored["fingerprint"].get("threads") if stored else None
    before = torch.get_num_threads()
    if isinstance(threads, int) and 0 < threads <= MAX_THREADS:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def claim(directory: Path, resume: bool) -> Iterator[None]:
    """Makes `directory` if need be and holds its lock; the system frees it with the process.

    Raises:
        LowbitError: see `refuse_occupied`; also if another process holds the lock.
    """
    refuse_occupied(directory, resume)
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LowbitError(f"{directory}: another process is writing to it; let it finish") from None
    else:
        yield
    finally:
        os.close(descriptor)


def refuse_occupied(directory: Path, resume: bool) -> None:
    """Refuses a directory that is neither empty nor, with `resume`, one of an earlier run.

    Raises:
        LowbitError: saying what is there.
    """
    with disk_errors(directory):
        if directory.is_file():
            raise LowbitError(f"{directory}: is a file; choose a new directory")
        found = sorted(path.name for path in directory.iterdir()) if directory.exists() else []
    # A run that was killed while it claimed the directory leaves this and nothing else.
    present = [name for name in found if name != JOURNAL_NAME + TEMPORARY_SUFFIX]
    if not present:
        return
    if JOURNAL_NAME in present and not resume:
        raise LowbitError(f"{directory}: holds an unfinished run; add --resume to go on with it")
    if MANIFEST_NAME in present and not resume:
        raise LowbitError(f"{directory}: already holds a quantized model; choose another output")
    if JOURNAL_NAME not in present and MANIFEST_NAME not in present:
        reason = "has no journal to resume from, and is" if resume else "is"
        raise LowbitError(
            f"{directory}: {reason} not empty (it holds {present[0]}); choose an empty or new "
            "directory"
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
