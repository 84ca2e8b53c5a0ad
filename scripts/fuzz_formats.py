"""Damages files of every format and reads them: anything but success or one sentence is a finding.

    python scripts/fuzz_formats.py --minutes 60
    python scripts/fuzz_formats.py --replay gptq:4711:1234

Cases run in a child process, because a reader may kill it; the child is started anew now and then.
Findings are kept with the files that show them, and can be replayed by their number.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import selectors
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError, unknown_name
from lowbit.progress import RunProgress
from scripts import command_line
from scripts.fuzzing.files import write_files
from scripts.fuzzing.readers import TARGETS, Target
from scripts.fuzzing.sandbox import Case, Finding, judge, warm_up
from scripts.fuzzing.session import Session
from scripts.provenance import RESULTS, ROOT, write_result

# A child lives so long: what it leaks, and what one case may do to the next, ends with it.
CHILD_SECONDS = 1200.0
REPORT_SECONDS = 1.0
# A child that says nothing for so long hangs where no signal reaches it.
SILENCE_SECONDS = 300.0
MEMORY_DISK = Path("/dev/shm")


def chosen(names: str) -> list[Target]:
    """Returns the targets of a list separated by commas, all of them for an empty one.

    Raises:
        LowbitError: there is none of that name.
    """
    wanted = [name for name in names.split(",") if name] or [*TARGETS]
    for name in wanted:
        if name not in TARGETS:
            raise unknown_name("reader", name, TARGETS)
    return [TARGETS[name] for name in wanted]


@contextmanager
def work_folder() -> Iterator[Path]:
    """Yields an empty folder, in memory where the system offers that: cases write a lot."""
    place = MEMORY_DISK if os.access(MEMORY_DISK, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="lowbit-fuzz-", dir=place) as folder:
        yield Path(folder)


def child(arguments: argparse.Namespace) -> None:
    """Runs cases and says on standard output what it does, one JSON object a line."""
    from lowbit.hf.loading import quiet_libraries

    quiet_libraries()
    done = json.loads(arguments.child)
    saying = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries print

    def say(**what: Any) -> None:
        print(json.dumps(what), file=saying, flush=True)

    current = os.open(arguments.current, os.O_WRONLY)
    with work_folder() as folder:
        session = Session(folder, chosen(arguments.readers), arguments.seed, done)
        end = min(time.time() + CHILD_SECONDS, arguments.until)
        reported = 0.0
        while (now := time.time()) < end:
            if now - reported > REPORT_SECONDS:
                reported = now
                say(done=session.done)
            finding = session.step(lambda case: _note(current, case))
            if finding is not None:
                say(finding=dataclasses.asdict(finding))
        say(done=session.done)


def _note(descriptor: int, case: Case) -> None:
    os.pwrite(descriptor, f"{case!s:<80}".encode(), 0)


class Campaign:
    """A run of children one after another.

    Args:
        arguments: of the command.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.done: dict[str, int] = {}
        self.findings: list[Finding] = []
        self.seen: Counter[tuple[str, ...]] = Counter()

    def execute(self) -> float:
        """Fuzzes for the time that was asked for; returns the seconds."""
        begin, total = time.monotonic(), self.arguments.minutes * 60
        with RunProgress(not self.arguments.quiet) as bar, work_folder() as folder:
            bar.stage("fuzzing", int(total))
            while (left := total - (time.monotonic() - begin)) > 0:
                self._run_child(folder / "current", time.time() + left, bar, begin)
        return time.monotonic() - begin

    def _run_child(self, current: Path, until: float, bar: RunProgress, begin: float) -> None:
        current.write_bytes(b"")
        command = [sys.executable, "-m", "scripts.fuzz_formats", "--until", str(until)]
        command += ["--readers", self.arguments.readers, "--seed", str(self.arguments.seed)]
        command += ["--child", json.dumps(self.done), "--current", str(current)]
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
        )
        assert process.stdout is not None
        assert process.stderr is not None
        errors = b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            selector.register(process.stderr, selectors.EVENT_READ)
            while selector.get_map():
                ready = selector.select(SILENCE_SECONDS)
                if not ready:
                    process.kill()
                    break
                for key, _ in ready:
                    line = key.fileobj.readline()  # type: ignore[union-attr]
                    if not line:
                        selector.unregister(key.fileobj)
                    elif key.fileobj is process.stderr:
                        errors = (errors + line)[-4000:]
                    else:
                        self._take(json.loads(line))
                        bar.complete(int(time.monotonic() - begin))
                        bar.describe(
                            f"{sum(self.done.values()):,} cases, {len(self.seen)} findings"
                        )
        if process.wait() != 0:
            self._take_crash(process.returncode, current, errors.decode(errors="replace"))

    def _take(self, said: dict[str, Any]) -> None:
        if "done" in said:
            self.done = said["done"]
            return
        self._add(Finding(**said["finding"]))

    def _take_crash(self, status: int, current: Path, errors: str) -> None:
        """Notes what ended a child; a child that never began a case is a bug of this script."""
        text = current.read_text().strip()
        if not text:
            raise RuntimeError(f"the child ended with {status}: {errors}")
        case = Case.parse(text)
        # Those that it had not told of are counted too: the next child goes on behind this one.
        self.done[case.target] = case.number + 1
        self._add(Finding(text, "crash", f"the process ended with {status}", trace=errors))

    def _add(self, finding: Finding) -> None:
        key = (finding.case.split(":")[0], finding.kind, finding.where)
        self.seen[key] += 1
        if self.seen[key] > 1:
            return
        self.findings.append(finding)
        case = Case.parse(finding.case)
        folder = self.arguments.findings / finding.case.replace(":", "-")
        if not folder.exists():
            write_files(case.files(TARGETS[case.target]), folder / "files")
            text = f"{finding.case}\n{finding.kind}: {finding.what}\n\n{finding.trace}"
            (folder / "finding.txt").write_text(text, encoding="utf-8", errors="backslashreplace")
        print(f"finding {finding.case}: {finding.kind}: {finding.what}", file=sys.stderr)


def environment() -> dict[str, str]:
    """Returns the environment of children: no network, one thread."""
    path = os.pathsep.join(str(ROOT / part) for part in (".", "eval", "kernels"))
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def replay(text: str) -> None:
    """Runs one case in this process and prints what comes of it."""
    case = Case.parse(text)
    (target,) = chosen(case.target)
    with work_folder() as folder:
        warm_up(target, folder / "sound")
        finding = judge(case, target, folder / "case")
    print(f"{case}: nothing wrong" if finding is None else f"{finding.kind}: {finding.what}")
    if finding is not None:
        print(finding.trace)
        sys.exit(1)


def main() -> None:
    """Runs the command."""
    parser = command_line.parser(__doc__, "python scripts/fuzz_formats.py --minutes 5")
    parser.add_argument("--minutes", type=float, default=60.0, help="how long")
    parser.add_argument("--readers", default="", help=f"some of {', '.join(TARGETS)}; empty: all")
    parser.add_argument("--seed", type=int, help="of all cases; none: a fresh one")
    parser.add_argument("--findings", type=Path, default=ROOT / "fuzz-findings", help="kept there")
    parser.add_argument("--json", type=Path, default=RESULTS / "fuzz.json", help="the result")
    parser.add_argument("--replay", help="run one case, as a finding names it, and no other")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--current", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    command_line.run(parser, _run)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.minutes <= 0:
        raise LowbitError(f"--minutes must be more than 0, got {arguments.minutes}")
    targets = chosen(arguments.readers)
    if arguments.replay:
        replay(arguments.replay)
        return
    if arguments.child:
        child(arguments)
        return
    if arguments.seed is None:
        arguments.seed = random.SystemRandom().randrange(1 << 32)
    campaign = Campaign(arguments)
    seconds = campaign.execute()
    content = {
        "seconds": round(seconds, 1),
        "seed": arguments.seed,
        "cases": {target.name: campaign.done.get(target.name, 0) for target in targets},
        "findings": [
            {"case": f.case, "kind": f.kind, "what": f.what, "where": f.where}
            for f in campaign.findings
        ],
    }
    command = f"python scripts/fuzz_formats.py --minutes {arguments.minutes:g}"
    write_result(arguments.json, command, content)
    found = len(campaign.findings)
    print(f"{sum(content['cases'].values()):,} cases in {seconds:,.0f} s, {found} findings")
    if found:
        sys.exit(1)


if __name__ == "__main__":
    main()
