"""DoRA on a packed weight: its norms come from products, no weight is decoded to train.

    y = m / ||Q + s B A|| * (x (Q + s B A)^T) + bias

The norm, one per row, is a constant for the gradient (section 4.3). PEFT decodes the weight and
multiplies B A out at every step, and keeps the decoded weight where there is dropout; here only
products with the packed weight are needed, see `QuantLoraLinear.weight_norm`.

Reference: Liu et al. 2024, DoRA, eq. 5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from lowbit import ops

if TYPE_CHECKING:
    from lowbit.adapters.layer import QuantLoraLinear


class QuantDoraVariant(DoraLinearVariant):  # type: ignore[misc]
    """What `use_dora=True` means for a `QuantLoraLinear`."""

    @staticmethod
    def init(module: QuantLoraLinear, adapter_name: str, **kwargs: Any) -> None:
        """Adds the magnitudes, which begin as the norms: the layer computes what it did before."""
        if "lora_magnitude_vector" not in module.adapter_layer_names:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        magnitude = DoraLinearLayer(fan_in_fan_out=False)
        a = module.lora_A[adapter_name].weight
        norm = (
            torch.empty(module.out_features, dtype=torch.float32, device="meta")
            if a.is_meta
            else module.weight_norm(adapter_name)
        )
        magnitude.weight = nn.Parameter(norm.to(a.dtype))
        module.lora_magnitude_vector[adapter_name] = magnitude

    @staticmethod
    def forward(
        module: QuantLoraLinear, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Returns `result` with the direction changed by the adapter and the magnitude learned.

        Where several adapters are active, `result` holds those before, as in PEFT.
        """
        dropout = module.lora_dropout[active_adapter]
        base = module.quantized
        if isinstance(dropout, nn.Identity) or not module.training:
            undisturbed = result if base.bias is None else result - base.bias
        else:
            x = dropout(x)
            undisturbed = ops.linear(x, base.operand)
        magnitude = module.lora_magnitude_vector[active_adapter].weight.float()
        factor = magnitude / module.weight_norm(active_adapter).to(magnitude.device)
        # Near one, so the difference is taken before it is rounded.
        change = (factor - 1).to(result.dtype) * undisturbed
        adapted = module.low_rank(active_adapter, x)
        total: Tensor = result + change + factor.to(result.dtype) * adapted
        return total

    @staticmethod
    def merged(module: QuantLoraLinear, adapter: str, weight: Tensor) -> Tensor:
        """Returns m / ||Q + s B A|| (weight + s B A), fp32; `weight` holds adapters before."""
        magnitude = module.lora_magnitude_vector[adapter].weight.float().to(weight.device)
        delta = module.delta(adapter).to(weight.device)
        norm = (module.quantized.dequantize(torch.float32) + delta).norm(dim=1)
        scaled: Tensor = (magnitude / norm)[:, None] * (weight + delta)
        return scaled
