"""Block tuning: codes and scales change until the block's output fits the original's.

References: Cheng et al. 2023, "SignRound" (AutoRound); Chen et al. 2024, "EfficientQAT", section
3.2. After the linears of a block have codes, positions on the grid (see `trainable.py`), scales and
zero points are trained together against

    mean over tokens of |block_q(x_q) - block(x)|^2

where x_q are the hidden states that the quantized blocks before this one send and x those of the
full-precision model: what went wrong before is made good here as far as the block can. Windows that
are not trained on judge; the best state that they saw is returned, which is the start if no other
was better.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowbit.algorithms.base import Quantized
from lowbit.errors import LowbitError
from lowbit.tuning.steps import Tuned
from lowbit.tuning.trainable import TrainableWeight
from lowbit.tuning.view import BlockView

# Bits of a code -> rounding rate. The finer the codes, the closer the start is to its best and the
# smaller are the gradients of single positions beside their noise, which Adam scales up to steps.
_RATES = {2: 1e-2, 3: 3e-3, 4: 1e-3, 8: 1e-4}


@dataclass(frozen=True)
class BlockTuning:
    """Trains codes and scales of one block at a time with Adam.

    Args:
        iterations: steps, of one batch each.
        rounding_rate: largest step of a position, in levels; None chooses for each layer by its
            bits.
        scale_rate: largest step of a scale, as a share of it; a zero point takes `rounding_rate`.
        held_out: share of the batches that only judge.
        evaluations: how often they judge.
        batch_tokens: tokens of a batch.
        seed: which batches are held out, and the order of the others.
    """

    name: ClassVar[str] = "block_tuning"
    iterations: int = 200
    rounding_rate: float | None = None
    scale_rate: float = 0.002
    held_out: float = 0.125
    evaluations: int = 10
    batch_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.evaluations < 1 or self.batch_tokens < 1:
            raise LowbitError(
                f"block tuning: iterations {self.iterations}, evaluations {self.evaluations} and "
                f"batch_tokens {self.batch_tokens} must be at least 1"
            )
        if not 0 < self.held_out < 1:
            raise LowbitError(
                f"block tuning: held_out {self.held_out} is out of range; use a share above 0 and "
                "below 1, for example 0.125"
            )

    def tune(
        self, view: BlockView, weights: dict[str, Tensor], modules: dict[str, Quantized]
    ) -> Tuned:
        """Returns codes and grids of the lowest held-out error; see `Tuning.tune`.

        Raises:
            LowbitError: for fewer than two batches.
        """
        return _BlockTuner(self, view, weights, modules).run()


class _BlockTuner:
    """The state of tuning one block."""

    def __init__(
        self,
        options: BlockTuning,
        view: BlockView,
        weights: dict[str, Tensor],
        modules: dict[str, Quantized],
    ) -> None:
        count = len(view.inputs)
        if count < 2:
            raise LowbitError(
                f"{view.name}: block tuning needs at least 2 batches of {options.batch_tokens} "
                f"tokens, one to learn from and one to judge, got {count}; give more samples"
            )
        self.options, self.view, self.modules = options, view, modules
        view.module.requires_grad_(False)
        self.weights = {
            name: TrainableWeight(view.linear(name), weights[name], start)
            for name, start in modules.items()
        }
        self.generator = torch.Generator().manual_seed(options.seed)
        order = torch.randperm(count, generator=self.generator).tolist()
        held = min(max(1, round(options.held_out * count)), count - 1)
        self.held, self.training = order[:held], order[held:]

    def run(self) -> Tuned:
        """Returns the best that was seen."""
        options = self.options
        optimizer = torch.optim.Adam(self._parameters(), betas=(0.9, 0.95), eps=1e-12)
        evaluations = min(options.evaluations, options.iterations)
        judged = {options.iterations * (i + 1) // evaluations for i in range(evaluations)}
        before = best = self._judge()
        found, best_at = self.modules, 0
        for step, batch in enumerate(self._batches(), 1):
            self._accumulate(batch)
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * (1 - (step - 1) / options.iterations)
            optimizer.step()
            if step in judged:
                error = self._judge()
                if error < best:
                    best, best_at = error, step
                    found = {name: weight.result() for name, weight in self.weights.items()}
        report = {"error_before": before, "error_after": best, "iteration": best_at}
        return Tuned(found, (), report)

    def _parameters(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for weight in self.weights.values():
            rounding = self.options.rounding_rate
            if rounding is None:
                rounding = _RATES[weight.grid.scheme.bits]
            rates = {"positions": rounding, "factors": self.options.scale_rate, "zeros": rounding}
            found += [
                {"params": [tensor], "rate": rates[name]}
                for name, tensor in weight.trained().items()
            ]
        return found

    def _batches(self) -> Iterator[int]:
        """Yields the batch of each step: all in a new order, and again."""
        queue: list[int] = []
        for _ in range(self.options.iterations):
            if not queue:
                order = torch.randperm(len(self.training), generator=self.generator)
                queue = [self.training[i] for i in order.tolist()]
            yield queue.pop()

    def _accumulate(self, batch: int) -> None:
        """Gives everything that is trained its gradient on one batch."""
        for weight in self.weights.values():
            weight.put()
            weight.parameter.requires_grad_(True)
        with torch.enable_grad():
            self._error(batch).backward()
        for weight in self.weights.values():
            weight.parameter.requires_grad_(False)
            weight.take_gradient()

    @torch.no_grad()
    def _judge(self) -> float:
        """Returns the mean error on the batches that are held out."""
        for weight in self.weights.values():
            weight.put()
        return sum(float(self._error(batch)) for batch in self.held) / len(self.held)

    def _error(self, batch: int) -> Tensor:
        output = self.view.forward(self.view.inputs[batch], batch)
        squared = (output.float() - self.view.targets[batch].float()).square()
        if self.view.masks is None:
            return squared.mean()
        mask = self.view.masks[batch].to(squared.device)
        # A batch of which no token counts teaches nothing.
        return squared[mask].sum() / max(int(mask.sum()) * squared.shape[-1], 1)
