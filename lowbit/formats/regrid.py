"""The same values under another scheme, where there is one that has them all.

Nothing is rounded. A scheme holds the values of another one if

    its codes have as many bits or more (the same scale, the same signed code), or the same table
    its groups are parts of the other's (scales are repeated)
    its scale dtype holds every scale exactly
    it has zero points, or the other needs none
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.algorithms import make_algorithm
from lowbit.quant import Grid, QuantizedWeight
from lowbit.scheme import Scheme


def regrid(qweight: QuantizedWeight, scheme: Scheme) -> QuantizedWeight | None:
    """Returns `qweight` as a weight of `scheme` that decodes to equal values, None if none does.

    Activations may be dropped: the weights are the same without.
    """
    old = qweight.scheme
    if old == scheme:
        return qweight
    if old.codebook != scheme.codebook or scheme.bits < old.bits or scheme.double_quant:
        return None
    if scheme.activations not in (None, old.activations):
        return None
    groups = _groups_within(old, scheme, qweight.in_features)
    if groups is None:
        return None
    grid = qweight.grid()
    scales = grid.scales[:, groups]
    dtype = scheme.torch_scale_dtype
    if not torch.equal(scales.to(dtype).float(), scales):
        return None
    zeros = None if grid.zeros is None else grid.zeros[:, groups]
    if scheme.symmetric:
        if zeros is not None and bool(zeros.any()):
            return None
        zeros = None
    elif zeros is None:
        zeros = torch.zeros_like(scales)
    input_scale = qweight.input_scale if scheme.activations is not None else None
    made = QuantizedWeight.from_codes(
        qweight.codes(), Grid(scheme, qweight.in_features, scales, zeros), input_scale
    )
    # Signs of zero aside, which `equal` does not see.
    return made if torch.equal(made.dequantize(), qweight.dequantize()) else None


def requantized(
    qweight: QuantizedWeight, scheme: Scheme, input_order: Tensor | None = None
) -> tuple[QuantizedWeight, float]:
    """Returns a weight of `scheme` as near as rounding comes, and its relative error.

    Args:
        qweight: what is to be approximated.
        scheme: of the result; one with activations of `qweight`'s kind, or without.
        input_order: int64 `[in_features]`, the input feature of each column of `qweight` where it
            is not its own; the result has them in natural order.

    Returns:
        The weight, exact where a scheme allows it, and ||new - old|| / ||old||.
    """
    exact = regrid(qweight, scheme) if input_order is None else None
    if exact is not None:
        return exact, 0.0
    weight = qweight.dequantize()
    if input_order is not None:
        weight = weight[:, torch.argsort(input_order)]
    result = make_algorithm("rtn").quantize(weight.clone(), scheme, None)
    input_scale = qweight.input_scale if scheme.activations is not None else None
    made = QuantizedWeight.from_codes(result.codes, result.grid, input_scale)
    error = torch.linalg.vector_norm(made.dequantize() - weight)
    return made, float(error / torch.linalg.vector_norm(weight).clamp_min(1e-30))


def _groups_within(old: Scheme, new: Scheme, in_features: int) -> Tensor | None:
    """Returns the old group that each new one is a part of, None if one is in two."""
    columns = torch.arange(in_features)
    old_group = columns // old.group_width(in_features)
    width = new.group_width(in_features)
    first = torch.arange(0, in_features, width)
    last = (first + width).clamp_max(in_features) - 1
    inside = torch.equal(old_group[first], old_group[last])
    return old_group[first] if inside else None
