"""A quantized weight whose codes, scales and zero points can be trained.

What is trained is continuous, and what is computed with is what would be stored: positions are
rounded to codes, scales to the stored dtype or through double quantization, zero points to
integers, and gradients pass through each rounding as if it were not there (straight-through).

A position counts levels, ascending: to move to the neighbouring value is one step, whether levels
are integers or a codebook. With t the position, l the level that it rounds to, s the scale and z
the zero point,

    w = s (l - z)
    dL/dt = dL/dw s dl/dt,   dL/ds = sum_group dL/dw (l - z),   dL/dz = -sum_group dL/dw s

where dl/dt is 1 for integers and for codebooks the mean of the gaps to both neighbours.
Shapes: `[N, K]` for weights, `[N, G]` for scales and zero points.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lowbit.algorithms.base import Quantized
from lowbit.nn.replace import weight_is_transposed
from lowbit.quant import Grid, sorted_codebook

# A position starts at its code plus the part that rounding took away, kept this far from the edge
# of the code's interval: at the start every position rounds to the code it comes from, whatever
# feedback moved that code away from the weight.
_LARGEST_REMAINDER = 0.45


@dataclass(frozen=True)
class _Decoded:
    """The weight as it would be stored now.

    Args:
        grid: scales and zero points.
        ranks: int64 `[N, K]`, ranks of levels.
        levels: float32 `[N, K]`, the levels less the zero points.
    """

    grid: Grid
    ranks: Tensor
    levels: Tensor


class TrainableWeight:
    """The weight of one linear layer.

    Args:
        module: the layer; its parameter `weight` receives what is decoded.
        weight: float `[N, K]`, what was quantized.
        start: codes and grid to start from.

    Attributes:
        positions: float32 `[N, K]`, counted from the lowest level.
        factors: float32 `[N, G]`, what the scales of the start are multiplied by.
        zeros: float32 `[N, G]`, None for a symmetric scheme.
    """

    def __init__(self, module: nn.Module, weight: Tensor, start: Quantized) -> None:
        self.module, self.start, self.grid = module, start, start.grid
        scheme, device = self.grid.scheme, weight.device
        if scheme.levels is None:
            levels = range(scheme.code_min, scheme.code_max + 1)
            self.table = torch.tensor(levels, dtype=torch.float32, device=device)
            self.codes = self.table.to(torch.int8)
        else:
            values, _, codes = sorted_codebook(scheme)
            self.table = torch.tensor(values, device=device)
            self.codes = torch.tensor(codes, dtype=torch.int8, device=device)
        self.gaps = self.table.diff()
        self.zeros = None if self.grid.zeros is None else self.grid.zeros.clone()
        self.factors = torch.ones_like(self.grid.scales)
        self.positions = self._positions(weight)
        self._decoded = self._decode()

    def _positions(self, weight: Tensor) -> Tensor:
        ranks = torch.zeros(256, dtype=torch.int64, device=weight.device)
        ranks[self.codes.long() + 128] = torch.arange(len(self.codes), device=weight.device)
        start = ranks[self.start.codes.long() + 128]
        target = weight.float() / self.grid.per_column(self.grid.scales)
        if self.zeros is not None:
            target += self.grid.per_column(self.zeros)
        away = target - self.table[start]
        above = self.gaps[start.clamp_max(len(self.gaps) - 1)]
        below = self.gaps[(start - 1).clamp_min(0)]
        remainder = away / torch.where(away > 0, above, below)
        return start + remainder.clamp_(-_LARGEST_REMAINDER, _LARGEST_REMAINDER)

    @property
    def parameter(self) -> nn.Parameter:
        """The layer's weight."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def trained(self) -> dict[str, Tensor]:
        """Returns what is trained, by name."""
        found = {"positions": self.positions, "factors": self.factors}
        return found if self.zeros is None else {**found, "zeros": self.zeros}

    def _decode(self) -> _Decoded:
        scheme = self.grid.scheme
        grid, zeros = self.start.grid, None
        if self.zeros is not None:
            zeros = self.zeros.round().clamp_(scheme.code_min, scheme.code_max)
        # The start is what it is: a second double quantization need not give the first again.
        moved = zeros is not None and grid.zeros is not None and not zeros.equal(grid.zeros)
        if moved or bool((self.factors != 1).any()):
            scales = self.grid.scales * self.factors
            grid = Grid.storable(scheme, self.grid.in_features, scales, zeros)
        ranks = self.positions.round().clamp_(0, len(self.table) - 1).long()
        levels = self.table[ranks]
        if zeros is not None:
            levels -= grid.per_column(zeros)
        return _Decoded(grid, ranks, levels)

    def put(self) -> None:
        """Gives the layer the weight as it would be stored now."""
        self._decoded = decoded = self._decode()
        weight = decoded.levels * decoded.grid.per_column(decoded.grid.scales)
        self.parameter.data.copy_(weight.T if weight_is_transposed(self.module) else weight)

    def take_gradient(self) -> None:
        """Moves the gradient of the layer's weight, as `put` left it, to what is trained."""
        grad, decoded = self.parameter.grad, self._decoded
        assert grad is not None
        grad_NK = (grad.T if weight_is_transposed(self.module) else grad).float()
        self.parameter.grad = None
        along_NK = grad_NK * decoded.grid.per_column(decoded.grid.scales)
        if self.zeros is not None:
            self.zeros.grad = -self._group_sums(along_NK)
        self.factors.grad = self._group_sums(grad_NK * decoded.levels) * self.grid.scales
        if self.grid.scheme.levels is not None:
            above = self.gaps[decoded.ranks.clamp_max(len(self.gaps) - 1)]
            below = self.gaps[(decoded.ranks - 1).clamp_min(0)]
            along_NK *= (above + below) / 2
        # Beyond the last level nothing changes any more, and a position must find its way back.
        top = len(self.table) - 0.5
        stuck = ((self.positions < -0.5) & (along_NK > 0)) | (
            (self.positions > top) & (along_NK < 0)
        )
        self.positions.grad = along_NK.masked_fill_(stuck, 0)

    def _group_sums(self, values: Tensor) -> Tensor:
        """Returns the sums of `values` `[N, K]` over groups, `[N, G]`."""
        width = self.grid.scheme.group_width(self.grid.in_features)
        missing = -values.shape[1] % width
        padded = pad(values, (0, missing)) if missing else values
        sums: Tensor = padded.unflatten(1, (-1, width)).sum(-1)
        return sums

    def result(self) -> Quantized:
        """Returns codes and grid as they would be stored now."""
        decoded = self._decode()
        return Quantized(self.codes[decoded.ranks], decoded.grid, self.start.report)
