"""The priority list of backends: the first one that does not refuse a request runs it.

A slower backend is never chosen silently where it matters: on CUDA, falling through to the
reference is warned about once, with the reasons of all backends before it.
"""

from __future__ import annotations

import functools
import warnings

from lowbit.backends.base import Backend, Request
from lowbit.backends.dequantize import DequantizeBackend
from lowbit.backends.triton import TritonBackend
from lowbit.errors import LowbitError

__all__ = ["BACKENDS", "Backend", "Request", "explain", "select"]

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


@functools.cache
def _warn_once(refusals: str) -> None:
    warnings.warn(
        f"lowbit decodes whole weights before every matmul on CUDA, which is slow ({refusals})",
        stacklevel=2,
    )
