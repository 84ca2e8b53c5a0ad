"""A part of the benchmark: a name, a deadline, a file that always holds what was measured so far.

Every part runs in a process of its own. A kernel that reads out of bounds takes the CUDA context of
its process with it, and one that hangs has to be killed; neither may cost the results of others.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


class OutOfTimeError(Exception):
    """There is no time left for what would come next; what was measured is kept."""


class DeadDeviceError(Exception):
    """The CUDA context of this process is gone: whatever follows would fail too."""


@dataclass(frozen=True)
class Settings:
    """What all parts are told.

    Args:
        smoke: tiny sizes on the CPU, kernels in Triton's interpreter, to test the plumbing.
        schemes: names of the schemes to measure.
        refused: scheme -> why it is not measured (its kernels gave wrong results).
        write_tiles: whether tuning writes its table beside the shipped ones.
        skipped: shapes that are measured already, or that ended the process that measured them.
    """

    smoke: bool
    schemes: tuple[str, ...]
    refused: dict[str, str]
    write_tiles: bool = True
    skipped: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        """Where tensors live."""
        return "cpu" if self.smoke else "cuda"

    def to_json(self) -> str:
        """Returns the settings as one argument of a command line."""
        return json.dumps(self.__dict__)

    @staticmethod
    def from_json(text: str) -> Settings:
        """Returns the settings whose `to_json` this is."""
        fields = json.loads(text)
        tuples = {name: tuple(fields[name]) for name in ("schemes", "skipped")}
        return Settings(**{**fields, **tuples})


class Part:
    """The results of one part.

    Args:
        name: of the part, printed before every line.
        file: JSON file that holds the results.
        seconds: after which the part should end by itself.
    """

    def __init__(self, name: str, file: Path, seconds: float) -> None:
        self.name, self.file, self.seconds = name, file, seconds
        self.begin = time.monotonic()
        self.results: dict[str, Any] = {"errors": {}}

    @property
    def remaining(self) -> float:
        """Seconds left."""
        return self.seconds - (time.monotonic() - self.begin)

    def need(self, seconds: float, what: str) -> None:
        """Ends the part if less than `seconds` are left for `what`."""
        if self.remaining < seconds:
            raise OutOfTimeError(f"no time left for {what}")

    def say(self, text: str) -> None:
        """Prints a line of progress."""
        print(f"[{time.monotonic() - self.begin:6.1f} s] {self.name}: {text}", flush=True)

    def set(self, key: str, value: Any) -> None:
        """Sets one entry of the results and writes the file."""
        self.results[key] = value
        self.save()

    def add(self, key: str, value: Any) -> None:
        """Appends to a list of the results; `save` comes later."""
        self.results.setdefault(key, []).append(value)

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        self.results["seconds"] = round(time.monotonic() - self.begin, 1)
        write_json(self.file, self.results)

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Records an error under `what` and goes on behind the block.

        Raises:
            OutOfTimeError: from the block.
            DeadDeviceError: nothing else could be measured in this process.
        """
        try:
            yield
        except (OutOfTimeError, DeadDeviceError):
            raise
        except Exception as error:  # whatever it is, the other measurements are worth having
            self.results["errors"][what] = traceback.format_exc()
            first_line = (str(error).splitlines() or [""])[0]
            self.say(f"FAILED {what}: {type(error).__name__}: {first_line[:200]}")
            self.save()
            if not _device_lives():
                raise DeadDeviceError(what) from error


def _device_lives() -> bool:
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def write_json(file: Path, content: Any) -> None:
    """Writes `content` so that a reader never sees half of it."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(file)
