"""The tables that the CPU benchmark prints; everything else is in its JSON."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

MET = {True: "[green]yes[/]", False: "[red]NO[/]", None: "not measured"}
# Wider than many a terminal, but a row stays a row.
WIDTH = 130
KINDS = {"ours": "bold", "peer": "", "torch": "dim"}


def show(result: dict[str, Any], console: Console | None = None) -> None:
    """Prints the tables of a whole result."""
    console = console or Console()
    console.width = max(console.width, WIDTH)
    for threads in sorted({entry["threads"] for entry in result["summary"]}):
        console.print(_linear(result, threads))
    if result["decoder"]:
        console.print(_decoder(result))
    console.print(_targets(result))
    for name, version in result["peers"].items():
        console.print(f"{name}: {version}", highlight=False, markup=False)
    for line in (*_refused(result), *(f"{w}: {why}" for w, why in result["errors"].items())):
        console.print(line, highlight=False, markup=False)


def _linear(result: dict[str, Any], threads: int) -> Table:
    mine = [entry for entry in result["summary"] if entry["threads"] == threads]
    tokens = sorted({int(m) for entry in mine for m in entry["vs_bf16"]})
    table = Table(
        "",
        "",
        *(f"M={m}" for m in tokens),
        "read ceiling, M=1",
        title=f"Times bf16 F.linear, geometric mean over shapes, threads: {threads}",
    )
    last = ""
    for entry in mine:
        if entry["kind"] not in KINDS or entry["candidate"] == "bf16":
            continue
        ratios = [entry["vs_bf16"].get(str(m)) for m in tokens]
        cells = ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        share = entry["share_of_ceiling"].get("1") if entry["kind"] == "ours" else None
        cells.append("" if share is None else f"{100 * share:.0f}%")
        scheme = "" if entry["scheme"] == last else entry["scheme"]
        last = entry["scheme"]
        table.add_row(scheme, entry["candidate"], *cells, style=KINDS[entry["kind"]])
    return table


def _decoder(result: dict[str, Any]) -> Table:
    table = Table("threads", "", "prefill tokens/s", "decode tokens/s", "logit error",
                  title="Decoder of 1B's shape, W4A16")  # fmt: skip
    for row in result["decoder"]:
        for name, entry in row["candidates"].items():
            table.add_row(
                str(row["threads"]),
                name,
                f"{entry['prefill_tokens_per_second']:.1f}",
                f"{entry['decode_tokens_per_second']:.1f}",
                f"{entry['logit_error']:.2g}",
            )
    return table


def _targets(result: dict[str, Any]) -> Table:
    title = f"Targets (speed-ups: for a processor with AMX; this one has {result['isa']})"
    table = Table("threads", "", "needed", "worst", "met", "where", title=title)
    for row in result["targets"]:
        measured = "-" if row["measured"] is None else f"{row['measured']:.3g}"
        met = MET[row["met"]] + ("" if row["applies"] else " (no AMX)")
        needed = f">= {row['needed']:g}"
        cells = [str(row["threads"]), row["target"], needed, measured, met, row["where"] or ""]
        table.add_row(*cells)
    return table


def _refused(result: dict[str, Any]) -> list[str]:
    """Returns why candidates are missing, each reason once."""
    reasons: dict[tuple[str, str], str] = {}
    for part in ("linear", "avx2"):
        for row in result[part]:
            for name, why in row["refused"].items():
                reasons.setdefault((name, why), f"{row['scheme']} {row['shape']} M={row['M']}")
    lines = [f"left out: {name}, {where} ...: {why}" for (name, why), where in reasons.items()]
    for row in result["decoder"]:
        lines += [f"left out: {name}, decoder: {why}" for name, why in row["refused"].items()]
    return lines
