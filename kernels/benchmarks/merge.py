"""Puts the parts of several runs together that were made on the same GPU with the same software.

    python kernels/benchmarks/merge.py --out bench-gpu first/bench-gpu.json second/bench-gpu.json

A part that several runs have is taken whole from the last. Targets, picture and tables are made
anew.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
for _path in (Path(__file__).parent, ROOT / "eval", ROOT / "kernels", ROOT):
    if str(_path) not in sys.path:
        sys.path.insert(0, str(_path))

from gpu import LIMITS  # noqa: E402 - after the paths
from parts import write_json  # noqa: E402
from report import tables  # noqa: E402
from roofline import draw  # noqa: E402
from targets import judge_all  # noqa: E402

from lowbit.errors import LowbitError  # noqa: E402


def merge(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns one result with the parts of all, the last one of each.

    Raises:
        LowbitError: they are of different devices, versions or commits.
    """
    first = results[0]
    whole = {**first, "errors": {}, "seconds": {}, "refused": {}}
    for number, result in enumerate(results, 1):
        for what, here, there in (
            ("GPU", result["gpu"].get("name"), first["gpu"].get("name")),
            ("versions", result["provenance"]["versions"], first["provenance"]["versions"]),
            ("commit", result["provenance"]["commit"], first["provenance"]["commit"]),
            ("smoke", result["smoke"], first["smoke"]),
        ):
            if here != there:
                raise LowbitError(
                    f"result {number} has {what} {here}, the first one {there}; merge runs of one "
                    "machine and one commit"
                )
        tables_of = [(whole, result)]
        tables_of += [(whole[name], result[name]) for name in ("errors", "seconds")]
        for part in LIMITS:
            if part in result or part in result["errors"]:
                for target, source in tables_of:
                    target.pop(part, None)
                    if part in source:
                        target[part] = source[part]
        whole["refused"] |= result.get("refused", {})
    whole["checked"] = all(result.get("checked", False) for result in results)
    whole["left_out"] = [name for name in first["left_out"] if name not in whole]
    whole["total_seconds"] = sum(result.get("total_seconds", 0) for result in results)
    whole["targets"] = judge_all(whole)
    return whole


def main() -> None:
    """Merges, draws and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="bench-gpu.json of each run")
    parser.add_argument("--out", type=Path, required=True, help="folder of the merged result")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        whole = merge([json.loads(file.read_text()) for file in arguments.results])
    except LowbitError as error:
        sys.exit(str(error))
    if whole.get("linear", {}).get("rows"):
        draw(whole, arguments.out / "roofline.png")
    write_json(arguments.out / "bench-gpu.json", whole)
    print(f"{tables(whole)}\n\nwrote {arguments.out / 'bench-gpu.json'}")


if __name__ == "__main__":
    main()
