"""The native kernels of `lowbit_kernels.cpu`: weights in strips, on CPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.base import PreparedWeight, Request
from lowbit.quant import QuantizedWeight

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class CpuBackend:
    """Runs prepared weights only: canonical tensors are not in an order that its kernels read."""

    name = "cpu"

    def refusal(self, request: Request) -> str | None:
        """Returns why the native kernels cannot run `request`."""
        if request.device.type != "cpu":
            return f"runs on CPU tensors only, these are on {request.device.type}"
        if request.dtype not in _DTYPES:
            return f"activations are {request.dtype}; float32, bfloat16 or float16 are needed"
        reason = self.unavailable_reason()
        if reason is None and not request.prepared:
            return (
                "the weight is not in the order of its kernels, because it is offloaded or the "
                "module was put together by hand; run lowbit.prepare_model(model)"
            )
        return reason

    def unavailable_reason(self) -> str | None:
        """Returns why there are no native kernels on this machine, or None if there are."""
        from lowbit_kernels.cpu import library

        return library.unavailable_reason()

    def prepare(self, qweight: QuantizedWeight) -> PreparedWeight:
        """Returns the weight in strips."""
        from lowbit.backends.strips import StripPrepared

        return StripPrepared.of(qweight)

    def linear(self, x: Tensor, qweight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        """Never called: canonical tensors are refused."""
        raise NotImplementedError

    def grad_input(self, grad: Tensor, qweight: QuantizedWeight) -> Tensor:
        """Never called: canonical tensors are refused."""
        raise NotImplementedError
