"""Processes that measure, watched: one that crashes or hangs loses a candidate, not the results."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from cpu_units import Settings, Unit, key_of

from lowbit.progress import RunProgress

# Without a finished case or another candidate for so long, a process hangs.
STALL_SECONDS = 600.0
POLL_SECONDS = 0.3
RESTARTS = 12
TOGETHER = "all in turns"


class Supervisor:
    """Runs the processes of a part.

    Args:
        script: the command, which `--worker` makes one of its processes.
        out: folder of the results.
        part: its name.
        environment: of the processes.
        errors: what -> why, added to.
    """

    def __init__(
        self,
        script: Path,
        out: Path,
        part: str,
        environment: Mapping[str, str],
        errors: dict[str, str],
    ) -> None:
        self.script, self.out, self.part = script, out, part
        self.environment, self.errors = environment, errors
        self.lines, self.current = out / f"{part}.jsonl", out / f"{part}.current"

    def run(self, unit: str, settings: Settings, bar: RunProgress) -> None:
        """Measures a unit (JSON; empty: the decoder), again without whatever ends the process."""
        what = f"{self.part} {unit}".strip()
        for _ in range(RESTARTS):
            self.current.write_text(json.dumps(["start", 0, 0]))
            status = self._process(unit, settings, bar)
            if status == "":
                return
            name, tokens, threads = json.loads(self.current.read_text())
            if status == "status 1" or name == "start":
                self.errors[what] = f"{status}; see {self.part}.log"
                return
            settings = dataclasses.replace(settings, done=settings.done + self._measured())
            if name == TOGETHER:
                # Nobody knows who it was: this case is given up, the others go on.
                case = Unit.from_json(unit).key(tokens, threads)
                self.errors[case] = f"{status} while all candidates ran in turns"
                settings = dataclasses.replace(settings, done=(*settings.done, case))
            else:
                crashed = (name, tokens, threads, f"the process ended with {status}")
                settings = dataclasses.replace(settings, crashed=(*settings.crashed, crashed))
        self.errors[what] = f"given up after {RESTARTS} processes; see {self.part}.log"

    def _measured(self) -> tuple[str, ...]:
        if self.part == "decoder" or not self.lines.exists():
            return ()
        return tuple(key_of(json.loads(line)) for line in self.lines.read_text().splitlines())

    def _process(self, unit: str, settings: Settings, bar: RunProgress) -> str:
        """Runs one process; returns how it ended, "" for well."""
        command = [sys.executable, "-u", str(self.script), "--worker", self.part, "--unit", unit]
        command += ["--settings", settings.to_json()]
        command += ["--lines", str(self.lines), "--current", str(self.current)]
        before, state, changed = self._count(), self._state(), time.monotonic()
        with (self.out / f"{self.part}.log").open("ab") as log:
            # A group of its own, so that its children end with it.
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(self.environment),
                preexec_fn=os.setpgrp,
            )
            try:
                while process.poll() is None:
                    time.sleep(POLL_SECONDS)
                    count = self._count()
                    bar.advance(count - before)
                    before = count
                    if self._state() != state:
                        state, changed = self._state(), time.monotonic()
                    elif time.monotonic() - changed > STALL_SECONDS:
                        return f"no sign of life for {STALL_SECONDS:.0f} s"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        bar.advance(self._count() - before)
        code = process.returncode
        if code == 0:
            return ""
        return f"signal {-code}" if code < 0 else f"status {code}"

    def _count(self) -> int:
        return len(self.lines.read_bytes().splitlines()) if self.lines.exists() else 0

    def _state(self) -> tuple[int, int]:
        return self._count(), self.current.stat().st_mtime_ns
