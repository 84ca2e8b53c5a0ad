"""The grids of ggml's types that are no schemes of ours, and how they are fitted.

Scales and minima of sub-blocks are small integers times an fp16 of the super-block, and a minimum
need not be a whole number of steps. A grid is fitted in three steps: for each sub-block the scale
and minimum of least error (a search over ranges with a closed form for the codes that each yields,
as in ggml's `make_qkx3_quants`); rounded to integers of the super-block; the two fp16 of the
super-block again by least squares for the codes of these integers, and the integers beside their
neighbours.

Shapes: weights `[rows, sub-blocks, width]`, importance `[sub-blocks, width]`, scales and minima
`[rows, sub-blocks]`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.formats.gguf.packing import pack_q4_1, pack_q4_k, pack_q6_k
from lowbit.quant import Grid
from lowbit.scheme import Scheme

SUPER_BLOCK = 256
# Shares of a sub-block's range that the search tries, and rounds of least squares after each.
RANGES = (1.08, 1.04, 1.0, 0.96, 0.92, 0.88, 0.84, 0.8)
REFITS = 2
TINY = 1e-12
# Weights that are fitted together.
CHUNK_WEIGHTS = 1 << 20


@dataclass(frozen=True)
class _SixBitScheme(Scheme):
    """Codes of Q6_K, -32...31, a width that no checkpoint of ours has."""

    def __post_init__(self) -> None:
        """Accepts what `Scheme` refuses."""


@dataclass(frozen=True)
class GgmlGrid:
    """The values that the rows of a matrix can take in a type.

    Args:
        kind: "Q4_1", "Q4_K" or "Q6_K".
        scales: float32 `[rows, sub-blocks]`, none zero.
        minima: the same, None for Q6_K.
        parts: the integers and fp16 that these are products of, `[rows, ...]` each.
    """

    kind: str
    scales: Tensor
    minima: Tensor | None
    parts: tuple[Tensor, ...] = ()

    def as_grid(self, columns: int) -> Grid:
        """Returns the grid for the solver, its codes signed."""
        if self.minima is None:
            return Grid(_six_bits(), columns, self.scales, None)
        zeros = self.minima / self.scales - 8
        return Grid(_four_bits(), columns, self.scales, zeros)

    def pack(self, codes: Tensor) -> Tensor:
        """Returns rows of blocks, uint8; `codes` int8 `[rows, columns]`, signed."""
        if self.kind == "Q6_K":
            return pack_q6_k(codes.short(), *self.parts)
        unsigned = codes.short() + 8
        if self.kind == "Q4_1":
            assert self.minima is not None
            return pack_q4_1(unsigned, self.scales, self.minima)
        sub_scales, sub_minima, d, dmin = self.parts
        return pack_q4_k(unsigned, (sub_scales, sub_minima), (d, dmin))

    def better_rows(self, better: Tensor, other: GgmlGrid) -> GgmlGrid:
        """Returns this grid with the rows of `other` where `better` is True."""

        def choose(mine: Tensor, theirs: Tensor) -> Tensor:
            return torch.where(better[:, None], theirs, mine)

        minima = None
        if self.minima is not None and other.minima is not None:
            minima = choose(self.minima, other.minima)
        parts = tuple(choose(a, b) for a, b in zip(self.parts, other.parts, strict=True))
        return GgmlGrid(self.kind, choose(self.scales, other.scales), minima, parts)


@functools.cache
def _four_bits() -> Scheme:
    return Scheme(bits=4, group_size=32, symmetric=False, scale_dtype="FP32")


@functools.cache
def _six_bits() -> Scheme:
    return _SixBitScheme(bits=6, group_size=16, scale_dtype="FP32")


def fit(weight: Tensor, kind: str, importance: Tensor | None) -> GgmlGrid:
    """Returns the grid of a type for `weight`.

    Args:
        weight: float32 `[rows, columns]`.
        kind: "Q4_1", "Q4_K" or "Q6_K".
        importance: float32 `[columns]`, the weight of a column's squared error; None for all alike.
    """
    width = 16 if kind == "Q6_K" else 32
    grouped = weight.unflatten(1, (-1, width))
    if importance is None:
        importance = torch.ones(weight.shape[1], device=weight.device)
    # Columns that never mattered must not divide by zero.
    weights = importance.float().clamp_min(float(importance.max()) * 1e-6 + TINY).view(-1, width)
    chunks = [
        _FITS[kind](rows, weights)
        for rows in grouped.split(max(1, CHUNK_WEIGHTS // weight.shape[1]))
    ]
    minima = [chunk.minima for chunk in chunks if chunk.minima is not None]
    return GgmlGrid(
        kind,
        torch.cat([chunk.scales for chunk in chunks]),
        torch.cat(minima) if minima else None,
        tuple(torch.cat(parts) for parts in zip(*(chunk.parts for chunk in chunks), strict=True)),
    )


def _half(values: Tensor) -> Tensor:
    """Returns `values` as fp16 has them, magnitudes clamped to what it can represent."""
    magnitude = values.abs().clamp(2.0**-24, 65504.0)
    return torch.where(values < 0, -magnitude, magnitude).half().float()


def _codes(weight: Tensor, scales: Tensor, minima: Tensor) -> Tensor:
    """Returns the nearest codes 0...15 as floats."""
    return ((weight + minima[..., None]) / scales[..., None]).round_().clamp_(0, 15)


def _error(weight: Tensor, values: Tensor, importance: Tensor) -> Tensor:
    weighted: Tensor = (weight - values).square_() * importance
    return weighted.sum(-1)


def _ranges(weight: Tensor, importance: Tensor, free: bool) -> tuple[Tensor, Tensor]:
    """Returns scales and minima of each sub-block with the least error found.

    Args:
        weight: see the module.
        importance: see the module.
        free: minima may be negative; else every range reaches zero, as Q4_K needs.
    """
    low, high = weight.amin(-1), weight.amax(-1)
    if not free:
        low, high = low.clamp_max(0), high.clamp_min(0)
    best_scale = ((high - low) / 15).clamp_min(TINY)
    best_minimum = -low
    best = torch.full_like(low, torch.inf)
    for share in RANGES:
        scale, minimum = ((high - low) * share / 15).clamp_min(TINY), -low * share
        for _ in range(REFITS + 1):
            codes = _codes(weight, scale, minimum)
            error = _error(weight, codes * scale[..., None] - minimum[..., None], importance)
            better = error < best
            best = torch.where(better, error, best)
            best_scale = torch.where(better, scale, best_scale)
            best_minimum = torch.where(better, minimum, best_minimum)
            scale, minimum = _least_squares(weight, codes, importance, free)
    return best_scale, best_minimum


def _least_squares(
    weight: Tensor, codes: Tensor, importance: Tensor, free: bool
) -> tuple[Tensor, Tensor]:
    """Returns the scale and minimum of least error for given codes."""
    total = importance.sum(-1)
    c, cc = (importance * codes).sum(-1), (importance * codes * codes).sum(-1)
    x, xc = (importance * weight).sum(-1), (importance * weight * codes).sum(-1)
    determinant = (total * cc - c * c).clamp_min(TINY)
    scale, minimum = (total * xc - x * c) / determinant, (c * xc - cc * x) / determinant
    if not free:
        alone = xc / cc.clamp_min(TINY)
        scale = torch.where(minimum < 0, alone, scale)
        minimum = minimum.clamp_min(0)
    return scale.clamp_min(TINY), minimum


def _fit_q4_1(weight: Tensor, importance: Tensor) -> GgmlGrid:
    scales, minima = _ranges(weight, importance, free=True)
    scales = _half(scales)
    # The best minimum beside the rounded scale; zero needs no smallest magnitude.
    codes = _codes(weight, scales, minima)
    centred = (importance * (codes * scales[..., None] - weight)).sum(-1) / importance.sum(-1)
    return GgmlGrid("Q4_1", scales, centred.clamp(-65504, 65504).half().float())


def _fit_q4_k(weight: Tensor, importance: Tensor) -> GgmlGrid:
    scales, minima = _ranges(weight, importance, free=False)
    per_super = SUPER_BLOCK // weight.shape[-1]

    def spread(values: Tensor) -> Tensor:
        return values.repeat_interleave(per_super, 1)

    def grouped(values: Tensor) -> Tensor:
        supers: Tensor = values.unflatten(1, (-1, per_super))
        return supers

    d = _half(grouped(scales).amax(-1) / 63)
    dmin = _half(grouped(minima).amax(-1) / 63)
    sub_scales = (scales / spread(d)).round_().clamp_(1, 63)
    sub_minima = (minima / spread(dmin)).round_().clamp_(0, 63)
    # Both fp16 anew, for the codes of these integers: x = d a - dmin b.
    codes = _codes(weight, spread(d) * sub_scales, spread(dmin) * sub_minima)
    a, b = codes * sub_scales[..., None], sub_minima[..., None].expand_as(codes)

    def total(product: Tensor) -> Tensor:
        return grouped((importance * product).sum(-1)).sum(-1)

    aa, ab, bb, xa, xb = (total(p) for p in (a * a, a * b, b * b, weight * a, weight * b))
    determinant = aa * bb - ab * ab
    safe = determinant.clamp_min(TINY)
    solvable = determinant > 1e-6 * aa * bb
    new_d = torch.where(solvable, (xa * bb - xb * ab) / safe, xa / aa.clamp_min(TINY))
    new_dmin = torch.where(solvable, (xa * ab - xb * aa) / safe, dmin)
    sound = (new_d > 0) & (new_dmin >= 0)
    candidates = [
        (d, dmin),
        (torch.where(sound, _half(new_d), d), torch.where(sound, _half(new_dmin), dmin)),
    ]
    errors = []
    for one, other in candidates:
        step, minimum = spread(one) * sub_scales, spread(other) * sub_minima
        errors.append(grouped(_asymmetric_error(weight, step, minimum, importance)).sum(-1))
    better = errors[1] < errors[0]
    d, dmin = (torch.where(better, new, old) for old, new in zip(*candidates, strict=True))
    sub_scales, sub_minima = _neighbours(
        weight, (sub_scales, sub_minima), (spread(d), spread(dmin)), importance
    )
    steps, minima = spread(d) * sub_scales, spread(dmin) * sub_minima
    return GgmlGrid("Q4_K", steps, minima, (sub_scales, sub_minima, d, dmin))


def _asymmetric_error(weight: Tensor, scales: Tensor, minima: Tensor, importance: Tensor) -> Tensor:
    """Returns the error of the nearest codes 0...15, `[rows, sub-blocks]`."""
    values: Tensor = _codes(weight, scales, minima).mul_(scales[..., None]).sub_(minima[..., None])
    return _error(weight, values, importance)


def _neighbours(
    weight: Tensor,
    integers: tuple[Tensor, Tensor],
    halves: tuple[Tensor, Tensor],
    importance: Tensor,
) -> tuple[Tensor, Tensor]:
    """Returns the best pair of integers among those next to `integers`, for each sub-block.

    Rounding scale and minimum one by one is not rounding the grid: a step up here often wants a
    step up there.
    """
    found, best = integers, torch.full_like(integers[0], torch.inf)
    for up in (0, -1, 1):
        for over in (0, -1, 1):
            scale = (integers[0] + up).clamp(1, 63)
            minimum = (integers[1] + over).clamp(0, 63)
            error = _asymmetric_error(weight, scale * halves[0], minimum * halves[1], importance)
            better = error < best
            best = torch.where(better, error, best)
            found = (torch.where(better, scale, found[0]), torch.where(better, minimum, found[1]))
    return found


def _fit_q6_k(weight: Tensor, importance: Tensor) -> GgmlGrid:
    low, high = weight.amin(-1), weight.amax(-1)
    # The larger extreme lands on -32, the one code without a counterpart.
    full = torch.where(high > -low, high, low) / -32
    full = torch.where(full == 0, TINY, full)
    best_scale, best = full, torch.full_like(full, torch.inf)
    for share in RANGES:
        scale = full * share
        for _ in range(REFITS + 1):
            codes = (weight / scale[..., None]).round_().clamp_(-32, 31)
            error = _error(weight, codes * scale[..., None], importance)
            better = error < best
            best, best_scale = (
                torch.where(better, error, best),
                torch.where(better, scale, best_scale),
            )
            fitted = (importance * weight * codes).sum(-1)
            squares = (importance * codes * codes).sum(-1)
            scale = torch.where(fitted == 0, scale, fitted / squares.clamp_min(TINY))
    per_super = SUPER_BLOCK // weight.shape[-1]
    largest = best_scale.unflatten(1, (-1, per_super))
    peak = largest.gather(-1, largest.abs().argmax(-1, keepdim=True)).squeeze(-1)
    d = _half(peak / -128)
    sub = (best_scale / d.repeat_interleave(per_super, 1)).round_().clamp_(-128, 127)
    sub = torch.where(sub == 0, 1.0, sub)
    return GgmlGrid("Q6_K", d.repeat_interleave(per_super, 1) * sub, None, (sub, d))


_FITS = {"Q4_1": _fit_q4_1, "Q4_K": _fit_q4_k, "Q6_K": _fit_q6_k}
