"""What a backend is: one way to multiply by a quantized weight, which says what it cannot do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowbit.quant import QuantizedWeight
from lowbit.scheme import Scheme


@dataclass(frozen=True)
class Request:
    """All that decides which backend runs.

    Args:
        scheme: how the weight is stored.
        device: where activations and weight are.
        dtype: dtype of the activations and of the result.
        out_features: rows of the weight.
        in_features: columns of the weight.
    """

    scheme: Scheme
    device: torch.device
    dtype: torch.dtype
    out_features: int
    in_features: int


class Backend(Protocol):
    """Multiplies activations by a quantized weight `w_NK`."""

    @property
    def name(self) -> str:
        """The name shown to users."""
        ...

    def refusal(self, request: Request) -> str | None:
        """Returns why this backend cannot run `request`, or None if it can."""
        ...

    def linear(self, x: Tensor, qweight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        """Returns `x w^T + bias`, `[..., N]` in x's dtype, for `x` `[..., K]`."""
        ...

    def grad_input(self, grad: Tensor, qweight: QuantizedWeight) -> Tensor:
        """Returns `grad w`, `[..., K]` in grad's dtype, for `grad` `[..., N]`."""
        ...
