"""What the CPU benchmark measures: schemes, shapes, numbers of tokens, and who meets whom.

A *case* is one scheme, shape, number of tokens and number of threads. All its candidates are
measured in turns, and only times of one case are divided by each other. A *unit* is the cases of
one scheme and shape: they share their weights, and run in one process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

TOKENS = (1, 4, 16, 64, 512)
THREADS = (1, 2)
# (rows N, columns K): query and output, gate and up, down of an 8B Llama.
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))

BF16, FP32, READ = "bf16", "fp32", "read"
# Scheme -> the peers that store about the same, by the names of `cpu_peers.PEERS`.
OPPONENTS: dict[str, tuple[str, ...]] = {
    "W4A16": (
        "fp32", "torch int4pack", "torchao int4", "openvino u4", "openvino u4 bf16",
        "llama.cpp q4_0", "llama.cpp q4_K",
    ),
    "W4A16_G64": ("torch int4pack",),
    "W4A16_G32": ("torch int4pack", "llama.cpp q4_0"),
    "W4A16_ASYM_G64": ("torch int4pack",),
    "NF4": ("bitsandbytes nf4",),
    "NF4_DQ": ("bitsandbytes nf4",),
    "FP4": ("bitsandbytes fp4",),
    "W3A16_G64": ("llama.cpp q3_K",),
    "W2A16_G64": ("llama.cpp q2_K",),
    "W8A16": ("torch int8pack", "llama.cpp q8_0"),
    "W8A8": ("torch onednn int8", "torchao int8"),
}  # fmt: skip
SCHEMES = tuple(OPPONENTS)
QUICK = {"schemes": ("W4A16", "NF4", "W2A16_G64"), "shapes": SHAPES[:1], "tokens": (1, 16, 512)}


@dataclass(frozen=True)
class Settings:
    """What a process that measures is told.

    Args:
        tokens: numbers of tokens M.
        threads: numbers of threads.
        seconds: to spend on one candidate of a case, roughly; three turns are the least.
        memory_bytes: that all weights of a unit together may take.
        cache_bytes: of the last level; the copies of a weight are to be twice as large.
        peers: folder that holds the packages of the peers, "" without them.
        llama: folder that llama.cpp was built in, "" without it.
        until: as of `time.time()`; no case is begun later.
        crashed: (candidate, tokens, threads, reason) that ended a process before.
        done: keys of cases that are measured already.
        rounds: of the decoder, each a prompt and some steps.
        tiny: a decoder that is only good for testing.
    """

    tokens: tuple[int, ...] = TOKENS
    threads: tuple[int, ...] = THREADS
    seconds: float = 0.3
    memory_bytes: int = 3 << 30
    cache_bytes: int = 32 << 20
    peers: str = ""
    llama: str = ""
    until: float = float("inf")
    crashed: tuple[tuple[str, int, int, str], ...] = ()
    done: tuple[str, ...] = ()
    rounds: int = 3
    tiny: bool = False

    def to_json(self) -> str:
        """Returns the settings as one argument of a command line."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Settings:
        """Returns the settings whose `to_json` this is."""
        fields = json.loads(text)
        fields["crashed"] = tuple(tuple(entry) for entry in fields["crashed"])
        lists = {name: tuple(fields[name]) for name in ("tokens", "threads", "done")}
        return Settings(**{**fields, **lists})


@dataclass(frozen=True)
class Unit:
    """One scheme and shape.

    Args:
        scheme: its name, one of `OPPONENTS`.
        rows: out_features N.
        columns: in_features K.
        isa: instruction set that everything is held to, "" for the processor's best.
    """

    scheme: str
    rows: int
    columns: int
    isa: str = ""

    @property
    def shape(self) -> str:
        """The name of the shape in results."""
        return f"{self.rows}x{self.columns}"

    def key(self, tokens: int, threads: int) -> str:
        """Returns what tells a case from all others."""
        return f"{self.isa or 'best'} {self.scheme} {self.shape} M={tokens} threads={threads}"

    def cases(self, settings: Settings) -> Iterator[tuple[int, int]]:
        """Yields (tokens, threads) of the cases that are not done yet."""
        for threads in settings.threads:
            for tokens in settings.tokens:
                if self.key(tokens, threads) not in settings.done:
                    yield tokens, threads

    def to_json(self) -> str:
        """Returns the unit as one argument of a command line."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Unit:
        """Returns the unit whose `to_json` this is."""
        return Unit(**json.loads(text))


def key_of(row: dict[str, Any]) -> str:
    """Returns the key of a measured case."""
    rows, columns = map(int, row["shape"].split("x"))
    return Unit(row["scheme"], rows, columns, row["limited_to"]).key(row["M"], row["threads"])
