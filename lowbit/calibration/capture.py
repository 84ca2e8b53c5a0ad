"""What reaches a linear layer during a real forward pass.

Layers that receive the very same tensor (q, k, v; gate, up) share their statistics and are
quantized together. Which layers those are is seen in the forward pass itself, by the identity of
the tensor, so no table per model family has to be kept true.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.algorithms.base import Statistics
from lowbit.calibration.ranges import InputRange
from lowbit.calibration.statistics import HessianAccumulator
from lowbit.errors import LowbitError


class StopForwardError(Exception):
    """Ends a forward pass once what was wanted from it has been seen."""


def input_groups(run: Callable[[], Any], modules: Mapping[str, nn.Module]) -> list[list[str]]:
    """Returns the names of `modules` grouped by shared input, in the order of their first call.

    Args:
        run: runs the forward pass once, on any batch.
        modules: name -> linear layer; one that is never called is in no group.
    """
    inputs: list[Tensor] = []  # keeps the tensors alive, so that no identity is reused
    groups: list[list[str]] = []
    handles = []

    def observe(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if any(name in group for group in groups):
                return
            for seen, group in zip(inputs, groups, strict=True):
                if seen is args[0]:
                    group.append(name)
                    return
            inputs.append(args[0])
            groups.append([name])

        return hook

    try:
        handles = [m.register_forward_pre_hook(observe(name)) for name, m in modules.items()]
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return groups


@dataclass(frozen=True)
class Reference:
    """A layer of the full-precision model, beside which the quantized one is measured.

    Args:
        run: runs that model's forward pass on the batch of the given index.
        module: the layer in it.
    """

    run: Callable[[int], Any]
    module: nn.Module


def layer_input(run: Callable[[int], Any], module: nn.Module, batch: int) -> Tensor | None:
    """Returns what reaches `module` when `run` runs batch `batch`, None if nothing does.

    The pass is stopped there.
    """
    seen: list[Tensor] = []

    def observe(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        raise StopForwardError

    handle = module.register_forward_pre_hook(observe)
    try:
        with torch.no_grad():
            run(batch)
    except StopForwardError:
        pass
    finally:
        handle.remove()
    return seen[0] if seen else None


def collect_statistics(
    run: Callable[[int], Any],
    batches: int,
    module: nn.Module,
    in_features: int,
    name: str,
    with_range: bool = False,
    reference: Reference | None = None,
    masks: Sequence[Tensor] | None = None,
) -> Statistics:
    """Returns the statistics of everything that reaches `module`.

    Args:
        run: runs the forward pass on the batch of the given index.
        batches: number of batches.
        module: a linear layer; each pass is stopped once its input has been seen.
        in_features: width of its input.
        name: its full name, for the error if its inputs are not finite.
        with_range: also choose an `input_scale`.
        reference: the same layer in the full-precision model, run batch by batch beside this one;
            gives `Statistics.cross`.
        masks: bool `[batch, seqlen]` for each batch, True for tokens that count; None counts all.
            The range of `input_scale` is that of all tokens: all of them will be rounded.
    """
    accumulator: HessianAccumulator | None = None
    inputs = InputRange() if with_range else None
    try:
        for batch in range(batches):
            x = layer_input(run, module, batch)
            if x is None:
                continue
            other = None
            if reference is not None:
                other = layer_input(reference.run, reference.module, batch)
                other = x.new_empty(0) if other is None else other
            if accumulator is None:
                accumulator = HessianAccumulator(in_features, x.device)
            if inputs is not None:
                inputs.add(x)
            if masks is not None:
                if other is not None and other.shape == x.shape:
                    other = counted_tokens(other, masks[batch])
                x = counted_tokens(x, masks[batch])
            accumulator.add(x, other)
        if accumulator is None:
            raise AssertionError(f"{name} was not called")
        statistics = accumulator.statistics()
    except LowbitError as error:
        raise LowbitError(f"{name}: {error}") from error
    statistics.input_scale = None if inputs is None else inputs.scale()
    return statistics


def counted_tokens(x: Tensor, mask: Tensor) -> Tensor:
    """Returns the vectors `[tokens, features]` of `x` `[..., features]` that `mask` marks.

    Args:
        x: the inputs of a layer, one vector for each token of a batch.
        mask: bool `[batch, seqlen]`.

    Raises:
        LowbitError: the layer sees other than all tokens of the batch, as an expert does.
    """
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] != mask.numel():
        raise LowbitError(
            f"calibration: this layer receives {rows.shape[0]} vectors for {mask.numel()} tokens, "
            "so a loss mask cannot tell which of them count; leave the loss mask out"
        )
    return rows[mask.reshape(-1).to(rows.device)]
