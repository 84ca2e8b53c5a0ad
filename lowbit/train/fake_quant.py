"""Linear layers that compute with the weights that would be stored: fake quantization.

The forward pass multiplies by what a checkpoint would decode to, bit for bit; in the backward pass
every rounding counts as the identity (straight-through; Bengio et al. 2013). With w the trained
weight, s and z scale and zero point, t = w / s + z and l the level that t rounds to,

    w^ = s (l - z)
    dL/dw = dL/dw^                                   where t is within the levels, else 0
    dL/ds = sum_group dL/dw^ (l - z - (w / s where t is within the levels))
    dL/dz = -sum_group dL/dw^ s                      where t is not within the levels

(LSQ, Esser et al. 2020, eq. 3 and 5; the offset as in LSQ+, Bhalgat et al. 2020, eq. 6). With codes
that do not move, w is no variable and the second terms go: dL/ds = sum_group dL/dw^ (l - z),
dL/dz = -sum_group dL/dw^ s (PEQA, Kim et al. 2023).

Scales are trained as factors, s = s_0 exp(f), so that they keep their signs and a step is a
relative one; zero points as z_0 + u 2^bits, so that a step is a share of the range of codes.
Shapes: weights `[N, K]`, scales and zero points `[N, G]`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from lowbit.quant import Grid, QuantizedWeight, decode
from lowbit.quant.packing import unpack
from lowbit.scheme import Scheme


class FakeQuantLinear(nn.Module):
    """`x w^T + bias`; what is trained besides the scales is up to the subclass.

    Args:
        start: codes and grid to begin with.
        bias: of the layer it replaces.

    Attributes:
        scheme: how the weight will be stored.
        log_factor: float32 `[N, G]`, f.
        zero_shift: float32 `[N, G]`, u; None for a symmetric scheme.
    """

    start_scales: Tensor
    start_zeros: Tensor
    zero_shift: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, start: QuantizedWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.scheme: Scheme = start.scheme
        self.out_features, self.in_features = start.shape
        grid = start.grid()
        self.register_buffer("start_scales", grid.scales)
        self.log_factor = nn.Parameter(torch.zeros_like(grid.scales))
        if grid.zeros is not None:
            self.register_buffer("start_zeros", grid.zeros)
        shift = None if grid.zeros is None else nn.Parameter(torch.zeros_like(grid.scales))
        self.register_parameter("zero_shift", shift)
        self.register_parameter("bias", bias)

    def grid(self) -> Grid:
        """Returns the grid as it would be stored now."""
        scheme, zeros = self.scheme, None
        if self.zero_shift is not None:
            exact = self.start_zeros + self.zero_shift.detach() * 2**scheme.bits
            zeros = exact.round().clamp(scheme.code_min, scheme.code_max)
        scales = self.start_scales * self.log_factor.detach().exp()
        return Grid.storable(scheme, self.in_features, scales, zeros)

    def codes(self, grid: Grid) -> Tensor:
        """Returns the int8 codes `[N, K]` as they would be stored now."""
        raise NotImplementedError

    def fake_weight(self) -> Tensor:
        """Returns the weight as it would be decoded now, float32 `[N, K]`, differentiable."""
        raise NotImplementedError

    def quantized(self) -> QuantizedWeight:
        """Returns what is stored; it decodes to `fake_weight()`."""
        with torch.no_grad():
            grid = self.grid()
            return QuantizedWeight.from_codes(self.codes(grid), grid)

    def forward(self, x: Tensor) -> Tensor:
        """Returns `[..., out_features]` in x's dtype, or in that of autocast."""
        return linear(x, self.fake_weight().to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """Returns sizes and scheme for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme}"


class TrainedWeightLinear(FakeQuantLinear):
    """Trains the weight itself, and its grid with it.

    Args:
        weight: float `[N, K]`, what `start` was quantized from; kept in float32.
        start: see the base class.
        bias: likewise.
    """

    def __init__(self, weight: Tensor, start: QuantizedWeight, bias: nn.Parameter | None) -> None:
        super().__init__(start, bias)
        self.weight = nn.Parameter(weight.detach().float().contiguous())

    def codes(self, grid: Grid) -> Tensor:
        """Returns the codes nearest to the weight."""
        return grid.round(self.weight.detach())

    def fake_weight(self) -> Tensor:
        """Returns the weight as it would be decoded now; see the base class."""
        # Under autocast the operator would see bf16 copies; the arithmetic here is fp32.
        found: Tensor = _RoundedWeight.apply(  # type: ignore[no-untyped-call]
            self.weight, self.log_factor, self.zero_shift, self
        )
        return found


class TrainedScalesLinear(FakeQuantLinear):
    """Trains the grid alone; codes stay packed, as they are."""

    weight_packed: Tensor

    def __init__(self, start: QuantizedWeight, bias: nn.Parameter | None) -> None:
        super().__init__(start, bias)
        self.register_buffer("weight_packed", start.packed)

    @property
    def weight(self) -> Tensor:
        """A stand-in with the dtype and the device of the decoded weight, for model code."""
        return self.log_factor.new_empty(0)

    def codes(self, grid: Grid) -> Tensor:
        """Returns the codes of the start."""
        return unpack(self.weight_packed, self.scheme.bits, self.in_features)

    def fake_weight(self) -> Tensor:
        """Returns the weight as it would be decoded now; see the base class."""
        found: Tensor = _RescaledWeight.apply(  # type: ignore[no-untyped-call]
            self.log_factor, self.zero_shift, self
        )
        return found


class _RoundedWeight(torch.autograd.Function):
    """What codes that follow the weight decode to."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, log_factor: Tensor, shift: Tensor | None, layer: FakeQuantLinear
    ) -> Tensor:
        grid = layer.grid()
        # Codes are found again in the backward pass: of the forward pass only the weight is kept.
        ctx.save_for_backward(weight)
        ctx.grid = grid
        return grid.dequantize(grid.round(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), grid, grad = ctx.saved_tensors, ctx.grid, gradients[0].float()
        scheme, scales = grid.scheme, grid.per_column(grid.scales)
        scaled = weight / scales
        zeros = None if grid.zeros is None else grid.per_column(grid.zeros)
        low, high = _level_range(scheme)
        position = scaled if zeros is None else scaled + zeros
        within = (position >= low) & (position <= high)
        levels = decode(grid.round(weight), torch.ones((), device=grad.device), zeros, scheme)
        # LSQ, section 2.2: as large beside the gradients of weights as scales are beside weights.
        share = 1 / math.sqrt(scheme.group_width(grid.in_features) * max(high, 1))
        slope = _group_sums(grad * (levels - scaled * within), grid)
        grad_shift = None
        if zeros is not None:
            outside = _group_sums(grad * scales * ~within, grid)
            grad_shift = -outside * (2**scheme.bits * share)
        return grad * within, slope * grid.scales * share, grad_shift, None


class _RescaledWeight(torch.autograd.Function):
    """What codes that stay decode to."""

    @staticmethod
    def forward(
        ctx: Any, log_factor: Tensor, shift: Tensor | None, layer: FakeQuantLinear
    ) -> Tensor:
        grid = layer.grid()
        ctx.layer, ctx.grid = layer, grid
        return grid.dequantize(layer.codes(grid))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grid, grad = ctx.grid, gradients[0].float()
        scheme = grid.scheme
        zeros = None if grid.zeros is None else grid.per_column(grid.zeros)
        levels = decode(ctx.layer.codes(grid), torch.ones((), device=grad.device), zeros, scheme)
        slope = _group_sums(grad * levels, grid)
        grad_shift = None
        if zeros is not None:
            grad_shift = -_group_sums(grad, grid) * grid.scales * 2**scheme.bits
        return slope * grid.scales, grad_shift, None


def _level_range(scheme: Scheme) -> tuple[float, float]:
    """Returns the smallest and the largest level, before a zero point is taken away."""
    if scheme.levels is not None:
        return min(scheme.levels), max(scheme.levels)
    return float(scheme.code_min), float(scheme.code_max)


def _group_sums(values: Tensor, grid: Grid) -> Tensor:
    """Returns the sums of `values` `[N, K]` over the groups of `grid`, `[N, G]`."""
    width = grid.scheme.group_width(grid.in_features)
    missing = -values.shape[1] % width
    padded = pad(values, (0, missing)) if missing else values
    sums: Tensor = padded.unflatten(1, (-1, width)).sum(-1)
    return sums
