"""Measures the cases of one unit in a process of its own; see cpu.py.

Every finished case is a line of a file at once, and a second file names the candidate that is about
to run: should it take the process with it, the command knows whom to leave out.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from cpu_candidates import MAX_TOKENS, Candidate, Inputs, make_inputs, own, relative_error
from cpu_peers import PEERS
from cpu_timing import Call, clock, copies_of, measure
from cpu_units import BF16, OPPONENTS, Settings, Unit
from lowbit_kernels.cpu.library import library
from timing import significant

from lowbit.errors import LowbitError

# Rounding activations to 8 bits explains a hundredth, storing weights in 4 bits a tenth.
WRONG = 0.3
# Our candidates, torch's bf16 and the two readings.
OWN = 5


class Journal:
    """The two files of a process that measures.

    Args:
        lines: a JSON object per finished case is appended here.
        current: overwritten with the candidate that is about to run.
    """

    def __init__(self, lines: Path, current: Path) -> None:
        self.lines, self.current = lines, current

    def begin(self, name: str, tokens: int, threads: int) -> None:
        """Says which candidate is about to run first in a case; 0 tokens: to be made."""
        self.current.write_text(json.dumps([name, tokens, threads]))

    def add(self, row: dict[str, Any]) -> None:
        """Appends a finished case."""
        with self.lines.open("a") as file:
            file.write(json.dumps(row) + "\n")


def run(unit: Unit, settings: Settings, journal: Journal) -> None:
    """Measures all cases of `unit` that are not done, as long as there is time."""
    cases = list(unit.cases(settings))
    if not cases:
        return
    torch.set_num_threads(max(settings.threads))
    measured = Measured.prepare(unit, settings, journal)
    for tokens, threads in cases:
        if time.time() > settings.until:
            return
        journal.add(measured.case(tokens, threads))


class Measured:
    """The candidates of a unit.

    Args:
        unit: what they multiply.
        settings: of the run.
        journal: of the process.
        inputs: what they were made from.
    """

    def __init__(self, unit: Unit, settings: Settings, journal: Journal, inputs: Inputs) -> None:
        self.unit, self.settings, self.journal, self.inputs = unit, settings, journal, inputs
        self.candidates: list[Candidate] = []
        self.refused: dict[str, str] = {}

    @staticmethod
    def prepare(unit: Unit, settings: Settings, journal: Journal) -> Measured:
        """Returns all candidates; why one cannot be made is in `refused`."""
        names = opponents(unit)
        share = settings.memory_bytes // (len(names) + OWN)

        def copies(size: int) -> int:
            return copies_of(size, settings.cache_bytes, share)

        tokens = min(MAX_TOKENS, max(settings.tokens))
        shape = (unit.rows, unit.columns)
        inputs = make_inputs(unit.scheme, shape, copies, settings.threads, tokens)
        measured = Measured(unit, settings, journal, inputs)
        for name, make in own(inputs).items():
            measured._make(name, make)
        for name in names:
            peer = PEERS[name]
            if not settings.peers and not peer.bundled:
                measured.refused[name] = "peers were not asked for (--peers none)"
            else:
                measured._make(name, lambda make=peer.make: make(inputs, settings))  # type: ignore[misc]
        return measured

    def _make(self, name: str, make: Callable[[], Candidate]) -> None:
        if why := self._crash(name, 0, 0):
            self.refused[name] = why
            return
        self.journal.begin(name, 0, 0)
        try:
            self.candidates.append(make())
        except Exception as error:  # a peer may raise anything; it is on record
            self.refused[name] = reason(error)
        gc.collect()

    def _crash(self, name: str, tokens: int, threads: int) -> str | None:
        """Returns why a candidate is left out of a case: it ended the process there before."""
        for other, at_tokens, at_threads, why in self.settings.crashed:
            if (other, at_tokens, at_threads) == (name, tokens, threads):
                return why
        return None

    def case(self, tokens: int, threads: int) -> dict[str, Any]:
        """Returns the line of one case: every candidate checked, then all timed in turns."""
        torch.set_num_threads(threads)
        x = self.inputs.x[:tokens].contiguous()
        refused, entries = dict(self.refused), {}
        calls: dict[str, Sequence[Call]] = {}
        for candidate in self.candidates:
            name = candidate.name
            if why := self._crash(name, tokens, threads):
                refused[name] = why
                continue
            self.journal.begin(name, tokens, threads)
            try:
                bound = candidate.bind(x, threads)
                entries[name] = {**describe(candidate), "copies": len(bound)}
                entries[name]["error"] = self._check(candidate, bound)
            except Exception as error:  # likewise
                refused[name] = reason(error)
                entries.pop(name, None)
            else:
                calls[name] = bound
        self.journal.begin("all in turns", tokens, threads)
        times = measure(calls, threads, self.settings.seconds)
        for name, timing in times.items():
            entries[name] |= timing.to_dict()
            if BF16 in times:
                entries[name]["vs_bf16"] = significant(times[BF16].seconds / timing.seconds)
        unit = self.unit
        return {
            "scheme": unit.scheme,
            "shape": unit.shape,
            "M": tokens,
            "threads": threads,
            "limited_to": unit.isa,
            "isa": library().isa_name,
            "clock": clock(threads)[0],
            "candidates": entries,
            "refused": refused,
        }

    def _check(self, candidate: Candidate, calls: Sequence[Call]) -> float | None:
        """Returns the relative error against float64; runs every copy once."""
        results = [call() for call in calls]
        if candidate.expected is None:
            return None
        error = relative_error(candidate.output(results[-1]), candidate.expected)
        if not error < WRONG:
            raise LowbitError(f"wrong result: relative error {error:.2g} against float64")
        return significant(error)


def opponents(unit: Unit) -> tuple[str, ...]:
    """Returns the peers of a unit: none below the processor's best, where not all could be held."""
    return () if unit.isa else OPPONENTS[unit.scheme]


def describe(candidate: Candidate) -> dict[str, Any]:
    """Returns what is recorded of a candidate beside its times."""
    try:
        used = version(candidate.package) if candidate.package else None
    except PackageNotFoundError:
        used = None
    return {
        "kind": candidate.kind,
        "activations": candidate.activations,
        "weight_bytes": candidate.weight_bytes,
        "version": used,
        **({"note": candidate.note} if candidate.note else {}),
    }


def reason(error: BaseException) -> str:
    """Returns an error as one line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:300]}"
