"""The limits of engines, read from `limits.json`.

    engines: name -> version, hardware, command that serves, formats that lowbit writes for it, best
             first; limits of all formats; format -> its limits; format -> why it is not read

A limit is a kind, a value, the weights it is about (`when`: attribute -> values), a reason, where
that was read and when. What is beyond it is refused; where `then` is `unknown`, it was not found
out what happens and the user is told; where it is `said`, it is served, but not as one would think.
New limits of these kinds are data; a new kind is a function in `linter.py`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from lowbit.errors import unknown_name

DATA = Path(__file__).with_name("limits.json")

# Attributes of a weight that a limit may list the allowed values of, and `when` may ask for.
ATTRIBUTES = (
    "bits",
    "symmetric",
    "group_size",
    "codebook",
    "double_quant",
    "activations",
    "scale_dtype",
    "kind",
    "expert",
    "ordered",
    "tensor_parallel",
)
STRUCTURAL = (
    "heads",
    "split",
    "whole_groups",
    "whole_words",
    "tile",
    "fused",
    "zero_points",
    "scales",
    "plain_experts",
    "note",
)
REFUSED, UNKNOWN, SAID = "refused", "unknown", "said"
MORE = "more"  # of `tensor_parallel`: more than one GPU


@dataclass(frozen=True)
class Reason:
    """Why, where that was read, and when.

    Args:
        because: half a sentence.
        source: addresses, with the symbol after `#`.
        checked: the day.
    """

    because: str
    source: tuple[str, ...]
    checked: date


@dataclass(frozen=True)
class Limit:
    """One limit.

    Args:
        kind: one of `ATTRIBUTES` (then `value` lists what is allowed) or of `STRUCTURAL`.
        value: JSON.
        reason: why.
        when: attribute -> values of the weights that it is about.
        then: REFUSED, UNKNOWN or SAID: what becomes of what is beyond it.
    """

    kind: str
    value: Any
    reason: Reason
    when: Mapping[str, Any] = field(default_factory=dict)
    then: str = REFUSED


@dataclass(frozen=True)
class Engine:
    """One engine.

    Args:
        name: of the command line.
        version: that was looked at.
        hardware: what its limits hold on.
        serve: its command, with `{path}`.
        parallel: what its command has for several GPUs, with `{tp}`; empty for nothing.
        writes: formats that lowbit writes for it, best first.
        formats: format -> limits, those of all formats among them.
        refused: format -> why it is not read.
    """

    name: str
    version: str
    hardware: str
    serve: str
    parallel: str
    writes: tuple[str, ...]
    formats: Mapping[str, tuple[Limit, ...]]
    refused: Mapping[str, Reason]

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    def command(self, path: str | Path, tensor_parallel: int = 1) -> str:
        """Returns the command by which it serves a checkpoint."""
        parts = [self.serve.format(path=path)]
        if tensor_parallel > 1 and self.parallel:
            parts.append(self.parallel.format(tp=tensor_parallel))
        return " ".join(parts)


def engine_named(name: str) -> Engine:
    """Returns the engine of that name.

    Raises:
        LowbitError: if there is none.
    """
    found = engines().get(name.lower())
    if found is None:
        raise unknown_name("engine", name, engines())
    return found


@functools.cache
def engines() -> dict[str, Engine]:
    """Returns name -> engine, in the order of the file."""
    data = json.loads(DATA.read_text(encoding="utf-8"))["engines"]
    return {name: _engine(name, fields) for name, fields in data.items()}


def _engine(name: str, fields: Mapping[str, Any]) -> Engine:
    common = tuple(_limit(limit) for limit in fields["limits"])
    return Engine(
        name=name,
        version=fields["version"],
        hardware=fields["hardware"],
        serve=fields["serve"],
        parallel=fields["parallel"],
        writes=tuple(fields["writes"]),
        formats={
            layout: common + tuple(_limit(limit) for limit in own["limits"])
            for layout, own in fields["formats"].items()
        },
        refused={layout: _reason(reason) for layout, reason in fields["refused"].items()},
    )


def _limit(fields: Mapping[str, Any]) -> Limit:
    return Limit(
        kind=fields["limit"],
        value=fields["value"],
        reason=_reason(fields),
        when=fields.get("when", {}),
        then=fields.get("then", REFUSED),
    )


def _reason(fields: Mapping[str, Any]) -> Reason:
    checked = date.fromisoformat(fields["checked"])
    return Reason(fields["because"], tuple(fields["source"]), checked)


ENGINES: tuple[str, ...] = tuple(engines())
