"""The output folder of a run: what it was started with, its checkpoints, and the result.

    checkpoints/run.json          the fingerprint: everything that the result depends on
    checkpoints/checkpoint-20/    Trainer's own: adapter, optimizer, schedule, random states
        complete.json             written last: size and SHA-256 of every other file
    tokenizer, loss.png, finetune.json, adapter_model.safetensors
    adapter_config.json           last of all: without it the folder is no adapter

Trainer writes a checkpoint in place, file by file, so one that was being written when the process
was killed looks like any other. Here one counts only if `complete.json` is there and every file is
what it says; all others are removed before a run goes on.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowbit.checkpoint.journal import MAX_THREADS
from lowbit.checkpoint.reader import file_digest, read_json
from lowbit.checkpoint.writer import (
    TEMPORARY_SUFFIX,
    disk_errors,
    fsync_directory,
    write_bytes,
    write_json,
)
from lowbit.errors import LowbitError

CHECKPOINTS = "checkpoints"
RUN_NAME = "run.json"
COMPLETE_NAME = "complete.json"
RESULT_NAME = "finetune.json"
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
STATE_NAME = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class RunFolder:
    """The folder at `path`; `claim` makes it.

    Args:
        path: the folder.
        last: the file without which there is no result.
    """

    path: Path
    last: str = CONFIG_NAME

    @property
    def checkpoints(self) -> Path:
        """Where Trainer writes."""
        return self.path / CHECKPOINTS

    @contextmanager
    def claim(self, resume: bool) -> Iterator[None]:
        """Makes the folder if need be and holds its lock; the system frees it with the process.

        Raises:
            LowbitError: it holds something else, a run that is not to be resumed, or another
                process writes to it.
        """
        self.refuse_occupied(resume)
        existed = self.path.exists()
        with disk_errors(self.path):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.checkpoints, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LowbitError(
                f"{self.path}: another process is writing to it; let it finish"
            ) from None
        else:
            try:
                yield
            except LowbitError:
                if not resume:
                    self._forget_beginning(existed)
                raise
        finally:
            os.close(descriptor)

    def _forget_beginning(self, keep: bool) -> None:
        """Removes a run that was refused before it had a checkpoint: it can be given again."""
        if any(entry.name != RUN_NAME for entry in self.checkpoints.iterdir()):
            return
        shutil.rmtree(self.checkpoints)
        if not keep and not any(self.path.iterdir()):
            self.path.rmdir()

    def refuse_occupied(self, resume: bool) -> None:
        """Refuses a folder that is neither empty nor, with `resume`, one of an earlier run.

        Raises:
            LowbitError: saying what is there.
        """
        with disk_errors(self.path):
            if self.path.is_file():
                raise LowbitError(f"{self.path}: is a file; choose a new directory")
            found = sorted(p.name for p in self.path.iterdir()) if self.path.exists() else []
        run = self.checkpoints / RUN_NAME
        # A run that was killed while it claimed the folder leaves nothing else.
        if found == [CHECKPOINTS] and not run.exists():
            found = sorted(
                p.name for p in self.checkpoints.iterdir() if p.suffix != TEMPORARY_SUFFIX
            )
        if not found:
            return
        if not run.exists():
            raise LowbitError(
                f"{self.path}: is not empty (it holds {found[0]}); choose an empty or new directory"
            )
        if not resume:
            done = self.result() is not None
            raise LowbitError(
                f"{self.path}: already holds the result of a run; choose another output"
                if done
                else f"{self.path}: holds an unfinished run; add --resume to go on with it"
            )

    def begin(self, fingerprint: Mapping[str, Any]) -> None:
        """Records the fingerprint of a new run, or holds it against that of the earlier one.

        Raises:
            LowbitError: they differ; the message names the first field that does.
        """
        stored = self.fingerprint()
        if stored is None:
            write_json(self.checkpoints / RUN_NAME, dict(fingerprint))
            return
        for key in [*stored, *(key for key in fingerprint if key not in stored)]:
            before, now = _flat(stored.get(key)), _flat(fingerprint.get(key))
            for name in [*before, *(name for name in now if name not in before)]:
                if before.get(name) != now.get(name):
                    raise LowbitError(
                        f"{self.path}: the run was started with another {key}{name}: "
                        f"{_short(before.get(name))}, now {_short(now.get(name))}; resume it as it "
                        "was started, or choose a new output"
                    )

    def fingerprint(self) -> dict[str, Any] | None:
        """Returns what the run was started with, None where none was."""
        file = self.checkpoints / RUN_NAME
        return read_json(file, "start again in a new directory") if file.exists() else None

    def result(self) -> dict[str, Any] | None:
        """Returns what a finished run has recorded, None if it is not finished."""
        if not (self.path / self.last).exists() or not (self.path / RESULT_NAME).exists():
            return None
        return read_json(self.path / RESULT_NAME, "start again in a new directory")

    def complete(self, step: int) -> None:
        """Marks the checkpoint of `step` as whole."""
        folder = self.checkpoint(step)
        with disk_errors(folder):
            files = {
                file.relative_to(folder).as_posix(): {
                    "bytes": file.stat().st_size,
                    "sha256": file_digest(file),
                }
                for file in sorted(folder.rglob("*"))
                if file.is_file() and file.name != COMPLETE_NAME
            }
        write_json(folder / COMPLETE_NAME, {"step": step, "files": files})

    def checkpoint(self, step: int) -> Path:
        """Returns the folder of the checkpoint of `step`."""
        return self.checkpoints / f"checkpoint-{step}"

    def whole_checkpoints(self) -> list[int]:
        """Returns the steps of the checkpoints that are complete and unchanged, in order."""
        steps = []
        for folder in self.checkpoints.glob("checkpoint-*"):
            named = _CHECKPOINT.fullmatch(folder.name)
            if named and _is_whole(folder):
                steps.append(int(named[1]))
        return sorted(steps)

    def remove_broken(self) -> None:
        """Removes checkpoints that a killed process left half-written."""
        whole = {self.checkpoint(step) for step in self.whole_checkpoints()}
        with disk_errors(self.checkpoints):
            for folder in self.checkpoints.glob("checkpoint-*"):
                if folder not in whole:
                    shutil.rmtree(folder)

    def publish(self, step: int, result: Mapping[str, Any]) -> None:
        """Makes the adapter of a checkpoint the result of the run.

        Each file appears whole, and the one that makes the folder an adapter comes last.

        Args:
            step: of the checkpoint.
            result: what is recorded, JSON values.
        """
        source = self.checkpoint(step)
        write_bytes(self.path / WEIGHTS_NAME, (source / WEIGHTS_NAME).read_bytes())
        write_json(self.path / RESULT_NAME, dict(result))
        write_bytes(self.path / CONFIG_NAME, (source / CONFIG_NAME).read_bytes())
        fsync_directory(self.path)


@contextmanager
def threads_of(fingerprint: Mapping[str, Any] | None) -> Iterator[None]:
    """Computes with as many threads as the run began with: they decide the last bits of sums."""
    threads = fingerprint.get("threads") if fingerprint else None
    before = torch.get_num_threads()
    if isinstance(threads, int) and 0 < threads <= MAX_THREADS:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _is_whole(folder: Path) -> bool:
    marker = folder / COMPLETE_NAME
    if not marker.is_file():
        return False
    try:
        files = read_json(marker, "")["files"]
        return all(
            (folder / name).stat().st_size == recorded["bytes"]
            and file_digest(folder / name) == recorded["sha256"]
            for name, recorded in files.items()
        )
    except (LowbitError, OSError, LookupError, TypeError, AttributeError):
        return False


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Returns dotted name -> value of nested mappings."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, part in value.items():
        flat.update(_flat(part, f"{prefix}.{key}"))
    return flat


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 48 else f"{text[:48]}..."
