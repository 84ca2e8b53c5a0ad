"""PEFT's LoRA layer over a quantized linear layer.

    y = x Q^T + bias + scaling (dropout(x) A^T) B^T

Q stays packed: the base multiplies by its stored tensors, and its backward pass computes the
gradient of the input from them again. Nothing of the size of the weight is kept in between.

Merging cannot write to a packed weight. A merged layer therefore holds a plain 16-bit layer with
Q + scaling B A in the place of the quantized one, which is put aside, not changed, and put back
when the adapter is unmerged. Requantizing the sum is another matter, see `lowbit merge`.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from contextlib import nullcontext
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS, Linear, LoraVariant
from peft.tuners.lora.variants import ALoraLinearVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from lowbit import ops
from lowbit.adapters.dora import QuantDoraVariant
from lowbit.adapters.refusals import refuse_config, refuse_rank
from lowbit.adapters.zero_point import ZeroPointVariant, require_zero_point_config
from lowbit.errors import LowbitError
from lowbit.memory import release_freed_memory
from lowbit.nn import QuantLinear
from lowbit.nn.replace import plain_like
from lowbit.quant import Grid


class QuantLoraLinear(Linear):  # type: ignore[misc]
    """LoRA, rsLoRA, DoRA and adapters for zero points on one `QuantLinear`.

    PEFT makes it wherever a `LoraConfig` names a quantized layer (`adapters/registration.py`). The
    adapter is multiplied in the dtype of the activations, whatever dtype its parameters have: no
    activation is kept a second time in fp32.

    Args:
        base_layer: the quantized layer, frozen.
        adapter_name: name of the first adapter.
        config: its configuration. `fan_in_fan_out` is about stock models that store their weight
            as `[in, out]` (GPT-2); a quantized weight is `[out, in]` always.
        r: its rank.
        lora_alpha: its alpha.
        **kwargs: what PEFT passes to every layer.

    Raises:
        LowbitError: for what would silently change or lose a weight.
    """

    merged_adapters: list[str]

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        name = kwargs.get("target_name") or "a quantized layer"
        if kwargs.get("parameter_name") is not None:
            raise LowbitError(
                f"{name}: target_parameters cannot reach into a quantized layer; name the layer in "
                "target_modules"
            )
        if not isinstance(base_layer, QuantLinear):
            raise LowbitError(
                f"{name}: already has an adapter of another kind ({type(base_layer).__name__}); "
                "load the model anew for this one"
            )
        # While merged: the quantized layer, in a tuple so that it is no submodule meanwhile.
        self._put_aside: tuple[QuantLinear] | None = None
        # Made of the base when first needed, and of which of its tensors they were made.
        self._row_squares: tuple[Any, Tensor] | None = None
        self._base_grid: tuple[Any, Grid] | None = None
        plain = copy.copy(config)
        plain.fan_in_fan_out = False
        super().__init__(
            base_layer, adapter_name, config=plain, r=r, lora_alpha=lora_alpha, **kwargs
        )
        # PEFT looks at a decoded weight, and then the adapter lies in what that has freed: the next
        # decoded weight would need new memory, layer after layer.
        release_freed_memory()

    @property
    def quantized(self) -> QuantLinear:
        """The quantized layer, merged or not."""
        if self._put_aside is not None:
            return self._put_aside[0]
        return cast(QuantLinear, self.base_layer)

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any
    ) -> None:
        """Adds an adapter.

        Raises:
            LowbitError: if its initialisation writes the base weight, its rank is larger than the
                layer, or it is of a kind that is not supported here.
        """
        name = kwargs.get("target_name") or "a quantized layer"
        refuse_config(config, name)
        if config.use_qalora:
            require_zero_point_config(config, self.quantized, name)
        refuse_rank(r, self.quantized, config, name)
        if self.merged and (config.use_dora or config.use_qalora):
            raise LowbitError(f"{name}: another adapter is merged; call unmerge_adapter() first")
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant | None:
        """Returns what the adapter is besides plain LoRA."""
        if config.use_qalora:
            return ZeroPointVariant()
        if config.use_dora:
            return QuantDoraVariant()
        return ALoraLinearVariant() if config.alora_invocation_tokens else None

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device, torch.dtype]:
        """Returns where the base is and what it computes in, without decoding its weight."""
        quantized = self.quantized
        device: torch.device = quantized.qweight.device
        return device, quantized.compute_dtype

    def _cast_input_dtype(self, x: Any, dtype: torch.dtype) -> Any:
        """Returns x as it is, except that 16-bit adapters take fp32 activations as 16 bits."""
        if x is None or x.dtype != torch.float32 or torch.is_autocast_enabled(x.device.type):
            return x
        return super()._cast_input_dtype(x, dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns `[..., out_features]` in the dtype of the base's product."""
        self._check_forward_args(x, *args, **kwargs)
        # Casts the adapter's parameters for the product, and hands their gradients back in fp32.
        context: Any = nullcontext()
        if x.dtype in (torch.float16, torch.bfloat16):
            context = torch.autocast(x.device.type, dtype=x.dtype)
        if torch.is_autocast_enabled(x.device.type):
            context = nullcontext()
        with context:
            if self.disable_adapters or self.merged or kwargs.get("adapter_names") is not None:
                output: Tensor = super().forward(x, *args, **kwargs)
                return output
            for_variants = {key: kwargs.pop(key, None) for key in VARIANT_KWARG_KEYS}
            result = self.base_layer(x, *args, **kwargs)
            dtype = result.dtype
            for name in self.active_adapters:
                if name not in self.lora_A:
                    continue
                lowered = self._cast_input_dtype(x, self.lora_A[name].weight.dtype)
                if name not in self.lora_variant:
                    result = result + self.low_rank(name, self.lora_dropout[name](lowered))
                    continue
                result = self.lora_variant[name].forward(
                    self, active_adapter=name, x=lowered, result=result, **for_variants, **kwargs
                )
        final: Tensor = result.to(dtype)
        return final

    def low_rank(self, adapter: str, x: Tensor) -> Tensor:
        """Returns scaling (x A^T) B^T, with the bias of B where it has one."""
        scaling = self.scaling[adapter]
        if self.lora_bias[adapter]:
            biased: Tensor = self.lora_B[adapter](self.lora_A[adapter](x)) * scaling
            return biased
        # r columns are scaled instead of out_features.
        product: Tensor = self.lora_B[adapter](self.lora_A[adapter](x) * scaling)
        return product

    def delta(self, adapter: str) -> Tensor:
        """Returns scaling B A, fp32 `[out_features, in_features]`, of a LoRA or DoRA adapter."""
        a, b = self._factors(adapter)
        scaling: float = self.scaling[adapter]
        return scaling * (b @ a)

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        a: Tensor = self.lora_A[adapter].weight
        b: Tensor = self.lora_B[adapter].weight
        return a.float(), b.float()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Returns what the adapter adds to the weight, `[out_features, in_features]`."""
        variant = self.lora_variant.get(adapter)
        if hasattr(variant, "delta"):
            changed: Tensor = variant.delta(self, adapter)
            return changed
        return self.delta(adapter).to(self.lora_B[adapter].weight.dtype)

    @torch.no_grad()
    def weight_norm(self, adapter: str) -> Tensor:
        """Returns the norm of every row of Q + scaling B A, fp32 `[out_features]`.

            ||q + s b A||^2 = ||q||^2 + 2 s b . (A q) + s^2 b (A A^T) b^T

        ||q|| is computed once, A Q^T is a product with r rows, and everything else is small.
        """
        a, b = self._factors(adapter)
        scaling: float = self.scaling[adapter]
        base = self.quantized
        device = base.qweight.device
        a, b = a.to(device), b.to(device)
        with torch.autocast(device.type, enabled=False):
            if base.scheme.activations is None:
                # Kernels of a GPU would decode all of Q for an fp32 product.
                narrow = device.type == "cuda" and base.compute_dtype != torch.float32
                rows = a.to(base.compute_dtype) if narrow else a
                aq_RN = ops.linear(rows, base.operand).float()
            else:  # such a product would round A to 8 bits
                aq_RN = a @ base.dequantize(torch.float32).T
            squares = self._base_squares() + 2 * scaling * (b * aq_RN.T).sum(1)
            squares += scaling**2 * ((b @ (a @ a.T)) * b).sum(1)
        return squares.clamp_min_(torch.finfo(torch.float32).tiny).sqrt_()

    def _base_state(self) -> Any:
        """Returns what tells one base from another, None where nothing can be told."""
        if torch.compiler.is_compiling():
            return None
        codes = self.quantized.qweight
        return codes.data_ptr(), codes.device, codes._version

    def base_grid(self) -> Grid:
        """Returns scales and zero points of the base, fp32 `[out_features, groups]`."""
        key = self._base_state()
        if self._base_grid is None or key not in (None, self._base_grid[0]):
            grid = self.quantized.quantized_weight.grid()
            self._base_grid = key, dataclasses.replace(grid, double_quantized=None)
        return self._base_grid[1]

    def _base_squares(self) -> Tensor:
        """Returns the squared norms of the rows of Q, fp32 `[out_features]`."""
        key = self._base_state()
        if self._row_squares is None or key not in (None, self._row_squares[0]):
            weight = self.quantized.dequantize(torch.float32)
            self._row_squares = key, weight.square_().sum(1)
        return self._row_squares[1]

    @torch.no_grad()
    def merged_weight(self, adapters: list[str]) -> Tensor:
        """Returns the base's weight with `adapters` in it, fp32 `[out_features, in_features]`.

        Raises:
            LowbitError: naming an adapter that cannot be merged or is not finite.
        """
        weight = self.quantized.dequantize(torch.float32)
        for name in adapters:
            variant = self.lora_variant.get(name)
            if variant is None:
                weight += self.delta(name).to(weight.device)
            elif hasattr(variant, "merged"):
                weight = variant.merged(self, name, weight)
            else:
                raise LowbitError(
                    f"adapter {name!r} depends on the tokens (aLoRA) and has no merged weight; "
                    "keep it as an adapter"
                )
            if not bool(weight.isfinite().all()):
                raise LowbitError(
                    f"adapter {name!r}: the merged weight holds NaN or Inf; the adapter is broken"
                )
        return weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts a plain layer with Q + scaling B A in the place of the quantized one.

        The sum is computed in fp32 and rounded once, to the compute dtype of the base.

        Args:
            safe_merge: the same either way; a sum that is not finite changes nothing.
            adapter_names: the adapters; None for all that are active.

        Raises:
            LowbitError: see `merged_weight`; also for a bias that the layer has no place for.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.lora_A]
        if not names:
            return
        base, merged = self.quantized, [*self.merged_adapters, *names]
        plain = plain_like(base, self.merged_weight(merged).to(base.compute_dtype))
        bias = base.bias
        for name in merged:
            if self.lora_bias[name]:
                if bias is None:
                    raise LowbitError(
                        f"adapter {name!r} has a bias, but its layer has none to add it to; keep "
                        "it as an adapter, or train with lora_bias=False"
                    )
                added = self.lora_B[name].bias.detach() * self.scaling[name]
                bias = nn.Parameter(bias.detach() + added.to(bias.dtype), requires_grad=False)
        plain.bias = bias
        if base._siblings is not None:
            base._siblings[0].part()
        for parameter in plain.parameters():
            parameter.requires_grad_(False)
        self._put_aside, self.base_layer = (base,), plain.train(base.training)
        self.merged_adapters = merged

    def unmerge(self) -> None:
        """Puts the quantized layer back, its stored tensors as they were bit for bit."""
        if self._put_aside is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        plain, (base,) = cast(nn.Linear, self.base_layer), self._put_aside
        self._put_aside, self.base_layer = None, base
        self.merged_adapters.clear()
        # What moved or cast the model meanwhile did not see it.
        base.to(device=plain.weight.device, dtype=plain.weight.dtype)
        base.train(plain.training)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Returns the layer for a model without adapters: plain if merged, else quantized."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        elif self.merged:
            self.unmerge()
        return self.base_layer

    def __repr__(self) -> str:
        text: str = super().__repr__()
        return text.replace("lora.", "lowbit.", 1)
