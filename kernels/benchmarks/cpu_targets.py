"""The targets of the project on a CPU with AVX-512 and AMX, and whether a result meets them.

Every target is judged by its worst case over schemes and shapes, for each number of threads alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from cpu_units import BF16, READ
from targets import Target
from timing import significant

from lowbit.scheme import Scheme

A16, A8 = "lowbit A16", "lowbit A8"
Rows = list[dict[str, Any]]
Values = Iterable[tuple[float, str]]


@dataclass(frozen=True)
class SpeedUp:
    """A speed-up over torch's bf16 product, or a share of the read ceiling.

    Args:
        bits: of the weights.
        tokens: number of tokens M.
        needed: the number.
        name: which of our candidates.
        ceiling: True for the share of the read ceiling.
    """

    bits: int
    tokens: int
    needed: float
    name: str = A16
    ceiling: bool = False

    @property
    def text(self) -> str:
        """The target in words."""
        what = "share of the read ceiling" if self.ceiling else "times bf16"
        return f"{self.bits} bits, M = {self.tokens}, {self.name.split()[1]}: {what}"

    def values(self, rows: Rows) -> Values:
        """Yields (value, where) of every case that this target is about."""
        for row in rows:
            found = row["candidates"]
            if Scheme.parse(row["scheme"]).bits != self.bits or row["M"] != self.tokens:
                continue
            if self.name not in found:
                continue
            value = share_of_ceiling(row, self.name) if self.ceiling else vs(row, self.name, BF16)
            if value is not None:
                yield value, place(row)


SPEED_UPS = (
    SpeedUp(4, 1, 4.5),
    SpeedUp(4, 1, 0.88, ceiling=True),
    SpeedUp(4, 4, 3.6),
    SpeedUp(4, 4, 4.2, A8),
    SpeedUp(4, 16, 2.7),
    SpeedUp(4, 64, 1.8),
    SpeedUp(4, 512, 1.0),
    SpeedUp(4, 512, 1.5, A8),
    SpeedUp(3, 1, 5.5),
    SpeedUp(2, 1, 7.0),
    SpeedUp(8, 1, 2.3),
)
AMX = "amx"


def judge_all(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns every target beside its worst measured value, for each number of threads.

    `applies` is False for speed-ups on a processor without AMX: the figures are for one with it.
    """
    judged = []
    linear, avx2 = result.get("linear", []), result.get("avx2", [])
    decoder = result.get("decoder", [])
    for threads in sorted({row["threads"] for row in (*linear, *avx2, *decoder)} or {1}):
        mine, slow, whole = (_of(rows, threads) for rows in (linear, avx2, decoder))
        entries: list[tuple[str, float, bool, Values]] = [
            (one.text, one.needed, result.get("isa") == AMX, one.values(mine)) for one in SPEED_UPS
        ]
        entries += [
            ("every M: time of every peer over ours", 1.0, True, against_peers(mine)),
            ("AVX2, every M: times bf16", 1.0, True, against_bf16(slow)),
            ("decoding: times llama.cpp Q4_0", 1.0, True, _decoder(whole, "decode_vs_llama")),
            ("prefill: times llama.cpp Q4_0", 2.0, True, _decoder(whole, "prefill_vs_llama")),
        ]
        for text, needed, applies, values in entries:
            found = list(values)
            target = Target(text, needed, True, _always(found))
            judged.append({**target.judge(result), "threads": threads, "applies": applies})
    return judged


def _always(values: list[tuple[float, str]]) -> Callable[[dict[str, Any]], Values]:
    return lambda _: values


def against_peers(rows: Rows) -> Iterator[tuple[float, str]]:
    """Yields the time of each peer over ours.

    A peer that rounds activations to 8 bits is compared with the faster of our two ways, one that
    does not with the way that does not either.
    """
    for row in rows:
        ours = own_names(row)
        for name, entry in row["candidates"].items():
            if entry["kind"] != "peer" or not ours:
                continue
            allowed = ours if entry["activations"] == "int8" else ours[:1]
            best = min(row["candidates"][own]["us"] for own in allowed)
            yield entry["us"] / best, f"{name}, {place(row)}"


def against_bf16(rows: Rows) -> Iterator[tuple[float, str]]:
    """Yields our default way over torch's bf16 product."""
    for row in rows:
        names = own_names(row)
        value = vs(row, names[0], BF16) if names else None
        if value is not None:
            yield value, place(row)


def own_names(row: dict[str, Any]) -> list[str]:
    """Returns our candidates of a case, the default one first."""
    return [name for name in (A16, A8) if name in row["candidates"]]


def vs(row: dict[str, Any], name: str, other: str) -> float | None:
    """Returns the time of `other` over that of `name`, None where one was not measured."""
    found = row["candidates"]
    if name not in found or other not in found:
        return None
    return float(found[other]["us"] / found[name]["us"])


def share_of_ceiling(row: dict[str, Any], name: str) -> float | None:
    """Returns the time of the faster plain reading over that of `name`."""
    reads = [vs(row, name, other) for other in row["candidates"] if other.startswith(READ)]
    return min((value for value in reads if value is not None), default=None)


def summary(rows: Rows) -> list[dict[str, Any]]:
    """Returns, per threads, scheme and candidate, geometric means over the shapes.

    `vs_bf16` and `share_of_ceiling` map the number of tokens (as text) to the mean.
    """
    groups: dict[tuple[int, str, str], Rows] = {}
    for row in rows:
        for name in row["candidates"]:
            groups.setdefault((row["threads"], row["scheme"], name), []).append(row)
    found = []
    for (threads, scheme, name), mine in groups.items():
        kind = mine[0]["candidates"][name]["kind"]
        entry = {"threads": threads, "scheme": scheme, "candidate": name, "kind": kind}
        for field, value in (
            ("vs_bf16", lambda row, name=name: vs(row, name, BF16)),
            ("share_of_ceiling", lambda row, name=name: share_of_ceiling(row, name)),
        ):
            by_tokens: dict[int, list[float]] = {}
            for row in mine:
                if (one := value(row)) is not None:  # type: ignore[no-untyped-call]
                    by_tokens.setdefault(row["M"], []).append(one)
            entry[field] = {str(m): significant(mean(v)) for m, v in sorted(by_tokens.items())}
        found.append(entry)
    return found


def mean(values: list[float]) -> float:
    """Returns the geometric mean."""
    return math.exp(sum(math.log(value) for value in values) / len(values))


def place(row: dict[str, Any]) -> str:
    """Returns where a value was measured."""
    return f"{row['scheme']} {row['shape']} M={row['M']}"


def _decoder(rows: Rows, field: str) -> Iterator[tuple[float, str]]:
    for row in rows:
        found = [
            (entry[field], name)
            for name, entry in row["candidates"].items()
            if name in (A16, A8) and field in entry
        ]
        yield from [max(found)] if found else []


def _of(rows: Rows, threads: int) -> Rows:
    return [row for row in rows if row["threads"] == threads]
