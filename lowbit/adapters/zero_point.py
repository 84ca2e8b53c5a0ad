"""Adapters that merge exactly: what they learn ends in the integer zero points of the base.

With inputs summed over the groups of the scheme, an adapter adds one number d to all weights of a
group, and s (q - z) + d = s (q - (z - d / s)). Stored zero points are integers, so they are rounded
in every forward pass, straight-through, and the merge changes nothing that training saw:

    d  = scaling B A                                [out_features, groups]
    z' = clamp(round(z - d / s), code_min, code_max)
    y  = x Q^T + (x summed over groups) (s (z - z'))^T + bias

The gradient of d is that of s (z - z') where z' is not clamped, and zero where it is.

d is computed in float64: sums that were rounded otherwise on another device could round z' to
another integer there. A has `[r, groups]`, B `[out_features, r]`.

Reference: Xu et al. 2023, QA-LoRA, section 3.3; there z' is a float, which no format stores. The
switch and the names in files are PEFT's (`use_qalora`), whose own layer is for GPTQ models and
cannot merge.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from lowbit.errors import LowbitError
from lowbit.quant import Grid, QuantizedWeight
from lowbit.quant.packing import pack
from lowbit.scheme import Scheme

if TYPE_CHECKING:
    from lowbit.adapters.layer import QuantLoraLinear

# PEFT's default of qalora_group_size: nobody chose it.
_PEFT_GROUP_SIZE = 16


def rounded_zeros(grid: Grid, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Returns z', integer values in fp32 `[out_features, groups]`.

    Args:
        grid: of the base.
        a: `[r, groups]`, any float dtype.
        b: `[out_features, r]`.
        scaling: alpha / r, or as the adapter has it.
    """
    target = _targets(grid, a, b, scaling)
    return target.round().clamp(grid.scheme.code_min, grid.scheme.code_max).float()


def _targets(grid: Grid, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    assert grid.zeros is not None
    delta = scaling * (b.double() @ a.double())
    return grid.zeros.double() - delta / grid.scales.double()


def with_merged_zero_points(
    weight: QuantizedWeight, a: Tensor, b: Tensor, scaling: float, name: str = "weight"
) -> QuantizedWeight:
    """Returns `weight` with the adapter in its zero points; codes and scales are the same tensors.

    Args:
        weight: the base that the adapter was trained on.
        a: float `[r, groups]`.
        b: float `[out_features, r]`.
        scaling: of the adapter.
        name: of the layer, for errors.

    Raises:
        LowbitError: for a scheme without zero points, shapes that do not fit, or values that are
            not finite.
    """
    require_zero_points(weight.scheme, name)
    groups = weight.scheme.groups(weight.in_features)
    if a.dim() != 2 or a.shape[1] != groups or b.shape != (weight.shape[0], a.shape[0]):
        raise LowbitError(
            f"{name}: A is {list(a.shape)} and B {list(b.shape)}, but an adapter for the zero "
            f"points of a {list(weight.shape)} weight in {weight.scheme} has [r, {groups}] and "
            f"[{weight.shape[0]}, r]; it was trained on another base"
        )
    if not bool(a.isfinite().all() and b.isfinite().all()):
        raise LowbitError(f"{name}: the adapter holds NaN or Inf; it is broken")
    zeros = rounded_zeros(weight.grid(), a, b, scaling)
    packed = pack(zeros.to(torch.int8).T, weight.scheme.bits).T.contiguous()
    return dataclasses.replace(weight, zero_point=packed)


def merged_zero_points(weight: QuantizedWeight, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Returns the stored `weight_zero_point` with the adapter in it; see the function above."""
    merged = with_merged_zero_points(weight, a, b, scaling).zero_point
    assert merged is not None
    return merged


def require_zero_points(scheme: Scheme, name: str) -> None:
    """Raises for a scheme that stores no zero points.

    Raises:
        LowbitError: with the nearest scheme that does.
    """
    if scheme.symmetric:
        nearest = Scheme.parse("W4A16_ASYM_G64")
        if scheme.codebook is None and scheme.activations is None:
            nearest = dataclasses.replace(scheme, symmetric=False)
        raise LowbitError(
            f"{name}: {scheme} stores no zero points to merge an adapter into; quantize the base "
            f"as {nearest}, or train a plain adapter"
        )


def require_zero_point_config(config: Any, layer: Any, name: str) -> None:
    """Raises for a configuration that means something else than the groups of the layer.

    Raises:
        LowbitError: see there.
    """
    require_zero_points(layer.scheme, name)
    width = layer.scheme.group_width(layer.logical_shape[1])
    if config.qalora_group_size not in (width, _PEFT_GROUP_SIZE):
        raise LowbitError(
            f"{name}: qalora_group_size {config.qalora_group_size} is not the group size of "
            f"{layer.scheme}, {width}; leave it out"
        )
    if config.lora_bias or config.init_lora_weights not in (True, False, "gaussian"):
        raise LowbitError(
            f"{name}: use_qalora goes with init_lora_weights True, False or 'gaussian' and without "
            "lora_bias"
        )


class _Correction(torch.autograd.Function):
    """s (z - z'), fp32 `[out_features, groups]`, with the straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scaling: float, grid: Grid) -> Tensor:
        assert grid.zeros is not None
        target = _targets(grid, a, b, scaling)
        low, high = grid.scheme.code_min, grid.scheme.code_max
        rounded = target.round().clamp(low, high)
        ctx.save_for_backward(a, b, (target >= low - 0.5) & (target <= high + 0.5))
        ctx.scaling = scaling
        return grid.scales * (grid.zeros - rounded.float())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        a, b, moves = ctx.saved_tensors
        grad = ctx.scaling * gradients[0].float() * moves
        return (b.float().T @ grad).to(a.dtype), (grad @ a.float().T).to(b.dtype), None, None


class ZeroPointVariant(LoraVariant):  # type: ignore[misc]
    """What `use_qalora=True` means for a `QuantLoraLinear`."""

    def supports_lora_conversion(self) -> bool:
        """Returns False: rounded zero points have no low rank."""
        return False

    @staticmethod
    def init(module: QuantLoraLinear, adapter_name: str, config: Any, **kwargs: Any) -> None:
        """Gives A a column per group. B begins with zeros, so that z' = z."""
        old = module.lora_A[adapter_name]
        groups = module.quantized.scheme.groups(module.in_features)
        pooled = nn.Linear(groups, old.out_features, bias=False)
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(pooled.weight, std=1 / old.out_features)
        module.lora_A[adapter_name] = pooled.to(old.weight.device, old.weight.dtype)

    @staticmethod
    def forward(
        module: QuantLoraLinear, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Returns `result` as if the zero points of the base were z'."""
        grid = module.base_grid()
        a, b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        correction: Tensor = _Correction.apply(a, b, module.scaling[active_adapter], grid)  # type: ignore[no-untyped-call]
        pooled = group_sums(module.lora_dropout[active_adapter](x), grid)
        return result + nn.functional.linear(pooled, correction.to(pooled.dtype))

    @staticmethod
    def merged(module: QuantLoraLinear, adapter: str, weight: Tensor) -> Tensor:
        """Returns s (q - z') for the codes q, fp32, and what `weight` held besides the base."""
        quantized = module.quantized
        exact = with_merged_zero_points(
            quantized.quantized_weight,
            module.lora_A[adapter].weight.detach().to(weight.device),
            module.lora_B[adapter].weight.detach().to(weight.device),
            module.scaling[adapter],
        ).dequantize(torch.float32)
        return exact + (weight - quantized.dequantize(torch.float32))

    @staticmethod
    def delta(module: QuantLoraLinear, adapter: str) -> Tensor:
        """Returns s (z - z') spread over the columns, `[out_features, in_features]`."""
        base = module.quantized.dequantize(torch.float32)
        return ZeroPointVariant.merged(module, adapter, base) - base


def group_sums(x: Tensor, grid: Grid) -> Tensor:
    """Returns the sums of x `[..., in_features]` over the groups, `[..., groups]`."""
    width = grid.scheme.group_width(grid.in_features)
    whole = grid.in_features // width * width
    sums: Tensor = x[..., :whole].unflatten(-1, (-1, width)).sum(-1)
    if whole == grid.in_features:
        return sums
    return torch.cat([sums, x[..., whole:].sum(-1, keepdim=True)], dim=-1)
