"""Runs the formats' tests with their real clients, and records what came of every pair.

Each client is installed into an environment of its own, from the package index, and kept there for
the next run. An environment that exists already may be named instead, by its interpreter:

    LOWBIT_INTEROP_LLAMA_CPP=/opt/llama/bin/python python scripts/interop.py

A run of some clients (`--clients`) replaces their rows of the result and keeps those of the others.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from lowbit.progress import RunProgress
from scripts import command_line
from scripts.peers.contenders import ENVIRONMENTS, Environment
from scripts.peers.environments import prepare
from scripts.provenance import RESULTS, ROOT, write_result

TESTS = ROOT / "tests" / "interop"
KEYS = ("format", "direction", "client", "equality")  # of a pair
# client -> its environment, and the packages whose versions are worth telling.
CLIENTS: dict[str, tuple[Environment, tuple[str, ...]]] = {
    "transformers": (
        Environment(
            "transformers",
            ("transformers", "accelerate", "compressed-tensors", "bitsandbytes", "gguf"),
        ),
        ("transformers", "compressed-tensors", "bitsandbytes", "gguf"),
    ),
    # optimum is what transformers loads GPTQ with.
    "gptqmodel": (
        Environment("gptqmodel", ("gptqmodel", "optimum"), build_isolation=False),
        ("gptqmodel", "optimum", "transformers"),
    ),
    "llmcompressor": (
        ENVIRONMENTS["llmcompressor"],
        ("llmcompressor", "compressed-tensors", "transformers"),
    ),
    "autoround": (ENVIRONMENTS["autoround"], ("auto-round", "transformers")),
    "llama_cpp": (Environment("llama_cpp", ("llama-cpp-python",)), ("llama-cpp-python",)),
}
VERSIONS = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""


def interpreters(names: list[str], folder: Path, torch_requirement: str) -> dict[str, str]:
    """Returns client -> its interpreter, or the sentence why there is none."""
    found = {}
    with RunProgress(True) as bar:
        bar.stage("environments", len(names))
        for name in names:
            bar.describe(f"environment {name}")
            named = os.environ.get(variable(name))
            if named is None:
                ready = prepare(CLIENTS[name][0], folder, torch_requirement)
                named = str(ready.python) if ready.python else ready.reason
            found[name] = named
            bar.advance(1)
    return found


def variable(client: str) -> str:
    """Returns the name of the environment variable that names a client's interpreter."""
    return f"LOWBIT_INTEROP_{client.upper()}"


def versions(interpreter: str, packages: tuple[str, ...]) -> dict[str, str | None]:
    """Returns what is installed there; nothing where there is no interpreter."""
    if not Path(interpreter).exists():
        return {}
    command = [interpreter, "-c", VERSIONS, *packages]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, str | None] = json.loads(done.stdout)
    return found


def run_tests(found: dict[str, str], arguments: list[str]) -> tuple[int, list[dict[str, Any]]]:
    """Runs the tests; returns the status of pytest and the outcomes that `conftest.py` wrote."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "outcomes.json"
        environment = {**os.environ, "LOWBIT_INTEROP_RESULT": str(result), "OMP_NUM_THREADS": "1"}
        environment |= {variable(name): python for name, python in found.items()}
        options = ["-o", "addopts=", "-o", "timeout=1800", "-ra", "--strict-markers", "-v"]
        command = [sys.executable, "-m", "pytest", *options, str(TESTS), *arguments]
        status = subprocess.run(command, cwd=ROOT, env=environment).returncode
        outcomes = json.loads(result.read_text()) if result.exists() else []
    return status, outcomes


def summary(outcomes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns one row for each pair: it has passed if all of its tests have."""
    rows = []
    for outcome in outcomes:
        form, direction, client, equality = outcome["pair"]
        counts = Counter(state for state, _ in outcome["tests"].values())
        order = ("failed", "not run", "passed")
        state = next(known for known in order if counts[known])
        why = next((why for found, why in outcome["tests"].values() if found == state), "")
        rows.append(
            {
                "format": form,
                "direction": direction,
                "client": client,
                "equality": equality,
                "outcome": state,
                "tests": dict(counts),
                "why": "" if state == "passed" else why,
                "cases": sorted(outcome["tests"]),
            }
        )
    return sorted(rows, key=lambda row: tuple(row[key] for key in KEYS))


def with_earlier(
    rows: list[dict[str, Any]], content: dict[str, Any], file: Path
) -> list[dict[str, Any]]:
    """Returns `rows` and, of clients that were not asked for, those of the result in `file`.

    Args:
        rows: of this run.
        content: of this run, its `clients` are completed.
        file: the earlier result.
    """
    earlier = json.loads(file.read_text()) if file.exists() else {"pairs": [], "clients": {}}
    origin = earlier.get("provenance", {})
    run = [row for row in rows if row["outcome"] != "not run"]
    known = {tuple(row[key] for key in KEYS) for row in run}
    content["clients"] = earlier["clients"] | content["clients"]
    kept = [
        {"commit": origin.get("commit"), "date": origin.get("date"), **row}
        for row in earlier["pairs"]
        if tuple(row[key] for key in KEYS) not in known
    ]
    return sorted([*run, *kept], key=lambda row: tuple(row[key] for key in KEYS))


def main() -> None:
    """Runs the command."""
    parser = command_line.parser(__doc__, "python scripts/interop.py --clients gptqmodel")
    add = parser.add_argument
    add("--clients", default=",".join(CLIENTS), help="which, separated by commas")
    add("--environments", type=Path, default=ROOT / ".interop", help="kept environments")
    add("--torch", default="torch==2.13.0", help="what pip installs first in each of them")
    add("--json", type=Path, default=RESULTS / "interop.json", help="the result")
    add("--pytest", default="", help="further arguments of pytest, separated by blanks")
    command_line.run(parser, _run)


def _run(arguments: argparse.Namespace) -> None:
    names = [name for name in arguments.clients.split(",") if name]
    for name in names:
        if name not in CLIENTS:
            from lowbit.errors import unknown_name

            raise unknown_name("client", name, CLIENTS)
    found = interpreters(names, arguments.environments, arguments.torch)
    status, outcomes = run_tests(found, arguments.pytest.split())
    rows = summary(outcomes)
    content = {
        "clients": {name: versions(found[name], CLIENTS[name][1]) for name in names},
        "pairs": rows,
    }
    if set(names) != CLIENTS.keys():
        rows = content["pairs"] = with_earlier(rows, content, arguments.json)
    write_result(arguments.json, "make test-interop", content)
    counts = Counter(row["outcome"] for row in rows)
    print(", ".join(f"{count} pairs {state}" for state, count in counts.items()))
    sys.exit(status)


if __name__ == "__main__":
    main()
