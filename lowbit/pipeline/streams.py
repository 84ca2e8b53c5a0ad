"""The hidden states between two blocks, in the model quantized so far and in the original.

Both models get the same tokens and, block by block, the same arguments; what differs is the hidden
states, so the second stream costs them once more, a second run of each block, and a copy of the one
block that is in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.calibration.capture import Reference
from lowbit.models.streaming import Activations, BlockCall, StreamedDecoder, call_block


class Streams:
    """The inputs of the piece that comes next.

    Args:
        decoder: the streamed model.
        batches: calibration tokens, int64 `[batch, seqlen]` each; empty to run nothing.
        with_reference: carry the hidden states of the full-precision model as well.

    Attributes:
        targets: what the full-precision block that `observe` saw returns; empty without reference.
    """

    def __init__(
        self, decoder: StreamedDecoder, batches: list[Tensor], with_reference: bool
    ) -> None:
        self.decoder, self.batches = decoder, batches
        self.with_reference = with_reference and bool(batches)
        self.targets: list[Tensor] = []
        self._activations: Activations | None = None
        self._reference: Activations | None = None
        self._block_copy: nn.Module | None = None

    @property
    def inputs(self) -> Activations:
        """What the quantized model sends to the next block."""
        if self._activations is None:
            raise AssertionError("the pieces before this one did not run")
        return self._activations

    def call(self, block: int, batch: int) -> BlockCall:
        """Returns the arguments of block `block`, its hidden states apart, for one batch."""
        return self.inputs.calls[batch][block]

    def observe(self, block: int | None) -> None:
        """Runs the full-precision model through a piece that is loaded and not yet changed.

        Args:
            block: index of the block, None for what is before or after the blocks.
        """
        if not self.with_reference:
            return
        if block is None:
            if self._reference is None:
                self._reference = self.decoder.start(self.batches)
            return
        reference = self._require_reference()
        self.targets = [
            self.decoder.run_block(block, reference, batch) for batch in range(len(self.batches))
        ]

    def keep_block(self, block: int) -> nn.Module:
        """Returns a copy of the loaded block, which stays until `advance`."""
        self._block_copy = copy.deepcopy(self.decoder.layers[block]).requires_grad_(False)
        return self._block_copy

    def runner(self, block: int | None) -> Callable[[int], Any]:
        """Returns what runs the piece as it is, on the batch of an index."""
        inputs = self.inputs
        if block is None:
            return lambda batch: self.decoder.run_tail(inputs, batch)
        return lambda batch: self.decoder.run_block(block, inputs, batch)

    def reference(self, name: str, block: int | None) -> Reference:
        """Returns the module `name` as it works in the full-precision model.

        For a module in a block, `keep_block` made the copy in which it is looked up.
        """
        reference = self._require_reference()
        if block is None:
            module = self.decoder.model.get_submodule(name)
            return Reference(lambda batch: self.decoder.run_tail(reference, batch), module)
        assert self._block_copy is not None
        kept = self._block_copy
        module = kept.get_submodule(name.removeprefix(self.decoder.block_name(block) + "."))

        def run(batch: int) -> Tensor:
            with torch.no_grad():
                return call_block(kept, reference.hidden[batch], self.call(block, batch))

        return Reference(run, module)

    def advance(self, block: int | None) -> None:
        """Runs the quantized model through a piece, so that the next one sees what it will see."""
        self._block_copy = None
        if block is None:
            self._activations = self.decoder.start(self.batches)
            if self._reference is not None:
                self._reference.calls = self._activations.calls  # equal, and large
            return
        for batch in range(len(self.batches)):
            self.inputs.hidden[batch] = self.decoder.run_block(block, self.inputs, batch)
        if self.with_reference:
            self._require_reference().hidden[:] = self.targets
            self.targets = []

    def _require_reference(self) -> Activations:
        if self._reference is None:
            raise AssertionError("the pieces before this one did not run at full precision")
        return self._reference
