"""The Triton kernels of `lowbit_kernels`: NVIDIA and AMD GPUs, weights in fragment order.

Where a scheme rounds activations to int8, tensor cores multiply bytes: `backends/int8.py`.

Triton is imported when the first weight on a GPU asks for it, not before.
"""

from __future__ import annotations

import importlib.util

from torch import Tensor

from lowbit.backends.base import PreparedWeight, Request
from lowbit.quant import QuantizedWeight


class TritonBackend:
    """Runs prepared weights only: canonical tensors are not in an order that its kernels read."""

    name = "triton"

    def refusal(self, request: Request) -> str | None:
        """Returns why Triton cannot run `request`."""
        if request.device.type != "cuda":
            return f"runs on CUDA tensors only, these are on {request.device.type}"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; run `pip install triton`"
        from lowbit_kernels.gpu import support

        scheme = request.scheme
        if scheme.activations is not None:
            from lowbit_kernels.gpu import w8a8

            if request.in_features > w8a8.MAX_IN_FEATURES:
                return (
                    f"{request.in_features} input features of int8 codes, whose sums could leave "
                    f"int32; up to {w8a8.MAX_IN_FEATURES} are supported"
                )
        reason = support.refusal(
            request.device,
            request.dtype,
            bits=scheme.bits,
            codebook=scheme.levels,
            group_size=scheme.group_size or 0,
        )
        if reason is None and not request.prepared:
            return (
                "the weight is not in the order of its kernels, because it is offloaded or was put "
                "on the device by hand; keep it on the device and run lowbit.prepare_model(model)"
            )
        return reason

    def prepare(self, qweight: QuantizedWeight) -> PreparedWeight:
        """Returns the weight in fragment order, or int8 codes for int8 activations."""
        if qweight.scheme.activations is not None:
            from lowbit.backends.int8 import Int8Prepared

            return Int8Prepared.of(qweight)
        from lowbit.backends.fragment import FragmentPrepared

        return FragmentPrepared.of(qweight)

    def linear(self, x: Tensor, qweight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        """Never called: canonical tensors are refused."""
        raise NotImplementedError

    def grad_input(self, grad: Tensor, qweight: QuantizedWeight) -> Tensor:
        """Never called: canonical tensors are refused."""
        raise NotImplementedError
