"""What an algorithm is: it looks at one weight matrix and returns integer codes on a grid.

Algorithms see tensors only. They never import modules, Hugging Face or kernels, so that any of them
works with any scheme and any backend.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from torch import Tensor

from lowbit.quant import Grid
from lowbit.scheme import Scheme


@dataclass
class Statistics:
    """What calibration saw at the input of one or several linear layers.

    Args:
        hessian: float32 `[in_features, in_features]`, the mean of x x^T over tokens.
        tokens: input vectors that were counted.
        dropped: input vectors left out because a value was not finite.
        cross: float32 `[in_features, in_features]`, the mean of x_ref x^T, where x_ref is what the
            layer receives in the full-precision model for the same token; None where the run does
            not keep that model's activations beside its own.
        input_scale: float32 `[1]`, for rounding all inputs to int8, where a scheme stores it.
            Algorithms choose weights and leave it alone.
    """

    hessian: Tensor
    tokens: int
    dropped: int = 0
    cross: Tensor | None = None
    input_scale: Tensor | None = None


@dataclass(frozen=True)
class Quantized:
    """What an algorithm returns for one weight matrix.

    Args:
        codes: int8 `[out_features, in_features]`.
        grid: the scales and zero points that the codes were chosen on.
        report: what the manifest records: `loss` (mean squared output error per output element
            where statistics were given, else mean squared weight error), and anything that fell
            back, for example `damp_percent` or `fallback`.
    """

    codes: Tensor
    grid: Grid
    report: dict[str, float | int | str] = field(default_factory=dict)


class Algorithm(Protocol):
    """Chooses the codes of one weight matrix. Implementations are frozen dataclasses of options."""

    name: ClassVar[str]

    @property
    def needs_statistics(self) -> bool:
        """True if `quantize` requires statistics, and so calibration data."""
        ...

    def quantize(self, weight: Tensor, scheme: Scheme, statistics: Statistics | None) -> Quantized:
        """Returns the codes of `weight` `[out_features, in_features]` under `scheme`.

        `weight` is any float dtype, finite, and is not changed. The result depends on nothing
        but the arguments and the algorithm's options.
        """
        ...
