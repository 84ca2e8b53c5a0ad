"""Makes cpu.json, cpu.png and tables of one or several runs of `make bench-cpu`.

    python kernels/benchmarks/cpu_merge.py bench-cpu --out docs/results
    python kernels/benchmarks/cpu_merge.py first second --out docs/results

Runs are put together if machine, versions and commit are the same; of a case that several have,
the last is taken.
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

from cpu_report import show  # noqa: E402
from cpu_targets import judge_all, summary  # noqa: E402
from cpu_units import key_of  # noqa: E402 - after the paths

from lowbit.errors import LowbitError  # noqa: E402

PARTS = ("linear", "avx2", "decoder")
# Of a candidate of a case; what is the same in all cases is told once.
TIMES = ("us", "low_us", "high_us", "repeats", "copies", "vs_bf16", "error", "kind", "activations")


def collect(folders: Sequence[Path]) -> dict[str, Any]:
    """Returns one result of the runs in `folders`, with targets and means.

    Raises:
        LowbitError: a folder holds no run, or runs of different machines, versions or commits.
    """
    heads = []
    for folder in folders:
        if not (folder / "run.json").exists():
            raise LowbitError(f"{folder}: holds no run.json; give the --out of a bench-cpu run")
        heads.append(json.loads((folder / "run.json").read_text()))
    first = heads[0]
    for folder, head in zip(folders, heads, strict=True):
        for what in ("device", "versions", "commit"):
            here, there = head["provenance"][what], first["provenance"][what]
            if here != there:
                raise LowbitError(
                    f"{folder} has {what} {here}, {folders[0]} has {there}; merge runs of one "
                    "machine and one commit"
                )
    result: dict[str, Any] = {**first, "errors": {}, "peers": {}, "candidates": {}}
    for head in heads:
        result["errors"] |= head["errors"]
        result["peers"] |= head["peers"]
    for part in PARTS:
        rows: dict[str, dict[str, Any]] = {}
        for folder in folders:
            for row in _lines(folder / f"{part}.jsonl"):
                rows[str(row["threads"]) if part == "decoder" else key_of(row)] = row
        result[part] = list(rows.values())
    result["summary"] = summary(result["linear"])
    result["targets"] = judge_all(result)
    for row in (*result["linear"], *result["avx2"]):
        _shorten(row, result["candidates"])
    return result


def publish(result: dict[str, Any], out: Path) -> None:
    """Writes `cpu.json` and `cpu.png` to `out`, and prints tables."""
    from cpu_picture import draw

    out.mkdir(parents=True, exist_ok=True)
    if result["linear"]:
        draw(result, out / "cpu.png")
    (out / "cpu.json").write_text(compact(result))
    show(result)
    print(f"wrote {out / 'cpu.json'}")


def compact(result: dict[str, Any]) -> str:
    """Returns JSON with a line for each measured case: some hundreds of them, to be compared."""
    parts = []
    for key, value in result.items():
        if isinstance(value, list):
            lines = ",\n  ".join(json.dumps(entry) for entry in value)
            text = f"[\n  {lines}\n ]" if value else "[]"
        else:
            text = json.dumps(value, indent=1).replace("\n", "\n ")
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _shorten(row: dict[str, Any], candidates: dict[str, Any]) -> None:
    """Moves what does not change from case to case to `candidates`."""
    for name, entry in row["candidates"].items():
        rest = {key: value for key, value in entry.items() if key not in TIMES}
        row.setdefault("weight_bytes", {})[name] = rest.pop("weight_bytes", None)
        if row["limited_to"] == "":
            candidates.setdefault(name, rest)
        row["candidates"][name] = {key: entry[key] for key in TIMES if key in entry}


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def main() -> None:
    """Merges, draws and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="--out of each run")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results", help="where to write")
    arguments = parser.parse_args()
    try:
        publish(collect(arguments.folders), arguments.out)
    except LowbitError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
