"""One decoder block during a run, as folding and tuning see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from lowbit.scheme import Scheme


@dataclass(frozen=True)
class BlockView:
    """A loaded block with everything that calibration knows about it.

    Args:
        name: of the block in the model.
        module: the block, its weights on the device of the run.
        schemes: full module name -> scheme of what is quantized in it.
        inputs: what enters the block in the model quantized so far, `[batch, seqlen, hidden]` for
            every batch.
        targets: what the block returns in the full-precision model, the same shapes.
        forward: (hidden states, index of the batch) -> output of `module` as it is now, called
            with the block's own arguments; gradients are recorded where they are enabled.
        masks: which tokens count, bool `[batch, seqlen]` for every batch; None where all do.
    """

    name: str
    module: nn.Module
    schemes: dict[str, Scheme]
    inputs: list[Tensor]
    targets: list[Tensor]
    forward: Callable[[Tensor, int], Tensor]
    masks: list[Tensor] | None = None

    def linear(self, name: str) -> nn.Module:
        """Returns the module with the full name `name`, which is inside the block."""
        found: nn.Module = self.module.get_submodule(name.removeprefix(self.name + "."))
        return found
