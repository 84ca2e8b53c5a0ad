"""An exact multiple-choice knapsack: one option out of every group, the least loss within a budget.

Sizes are bytes of a whole model, so a table over the budget is out of the question. Three facts
make the exact optimum cheap all the same:

*Relaxation.* Minimising loss + price * size picks for every group on its own. At the price where
that just meets the budget its value is a lower bound, and every option has a *regret*: how much
worse it is at that price than the best one of its group. A solution's loss is exactly

    bound + sum of regrets + price * unused bytes,

and none of the three can be negative.

*Pruning.* Partial solutions whose regrets already exceed the gap between the bound and a known
solution cannot become better than that one. A first pass that keeps only the most promising
partial solutions makes the gap tiny.

*Dominance.* Of two partial solutions over the same groups, one that is neither smaller nor better
is dropped. Decoder blocks have few shapes, so many combinations have the very same size.

Reference: Kellerer, Pferschy, Pisinger 2004, "Knapsack Problems", chapter 11.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

# Partial solutions of the first pass, and the most that the exact pass holds: 13 bytes each for
# every group, so that the way back can be found.
FIRST_PASS_STATES = 2_000
MAX_STATES = 250_000
# Sums of floats in another order differ in their last bits; nothing is pruned for as little.
_SLACK = 1e-12


@dataclass(frozen=True)
class Packing:
    """A choice for every group.

    Args:
        picks: index of the chosen option for each group.
        size: their sizes summed.
        loss: their losses summed.
        bound: no choice within the budget has a loss below this; equal to `loss` if it is proven
            to be the optimum.
    """

    picks: tuple[int, ...]
    size: int
    loss: float
    bound: float

    @property
    def gap(self) -> float:
        """How far from the optimum this may be at most, as a share of its loss; 0 if it is it."""
        return 0.0 if self.loss <= self.bound else (self.loss - self.bound) / self.loss


@dataclass(frozen=True)
class _Group:
    """The options of a group that are of use, by growing size and falling loss."""

    options: Integers
    sizes: Integers
    losses: Floats


def pack(
    sizes: Sequence[Sequence[int]],
    losses: Sequence[Sequence[float]],
    budget: int,
    max_states: int = MAX_STATES,
) -> Packing:
    """Returns the choice of least loss whose sizes sum to at most `budget`; of equals, the smaller.

    Args:
        sizes: for each group, the size of each option, integers.
        losses: the same for losses; finite.
        budget: the most that the sizes may sum to.
        max_states: the most partial solutions that are held at once. If that is not enough to
            prove the optimum, `Packing.bound` says how far away it may be.

    Raises:
        ValueError: if not even the smallest options fit, or a loss is not finite.
    """
    groups = [_useful(*options) for options in zip(sizes, losses, strict=True)]
    smallest = sum(int(group.sizes[0]) for group in groups)
    if smallest > budget:
        raise ValueError(f"the smallest options sum to {smallest}, above the budget of {budget}")
    price, first = _relax(groups, budget)
    bound = sum(float((g.losses + price * g.sizes).min()) for g in groups) - price * budget
    known = _measure(groups, first)
    if len(groups) == 0:
        return Packing((), 0, 0.0, 0.0)
    for limit in (min(FIRST_PASS_STATES, max_states), max_states):
        found, dropped = _search(groups, budget, price, bound, known[0], limit)
        known = min(known, found) if found else known
        # What was dropped for want of room had at least these regrets.
        proven = min(known[0], bound + dropped)
        if proven >= known[0]:
            break
    loss, size, picks = known
    chosen = tuple(int(g.options[pick]) for g, pick in zip(groups, picks, strict=True))
    return Packing(chosen, size, loss, proven)


def _useful(sizes: Sequence[int], losses: Sequence[float]) -> _Group:
    """Returns the options that no other one beats in both size and loss."""
    size, loss = np.asarray(sizes, dtype=np.int64), np.asarray(losses, dtype=np.float64)
    if size.shape != loss.shape or not size.size or not np.isfinite(loss).all():
        raise ValueError("every group needs options, each with a size and a finite loss")
    order = np.lexsort((loss, size))
    keep = order[_falling(loss[order])]
    return _Group(keep, size[keep], loss[keep])


def _falling(losses: Floats) -> NDArray[np.bool_]:
    """Returns where `losses` are below all before them."""
    before = np.concatenate(([np.inf], np.minimum.accumulate(losses)[:-1]))
    return np.asarray(losses < before)


def _relax(groups: list[_Group], budget: int) -> tuple[float, list[int]]:
    """Returns the price of a byte at which the relaxed problem meets the budget, and a solution.

    Upgrades along the lower convex hulls of all groups are taken by falling gain per byte. The one
    that does not fit any more sets the price (0 if all fit); smaller ones may still fit.
    """
    hulls = [_hull(group) for group in groups]
    steps = []
    for index, (group, hull) in enumerate(zip(groups, hulls, strict=True)):
        for before, after in itertools.pairwise(hull):
            extra = int(group.sizes[after] - group.sizes[before])
            gain = float(group.losses[before] - group.losses[after])
            steps.append((-gain / extra, index, before, after, extra))
    picks = [hull[0] for hull in hulls]
    room, price = budget - sum(int(g.sizes[0]) for g in groups), None
    for rate, index, before, after, extra in sorted(steps):
        if picks[index] == before and extra <= room:
            picks[index] = after
            room -= extra
        elif price is None:
            price = -rate
    return price or 0.0, picks


def _hull(group: _Group) -> list[int]:
    """Returns the options on the lower convex hull of loss over size."""
    hull: list[int] = []
    for index in range(len(group.sizes)):
        while len(hull) > 1 and not _bends_up(group, hull[-2], hull[-1], index):
            hull.pop()
        hull.append(index)
    return hull


def _bends_up(group: _Group, a: int, b: int, c: int) -> bool:
    size, loss = group.sizes, group.losses
    left = (loss[a] - loss[b]) * float(size[c] - size[b])
    return bool(left > (loss[b] - loss[c]) * float(size[b] - size[a]))


_Known = tuple[float, int, tuple[int, ...]]


def _measure(groups: list[_Group], picks: Sequence[int]) -> _Known:
    """Returns loss, size and picks of a solution, by which solutions are compared."""
    pairs = list(zip(groups, picks, strict=True))
    loss = sum(float(group.losses[pick]) for group, pick in pairs)
    return loss, sum(int(group.sizes[pick]) for group, pick in pairs), tuple(picks)


def _search(
    groups: list[_Group], budget: int, price: float, bound: float, best: float, limit: int
) -> tuple[_Known | None, float]:
    """Returns the best solution found, and the least regrets of what was dropped for want of room.

    Args:
        groups: the useful options.
        budget: for the sizes.
        price: of a byte.
        bound: the relaxed optimum.
        best: the loss of a known solution; nothing worse is looked for.
        limit: partial solutions that are kept after each group.
    """
    regrets = [g.losses + price * g.sizes for g in groups]
    regrets = [r - r.min() for r in regrets]
    gap = best - bound + _SLACK * (abs(best) + abs(bound))
    # Groups in which much can be gained or lost first: what comes last multiplies the states.
    order = sorted(range(len(groups)), key=lambda i: -float(np.sort(regrets[i])[:2][-1]))
    usable = [np.flatnonzero(r <= gap) for r in regrets]
    least, most = (
        np.cumsum([0] + [int(pick(groups[i].sizes[usable[i]])) for i in order[::-1]])[::-1]
        for pick in (np.min, np.max)
    )
    size, loss, regret = np.zeros(1, np.int64), np.zeros(1), np.zeros(1)
    trail: list[tuple[NDArray[np.int32], NDArray[np.int8]]] = []
    dropped = np.inf
    for position, index in enumerate(order):
        options = usable[index]
        size = (size[:, None] + groups[index].sizes[options]).ravel()
        loss = (loss[:, None] + groups[index].losses[options]).ravel()
        regret = (regret[:, None] + regrets[index][options]).ravel()
        rest_least, rest_most = least[position + 1], most[position + 1]
        unused = price * np.maximum(budget - size - rest_most, 0)
        keep = np.flatnonzero((size + rest_least <= budget) & (regret + unused <= gap))
        keep = keep[np.lexsort((loss[keep], size[keep]))]
        keep = keep[_falling(loss[keep])]
        if len(keep) > limit:
            by_regret = keep[np.argsort((regret + unused)[keep], kind="stable")]
            dropped = min(dropped, float((regret + unused)[by_regret[limit]]))
            keep = np.sort(by_regret[:limit])
        size, loss, regret = size[keep], loss[keep], regret[keep]
        trail.append(
            ((keep // len(options)).astype(np.int32), options[keep % len(options)].astype(np.int8))
        )
    if not len(size):
        return None, dropped
    state = int(np.lexsort((size, loss))[0])
    picks = [0] * len(groups)
    for index, (parents, chosen) in zip(order[::-1], trail[::-1], strict=True):
        picks[index] = int(chosen[state])
        state = int(parents[state])
    return _measure(groups, picks), dropped
