"""Everything that is measured on a CPU, in one command; see docs/benchmarks-cpu.md.

    python kernels/benchmarks/cpu.py --out bench-cpu
    python kernels/benchmarks/cpu.py --quick                  a few minutes
    python kernels/benchmarks/cpu.py --only decoder --threads 2

Peers are installed into the output folder first. Every case is on disk when it is done, and a
second run goes on where the first one ended. The exit status is 1 if something failed; missed
targets are no failure.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
for _path in (Path(__file__).parent, ROOT / "eval", ROOT / "kernels", ROOT):
    if str(_path) not in sys.path:
        sys.path.insert(0, str(_path))

from cpu_crossover import LIMITS  # noqa: E402
from cpu_timing import cache_bytes  # noqa: E402
from cpu_units import (  # noqa: E402 - after the paths
    QUICK,
    SCHEMES,
    SHAPES,
    THREADS,
    TOKENS,
    Settings,
    Unit,
    key_of,
)
from cpu_workers import Supervisor  # noqa: E402
from lowbit_kernels.cpu import library  # noqa: E402

from lowbit.checkpoint.writer import write_json  # noqa: E402
from lowbit.errors import LowbitError  # noqa: E402
from lowbit.progress import RunProgress  # noqa: E402
from scripts.provenance import provenance  # noqa: E402

PARTS = ("linear", "avx2", "decoder")
COMMAND = "make bench-cpu"
AVX2 = "avx2"
NONE = "none"
# One candidate of one case, and rounds of the decoder.
SECONDS, QUICK_SECONDS = 0.3, 0.05
ROUNDS, QUICK_ROUNDS = 3, 1


class Benchmark:
    """One run of the command.

    Args:
        arguments: of the command line.

    Raises:
        LowbitError: the output folder holds results of another commit, machine or software.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.out: Path = arguments.out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.until = time.time() + arguments.budget_seconds
        self.errors: dict[str, str] = {}
        self.head = self._head()
        self.settings = Settings(
            tokens=arguments.tokens,
            threads=self._threads(),
            seconds=QUICK_SECONDS if arguments.quick else SECONDS,
            memory_bytes=arguments.memory_gib << 30,
            cache_bytes=arguments.cache_mib << 20 if arguments.cache_mib else cache_bytes(),
            until=self.until,
            rounds=QUICK_ROUNDS if arguments.quick else ROUNDS,
            tiny=arguments.tiny,
        )
        self.head["cache_mib"] = round(self.settings.cache_bytes / (1 << 20), 1)

    def run(self) -> int:
        """Installs, measures and reports; returns the exit status."""
        self._install()
        self.save()
        for part in PARTS:
            if part in self.arguments.parts:
                self._part(part)
        self.save()
        from cpu_merge import collect, publish

        publish(collect([self.out]), self.out)
        return 1 if self.errors else 0

    def save(self) -> None:
        """Writes what is known about this run beside its results."""
        write_json(self.out / "run.json", {**self.head, "errors": self.errors})

    def _head(self) -> dict[str, Any]:
        """Returns provenance and processor, checked against what the folder holds."""
        loaded = library.load()
        if isinstance(loaded, str):
            raise LowbitError(loaded)
        origin = provenance()
        origin["device"].pop("torch_threads")
        if self.arguments.commit:
            origin["commit"] = self.arguments.commit
        head = {"command": COMMAND, "provenance": origin, "isa": loaded.isa_name, "peers": {}}
        file = self.out / "run.json"
        if not file.exists():
            return head
        before = json.loads(file.read_text())
        for what in ("device", "versions", "commit"):
            here, there = origin[what], before["provenance"][what]
            if here != there:
                raise LowbitError(
                    f"{self.out} holds results of {what} {there}, this run has {here}; choose "
                    "another folder with --out, or delete the old results"
                )
        return {**head, "peers": before["peers"]}

    def _threads(self) -> tuple[int, ...]:
        """Returns the numbers of threads there are processors for."""
        usable = len(os.sched_getaffinity(0))
        wanted: tuple[int, ...] = self.arguments.threads
        for threads in wanted:
            if threads > usable:
                self.errors[f"threads {threads}"] = f"only {usable} processors may be used"
        return tuple(threads for threads in wanted if threads <= usable) or (1,)

    def _install(self) -> None:
        """Installs the peers; what cannot be is recorded, and is no error of ours."""
        from cpu_install import LLAMA, PACKAGES, build_llama, install_packages

        peers, llama = self.arguments.peers, self.arguments.llama
        failed, reason = {}, "not asked for (--llama none)"
        if peers != NONE:
            folder = self.out / "peers" if peers == "auto" else Path(peers).resolve()
            print(f"peers: {folder}", file=sys.stderr)
            failed = install_packages(folder)
            self.settings = dataclasses.replace(self.settings, peers=str(folder))
            for package, requirement in PACKAGES.items():
                self.head["peers"][package] = failed.get(package, requirement)
        if llama != NONE and peers != NONE:
            folder = self.out / "llama" if llama == "auto" else Path(llama).resolve()
            print(f"llama.cpp: {folder} (compiling it takes minutes)", file=sys.stderr)
            found = build_llama(folder, self.arguments.jobs)
            reason = found or LLAMA
            self.settings = dataclasses.replace(self.settings, llama="" if found else str(folder))
        self.head["peers"]["llama.cpp"] = reason

    def _part(self, part: str) -> None:
        lines = self.out / f"{part}.jsonl"
        done = self._done(part, lines)
        settings = dataclasses.replace(self.settings, done=done)
        environment = dict(os.environ)
        # Threads of OpenMP that are not needed would be counted in the time of the process.
        environment["OMP_NUM_THREADS"] = str(max(settings.threads))
        if part == AVX2:
            environment |= {**LIMITS[AVX2], "LOWBIT_CPU_ISA": AVX2}
        supervisor = Supervisor(Path(__file__).resolve(), self.out, part, environment, self.errors)
        with RunProgress(sys.stderr.isatty() or self.arguments.progress) as bar:
            if part == "decoder":
                bar.stage(part, len(settings.threads))
                supervisor.run("", settings, bar)
                return
            units = self._units(AVX2 if part == AVX2 else "")
            waiting = [unit for unit in units if list(unit.cases(settings))]
            bar.stage(part, sum(len(list(unit.cases(settings))) for unit in waiting))
            for unit in waiting:
                if time.time() > self.until:
                    self.errors[f"{part} left out"] = "no time left (--budget-seconds)"
                    return
                bar.describe(f"{part} {unit.scheme} {unit.shape}")
                supervisor.run(unit.to_json(), settings, bar)

    def _done(self, part: str, lines: Path) -> tuple[str, ...]:
        from cpu_decoder import key

        if not lines.exists():
            return ()
        rows = [json.loads(line) for line in lines.read_text().splitlines()]
        return tuple(key(row["threads"]) if part == "decoder" else key_of(row) for row in rows)

    def _units(self, isa: str) -> list[Unit]:
        return [
            Unit(scheme, rows, columns, isa)
            for rows, columns in self.arguments.shapes
            for scheme in self.arguments.schemes
        ]


def work(arguments: argparse.Namespace) -> None:
    """Runs one process that measures."""
    settings = Settings.from_json(arguments.settings)
    if settings.peers:
        sys.path.append(settings.peers)  # behind all else: nothing of ours is replaced
    import cpu_linear

    journal = cpu_linear.Journal(arguments.lines, arguments.current)
    if arguments.worker == "decoder":
        import cpu_decoder

        cpu_decoder.run(settings, journal, arguments.lines.parent / "models")
    else:
        cpu_linear.run(Unit.from_json(arguments.unit), settings, journal)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("bench-cpu"), help="folder of the results")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between")
    parser.add_argument("--quick", action="store_true", help="fewer cases and turns: minutes")
    parser.add_argument("--budget-seconds", type=float, default=6 * 3600.0)
    parser.add_argument("--threads", type=_integers, default=THREADS, help="for example 1,2")
    parser.add_argument("--shapes", type=_shapes, help="NxK, for example 4096x4096,14336x4096")
    parser.add_argument("--tokens", type=_integers, help="for example 1,4,16,64,512")
    parser.add_argument("--schemes", type=lambda text: tuple(text.split(",")), help="fewer schemes")
    parser.add_argument("--peers", default="auto", help="folder of their packages, or none")
    parser.add_argument("--llama", default="auto", help="folder llama.cpp is built in, or none")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    parser.add_argument("--cache-mib", type=int, help="last-level cache, where nothing tells")
    parser.add_argument("--memory-gib", type=int, default=3, help="for the weights of one case")
    parser.add_argument("--commit", help="recorded where there is no git to ask")
    parser.add_argument("--progress", action="store_true", help="a bar without a terminal, too")
    parser.add_argument("--tiny", action="store_true", help="a tiny decoder, for testing")
    for internal in ("--worker", "--unit", "--settings"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    for internal in ("--lines", "--current"):
        parser.add_argument(internal, type=Path, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    defaults: dict[str, Any] = {"schemes": SCHEMES, "shapes": SHAPES, "tokens": TOKENS}
    for name, value in (QUICK if parsed.quick else defaults).items():
        if getattr(parsed, name) is None:
            setattr(parsed, name, value)
    parsed.parts = parsed.only.split(",")
    for what, given, known in (
        ("parts", parsed.parts, PARTS),
        ("schemes", parsed.schemes, SCHEMES),
    ):
        if unknown := sorted(set(given) - set(known)):
            parser.error(f"unknown {what}: {', '.join(unknown)}; there are {', '.join(known)}")
    return parsed


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    pairs = [part.split("x") for part in text.split(",")]
    return tuple((int(rows), int(columns)) for rows, columns in pairs)


def main(command_line: Sequence[str]) -> int:
    """Runs the command, or one process of it, and returns the exit status."""
    arguments = parse(command_line)
    if arguments.worker:
        try:
            work(arguments)
        except Exception:
            traceback.print_exc()
            return 1
        return 0
    try:
        return Benchmark(arguments).run()
    except LowbitError as error:
        print(f"cpu.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
