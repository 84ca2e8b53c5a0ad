"""The reference backend: decode the whole matrix, then multiply. Runs wherever torch does."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lowbit.backends.base import PreparedWeight, Request
from lowbit.quant import QuantizedWeight, integer_product, quantize_activations


class DequantizeBackend:
    """Decodes to the dtype of the activations and calls torch's own matmul.

    Where the scheme rounds activations, integers are multiplied and scaled afterwards, so that the
    result is what integer kernels compute.
    """

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
        if qweight.scheme.activations is not None:
            return _linear_int8(x, qweight, bias)
        weight_NK = qweight.dequantize(x.dtype)
        return F.linear(x, weight_NK, None if bias is None else bias.to(x.dtype))

    def grad_input(self, grad: Tensor, qweight: QuantizedWeight) -> Tensor:
        """Returns `grad w`, in grad's dtype: straight through the rounding of activations."""
        return grad @ qweight.dequantize(grad.dtype)


def _linear_int8(x: Tensor, qweight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """Returns `linear` with activations rounded to int8, rounded once to x's dtype at the end."""
    x_codes, x_scales = quantize_activations(x, qweight.input_scale)
    product = integer_product(x_codes, qweight.codes()).to(x_scales.dtype)
    y = product * x_scales * qweight.grid().scales.squeeze(-1)
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)
