"""The progress of a long run: what is being done, how far it is, how long it will take."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class RunProgress:
    """A progress bar on standard error; silent where `enabled` is false.

    Use as a context manager. Work is counted in units of the caller's choice; `stage` starts a
    new count.
    """

    def __init__(self, enabled: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", table_column=None),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not enabled,
            transient=False,
        )
        self._task = self._progress.add_task("", total=None, visible=False)

    def __enter__(self) -> RunProgress:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def stage(self, description: str, total: int) -> None:
        """Starts a stage of `total` units."""
        self._progress.reset(self._task, description=description, total=total, visible=True)

    def describe(self, description: str) -> None:
        """Replaces the text beside the bar."""
        self._progress.update(self._task, description=description)

    def advance(self, units: int) -> None:
        """Counts `units` as done."""
        self._progress.advance(self._task, units)

    def complete(self, units: int) -> None:
        """Counts as if `units` of the stage were done, whatever was counted before."""
        self._progress.update(self._task, completed=units)
