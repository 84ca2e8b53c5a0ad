"""The reference backend: decode the whole matrix, then multiply. Runs wherever torch does."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lowbit.backends.base import PreparedWeight, Request
from lowbit.quant import QuantizedWeight


class DequantizeBackend:
    """Decodes to the dtype of the activations and calls torch's own matmul."""

    name = "dequantize"

    def refusal(self, request: Request) -> str | None:
        """Returns a reason for integer activations only."""
        if not request.dtype.is_floating_point:
            return f"activations are {request.dtype}, a float dtype is needed"
        return None

    def prepare(self, qweight: QuantizedWeight) -> PreparedWeight | None:
        """Returns None: the canonical tensors are what is decoded."""
        return None

    def linear(self, x: Tensor, qweight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        """Returns `x w^T + bias`, in x's dtype."""
        weight_NK = qweight.dequantize(x.dtype)
        return F.linear(x, weight_NK, None if bias is None else bias.to(x.dtype))

    def grad_input(self, grad: Tensor, qweight: QuantizedWeight) -> Tensor:
        """Returns `grad w`, in grad's dtype."""
        return grad @ qweight.dequantize(grad.dtype)
