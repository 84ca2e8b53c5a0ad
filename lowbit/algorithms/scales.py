"""Fitting the grid of a matrix: absmax, or a search over shrunken grids.

Every scheme is the same problem per group: choose a scale s (and an integer zero point z) such
that the nearest representable values s * l approximate the weights, where a level l is `code - z`
or a table entry. The search walks over candidate scales and, for the levels l that a candidate
yields, takes the scale that fits *those* levels best in closed form:

    s* = (w^T D l) / (l^T D l),        error(s*) = w^T D w - (w^T D l)^2 / (l^T D l)

so that one pass per candidate both scores and refits it, the candidate with the largest
(w^T D l)^2 / (l^T D l) wins, and a coarse set of candidates is enough. D is the identity or the
diagonal importance of the input features.

Shapes inside a chunk: weights are `[rows, groups, group width]`, importance `[groups, width]`,
scales and zero points `[rows, groups, 1]`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.quant import Grid, decode, nearest_code
from lowbit.scheme import Scheme

# On a CPU 1 MB per fp32 temporary: near the caches, and large enough that the many small operations
# on scales (one element per group) do not dominate. Elsewhere the launches would: a few hundred per
# chunk, whatever its size.
CHUNK_ELEMENTS = 1 << 18
LARGE_CHUNK_ELEMENTS = 1 << 25
# Against 40 + 40 candidates and 4 refits this leaves 0.1 to 0.2% of the squared error (W2, W3, W4,
# NF4; trained weights, normal and Student t, groups of 64 and whole rows).
CANDIDATES = 7
FLIPPED_CANDIDATES = 4
REFITS = 2
# The candidates end where a group's range is this many root mean squares: a little below the best
# clipping range for normal weights at that width.
SMALLEST_RANGE_IN_RMS = {2: 1.3, 3: 1.9, 4: 2.3, 8: 3.6}
# Resolution of the table that replaces a binary search for codebook levels during the search.
LOOKUP_CELLS_PER_UNIT = 256


def fit_grid(
    weight: Tensor, scheme: Scheme, importance: Tensor | None = None, search: bool = True
) -> Grid:
    """Returns a grid for `weight`, already rounded to what the scheme stores.

    Args:
        weight: float `[out_features, in_features]`, finite.
        scheme: the scheme.
        importance: float32 `[in_features]`, not negative: weight of a feature's squared error.
            None weighs all features alike.
        search: False takes the absmax grid. True never returns a grid whose (weighted) error
            exceeds that of the absmax grid.
    """
    weight = weight.detach()
    absmax = _fit_chunks(weight, scheme, importance, search=False)
    if not search:
        return absmax
    searched = _fit_chunks(weight, scheme, importance, search=True)
    # Without double quantization a group keeps its absmax grid unless another one is better.
    # With it, the scales of a block round together, so only whole matrices can be compared.
    if scheme.double_quant and not (
        grid_error(weight, searched, importance) <= grid_error(weight, absmax, importance)
    ):
        return absmax
    return searched


def grid_error(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> float:
    """Returns the sum over `weight` of importance * (weight - nearest value on `grid`)^2."""
    total = 0.0
    rows_per_chunk = _rows_per_chunk(weight)
    for rows in torch.arange(weight.shape[0], device=weight.device).split(rows_per_chunk):
        w_RK, part = weight[rows].float(), grid.rows(rows)
        squared = (w_RK - part.dequantize(part.round(w_RK))).square_()
        total += float((squared if importance is None else squared * importance).sum())
    return total


def _rows_per_chunk(weight: Tensor) -> int:
    elements = CHUNK_ELEMENTS if weight.device.type == "cpu" else LARGE_CHUNK_ELEMENTS
    return max(1, elements // weight.shape[1])


def _fit_chunks(weight: Tensor, scheme: Scheme, importance: Tensor | None, search: bool) -> Grid:
    """Fits groups of equal width together, a few rows at a time; the short last group follows."""
    out_features, in_features = weight.shape
    width, groups = scheme.group_width(in_features), scheme.groups(in_features)
    scales = torch.empty(out_features, groups, device=weight.device)
    zeros = None if scheme.symmetric else torch.empty_like(scales)
    full = in_features // width
    spans = [(0, full, width)]
    if full < groups:
        spans.append((full, groups, in_features - full * width))
    rows_per_chunk = _rows_per_chunk(weight)
    for first, last, size in spans:
        columns = slice(first * width, first * width + (last - first) * size)
        grouped = None if importance is None else importance[columns].float().view(-1, size)
        for row in range(0, out_features, rows_per_chunk):
            rows = slice(row, row + rows_per_chunk)
            chunk = weight[rows, columns].float().unflatten(1, (last - first, size))
            fitted = _Search(chunk, grouped, scheme).run() if search else _absmax(chunk, scheme)
            scales[rows, first:last] = fitted.scale.squeeze(-1)
            if zeros is not None and fitted.zero is not None:
                zeros[rows, first:last] = fitted.zero.squeeze(-1)
    return Grid.storable(scheme, in_features, _fill_empty_groups(scales), zeros)


def _fill_empty_groups(scales: Tensor) -> Tensor:
    """Gives all-zero groups (scale 0) the mean magnitude of the other groups, or 1.

    Any scale decodes their zeros exactly; a typical one does not widen the range that double
    quantization has to cover.
    """
    empty = scales == 0
    used = scales[~empty].abs()
    return torch.where(empty, used.mean() if used.numel() else torch.ones(()), scales)


@dataclass(frozen=True)
class _Fit:
    """Scale and zero point of a chunk of groups, float32 `[rows, groups, 1]`; scale 0 if empty."""

    scale: Tensor
    zero: Tensor | None


def _absmax(weight: Tensor, scheme: Scheme) -> _Fit:
    """Returns the grid that just covers each group, without clipping."""
    low = weight.amin(-1, keepdim=True)
    high = weight.amax(-1, keepdim=True)
    if scheme.levels is not None:
        return _Fit(torch.maximum(high, -low) / max(scheme.levels), None)
    if scheme.symmetric and not scheme.signed_scales:
        return _Fit(torch.maximum(high, -low) / scheme.code_max, None)
    if scheme.symmetric:
        # The larger extreme lands on code -2^(bits-1), the one code without a counterpart.
        return _Fit(torch.where(high > -low, high, low) / scheme.code_min, None)
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = (high - low) / (scheme.code_max - scheme.code_min)
    safe = torch.where(scale == 0, 1.0, scale)
    zero = (scheme.code_min - low / safe).round_().clamp_(scheme.code_min, scheme.code_max)
    return _Fit(scale, zero)


class _Search:
    """The best grid so far for a chunk of groups.

    Args:
        weight: float32 `[rows, groups, width]`.
        importance: float32 `[groups, width]`, or None.
        scheme: the scheme.
    """

    def __init__(self, weight: Tensor, importance: Tensor | None, scheme: Scheme) -> None:
        self.scheme, self.weight, self.importance = scheme, weight, importance
        self.weighted = weight if importance is None else weight * importance
        self.absmax = _absmax(weight, scheme)
        self.lookup = _level_lookup(scheme, weight.device)
        # An empty group never gains anything, so it keeps its place; it only must not divide by 0.
        self.scale = torch.where(self.absmax.scale == 0, 1.0, self.absmax.scale)
        self.zero = self.absmax.zero
        self.gain = torch.zeros_like(self.scale)

    def run(self) -> _Fit:
        """Returns the best grid, judged after rounding to the scale dtype."""
        full, shrunk = self.scale, self._smallest_factor()
        for i in range(CANDIDATES):
            self._try(full * shrunk ** (i / (CANDIDATES - 1)), self.zero)
        if self.scheme.signed_scales:
            # With the other sign the larger extreme needs a wider scale to be covered.
            wide = min(1.3, self.scheme.code_min / -self.scheme.code_max)
            for i in range(FLIPPED_CANDIDATES):
                step = i / (FLIPPED_CANDIDATES - 1)
                self._try(-full * wide * (shrunk / wide) ** step, self.zero)
        for _ in range(REFITS):
            self._try(self.scale, self.zero)
        if self.zero is not None:
            scale, zero = self.scale, self.zero
            for shift in (-1, 1):
                shifted = (zero + shift).clamp_(self.scheme.code_min, self.scheme.code_max)
                self._try(scale, shifted)
            self._try(self.scale, self.zero)
        return self._better_when_stored(_Fit(self.scale, self.zero))

    def _smallest_factor(self) -> Tensor:
        """Returns the factor on the absmax scale at which candidates end, at most 0.8.

        It is set by the group's root mean square: the wider a group's extremes stand out, the
        further it pays to clip them, in a row of 4096 much further than in a group of 32.
        """
        rms = self.weight.square().mean(-1, keepdim=True).sqrt_()
        extreme = (
            self.weight.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        )
        factor = SMALLEST_RANGE_IN_RMS[self.scheme.bits] * rms / extreme
        return factor.clamp_(0.01, 0.95 if self.scheme.bits == 8 else 0.8)

    def _try(self, scale: Tensor, zero: Tensor | None) -> None:
        """Scores the levels of one candidate and keeps their closed-form scale where it wins."""
        levels = self._levels(scale, zero)
        along = (self.weighted * levels).sum(-1, keepdim=True)
        squares = (
            levels.square_() if self.importance is None else levels.square_() * self.importance
        )
        # 0 / 0 where every level is zero: the NaN compares as no gain.
        refit = along / squares.sum(-1, keepdim=True)
        gain = along * refit
        better = gain > self.gain
        self.gain = torch.where(better, gain, self.gain)
        self.scale = torch.where(better, refit, self.scale)
        if zero is not None and self.zero is not None:
            self.zero = torch.where(better, zero, self.zero)

    def _levels(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Returns the level of every weight; a reciprocal and a table may err next to a tie."""
        scaled = self.weight * scale.reciprocal()
        if self.lookup is not None:
            reach = self.lookup.numel() // 2
            cell = scaled.mul_(LOOKUP_CELLS_PER_UNIT).clamp_(-reach, reach - 1).add_(reach)
            return self.lookup.index_select(0, cell.to(torch.int32).flatten()).view_as(scaled)
        low, high = self.scheme.code_min, self.scheme.code_max
        if zero is None:
            return scaled.round_().clamp_(low, high)
        return scaled.add_(zero).round_().clamp_(low, high).sub_(zero)

    def _better_when_stored(self, found: _Fit) -> _Fit:
        """Returns, group by group, the one of `found` and absmax that is better as stored.

        The levels of `found` may miss the nearest next to a tie, so its true error is at most the
        one computed here; that of absmax is exact. What wins here is therefore never worse.
        """
        plain = replace(self.scheme, double_quant=False)
        scale = Grid.storable(plain, 1, found.scale, None).scales
        absmax = Grid.storable(plain, 1, self.absmax.scale, None).scales
        error = self._error(self._levels(scale, found.zero) * scale)
        codes = nearest_code(self.weight, absmax, self.absmax.zero, plain)
        better = error < self._error(decode(codes, absmax, self.absmax.zero, plain))
        # Scale 0 is the mark that `_fill_empty_groups` looks for.
        scale = torch.where(better, scale, torch.where(self.absmax.scale == 0, 0.0, absmax))
        zero = self.absmax.zero
        if zero is not None and found.zero is not None:
            zero = torch.where(better, found.zero, zero)
        return _Fit(scale, zero)

    def _error(self, values: Tensor) -> Tensor:
        """Returns the weighted squared error `[rows, groups, 1]` of `values`."""
        squared = (self.weight - values).square_()
        weighted = squared if self.importance is None else squared.mul_(self.importance)
        return weighted.sum(-1, keepdim=True)


def _level_lookup(scheme: Scheme, device: torch.device) -> Tensor | None:
    """Returns the nearest level at equally spaced points from -reach to reach, or None.

    A gather from a small table is ten times faster than a binary search over 15 boundaries; a
    weight within half a cell of a boundary may get the other, equally good level.
    """
    if scheme.levels is None:
        return None
    reach = int(max(scheme.levels) * LOOKUP_CELLS_PER_UNIT * 1.25)
    points = (torch.arange(-reach, reach, device=device) + 0.5) / LOOKUP_CELLS_PER_UNIT
    one = torch.ones((), device=device)
    return decode(nearest_code(points, one, None, scheme), one, None, scheme)
