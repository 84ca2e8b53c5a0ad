"""The targets of the project on an H200, and whether a result meets them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from timing import significant

# Smaller weights are bound by launches, not by memory.
LARGE_WEIGHT = 25e6
FOUR_BIT = ("W4A16_G128", "W4A16_ASYM_G64")
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Target:
    """One target.

    Args:
        text: what is wanted.
        needed: the number.
        at_least: whether the measured value is to be no less than `needed`, or no more.
        values: (value, where) of everything that it speaks of, from the whole result.
    """

    text: str
    needed: float
    at_least: bool
    values: Callable[[dict[str, Any]], Iterable[tuple[float, str]]]

    def judge(self, result: dict[str, Any]) -> dict[str, Any]:
        """Returns the target beside the worst measured value; `met` is None without one."""
        found = list(self.values(result))
        entry = {"target": self.text, "needed": self.needed, "at_least": self.at_least}
        if not found:
            return {**entry, "measured": None, "where": None, "met": None}
        worst = (min if self.at_least else max)(found)
        met = worst[0] >= self.needed if self.at_least else worst[0] <= self.needed
        return {
            **entry,
            "measured": significant(worst[0]),
            "where": worst[1],
            "met": met,
            "of": len(found),
        }


def judge_all(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns every target beside what was measured."""
    return [target.judge(result) for target in TARGETS]


def rows_of(result: dict[str, Any]) -> Rows:
    """Returns the rows of the linear layers."""
    rows: Rows = result.get("linear", {}).get("rows", [])
    return rows


def large(row: dict[str, Any]) -> bool:
    """Returns True for a weight of 25 MB and more as stored."""
    return bool(row["weight_bytes"] >= LARGE_WEIGHT)


def _field(
    field: str, keep: Callable[[dict[str, Any]], bool]
) -> Callable[[dict[str, Any]], Iterable[tuple[float, str]]]:
    def values(result: dict[str, Any]) -> Iterable[tuple[float, str]]:
        for row in rows_of(result):
            if not row["peer"] and row["name"] != "bf16" and field in row and keep(row):
                yield row[field], f"{row['name']} {row['shape']} M={row['M']}"

    return values


def _against_peers(result: dict[str, Any]) -> Iterable[tuple[float, str]]:
    """Yields the time of each peer over that of the comparable scheme."""
    for part in ("linear", "peers"):
        measured = result.get(part, {})
        rows: Rows = measured.get("rows", [])
        comparable = {name: p["comparable"] for name, p in measured.get("peers", {}).items()}
        ours = {(r["name"], r["shape"], r["M"]): r["us"] for r in rows if not r["peer"]}
        for row in rows:
            mine = ours.get((comparable.get(row["name"]), row["shape"], row["M"]))
            if row["peer"] and row["M"] <= 64 and mine is not None:
                yield row["us"] / mine, f"{row['name']} {row['shape']} M={row['M']}"


def _backward(result: dict[str, Any]) -> Iterable[tuple[float, str]]:
    for row in result.get("backward", {}).get("backward", []):
        yield row["times_bf16"], f"{row['scheme']} {row['shape']}"


def _decoding(result: dict[str, Any]) -> Iterable[tuple[float, str]]:
    """Yields the ratio at batch 1 by the better of the two ways to run a model."""
    found = [
        (row["vs_bf16"], "compiled" if row["compiled"] else "as it is")
        for part in ("decoder", "compiled")
        for row in result.get(part, {}).get("decode", [])
        if row["batch"] == 1
    ]
    yield from [max(found)] if found else []


def _gptq(result: dict[str, Any]) -> Iterable[tuple[float, str]]:
    gptq = result.get("gptq", {})
    run = gptq.get("run")
    if run and run["blocks_run"] == gptq["blocks"]:
        yield run["seconds"], f"{run['blocks_run']} blocks"


TARGETS = (
    Target(
        "4-bit integers, M <= 16, weights of 25 MB and more: share of the copy bandwidth",
        0.70,
        True,
        _field("copy_fraction", lambda r: r["name"] in FOUR_BIT and r["M"] <= 16 and large(r)),
    ),
    Target(
        "the same beside cuBLAS bf16",
        2.7,
        True,
        _field("vs_bf16", lambda r: r["name"] in FOUR_BIT and r["M"] <= 16 and large(r)),
    ),
    Target(
        "NF4_DQ, M <= 16, weights of 25 MB and more: share of the copy bandwidth",
        0.60,
        True,
        _field("copy_fraction", lambda r: r["name"] == "NF4_DQ" and r["M"] <= 16 and large(r)),
    ),
    Target(
        "4-bit integers, M = 64, weights of 25 MB and more: beside cuBLAS bf16",
        2.0,
        True,
        _field("vs_bf16", lambda r: r["name"] in FOUR_BIT and r["M"] == 64 and large(r)),
    ),
    Target(
        "every scheme, M >= 1024: beside cuBLAS bf16",
        0.95,
        True,
        _field("vs_bf16", lambda r: r["M"] >= 1024),
    ),
    Target("M <= 64: time of every peer over ours", 1.0, True, _against_peers),
    Target("backward at 4,096 tokens: time over that of bf16", 1.15, False, _backward),
    Target("decoding of the 8B shape at batch 1: beside bf16", 2.8, True, _decoding),
    Target("GPTQ of the 8B shape: seconds", 180.0, False, _gptq),
)
