"""Renders the JSON results into README.md and docs, between `<!-- table:NAME -->` markers.

python scripts/readme_tables.py            rewrite what is stale
python scripts/readme_tables.py --check    change nothing, exit with 1 where something is stale
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError
from scripts import command_line
from scripts.provenance import RESULTS, ROOT
from scripts.tables.finetuning import finetune, finetune_memory, qlora
from scripts.tables.formats import fuzz, interop
from scripts.tables.machine import cpu, kernels, kill_resume, memory
from scripts.tables.peers import peers, peers_short
from scripts.tables.quality import activations, allocation, quality

BLOCK = re.compile(r"(<!-- table:(?P<name>\w+) -->\n).*?(<!-- /table:(?P=name) -->)", re.DOTALL)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "allocation": allocation,
    "quality": quality,
    "memory": memory,
    "kill_resume": kill_resume,
    "activations": activations,
    "kernels": kernels,
    "cpu": cpu,
    "peers": peers,
    "peers_short": peers_short,
    "peers_outliers": peers,
    "finetune": finetune,
    "finetune_memory": finetune_memory,
    "qlora": qlora,
    "interop": interop,
    "fuzz": fuzz,
}


# Tables of a result that has another name.
RESULT_OF = {"peers_short": "peers"}


def render(text: str, results: Path) -> str:
    """Returns `text` with every marked block rendered anew.

    Raises:
        LowbitError: a marker names no table.
    """

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise LowbitError(f"marker table:{name} is unknown; known are {', '.join(TABLES)}")
        file = results / f"{RESULT_OF.get(name, name)}.json"
        if not file.exists():
            return f"{match[1]}Not measured yet.\n{match[3]}"
        return f"{match[1]}{TABLES[name](json.loads(file.read_text()))}\n{match[3]}"

    return BLOCK.sub(block, text)


def pages() -> list[Path]:
    """Returns the Markdown files that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
    """Runs the command."""
    parser = command_line.parser(__doc__, "python scripts/readme_tables.py --check")
    parser.add_argument("--check", action="store_true", help="only report, exit with 1 if stale")
    command_line.run(parser, _run)


def _run(arguments: argparse.Namespace) -> None:
    stale = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        rendered = render(text, RESULTS)
        if rendered == text:
            continue
        stale.append(page)
        if not arguments.check:
            page.write_text(rendered, encoding="utf-8")
    for page in stale:
        print(f"{page.relative_to(ROOT)}: {'stale' if arguments.check else 'rewritten'}")
    if stale and arguments.check:
        sys.exit(1)


if __name__ == "__main__":
    main()
