"""The priority list of backends: the first one that does not refuse a request runs it.

A backend may want the weight in an order of its own (`prepare`). Then it runs prepared weights, and
canonical tensors fall through to the next.

A slower backend is never chosen silently where it matters: on CUDA, falling through to the
reference is warned about once, with the reasons of all backends before it; on a CPU, native kernels
that are not there.
"""

from __future__ import annotations

import functools
import warnings

import torch

from lowbit.backends.base import Backend, Joined, PreparedWeight, Request
from lowbit.backends.cpu import CpuBackend
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

BACKENDS: list[Backend] = [TritonBackend(), CpuBackend(), DequantizeBackend()]


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
            if backend.name == "dequantize":
                _warn_if_slow(request.device.type, "; ".join(refusals))
            return backend
        refusals.append(f"{backend.name}: {reason}")
    raise LowbitError(
        f"no backend can multiply {request.dtype} activations on {request.device} by a "
        f"{request.scheme} weight [{request.out_features}, {request.in_features}]: "
        + "; ".join(refusals)
    )


def prepare(
    qweight: QuantizedWeight, dtype: torch.dtype, activations: str = "float"
) -> PreparedWeight | None:
    """Returns `qweight` in the order of the backend that multiplies `dtype` activations by it.

    None where that backend reads the canonical tensors, and where they could not be had back bit
    for bit.

    Args:
        qweight: the canonical tensors.
        dtype: dtype of the activations.
        activations: "float", or "int8" to round activations to 8 bits while multiplying.

    Raises:
        LowbitError: where no backend does what `activations` asks for.
    """
    request = Request(qweight.scheme, qweight.packed.device, dtype, *qweight.shape, prepared=True)
    backend = select(request)
    prepared = backend.prepare(qweight) if qweight.padding_is_zero() else None
    if prepared is not None:
        return prepared.with_activations(activations)
    if activations != "float":
        raise LowbitError(
            f"{activations} activations: no backend multiplies a {qweight.scheme} weight by them "
            "here (" + "; ".join(f"{k}: {why}" for k, why in explain(request).items() if why) + ")"
        )
    return None


@functools.cache
def _warn_if_slow(device: str, refusals: str) -> None:
    """Warns that the reference runs: on CUDA always, on a CPU without native kernels."""
    reason = refusals if device == "cuda" else None
    if device == "cpu":
        reason = CpuBackend().unavailable_reason()
    if reason is not None:
        _warn_once(device, reason)


@functools.cache
def _warn_once(device: str, reason: str) -> None:
    warnings.warn(
        f"lowbit decodes whole weights before every matmul on {device}, which is several times "
        f"slower than its kernels: {reason}",
        stacklevel=2,
    )
