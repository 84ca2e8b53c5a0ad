"""The same few tokens through a checkpoint's decoded weights and through our kernels.

    files -> codes, grid -> float32 -> the model's own layers  ->  hidden states, logits
    files -> transformers' loader -> our modules -> kernels    ->  hidden states, logits

Both sides go through the model block by block, so that one block of each is in memory. Both get the
states that the decoded weights gave: rounding then does not add up over the blocks, where a deep
model may blow it up, and one tolerance is for all of them. What is compared is what a block adds to
a token's state: against the state itself, a late block would hide behind the sum of those before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError
from lowbit.memory import release_freed_memory
from lowbit.models.streaming import Activations, StreamedDecoder
from lowbit.nn.linear import TiedQuantLinear
from lowbit.nn.stored import StoredWeight
from lowbit.progress import RunProgress
from lowbit.quant import quantize_activations
from lowbit.verification.decoded import Inspector

# One prompt of so many tokens: enough for a median, and more than one launch holds as a decode.
TOKENS = 16
SEED = 20
# Largest difference of the median token, by the dtype in which our kernels compute. They round
# activations to 16 bits, or to 8 where the scheme says so: there a value at a tie goes elsewhere,
# and may take others with it inside of the block.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
ROUNDED_TOLERANCE = 0.1


@dataclass(frozen=True)
class Outcome:
    """What the two sides gave.

    Args:
        logits: of the decoded weights, float32 `[tokens, vocabulary]`.
        difference: of the logits, relative, of the median token; None without kernels.
        worst: largest difference of a block.
    """

    logits: Tensor
    difference: float | None
    worst: float | None


def probe_ids(decoder: StreamedDecoder) -> Tensor:
    """Returns int64 `[1, TOKENS]`, the same for every checkpoint of a vocabulary."""
    config = decoder.model.config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None) or TOKENS
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(config.vocab_size, (1, min(TOKENS, longest)), generator=generator)


def run_probe(
    reference: StreamedDecoder,
    kernels: StreamedDecoder | None,
    inspector: Inspector,
    bar: RunProgress,
) -> Outcome:
    """Returns the outcome of running both sides.

    Args:
        reference: of decoded weights.
        kernels: of our modules, None where nothing is quantized or nothing here runs it.
        inspector: knows the scales of activations.
        bar: told about each block.

    Raises:
        LowbitError: naming the block in which they part, or for logits that are no numbers.
    """
    ids = probe_ids(reference)
    sides = [_Side(decoder, ids) for decoder in (reference, kernels) if decoder is not None]
    rounds = any(s.scheme.activations for s in inspector.subject.modules.values())
    tolerance = TOLERANCE[sides[-1].decoder.dtype]
    tolerance = max(tolerance, ROUNDED_TOLERANCE) if rounds else tolerance
    with _rounding(reference, inspector):
        for side in sides:
            side.start()
        worst = sides[0].distance(sides[-1], tolerance) if len(sides) == 2 else None
        sides[-1].follow(sides[0])
        for index in range(len(reference.layers)):
            bar.describe(f"comparing block {index + 1:<6}")
            added = [side.advance(index) for side in sides]
            sides[-1].follow(sides[0])
            if len(added) == 2:
                name = reference.block_name(index)
                worst = max(worst or 0.0, _require_near(name, added[0], added[1], tolerance))
            bar.advance(1)
        logits = [side.logits() for side in sides]
    if not bool(torch.isfinite(logits[0]).all()):
        raise LowbitError("the logits of the decoded weights are NaN or Inf")
    difference = None
    if len(logits) == 2:
        difference = _require_near("the logits", logits[0], logits[1], tolerance)
    return Outcome(logits[0], difference, worst)


def compare_with_model(model: nn.Module, ids: Tensor, logits: Tensor) -> float:
    """Returns how far the logits of a model in memory are from `logits`, relative.

    Raises:
        LowbitError: further than its arithmetic explains.
    """
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    with torch.inference_mode():
        own = model(input_ids=ids.to(parameter.device), use_cache=False).logits[0].float().cpu()
    tolerance = TOLERANCE.get(parameter.dtype, TOLERANCE[torch.bfloat16])
    return _require_near("the logits of the model in memory", logits, own, tolerance)


class _Side:
    """One decoder on its way through the blocks."""

    def __init__(self, decoder: StreamedDecoder, ids: Tensor) -> None:
        self.decoder, self.ids = decoder, ids
        blocks = [decoder.block_name(index) for index in range(len(decoder.layers))]
        head = decoder.head_name
        inside = {t for name in [*blocks, *([head] if head else [])] for t in decoder.targets(name)}
        self._outside = [target for target in decoder.sources if target not in inside]
        self._activations = Activations()

    def start(self) -> None:
        """Computes what goes into the first block."""
        self.decoder.load(self._outside)
        self._activations = self.decoder.start([self.ids])
        embedding = self.decoder.model.get_input_embeddings()
        if not isinstance(embedding, StoredWeight):
            self.decoder.free(embedding)  # one that is quantized is small, and may be the head too
        release_freed_memory()

    def distance(self, other: _Side, tolerance: float) -> float:
        """Returns how far the states of another side are from its own, relative."""
        own, others = (side._activations.hidden[0][0].cpu() for side in (self, other))
        return _require_near("the embedding", own, others, tolerance)

    def advance(self, index: int) -> Tensor:
        """Runs a block and returns what it added, float32 `[tokens, hidden]`."""
        decoder, before = self.decoder, self._activations.hidden[0]
        decoder.load(decoder.targets(decoder.block_name(index)))
        after = decoder.run_block(index, self._activations, 0)
        decoder.free(decoder.layers[index])
        release_freed_memory()
        self._activations.hidden[0] = after
        return (after.float() - before.float())[0].cpu()

    def follow(self, reference: _Side) -> None:
        """Goes on with the states of the reference."""
        self._activations.hidden[0] = reference._activations.hidden[0].to(self.decoder.dtype)

    def logits(self) -> Tensor:
        """Returns the logits, float32 `[tokens, vocabulary]`."""
        decoder = self.decoder
        head: Any = decoder.model.get_output_embeddings()
        if head is not None and not isinstance(head, TiedQuantLinear):
            targets = decoder.targets(decoder.head_name or "")
            decoder.load(targets)
            if f"{decoder.head_name}.weight" not in targets and not isinstance(head, StoredWeight):
                decoder.load_tied_head()
        with torch.no_grad():
            logits = decoder.logits(self._activations.hidden[0])[0].float().cpu()
        decoder.free(decoder.model)
        release_freed_memory()
        return logits


@contextmanager
def _rounding(reference: StreamedDecoder, inspector: Inspector) -> Iterator[None]:
    """Rounds the inputs of the reference's layers where the scheme rounds activations."""
    handles = []
    for name, stored in inspector.subject.modules.items():
        if stored.scheme.activations is None:
            continue

        def round_input(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> Any:
            codes, scales = quantize_activations(args[0], inspector.input_scales.get(name))
            return ((codes * scales).to(args[0].dtype), *args[1:])

        module = reference.model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(round_input))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _require_near(what: str, expected: Tensor, found: Tensor, tolerance: float) -> float:
    """Returns the relative difference of the median token.

    Raises:
        LowbitError: it is above `tolerance`, or no number.
    """
    norms = torch.linalg.vector_norm(expected.double(), dim=-1).clamp_min(1e-30)
    distance = torch.linalg.vector_norm(found.double() - expected.double(), dim=-1)
    difference = float((distance / norms).median())
    if not difference <= tolerance:
        raise LowbitError(
            f"{what} of the loaded model differs from what the decoded weights give by "
            f"{difference:.2g} of its size, more than {tolerance:g}"
        )
    return difference
