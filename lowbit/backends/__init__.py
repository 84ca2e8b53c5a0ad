"""The priority list of backends: the first one that does not refuse a request runs it.

A backend may want the weight in an order of its own (`prepare`). Then it runs prepared weights, and
canonical tensors fall through to the next.

A slower backend is never chosen silently where it matters: on CUDA, falling through to the
reference is warned about once, with the reasons of all backends before it.
"""

from __future__ import annotations

import functools
import warnings

import torch

from lowbit.backends.base import Backend, Joined, PreparedWeight, Request
from lowbit.backends.dequantize import DequantizeBackend
from lowbit.backends.triton import TritonBackend
from lowbit.errors import LowbitError
from lowbit.quant import QuantizedWeight

__all__ = [
    "BACKENDS",
    "Backend",
    "Joined",
    "PreparedWeight",
    "Request",
    "explain",
    "prepare",
    "select",
]

BACKENDS: list[Backend] = [TritonBackend(), DequantizeBackend()]


def explain(request: Request) -> dict[str, str | None]:
    """Returns backend name -> why it refuses `request` (None: it would run it), by priority."""
    return {backend.name: backend.refusal(request) for backend in BACKENDS}


@functools.lru_cache(maxsize=4096)
def select(request: Request) -> Backend:
    """Returns the first backend that can run `request`.

    Cached: a model asks the same few questions for every token. Whoever changes `BACKENDS` calls
    `select.cache_clear()`.

    Raises:
        LowbitError: with the refusal of every backend, if none can.
    """
    refusals: list[str] = []
    for backend in BACKENDS:
        reason = backend.refusal(request)
        if reason is None:
            if refusals and request.device.type == "cuda" and backend.name == "dequantize":
                _warn_once("; ".join(refusals))
            return backend
        refusals.append(f"{backend.name}: {reason}")
    raise LowbitError(
        f"no backend can multiply {request.dtype} activations on {request.device} by a "
        f"{request.scheme} weight [{request.out_features}, {request.in_features}]: "
        + "; ".join(refusals)
    )


def prepare(qweight: QuantizedWeight, dtype: torch.dtype) -> PreparedWeight | None:
    """Returns `qweight` in the order of the backend that multiplies `dtype` activations by it.

    None where that backend reads the canonical tensors, and where they could not be had back bit
    for bit.
    """
    request = Request(qweight.scheme, qweight.packed.device, dtype, *qweight.shape, prepared=True)
    if not qweight.padding_is_zero():
        return None
    return select(request).prepare(qweight)


@functools.cache
def _warn_once(refusals: str) -> None:
    warnings.warn(
        f"lowbit decodes whole weights before every matmul on CUDA, which is slow ({refusals})",
        stacklevel=2,
    )
