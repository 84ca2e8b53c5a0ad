"""What is done to a decoder, block by block: the algorithm and everything around it.

An `Algorithm` sees one matrix. What needs a whole block stands beside it in the recipe, each a
frozen dataclass of options like an algorithm, and in this order:

    fold        changes the block's float weights without changing what the block computes
    algorithm   chooses codes, group of linears after group of linears
    tuning      changes codes and grids until the block's output fits the full-precision block's
    end_to_end  once all blocks are on disk: tunes what is stored against the logits

`mismatch` gives algorithms `Statistics.cross`: what the full-precision model sends to each layer,
beside what the layer receives. That, folds and tuning need the hidden states of the full-precision
model, which the run then carries along.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from lowbit.algorithms import GPTQ, RTN, Algorithm, algorithm_options, make_algorithm
from lowbit.errors import LowbitError, unknown_name
from lowbit.tuning.awq import AWQ
from lowbit.tuning.end_to_end import ScaleTuning
from lowbit.tuning.rounding import BlockTuning
from lowbit.tuning.steps import EndToEnd, Fold, Tuning


@dataclass(frozen=True)
class Recipe:
    """Everything that is done to a decoder.

    Args:
        algorithm: chooses codes.
        mismatch: give it `Statistics.cross`.
        fold: changes each block beforehand.
        tuning: improves each block afterwards.
        end_to_end: improves the finished model.
    """

    algorithm: Algorithm
    mismatch: bool = False
    fold: Fold | None = None
    tuning: Tuning | None = None
    end_to_end: EndToEnd | None = None

    @property
    def keeps_reference(self) -> bool:
        """True if a run carries the full-precision model's hidden states beside its own."""
        return self.mismatch or self.fold is not None or self.tuning is not None

    @property
    def needs_data(self) -> bool:
        """True if it cannot work without calibration data."""
        return (
            self.keeps_reference or self.end_to_end is not None or self.algorithm.needs_statistics
        )

    def surroundings(self) -> dict[str, Any]:
        """Returns the recipe without its algorithm, JSON values; empty if there is nothing else."""
        content: dict[str, Any] = {"mismatch": True} if self.mismatch else {}
        for part in ("fold", "tuning", "end_to_end"):
            step = getattr(self, part)
            if step is not None:
                options = {option.name: getattr(step, option.name) for option in fields(step)}
                content[part] = {"name": step.name, **options}
        return content

    def algorithm_options(self) -> dict[str, Any]:
        """Returns the options of the algorithm."""
        return algorithm_options(self.algorithm)


# Only for what has outlier channels: elsewhere it gains next to nothing and is left out, so that
# codes stand for the model's own weights.
OUTLIERS = AWQ(steps=10, tokens=4096, least_gain=0.1)

# How much a run may take for a better result; `docs/design/tuning.md` has what each gives.
PRESETS: dict[str, Recipe] = {
    "fast": Recipe(GPTQ()),
    "balanced": Recipe(
        GPTQ(sweeps=2), mismatch=True, fold=OUTLIERS, tuning=BlockTuning(iterations=150)
    ),
    "best": Recipe(
        GPTQ(sweeps=4),
        mismatch=True,
        fold=OUTLIERS,
        tuning=BlockTuning(iterations=150),
        end_to_end=ScaleTuning(steps=100, evaluations=5),
    ),
}

# What users know as algorithms, and what is a fold before one.
FOLDING: dict[str, Recipe] = {
    "awq": Recipe(RTN(), fold=AWQ()),
    "awq+gptq": Recipe(GPTQ(), fold=AWQ()),
}


def make_recipe(algorithm: str | Algorithm | None, quality: str | Recipe | None) -> Recipe:
    """Returns the recipe that a user chose by one of the two; GPTQ alone where neither is given.

    Raises:
        LowbitError: if both are given, or for an unknown name.
    """
    if algorithm is not None and quality is not None:
        raise LowbitError(
            "algorithm and quality are both given, but a quality chooses its own algorithm; "
            "give one of them"
        )
    if isinstance(quality, Recipe):
        return quality
    if isinstance(algorithm, str) and algorithm.lower() in FOLDING:
        return FOLDING[algorithm.lower()]
    if quality is None:
        return Recipe(make_algorithm("gptq" if algorithm is None else algorithm))
    if quality.lower() not in PRESETS:
        raise unknown_name("quality", quality, PRESETS)
    return PRESETS[quality.lower()]
