"""One case, made from its number and read under limits.

What is opened, started or asked for is seen by an audit hook, which Python cannot take away again:
it does nothing outside of a case.
"""

from __future__ import annotations

import functools
import gc
import os
import random
import resource
import signal
import sys
import sysconfig
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError
from scripts.fuzzing.files import Files, write_files
from scripts.fuzzing.mutations import mutated
from scripts.fuzzing.readers import Target
from scripts.provenance import ROOT

SECONDS = 2.0
GROWTH_BYTES = 256 << 20
# Beyond this much more address space the allocator refuses, so that no case takes the machine down.
ADDRESS_SPACE_BYTES = 2 << 30
LONGEST_MESSAGE = 2000
# What allocators say; libraries turn it into errors of their own, which may look like a refusal.
OUT_OF_MEMORY = ("not enough memory", "can't allocate", "Unable to allocate", "out of memory")
FORBIDDEN_EVENTS = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class",
    "socket.connect", "socket.getaddrinfo", "webbrowser.open", "ctypes.dlopen",
)  # fmt: skip


class OutOfTimeError(BaseException):
    """A case has used up its processor time; no handler of ordinary errors may catch it."""


@dataclass(frozen=True)
class Case:
    """A number from which a damaged folder is made.

    Args:
        target: whose reader.
        seed: of the run.
        number: of the case in its target.
    """

    target: str
    seed: int
    number: int

    def __str__(self) -> str:
        return f"{self.target}:{self.seed}:{self.number}"

    @staticmethod
    def parse(text: str) -> Case:
        """Returns the case that `str` of it is.

        Raises:
            LowbitError: it is none.
        """
        target, *numbers = text.split(":")
        if len(numbers) != 2 or not all(number.isdigit() for number in numbers):
            raise LowbitError(f"{text!r} is no case; give TARGET:SEED:NUMBER as it was printed")
        return Case(target, int(numbers[0]), int(numbers[1]))

    def chance(self) -> random.Random:
        """Returns what all choices of the case are drawn from."""
        return random.Random(str(self))

    def files(self, target: Target) -> Files:
        """Returns the damaged files."""
        chance = self.chance()
        files = mutated(_sample(target.name, chance.randrange(len(target.samples))), chance)
        if target.repaired is not None and chance.random() < 0.5:
            files = target.repaired(files)
        return files


@dataclass(frozen=True)
class Finding:
    """What a reader did that it must not do.

    Args:
        case: that shows it.
        kind: "exception", "message", "time", "memory", "outside" or "crash".
        what: in a line.
        where: the last lines of lowbit that were on the stack, which tells findings apart.
        trace: all of the stack.
    """

    case: str
    kind: str
    what: str
    where: str = ""
    trace: str = ""


@dataclass
class _Watch:
    folder: str
    allowed: tuple[str, ...]
    seen: list[str] = field(default_factory=list)


_watch: _Watch | None = None


def judge(case: Case, target: Target, folder: Path) -> Finding | None:
    """Writes a case to `folder` and reads it; returns what is wrong with that, if anything is.

    Args:
        case: to be made.
        target: its reader.
        folder: that does not exist yet; files beside it must not be read.
    """
    write_files(case.files(target), folder)
    chance = case.chance()
    begin = time.process_time()
    before = _reset_peak()
    raised: BaseException | None = None
    with _watched(folder) as seen, _limited():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                target.read(folder, chance)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raised = error
    seconds, growth = time.process_time() - begin, _peak() - before
    finding = functools.partial(_finding, case, raised)
    if isinstance(raised, OutOfTimeError) or seconds > SECONDS:
        return finding("time", f"{seconds:.1f} s")
    if isinstance(raised, MemoryError) or any(text in str(raised) for text in OUT_OF_MEMORY):
        return finding("memory", f"{type(raised).__name__}: {str(raised)[:200]}")
    if growth > GROWTH_BYTES:
        return finding("memory", f"grew by {growth >> 20} MB")
    if seen:
        return finding("outside", seen[0])
    if raised is not None and not isinstance(raised, LowbitError):
        return finding("exception", f"{type(raised).__name__}: {str(raised)[:200]}")
    if raised is not None and _is_no_sentence(str(raised)):
        return finding("message", f"{len(str(raised))} characters: {str(raised)[:200]!r}")
    return None


def warm_up(target: Target, folder: Path) -> None:
    """Reads sound files, so that what is imported once is imported before any time is taken.

    Raises:
        Exception: a reader does not read what is sound.
    """
    for index in range(len(target.samples)):
        path = folder / f"{target.name}-{index}"
        write_files(_sample(target.name, index), path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                target.read(path, random.Random(index))
            except LowbitError:
                # Not every format holds every other one, and act-order does not run.
                if target.name not in ("convert", "load", "verify"):
                    raise


@functools.cache
def _sample(target: str, index: int) -> Files:
    from scripts.fuzzing.readers import TARGETS

    return TARGETS[target].samples[index]()


def _is_no_sentence(message: str) -> bool:
    plain = all(character.isprintable() for character in message)
    return not plain or len(message) > LONGEST_MESSAGE


def _finding(case: Case, raised: BaseException | None, kind: str, what: str) -> Finding:
    if raised is None:
        return Finding(str(case), kind, what)
    frames = traceback.extract_tb(raised.__traceback__)
    own = [f for f in frames if f"{ROOT}/lowbit" in f.filename] or frames
    where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(own[-2:]))
    return Finding(str(case), kind, what, where, "".join(traceback.format_exception(raised)))


@contextmanager
def _limited() -> Iterator[None]:
    """Ends a case after `SECONDS` of processor time, and lets it have only so much memory."""

    def out_of_time(*_: object) -> None:
        raise OutOfTimeError

    old_handler = signal.signal(signal.SIGPROF, out_of_time)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ADDRESS_SPACE_BYTES
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old_handler)


def _reset_peak() -> int:
    """Makes the system count the largest resident set anew; returns what it is now."""
    gc.collect(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise AssertionError("this system does not tell the size of a process")


@contextmanager
def _watched(folder: Path) -> Iterator[list[str]]:
    global _watch
    _install_hook()
    _watch = _Watch(os.path.realpath(folder), _allowed_places())
    seen = _watch.seen
    try:
        yield seen
    finally:
        _watch = None


@functools.cache
def _allowed_places() -> tuple[str, ...]:
    """Returns where code and what libraries look up lie."""
    places = {*sysconfig.get_paths().values(), *sys.path, sys.prefix, sys.base_prefix, str(ROOT)}
    return (*(os.path.realpath(p) for p in places if p), "/proc", "/sys", "/dev/null")


@functools.cache
def _install_hook() -> None:
    sys.addaudithook(_audit)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    watch = _watch
    if watch is None:
        return
    if event in FORBIDDEN_EVENTS:
        watch.seen.append(f"{event} {str(arguments)[:200]}")
    elif event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path = os.path.abspath(os.fsdecode(arguments[0]))  # noqa: PTH100 (links stay as they are)
        inside = any(_is_below(path, place) for place in (watch.folder, *watch.allowed))
        if not inside:
            watch.seen.append(f"open {path}")


def _is_below(path: str, place: str) -> bool:
    return path == place or path.startswith(place.rstrip("/") + "/")
