"""Runs parts in processes of their own and brings their results together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Beyond its deadline, for writing its file, before a part is killed.
GRACE_SECONDS = 15.0
POLL_SECONDS = 0.2
SAVE_SECONDS = 10.0
# A part ends with this status when its CUDA context is gone.
DEAD_DEVICE_STATUS = 3


@dataclass(frozen=True)
class Job:
    """One process.

    Args:
        label: in messages.
        command: its arguments.
        file: where it writes its results.
        seconds: its deadline.
    """

    label: str
    command: Sequence[str]
    file: Path
    seconds: float


def run_all(jobs: Sequence[Job], save: Callable[[], None]) -> dict[str, int]:
    """Runs `jobs` side by side and returns label -> exit status, negative for a signal.

    Args:
        jobs: processes to run; each is killed, with all its children, after its deadline.
        save: called from time to time, so that results are on disk if this process is killed too.
    """
    running = {job.label: (job, _start(job), time.monotonic()) for job in jobs}
    statuses: dict[str, int] = {}
    saved = time.monotonic()
    try:
        while running:
            time.sleep(POLL_SECONDS)
            for label, (job, process, begin) in list(running.items()):
                if (
                    process.poll() is None
                    and time.monotonic() - begin > job.seconds + GRACE_SECONDS
                ):
                    print(f"{label}: killed, it did not end by itself", flush=True)
                    _kill(process)
                if process.poll() is not None:
                    statuses[label] = process.returncode
                    del running[label]
            if time.monotonic() - saved > SAVE_SECONDS:
                save()
                saved = time.monotonic()
    finally:
        for _, process, _ in running.values():
            _kill(process)
    return statuses


def merged(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns one result of several runs of a part: lists and tables joined, the last number."""
    whole: dict[str, Any] = {}
    for result in results:
        for key, value in result.items():
            if isinstance(value, list) and key != "left_out":
                whole[key] = [*whole.get(key, []), *value]
            elif isinstance(value, dict):
                whole[key] = {**whole.get(key, {}), **value}
            else:
                whole[key] = value
    return whole


def _start(job: Job) -> subprocess.Popen[bytes]:
    # A group of its own, so that the children of a part can be ended with it. No session of its
    # own: what ends everything in this one, after a time limit say, is to end the parts too.
    return subprocess.Popen([sys.executable, "-u", *job.command], preexec_fn=os.setpgrp)


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
