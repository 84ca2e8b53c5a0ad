"""The short tables that the benchmark prints; everything else is in the JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from targets import large, rows_of

SHOWN_MS = (1, 4, 16, 64, 256, 1024, 2048)


def tables(result: dict[str, Any]) -> str:
    """Returns the tables of a whole result."""
    parts = [_linear(result), _decoder(result), _gptq(result), _targets(result), _errors(result)]
    return "\n\n".join(part for part in parts if part)


def _linear(result: dict[str, Any]) -> str:
    rows = rows_of(result)
    if not rows:
        return ""
    ms = [m for m in SHOWN_MS if any(row["M"] == m for row in rows)]
    names = list(dict.fromkeys(row["name"] for row in rows))
    big = [row for row in rows if large(row)]
    which, big = ("Linear layers of 25 MB and more", big) if big else ("Linear layers", rows)
    body = []
    for name in names:
        cells = [name]
        for m in ms:
            mine = [row for row in big if (row["name"], row["M"]) == (name, m)]
            share, ratio = (
                _mean([r[f] for r in mine if f in r]) for f in ("copy_fraction", "vs_bf16")
            )
            cells.append("-" if share is None else f"{100 * share:.0f}% {ratio or 0:.2f}x")
        body.append(cells)
    bandwidth = result["linear"].get("copy_bandwidth_gbps", 0)
    title = (
        f"{which}, geometric mean: share of the copy bandwidth "
        f"({bandwidth:,.0f} GB/s), speed beside cuBLAS bf16"
    )
    return f"{title}\n{table(['', *(f'M={m}' for m in ms)], body)}"


def _decoder(result: dict[str, Any]) -> str:
    decoder = result.get("decoder", {})
    scheme = decoder.get("scheme") or result.get("compiled", {}).get("scheme", "")
    body = []
    rows = [*decoder.get("decode", []), *result.get("compiled", {}).get("decode", [])]
    entries = [(f"batch {r['batch']}" + ", compiled" * r["compiled"], r) for r in rows]
    if "prefill" in decoder:
        entries.append((f"prompt of {decoder['prefill']['tokens']}", decoder["prefill"]))
    for name, row in entries:
        speeds = [f"{row[model]['tokens_per_second']:.1f}" for model in (scheme, "bf16")]
        body.append([name, *speeds, f"{row['vs_bf16']:.2f}x"])
    if not body:
        return ""
    return "Decoder, tokens/s\n" + table(["", scheme, "bf16", "ratio"], body)


def _gptq(result: dict[str, Any]) -> str:
    gptq = result.get("gptq", {})
    body = [
        [f"{row['blocks_run']} of {gptq['blocks']}", f"{row['seconds']:.1f}", row["peak_gpu_gb"]]
        for row in (gptq.get("trial"), gptq.get("run"))
        if row
    ]
    if not body:
        return ""
    return "GPTQ, files to files\n" + table(["blocks", "seconds", "peak GPU GB"], body)


def _targets(result: dict[str, Any]) -> str:
    words = {True: "yes", False: "NO", None: "not measured"}
    body = []
    for row in result.get("targets", []):
        sign = ">=" if row["at_least"] else "<="
        measured = "-" if row["measured"] is None else f"{row['measured']:.3g}"
        cells = [row["target"], f"{sign} {row['needed']:g}", measured, words[row["met"]]]
        body.append([*cells, row["where"] or ""])
    return "Targets\n" + table(["", "needed", "worst", "met", "where"], body) if body else ""


def _errors(result: dict[str, Any]) -> str:
    lines = []
    for part, errors in result.get("errors", {}).items():
        for what, text in errors.items():
            lines.append(f"  {part}, {what}: {text.strip().splitlines()[-1][:160]}")
    return "\n".join([f"{len(lines)} errors", *lines[:12]]) if lines else ""


def table(header: Sequence[Any], body: Sequence[Sequence[Any]]) -> str:
    """Returns a plain table; the first column is text, the others are set to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *body)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *rest]).rstrip())
    return "\n".join(lines)


def _mean(values: list[float]) -> float | None:
    if not values:
        return None
    return math.exp(sum(math.log(value) for value in values) / len(values))
