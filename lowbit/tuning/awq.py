"""AWQ: input channels with large activations get larger weights, which rounding then harms less.

A channel multiplied by s in the weights and divided by s where it comes from keeps the step of its
group, so the error of its weights, as the input sees it, shrinks by s. Channels that matter less
pay for it, for they share the group's step.

Reference: Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and
Acceleration", section 3.2, equations 4 and 5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowbit.algorithms.scales import fit_grid
from lowbit.calibration.capture import counted_tokens
from lowbit.errors import LowbitError
from lowbit.nn.replace import weight_is_transposed
from lowbit.scheme import Scheme
from lowbit.tuning.folds import Fold, find_folds
from lowbit.tuning.view import BlockView

# Largest factor is 2^13: beyond, a divided norm or bias would leave float16's range.
LARGEST_POWER = 13


@dataclass(frozen=True)
class AWQ:
    """Multiplies the weights of each input channel by s = (mean |x|)^r, fold by fold.

    The exponent r is the one of i / steps, i = 0 ... steps - 1, under which rounding to nearest
    changes least what follows (the outputs of the attention, of the MLP, of the linear layer);
    r = 0 folds nothing and wins ties. The paper's clip search is not done: grids are searched
    anyway, here and by every algorithm, and that clips.

    Args:
        steps: number of exponents.
        tokens: an exponent is judged on the first batches with at least this many tokens.
        least_gain: share of the error with no fold that the best exponent must take away, else
            nothing is folded.

    Raises:
        LowbitError: for less than one step or token, or a share that is not in [0, 1).
    """

    name: ClassVar[str] = "awq"
    steps: int = 20
    tokens: int = 8192
    least_gain: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.least_gain < 1:
            raise LowbitError(f"awq: least_gain is a share in [0, 1), got {self.least_gain}")
        if self.steps < 1 or self.tokens < 1:
            raise LowbitError(
                f"awq: got {self.steps} steps and {self.tokens} tokens; give at least 1 of each"
            )

    def fold(self, view: BlockView) -> dict[str, Any]:
        """Folds a block; see `lowbit.tuning.steps.Fold`.

        Returns:
            `changed`, and `points`: for each fold its source, the exponent, and the mean squared
            error of the outputs with that exponent and with none.
        """
        changed: set[str] = set()
        points = []
        for fold in find_folds(view.module):
            schemes = [view.schemes.get(f"{view.name}.{reader}") for reader in fold.point.readers]
            if all(scheme is None for scheme in schemes):
                continue
            search = _Search(view, fold, schemes, self.tokens)
            exponent, loss, unfolded = search.best(self.steps)
            if loss > (1 - self.least_gain) * unfolded:
                exponent, loss = 0.0, unfolded
            source = fold.point.source
            points.append(
                {"source": source, "exponent": exponent, "loss": loss, "loss_unfolded": unfolded}
            )
            if exponent > 0:
                fold.apply(search.scales(exponent))
                changed |= {f"{view.name}.{name}" for name in fold.parameters()}
        return {"changed": sorted(changed), "points": points}


class _Search:
    """What passes through one fold of a block in float, and what rounding its readers changes.

    Args:
        view: the block.
        fold: one of its folds.
        schemes: of the fold's readers; None for one that is not quantized.
        tokens: see `AWQ`.
    """

    def __init__(
        self, view: BlockView, fold: Fold, schemes: list[Scheme | None], tokens: int
    ) -> None:
        self.view, self.fold, self.schemes = view, fold, schemes
        self.inside = view.module.get_submodule(fold.point.inside)
        # Per batch: number, arguments, outputs of counted tokens.
        self.calls: list[tuple[int, tuple[Any, ...], dict[str, Any], Tensor]] = []
        self.magnitude, self.mean_square = self._observe(tokens)

    def _observe(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Runs batches; returns mean |x| and mean x^2 of the readers' inputs, `[in_features]`."""
        inputs: list[Tensor] = []
        calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []

        def read(_: nn.Module, args: tuple[Any, ...]) -> None:
            inputs.append(args[0])

        def call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            calls.append((args, kwargs, out))

        handles = [
            self.fold.readers[0].register_forward_pre_hook(read),
            self.inside.register_forward_hook(call, with_kwargs=True),
        ]
        sums = torch.zeros((), dtype=torch.float32), torch.zeros((), dtype=torch.float32)
        seen = count = 0
        try:
            for batch, hidden in enumerate(self.view.inputs):
                if seen >= tokens:
                    break
                seen += hidden.shape[:-1].numel()
                with torch.no_grad():
                    self.view.forward(hidden, batch)
                x = self._counted(inputs.pop(), batch).float()
                x = x[x.square().sum(-1).isfinite()]
                count += len(x)
                sums = sums[0] + x.abs().sum(0).cpu(), sums[1] + x.square().sum(0).cpu()
                args, kwargs, out = calls.pop()
                self.calls.append((batch, args, kwargs, self._outputs(out, batch)))
        finally:
            for handle in handles:
                handle.remove()
        device = self.view.inputs[0].device
        return (sums[0] / max(count, 1)).to(device), (sums[1] / max(count, 1)).to(device)

    def _counted(self, x: Tensor, batch: int) -> Tensor:
        """Returns the vectors `[tokens, features]` of `x` that count."""
        masks = self.view.masks
        return x.reshape(-1, x.shape[-1]) if masks is None else counted_tokens(x, masks[batch])

    def _outputs(self, returned: Any, batch: int) -> Tensor:
        """Returns what `inside` returned for tokens that count, float32 `[tokens, features]`."""
        output = returned[0] if isinstance(returned, tuple) else returned
        return self._counted(output, batch).float()

    def best(self, steps: int) -> tuple[float, float, float]:
        """Returns the best exponent, its loss and the loss of exponent 0; weights stay as is."""
        weights: list[Any] = [reader.weight for reader in self.fold.readers]
        originals: list[Tensor] = [weight.data for weight in weights]
        try:
            losses = [self._loss(i / steps, originals) for i in range(steps)]
        finally:
            for weight, original in zip(weights, originals, strict=True):
                weight.data = original
        ranked = [loss if math.isfinite(loss) else math.inf for loss in losses]
        chosen = ranked.index(min(ranked))
        return chosen / steps, losses[chosen], losses[0]

    def scales(self, exponent: float) -> Tensor:
        """Returns float64 factors `[channels]`, around 1 (the paper's normalisation).

        They are powers of two: rows, biases and most norms are divided by these exactly in any
        dtype.
        """
        magnitude = self.fold.over_channels(self.magnitude.double())
        used = magnitude[magnitude > 0]
        if exponent == 0 or used.numel() == 0:
            return torch.ones_like(magnitude)
        # A channel that was silent has no say in the range of the others.
        scales = magnitude.clamp_min(float(used.min())) ** exponent
        scales = scales / (scales.max() * scales.min()).sqrt()
        scales = scales.log2().round().clamp(-LARGEST_POWER, LARGEST_POWER).exp2()
        return self.fold.storable(scales)

    def _loss(self, exponent: float, originals: list[Tensor]) -> float:
        """Returns the mean squared change of the outputs when scaled readers are rounded."""
        per_input = self.fold.scale_of_inputs(self.scales(exponent)).float()
        importance = self.mean_square / per_input.square()
        for reader, original, scheme in zip(
            self.fold.readers, originals, self.schemes, strict=True
        ):
            if scheme is None:
                continue
            transposed = weight_is_transposed(reader)
            scaled = (original.T if transposed else original).float() * per_input
            grid = fit_grid(scaled, scheme, importance)
            rounded = (grid.dequantize(grid.round(scaled)) / per_input).to(original.dtype)
            reader.weight.data = rounded.T if transposed else rounded
        total = torch.zeros((), dtype=torch.float64)
        count = 0
        with torch.no_grad():
            for batch, args, kwargs, target in self.calls:
                change = self._outputs(self.inside(*args, **kwargs), batch) - target
                finite = target.isfinite().all(-1)
                total += change[finite].square().sum().double().cpu()
                count += int(finite.sum()) * target.shape[-1]
        return float(total) / max(count, 1)
