"""The stored tensors of a quantized weight as members of a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import ops
from lowbit.quant import QuantizedWeight
from lowbit.scheme import Scheme


class StoredWeight(nn.Module):
    """Mixin: holds one quantized weight instead of a parameter `weight`.

    Integer tensors are parameters (accelerate offloads parameters, not buffers). Float tensors are
    buffers, because transformers takes the dtype of the first float *parameter* for the dtype of
    the model: with fp16 scales among the parameters, a bf16 model whose embedding is quantized
    would call itself fp16, and be saved and reloaded as such.

    Attributes:
        scheme: how the weight is stored.
        logical_shape: (out_features, in_features).
        compute_dtype: dtype of `weight` and of `dequantize()`; `.to(dtype)` changes this only.
        plain_class: the class that this module replaces, to go back to.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    scheme: Scheme
    logical_shape: tuple[int, int]
    compute_dtype: torch.dtype
    plain_class: type[nn.Module]

    def _create_stored(
        self,
        scheme: Scheme,
        shape: tuple[int, int],
        compute_dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        """Registers uninitialised tensors for a weight `[out, in]`."""
        self.scheme, self.logical_shape, self.compute_dtype = scheme, shape, compute_dtype
        for name, (size, dtype) in scheme.tensor_specs(shape).items():
            empty = torch.empty(size, dtype=dtype, device=device)
            if dtype.is_floating_point:
                self.register_buffer(name, empty)
            else:
                self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        # transformers must not initialise what it takes for an nn.Linear or nn.Embedding.
        self._is_hf_initialized = True

    def _fill_stored(self, qweight: QuantizedWeight) -> None:
        """Puts the tensors of `qweight` in place, without copying them."""
        for name, tensor in qweight.tensors().items():
            if name in self._buffers:
                self._buffers[name] = tensor
            else:
                self._parameters[name] = nn.Parameter(tensor, requires_grad=False)

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The stored tensors with their meaning."""
        return QuantizedWeight(
            scheme=self.scheme,
            in_features=self.logical_shape[1],
            packed=self.weight_packed,
            scale=self.weight_scale,
            zero_point=getattr(self, "weight_zero_point", None),
            scale_offset=getattr(self, "weight_scale_offset", None),
            scale_step=getattr(self, "weight_scale_step", None),
        )

    @property
    def qweight(self) -> Tensor:
        """The packed codes, by the name that PEFT looks for."""
        return self.quantized_weight.packed

    @property
    def W_q(self) -> Tensor:  # noqa: N802 - PEFT's name
        """The packed codes: PEFT calls `dequantize()` on modules that have a `W_q`."""
        return self.qweight

    @property
    def weight(self) -> Tensor:
        """The decoded weight, made anew on every access; the 16-bit placeholder while loading.

        Model code reads its dtype, and GPT-2's initialisation writes to the weights of children:
        the flag makes that a no-op.
        """
        placeholder = self._parameters.get("weight")
        if placeholder is not None:
            return placeholder
        decoded = self.dequantize()
        decoded._is_hf_initialized = True  # type: ignore[attr-defined]
        return decoded

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the weight `[out_features, in_features]` in `dtype` (default: compute_dtype)."""
        return ops.dequantize(self.quantized_weight, dtype or self.compute_dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves everything, casts everything except the stored tensors.

        `.half()` and `.to(dtype)` must not round scales: codes were chosen for exactly these.
        """
        stored = {id(self._parameters.get(name, self._buffers.get(name))) for name in self._names()}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in stored and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        return super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]

    def _names(self) -> tuple[str, ...]:
        return tuple(self.scheme.tensor_specs(self.logical_shape))
