"""Real clients of the formats: which are there, and what came of each pair.

A client lives in an environment of its own, named by its interpreter in LOWBIT_INTEROP_<CLIENT>;
`make test-interop` makes the environments and sets the names. Tests of a client that nobody names
are skipped. A test says what it proves with a mark,

    @pytest.mark.pair(format, direction, client, equality)

direction "write" (ours, loaded there) or "read" (theirs, loaded here), and what came of all tests
of each pair is written to the file in LOWBIT_INTEROP_RESULT.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# (format, direction, client, equality) -> test -> (outcome, why not)
_OUTCOMES: dict[tuple[str, ...], dict[str, tuple[str, str]]] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks all tests of this folder."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.interop)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Notes the outcome of a test that has a pair."""
    outcome: Any = yield
    report, mark = outcome.get_result(), item.get_closest_marker("pair")
    if mark is None or (report.when != "call" and report.passed):
        return
    why = ""
    if report.skipped:
        why = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        why = why.removeprefix("Skipped: ")
    elif report.failed and call.excinfo is not None:
        why = " ".join(str(call.excinfo.value).split())[-300:]
    tests = _OUTCOMES.setdefault(tuple(mark.args), {})
    tests[item.name] = ("not run" if report.skipped else report.outcome, why)


def pytest_sessionfinish() -> None:
    """Writes the outcomes where somebody asked for them."""
    result = os.environ.get("LOWBIT_INTEROP_RESULT")
    if result:
        pairs = [
            {"pair": pair, "tests": {name: list(found) for name, found in tests.items()}}
            for pair, tests in _OUTCOMES.items()
        ]
        Path(result).write_text(json.dumps(pairs, indent=2))
