"""GPTQ: round column by column, each time letting the columns to come make up for the error.

Reference: Frantar et al. 2022, "GPTQ". The recursion itself is in `ldlq.py`; here are the choices
around it.

*Static groups.* Columns are visited by falling diag(H) (`act_order`), but a scale belongs to a
fixed group of neighbouring columns and is known before the first code: the stored layout needs no
index of groups, and double quantization is exact.

*Scales fitted twice.* What is rounded is not the weight but the weight plus feedback, which spreads
wider; a range that is right for the weights clips it. So the scales are fitted to the weights, the
layer is solved, and they are fitted again to the targets that this solution met; of the two
solutions each row keeps its better one. Both fits weigh a squared error as the recursion's loss
does, by A_kk^2 = 1 / U_kk^2: the variance of input k that the inputs still to be rounded cannot
make up for. diag(H) would count what they can. `docs/results/quality.json` has one fit beside two.

*Refinement.* Columns and scales are then visited again, `sweeps` times (`refine.py`).

*Input mismatch.* Where statistics have `cross`, all of this aims at the weight that gives the
full-precision model's outputs on the inputs that the layer really gets (`mismatch.py`).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowbit.algorithms.base import Quantized, Statistics
from lowbit.algorithms.ldlq import Factor, better_rows, factorise, solve
from lowbit.algorithms.mismatch import corrected_weight
from lowbit.algorithms.refine import refine
from lowbit.algorithms.rtn import RTN
from lowbit.algorithms.scales import fit_grid
from lowbit.errors import LowbitError
from lowbit.scheme import Scheme


@dataclass(frozen=True)
class GPTQ:
    """Quantizes columns in sequence with error feedback.

    Args:
        damp_percent: share of the mean of diag(H) that is added to diag(H), above 0, at most 1;
            more where statistics hold few tokens, see `damping`.
        act_order: visit columns by falling diag(H); False visits them as stored.
        block_size: columns whose feedback is computed together. It changes speed, not results.
        search: search scales for the least squared error; False takes absmax.
        refit: fit the scales a second time, to the targets of a first solution (twice the time).
        sweeps: times that all codes and scales are reconsidered afterwards; a sweep takes about as
            long as a solution. 0 for plain GPTQ.
        mismatch: share of the correction for inputs that differ from those of the full-precision
            model, 0 to 1, where the run measures them (`Statistics.cross`).
    """

    name: ClassVar[str] = "gptq"
    damp_percent: float = 0.01
    act_order: bool = True
    block_size: int = 128
    search: bool = True
    refit: bool = True
    sweeps: int = 0
    mismatch: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.damp_percent <= 1:
            raise LowbitError(
                f"gptq: damp_percent {self.damp_percent} is out of range; use a value above 0 and "
                "at most 1, for example 0.01"
            )
        if self.block_size < 1:
            raise LowbitError(f"gptq: block_size {self.block_size} is not positive; use 128")
        if self.sweeps < 0:
            raise LowbitError(f"gptq: sweeps {self.sweeps} is negative; use 0 for none, or 4")
        if not 0 <= self.mismatch <= 1:
            raise LowbitError(
                f"gptq: mismatch {self.mismatch} is out of range; use 0 for none of the "
                "correction to 1 for all of it"
            )

    @property
    def needs_statistics(self) -> bool:
        """True: there is no GPTQ without H."""
        return True

    def quantize(self, weight: Tensor, scheme: Scheme, statistics: Statistics | None) -> Quantized:
        """Returns codes that minimise the output error greedily; see `Algorithm.quantize`.

        Raises:
            LowbitError: without statistics, or with statistics of another width.
        """
        if statistics is None:
            raise LowbitError(
                "gptq needs calibration statistics; give calibration text, or use rtn"
            )
        size = statistics.hessian.shape[0]
        if size != weight.shape[1]:
            raise LowbitError(
                f"gptq: statistics are of {size} input features, but the weight has "
                f"{weight.shape[1]}"
            )
        factor = shared_factor(statistics, damping(self.damp_percent, statistics), self.act_order)
        if factor is None:
            usable = statistics if bool(statistics.hessian.isfinite().all()) else None
            fallback = RTN(self.search).quantize(weight, scheme, usable)
            return Quantized(fallback.codes, fallback.grid, {**fallback.report, "fallback": "rtn"})
        weight, report = self._target(weight, statistics, factor)
        grid = fit_grid(weight, scheme, factor.importance(), self.search)
        best = solve(weight, grid, factor, self.block_size)
        if self.search and self.refit:
            grid = fit_grid(best.targets, scheme, factor.importance(), self.search)
            best = better_rows(best, solve(weight, grid, factor, self.block_size))
        if self.sweeps:
            report["loss_before_sweeps"] = best.loss
            best = refine(weight, best, statistics.hessian, factor, self.sweeps, self.block_size)
        report["loss"] = best.loss
        if factor.damp_percent != self.damp_percent:
            report["damp_percent"] = factor.damp_percent
        if factor.dead.any():
            report["dead_features"] = int(factor.dead.sum())
        return Quantized(best.codes, best.grid, report)

    def _target(
        self, weight: Tensor, statistics: Statistics, factor: Factor
    ) -> tuple[Tensor, dict[str, float | int | str]]:
        """Returns the float32 weight to aim for, and what the report says of it."""
        weight = weight.detach().float()
        # A feature that was never active says nothing about its weights: they become zero, here,
        # so that the scales are not fitted to them either.
        plain = weight.masked_fill(factor.dead, 0.0)
        if statistics.cross is None or self.mismatch == 0:
            return plain, {}
        corrected = corrected_weight(weight, statistics, factor, self.mismatch)
        change = float((corrected - plain).norm() / plain.norm().clamp_min(1e-30))
        return corrected, {"mismatch_correction": change}


def damping(damp_percent: float, statistics: Statistics) -> float:
    """Returns `damp_percent`, or (in_features / tokens)^2 where that is more, at most 1.

    An H of few tokens is noise in its small eigenvalues, and feedback through those makes the
    weights worse than rounding them. How much damping is best was measured: about 1 below two
    tokens a feature, a few hundredths at five. From ten on this changes nothing at 1%.
    """
    few = statistics.hessian.shape[0] / max(statistics.tokens, 1)
    return max(damp_percent, min(few**2, 1.0))


_last_factor: tuple[weakref.ref[Statistics], tuple[float, bool], Factor | None] | None = None


def shared_factor(statistics: Statistics, damp_percent: float, act_order: bool) -> Factor | None:
    """Returns `factorise(...)`, computed once for consecutive layers with the same statistics.

    q, k and v get the same `Statistics` object one after the other, so remembering one factor is
    enough; it is dropped together with the statistics (it is as large as H).
    """
    global _last_factor
    options = damp_percent, act_order
    if _last_factor is not None:
        known, known_options, factor = _last_factor
        if known() is statistics and known_options == options:
            return factor
    _last_factor = None
    factor = factorise(statistics.hessian, damp_percent, act_order)
    _last_factor = (weakref.ref(statistics, _forget_factor), options, factor)
    return factor


def _forget_factor(dead_reference: weakref.ref[Statistics]) -> None:
    global _last_factor
    if _last_factor is not None and _last_factor[0] is dead_reference:
        _last_factor = None
