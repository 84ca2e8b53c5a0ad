"""What a backend is: one way to multiply by a quantized weight, which says what it cannot do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowbit.errors import LowbitError
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
        prepared: whether the backend may have the weight in an order of its own; False for the
            canonical tensors.
    """

    scheme: Scheme
    device: torch.device
    dtype: torch.dtype
    out_features: int
    in_features: int
    prepared: bool = False


class PreparedWeight(ABC):
    """A weight `w_NK` in the order that one backend's kernels read.

    It holds everything that the canonical tensors hold. `linear`, `dequantize` and
    `dequantize_rows` are one operator call each, so that `torch.compile` can trace them; so is
    `with_tensors`, which must do nothing but build an object.

    Attributes:
        backend: name of the backend that made it.
        scheme: how the weight is stored in a checkpoint.
        shape: (out_features, in_features).
    """

    backend: str
    scheme: Scheme
    shape: tuple[int, int]

    @property
    def kernels(self) -> str:
        """What runs it, for people: the backend, and which of its kernels where it has several."""
        return self.backend

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Returns all tensors by name, the one with the codes first."""

    @abstractmethod
    def with_tensors(self, tensors: Mapping[str, Tensor]) -> PreparedWeight:
        """Returns the same weight over `tensors`: copies of its own, perhaps on another device."""

    @abstractmethod
    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Returns `x w^T + bias`, `[..., N]` in x's dtype; differentiable in x and bias."""

    @abstractmethod
    def grad_input(self, grad: Tensor) -> Tensor:
        """Returns `grad w`, `[..., K]` in grad's dtype, for `grad` `[..., N]`."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight `[N, K]` in `dtype`."""

    @abstractmethod
    def dequantize_rows(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the weights of `rows` (int64 `[n]`), `[n, K]` in `dtype`."""

    @abstractmethod
    def canonical(self) -> QuantizedWeight:
        """Returns the tensors that the weight was prepared from, bit for bit."""

    def for_mode(self, training: bool) -> PreparedWeight:
        """Returns the form for training or for inference; itself where there is only one.

        Double-quantized scales stay codes for training, where memory is short, and are decoded
        for inference.
        """
        return self

    def with_activations(self, activations: str) -> PreparedWeight:
        """Returns the weight for activations rounded to "int8", or for "float" ones again.

        Raises:
            LowbitError: where the backend has no such kernels.
        """
        if activations == "float":
            return self
        raise LowbitError(
            f"backend {self.backend} multiplies float activations, not {activations}; those are "
            "for the native kernels on a CPU"
        )

    def join(self, others: Sequence[PreparedWeight]) -> Joined | None:
        """Returns this weight and `others` as one, or None where they cannot be one."""
        return None


@dataclass(frozen=True)
class Joined:
    """Several weights of the same width as one weight.

    Args:
        weight: all rows, one part after the other; rows between the parts mean nothing.
        parts: the weights that were joined, over the memory of `weight`.
        starts: the first row of each part in `weight`.
    """

    weight: PreparedWeight
    parts: tuple[PreparedWeight, ...]
    starts: tuple[int, ...]


class Backend(Protocol):
    """Multiplies activations by a quantized weight `w_NK`."""

    @property
    def name(self) -> str:
        """The name shown to users."""
        ...

    def refusal(self, request: Request) -> str | None:
        """Returns why this backend cannot run `request`, or None if it can."""
        ...

    def prepare(self, qweight: QuantizedWeight) -> PreparedWeight | None:
        """Returns the weight in this backend's own order; None if it reads the canonical tensors.

        Asked only for a weight whose request, with `prepared`, was not refused.
        """
        ...

    def linear(self, x: Tensor, qweight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        """Returns `x w^T + bias`, `[..., N]` in x's dtype, for `x` `[..., K]`."""
        ...

    def grad_input(self, grad: Tensor, qweight: QuantizedWeight) -> Tensor:
        """Returns `grad w`, `[..., K]` in grad's dtype, for `grad` `[..., N]`."""
        ...
