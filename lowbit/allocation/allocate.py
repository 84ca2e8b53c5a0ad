"""From sensitivities and a budget to a scheme for every layer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from lowbit.allocation.budget import describe_bytes, parse_size
from lowbit.allocation.knapsack import Packing, pack
from lowbit.errors import LowbitError
from lowbit.scheme import Scheme

OPTIONS = (
    "W2A16_G32", "W2A16_G64", "W2A16",
    "W3A16_G32", "W3A16_G64", "W3A16",
    "W4A16_G32", "W4A16_G64", "W4A16",
    "W8A16",
)  # fmt: skip
SAMPLES = 32


@dataclass(frozen=True)
class Allocation:
    """A budget, and what may be chosen from.

    Args:
        target_bits: stored bits per quantized weight (codes, scales, zero points), at most; or
        target_size: bytes of all safetensors files, at most: a number, or "4.2GB", "900MiB".
        options: schemes to choose from, of weights only.
        fused: layers that engines multiply as one (q, k, v; gate, up) share a scheme.
        samples: calibration windows that sensitivities are measured on, fewer if there are fewer.
        sensitivities: a file that keeps what was measured, for other budgets; read if it exists.

    Raises:
        LowbitError: for both targets or none, or one that is no number above 0.
    """

    target_bits: float | None = None
    target_size: int | str | None = None
    options: tuple[str | Scheme, ...] = OPTIONS
    fused: bool = True
    samples: int = SAMPLES
    sensitivities: str | Path | None = None
    schemes: tuple[Scheme, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if (self.target_bits is None) == (self.target_size is None):
            given = "neither" if self.target_bits is None else "both"
            raise LowbitError(
                f"bit allocation needs target bits or a target size, {given} of them was given"
                if given == "neither"
                else "target bits and a target size are both given; give one of them"
            )
        bits = self.target_bits
        if bits is not None and not (math.isfinite(bits) and bits > 0):
            raise LowbitError(
                f"target bits is a number of bits per weight above 0, for example 3.5, got {bits}"
            )
        if self.samples < 1:
            raise LowbitError(f"bit allocation needs at least 1 sample, got {self.samples}")
        if self.target_size is not None:
            parse_size(self.target_size)
        schemes = tuple(dict.fromkeys(Scheme.parse(option) for option in self.options))
        if not schemes:
            raise LowbitError("bit allocation needs options to choose from, got none")
        rounding = [scheme for scheme in schemes if scheme.activations is not None]
        if rounding:
            raise LowbitError(
                f"bit allocation chooses how weights are stored, and {rounding[0]} rounds "
                "activations as well; give options of weights only, for example W8A16"
            )
        object.__setattr__(self, "schemes", schemes)


@dataclass(frozen=True)
class Sizes:
    """What storing costs, in the unit of the target.

    Args:
        of: (module name, scheme) -> bytes.
        fixed: bytes beside the modules whose scheme is chosen.
        weights: weights that bits are counted for; None if the target is a size.
    """

    of: Callable[[str, Scheme], int]
    fixed: int
    weights: int | None = None

    def describe(self, size: int) -> str:
        """Returns `size`, `fixed` included, as the user counts it."""
        if self.weights is None:
            return describe_bytes(size)
        return f"{8 * size / self.weights:.4f} bits per weight"


@dataclass(frozen=True)
class Allocated:
    """The choice.

    Args:
        schemes: module name -> scheme.
        packing: the solution of the knapsack; its sizes are without `fixed`.
        report: what the manifest records, JSON values.
    """

    schemes: dict[str, Scheme]
    packing: Packing
    report: dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """Bytes, `Sizes.fixed` included.

    Args:
        budget: the most that may be stored.
        smallest: the least that can be.
        largest: the most that is of use.
    """

    budget: int
    smallest: int
    largest: int


def require_feasible(
    allocation: Allocation, groups: Iterable[Sequence[str]], sizes: Sizes
) -> Limits:
    """Returns the budget beside what is possible, which takes no measuring.

    Args:
        allocation: budget and options.
        groups: names of modules that share a scheme.
        sizes: what each would cost.

    Raises:
        LowbitError: if no choice meets the budget.
    """
    smallest = largest = sizes.fixed
    for group in groups:
        costs = [sum(sizes.of(name, s) for name in group) for s in allocation.schemes]
        smallest, largest = smallest + min(costs), largest + max(costs)
    if allocation.target_size is not None:
        budget = parse_size(allocation.target_size)
    else:
        assert sizes.weights is not None
        budget = math.floor(Fraction(allocation.target_bits or 0) * sizes.weights / 8)
    if budget < smallest:
        what = "size" if sizes.weights is None else "bits"
        raise LowbitError(
            f"target {what}: {sizes.describe(budget)} cannot be met; with these options the "
            f"smallest possible is {sizes.describe(smallest)}, and more than "
            f"{sizes.describe(largest)} would be of no use"
        )
    return Limits(budget, smallest, largest)


def allocate(
    allocation: Allocation,
    groups: Sequence[Sequence[str]],
    losses: Sequence[Mapping[str, float]],
    sizes: Sizes,
) -> Allocated:
    """Returns the schemes of least predicted loss that meet the budget.

    Args:
        allocation: budget and options.
        groups: names of modules that share a scheme.
        losses: for each group, scheme -> predicted loss, see `Sensitivities`.
        sizes: what each would cost.

    Raises:
        LowbitError: if no choice meets the budget.
    """
    limits = require_feasible(allocation, groups, sizes)
    options = allocation.schemes
    costs = [[sum(sizes.of(name, s) for name in group) for s in options] for group in groups]
    values = [[found[str(s)] for s in options] for found in losses]
    budget = limits.budget
    packing = pack(costs, values, budget - sizes.fixed)
    chosen = {
        name: options[pick]
        for group, pick in zip(groups, packing.picks, strict=True)
        for name in group
    }
    report = {
        "target_bits": allocation.target_bits,
        "target_size": allocation.target_size,
        "budget_bytes": budget,
        "bytes": packing.size + sizes.fixed,
        "smallest_bytes": limits.smallest,
        "largest_useful_bytes": limits.largest,
        "options": [str(scheme) for scheme in options],
        "fused": allocation.fused,
        "predicted_loss": packing.loss,
        "gap_percent": 100 * packing.gap,
        "modules": {str(s): sum(c == s for c in chosen.values()) for s in options},
    }
    return Allocated(chosen, packing, report)


def dynamic_rules(
    schemes: Mapping[str, Scheme], default: Scheme, layers_name: str
) -> list[tuple[str, Scheme]]:
    """Returns (regex, scheme) pairs that give every module its scheme, those of `default` left out.

    Modules that have the same scheme in the same blocks share a regex.

    Args:
        schemes: module name -> scheme; all are in the blocks.
        default: scheme of whatever no regex matches.
        layers_name: dotted name of the list of blocks.
    """
    blocks: dict[tuple[Scheme, str], list[int]] = {}
    for name, scheme in schemes.items():
        index, _, rest = name.removeprefix(layers_name + ".").partition(".")
        if scheme != default:
            blocks.setdefault((scheme, rest), []).append(int(index))
    shared: dict[tuple[Scheme, tuple[int, ...]], list[str]] = {}
    for (scheme, rest), indices in blocks.items():
        shared.setdefault((scheme, tuple(indices)), []).append(rest)
    return [
        (f"^{re.escape(layers_name)}\\.{_any_of(map(str, indices))}\\.{_any_of(names)}$", scheme)
        for (scheme, indices), names in shared.items()
    ]


def _any_of(texts: Iterable[str]) -> str:
    escaped = [re.escape(text) for text in texts]
    return escaped[0] if len(escaped) == 1 else f"(?:{'|'.join(escaped)})"
