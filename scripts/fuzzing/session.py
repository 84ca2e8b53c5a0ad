"""Cases of many targets one after another, each target with the same share of the time."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from scripts.fuzzing.readers import Target
from scripts.fuzzing.samples import unquantized
from scripts.fuzzing.sandbox import Case, Finding, judge, warm_up

# Beside the folder of a case: what paths that lead outside would find.
OUTSIDE = "outside"


@dataclass
class Session:
    """A run of cases in this process.

    Args:
        folder: to work in, empty.
        targets: to fuzz.
        seed: of all cases.
        done: cases done so far of each target, where an earlier process has ended.
    """

    folder: Path
    targets: Iterable[Target]
    seed: int
    done: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._seconds = {target.name: 0.0 for target in self.targets}
        self._by_name = {target.name: target for target in self.targets}
        for target in self.targets:
            self.done.setdefault(target.name, 0)
            warm_up(target, self.folder / "sound")
        outside = self.folder / OUTSIDE
        outside.mkdir()
        for name, content in unquantized().items():
            (outside / name).write_bytes(content or b"")
        (outside / "model.safetensors").write_bytes(b"\0" * 16)

    def step(self, announce: Callable[[Case], None] | None = None) -> Finding | None:
        """Does the next case of the target that has had the least time.

        Args:
            announce: told the case before it begins, which may kill the process.
        """
        name = min(self._seconds, key=self._seconds.__getitem__)
        case = Case(name, self.seed, self.done[name])
        if announce is not None:
            announce(case)
        begin = time.process_time()
        folder = self.folder / "case"
        try:
            return judge(case, self._by_name[name], folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            self.done[name] += 1
            # A moment for each case even where the clock is coarse, so that none starves.
            self._seconds[name] += time.process_time() - begin + 1e-6
