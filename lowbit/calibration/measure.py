"""Everything that later runs may want to know of a block's inputs, in one forward pass.

A run that quantizes as it goes measures a group of layers after the groups before it are quantized,
one pass for each. Here nothing changes between groups, so one pass sees them all, and its outputs
are the next block's inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.calibration.capture import StopForwardError, counted_tokens, input_groups
from lowbit.calibration.ranges import InputRange
from lowbit.calibration.statistics import HessianAccumulator
from lowbit.errors import LowbitError


@dataclass(frozen=True)
class InputStatistics:
    """What is kept of the inputs x of one group of layers.

    Args:
        members: names of the layers that share them.
        hessian: float32 `[K, K]`, the mean of x x^T; its diagonal is the mean of x^2.
        mean_magnitude: float32 `[K]`, the mean of |x|.
        input_scale: float32 `[1]`, for rounding all inputs to int8.
        tokens: input vectors that were counted.
        dropped: input vectors left out because a value was not finite.
    """

    members: tuple[str, ...]
    hessian: Tensor
    mean_magnitude: Tensor
    input_scale: Tensor
    tokens: int
    dropped: int


class InputMeter:
    """Accumulates the statistics of one group.

    Args:
        members: names of the layers.
        in_features: width of their input.
        device: where H is summed.
    """

    def __init__(self, members: list[str], in_features: int, device: torch.device) -> None:
        self.members = members
        self._hessian = HessianAccumulator(in_features, device)
        self._range = InputRange()
        self._magnitude = torch.zeros(in_features, dtype=torch.float64, device=device)

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        """Adds the input vectors of `x` `[..., in_features]`; of H and |x| only those in `mask`."""
        self._range.add(x)
        rows = x.reshape(-1, x.shape[-1]) if mask is None else counted_tokens(x, mask)
        self._hessian.add(rows)
        values = rows.detach().float()
        finite = values.square().sum(-1).isfinite()  # those that H counts
        self._magnitude += values[finite].abs().sum(0, dtype=torch.float64)

    def result(self) -> InputStatistics:
        """Returns the statistics.

        Raises:
            LowbitError: see `HessianAccumulator.statistics`.
        """
        statistics = self._hessian.statistics()
        return InputStatistics(
            tuple(self.members),
            statistics.hessian,
            (self._magnitude / statistics.tokens).float(),
            self._range.scale(),
            statistics.tokens,
            statistics.dropped,
        )


def measure_inputs(
    run: Callable[[int], Any],
    batches: int,
    modules: Mapping[str, nn.Module],
    widths: Mapping[str, int],
    masks: Sequence[Tensor] | None,
    stop: bool = False,
) -> tuple[list[InputStatistics], list[Any]]:
    """Returns the statistics of every group of `modules`, and what `run` returned for each batch.

    Args:
        run: runs the forward pass on the batch of the given index.
        batches: number of batches.
        modules: name -> linear layer; one that is never called is in no group.
        widths: name -> in_features.
        masks: bool `[batch, seqlen]` for each batch, True for tokens that count; None counts all.
        stop: end each pass once the first group has been seen.

    Raises:
        LowbitError: inputs of a group are not finite, or cannot be told apart by the mask.
    """
    meters: dict[str, InputMeter] = {}
    current = 0

    def observe(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if name not in meters:
                meters[name] = InputMeter(members[name], widths[name], args[0].device)
            try:
                meters[name].add(args[0], None if masks is None else masks[current])
            except LowbitError as error:
                raise LowbitError(f"{name}: {error}") from error
            if stop:
                raise StopForwardError

        return hook

    members = {group[0]: group for group in input_groups(lambda: run(0), modules)}
    handles = [modules[name].register_forward_pre_hook(observe(name)) for name in members]
    outputs = []
    try:
        with torch.no_grad():
            for current in range(batches):  # which the hooks read
                outputs.append(run(current))
    finally:
        for handle in handles:
            handle.remove()
    return [_result(name, meter) for name, meter in meters.items()], outputs


def _result(name: str, meter: InputMeter) -> InputStatistics:
    try:
        return meter.result()
    except LowbitError as error:
        raise LowbitError(f"{name}: {error}") from error
