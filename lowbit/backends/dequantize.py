"""The reference backend: decode the whole matrix, then multiply. Runs wherever torch does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.backends.base import Request
from lowbit.quant import QuantizedWeight, unpack

# Decoding needs several fp32 copies of what it decodes. Rows are decoded in blocks of at most this
# many weights (64 MiB per fp32 copy), so that a large lm_head costs its own 16-bit size and little
# more. Rows do not depend on each other: the result is the same bit for bit.
BLOCK_WEIGHTS = 1 << 24


class DequantizeBackend:
    """Decodes to the dtype of the activations and calls torch's own matmul."""

    name = "dequantize"

    def refusal(self, request: Request) -> str | None:
        """Returns a reason for integer activations only."""
        if not request.dtype.is_floating_point:
            return f"activations are {request.dtype}, a float dtype is needed"
        return None

    def linear(self, x: Tensor, qweight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        """Returns `x w^T + bias`, in x's dtype."""
        weight_NK = dequantize(qweight, x.dtype)
        return F.linear(x, weight_NK, None if bias is None else bias.to(x.dtype))

    def grad_input(self, grad: Tensor, qweight: QuantizedWeight) -> Tensor:
        """Returns `grad w`, in grad's dtype."""
        return grad @ dequantize(qweight, grad.dtype)


def dequantize(qweight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Returns the weight `[N, K]` in `dtype`, equal to `qweight.dequantize(dtype)`."""
    out_features, in_features = qweight.shape
    block_rows = max(1, BLOCK_WEIGHTS // in_features)
    if out_features <= block_rows:
        return qweight.dequantize(dtype)
    grid = qweight.grid()
    weight_NK = torch.empty(qweight.shape, dtype=dtype, device=qweight.packed.device)
    for start in range(0, out_features, block_rows):
        rows = slice(start, start + block_rows)
        codes = unpack(qweight.packed[rows], qweight.scheme.bits, in_features)
        indices = torch.arange(start, start + codes.shape[0], device=codes.device)
        weight_NK[rows] = grid.rows(indices).dequantize(codes).to(dtype)
    return weight_NK
