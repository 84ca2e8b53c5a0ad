"""Who is compared, at which sizes, and what ours has to reach: data only, standard library only.

A class is a row of the comparison: all schemes in it are meant as alternatives to each other,
though their bits per weight differ a little; no target is met by using more bits than the peer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Symmetric or not: tools have a default, and at few bits the other one may be better.
SYM, ASYM = True, False


@dataclass(frozen=True)
class Storage:
    """What a driver is asked for: width of a code, features in a group, symmetric or not."""

    bits: int
    group_size: int
    symmetric: bool

    def __str__(self) -> str:
        return f"{self.bits} bits g{self.group_size} {'sym' if self.symmetric else 'asym'}"


CLASSES: dict[str, tuple[int, int]] = {"4": (4, 128), "3": (3, 128), "2": (2, 64), "nf4": (4, 64)}
INTEGERS = ("4", "3", "2")

# What ours is measured with in each class, by every recipe of `--ours`. A scheme
# may not be larger than the peer it is compared with; peers of more bits meet these ones too, save
# at 2 bits, where half a bit is much.
OUR_SCHEMES: dict[str, tuple[str, ...]] = {
    "4": ("W4A16_G128", "W4A16_ASYM_G128"),
    "3": ("W3A16_G128", "W3A16_ASYM_G128"),
    "2": ("W2A16_G64", "W2A16_ASYM_G64", "W2A16_ASYM_G32"),
    "nf4": ("NF4_DQ",),
}


@dataclass(frozen=True)
class Environment:
    """A virtual environment that one or several peers are run in.

    Args:
        name: of its folder.
        requirements: what pip installs after torch.
        build_isolation: False where a source distribution must see the torch that is there.
    """

    name: str
    requirements: tuple[str, ...]
    build_isolation: bool = True


ENVIRONMENTS = {
    environment.name: environment
    for environment in (
        Environment(
            "shared",
            ("transformers", "accelerate", "hqq", "bitsandbytes", "torchao", "optimum-quanto"),
        ),
        Environment("llmcompressor", ("llmcompressor",)),
        Environment("autoround", ("auto-round",)),
        Environment("gptqmodel", ("gptqmodel",), build_isolation=False),
    )
}


@dataclass(frozen=True)
class Contender:
    """One method of one peer.

    Args:
        name: in tables.
        peer: the tool, which `--only` selects and the figure colours.
        environment: name of the environment it runs in.
        driver: module in `scripts/peers`.
        method: of the driver.
        storages: what it is asked for, by class.
        calibrated: sees tokens, so that seeds differ.
        options: of the method, by class; for all classes under "".
    """

    name: str
    peer: str
    environment: str
    driver: str
    method: str
    storages: dict[str, tuple[Storage, ...]]
    calibrated: bool = True
    options: dict[str, dict[str, Any]] = field(default_factory=dict)

    def options_of(self, size_class: str) -> dict[str, Any]:
        """Returns the options of one class."""
        return {**self.options.get("", {}), **self.options.get(size_class, {})}


def storages(*symmetric: bool, classes: tuple[str, ...] = INTEGERS) -> dict[str, Any]:
    """Returns the storages of `classes`, each with every value of `symmetric`."""
    return {name: tuple(Storage(*CLASSES[name], value) for value in symmetric) for name in classes}


def _ggml(family: str, types: dict[str, str], matrix: bool) -> Contender:
    return Contender(
        f"llama.cpp {family}" + (" imatrix" if matrix else ""),
        "llama.cpp",
        "shared",
        "llama_cpp",
        "ggml",
        # Blocks of 256 with scales of their own; the type decides, not the storage.
        {
            name: (Storage(CLASSES[name][0], 256, kind.startswith("I")),)
            for name, kind in types.items()
        },
        calibrated=matrix,
        options={"": {"imatrix": matrix}, **{name: {"type": k} for name, k in types.items()}},
    )


K_QUANTS = {"4": "Q4_K", "3": "Q3_K", "2": "Q2_K"}
I_QUANTS = {"4": "IQ4_XS", "3": "IQ3_S", "2": "IQ2_S"}

CONTENDERS = (
    Contender("GPTQModel", "gptqmodel", "gptqmodel", "gptq_model", "plain", storages(SYM)),
    Contender(
        "GPTQModel group-aware", "gptqmodel", "gptqmodel", "gptq_model", "group_aware",
        storages(SYM, ASYM),
    ),
    Contender(
        "llm-compressor GPTQ", "llm-compressor", "llmcompressor", "llm_compressor", "gptq",
        storages(SYM, ASYM),
    ),
    Contender(
        "llm-compressor AWQ", "llm-compressor", "llmcompressor", "llm_compressor", "awq",
        storages(ASYM),
    ),
    Contender(
        "AutoRound", "auto-round", "autoround", "auto_round_tuning", "signround",
        storages(SYM, ASYM), options={"": {"iters": 200}},
    ),
    Contender("HQQ", "hqq", "shared", "weight_only", "hqq", storages(ASYM), calibrated=False),
    Contender(
        "HQQ axis 0", "hqq", "shared", "weight_only", "hqq_axis0", storages(ASYM), calibrated=False
    ),
    Contender(
        "torchao", "torchao", "shared", "weight_only", "torchao", storages(SYM, ASYM),
        calibrated=False,
    ),
    Contender(
        "torchao HQQ", "torchao", "shared", "weight_only", "torchao_hqq", storages(SYM),
        calibrated=False,
    ),
    Contender(
        "optimum-quanto", "optimum-quanto", "shared", "weight_only", "quanto", storages(ASYM),
        calibrated=False,
    ),
    _ggml("k-quants", K_QUANTS, False),
    _ggml("k-quants", K_QUANTS, True),
    _ggml("i-quants", I_QUANTS, True),
    Contender(
        "bitsandbytes NF4 DQ", "bitsandbytes", "shared", "weight_only", "bnb_nf4_dq",
        storages(SYM, classes=("nf4",)), calibrated=False,
    ),
)  # fmt: skip

PEERS = tuple(dict.fromkeys(contender.peer for contender in CONTENDERS))


@dataclass(frozen=True)
class Target:
    """Ours against the best peer of a class.

    Args:
        size_class: key of `CLASSES`.
        ours: label of the algorithm in `--ours`.
        ratio: our KL divided by the peer's has to be at most this.
        peers: tools that count; empty for all of the class.
        time: it is CPU time that is compared, not KL.
    """

    size_class: str
    ours: str
    ratio: float
    peers: tuple[str, ...] = ()
    time: bool = False

    def __str__(self) -> str:
        against = ", ".join(self.peers) or "the best peer"
        quantity = "CPU time" if self.time else "KL"
        wanted = "no more" if self.ratio == 1 else f"{1 - self.ratio:.0%} less"
        wanted = f"{wanted} {quantity} than"
        return f"class {self.size_class}: {self.ours} has {wanted} {against}, at no more bits"


TARGETS = (
    Target("4", "balanced", 1.0),
    Target("3", "balanced", 1.0),
    Target("4", "best", 0.85),
    Target("3", "best", 0.75),
    Target("2", "best", 0.65),
    Target("4", "balanced", 1.0, ("auto-round",), time=True),
    Target("3", "balanced", 1.0, ("auto-round",), time=True),
    Target("nf4", "fast", 0.85, ("bitsandbytes",)),
)
