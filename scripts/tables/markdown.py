"""What the tables of all results share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def gigabytes(size: int) -> str:
    """Returns bytes in GB (1e9) with two decimals."""
    return f"{size / 1e9:.2f}"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table, all columns but the first right-aligned."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def footnote(result: dict[str, Any], packages: Sequence[str] = ("torch", "transformers")) -> str:
    """Returns how and where a result was measured, with the versions of `packages`."""
    origin = result["provenance"]
    device, versions = origin["device"], origin["versions"]
    place = device["gpu"] or f"{device['cpu']}, {device['cores']} cores"
    commit = (origin["commit"] or "unknown")[:12]
    used = ", ".join(f"{package} {versions[package]}" for package in packages)
    return f"<sub>`{result['command']}`, {place}, {used}, commit {commit}, {origin['date']}.</sub>"
