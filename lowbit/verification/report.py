"""What verification found: a row for each check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError


@dataclass(frozen=True)
class Check:
    """One check.

    Args:
        name: what was checked.
        passed: None if it was not run.
        detail: what was found, or why it was not run.
    """

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Report:
    """The outcome of a verification.

    Args:
        path: the checkpoint.
        layout: its format.
        checks: in the order in which they were run.
        measured: the comparison with the original as JSON values, None where there was none.
    """

    path: Path
    layout: str
    checks: tuple[Check, ...]
    measured: dict[str, Any] | None = None

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not self.failed

    @property
    def failed(self) -> dict[str, str]:
        """Name of each check that failed -> what is wrong."""
        return {check.name: check.detail for check in self.checks if check.passed is False}

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values."""
        checks = [vars(check) for check in self.checks]
        measured = {} if self.measured is None else {"measured": self.measured}
        return {
            "path": str(self.path), "format": self.layout, "ok": self.ok, "checks": checks
        } | measured  # fmt: skip


@dataclass
class Checks:
    """Checks as they are run.

    Args:
        rows: what was found so far.
    """

    rows: list[Check] = field(default_factory=list)

    def run(self, name: str, check: Callable[[], str]) -> bool:
        """Runs `check`, which returns what it found or raises `LowbitError`; True if it passed."""
        try:
            detail = check()
        except LowbitError as error:
            self.rows.append(Check(name, False, str(error)))
            return False
        self.rows.append(Check(name, True, detail))
        return True

    def skip(self, why: str, *names: str) -> None:
        """Notes that checks are not run."""
        self.rows += [Check(name, None, f"not run: {why}") for name in names]


def listed(names: list[str], shown: int = 3) -> str:
    """Returns the first few of `names`, and how many there are more."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")
