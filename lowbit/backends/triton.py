"""The place of the Triton kernels in the priority list: not shipped yet, and it says so."""

from __future__ import annotations

import importlib.util

from torch import Tensor

from lowbit.backends.base import PreparedWeight, Request
from lowbit.quant import QuantizedWeight


class TritonBackend:
    """Refuses everything, with the first true reason."""

    name = "triton"

    def refusal(self, request: Request) -> str | None:
        """Returns why Triton cannot run `request`."""
        if request.device.type != "cuda":
            return f"runs on CUDA tensors only, these are on {request.device.type}"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; run `pip install triton`"
        return "this version of lowbit ships no Triton kernels"

    def prepare(self, qweight: QuantizedWeight) -> PreparedWeight | None:
        """Never called: `refusal` is never None."""
        raise NotImplementedError

    def linear(self, x: Tensor, qweight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        """Never called: `refusal` is never None."""
        raise NotImplementedError

    def grad_input(self, grad: Tensor, qweight: QuantizedWeight) -> Tensor:
        """Never called: `refusal` is never None."""
        raise NotImplementedError
