"""What each scheme would cost each layer, in nats per token of the whole model's predictions.

To second order, a change d of what a block returns for a token costs 1/2 E[(g . d)^2], where g is
the gradient, at the block's output, of -log p of tokens *drawn from the model* (the Fisher
information; drawn tokens and not the text's make it so). g takes one backward pass. d takes the
block alone: a group of layers is quantized in it, and it runs again on the same inputs. So all that
the block makes of the error (softmax, gates, the next product) is in it, and what comes after the
block is in g; the rest of the model need not run. Values add up over groups.

The pass works block by block. On the way up only the inputs of each block are kept; on the way down
a block is loaded again, run with gradients, measured, and the gradient of its inputs is handed on.
The model is never whole in memory: one block, its H matrices, and the hidden states of all blocks.
It is computed in float32, because differences of bfloat16 would be rounding.

Reference: Kunstner et al. 2019, "Limitations of the empirical Fisher approximation" (the Fisher
information by sampled labels). `docs/design/allocation.md` has what else was tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.algorithms.base import Algorithm, Statistics
from lowbit.calibration.capture import input_groups
from lowbit.calibration.statistics import HessianAccumulator
from lowbit.errors import LowbitError
from lowbit.memory import release_freed_memory
from lowbit.models.streaming import Activations, StreamedDecoder, call_block
from lowbit.nn.replace import weight_is_transposed, weight_shape
from lowbit.progress import RunProgress
from lowbit.scheme import Scheme


@dataclass(frozen=True)
class Sensitivities:
    """Predicted divergence of each option of each group of layers.

    Args:
        groups: names of the modules that share a scheme.
        losses: for each group, scheme -> mean KL(original || quantized) in nats per token, if
            nothing else were quantized.
        guessed: names of modules that no token reached: they add as much per weight as the rest of
            their group, or as all groups do.
    """

    groups: list[list[str]]
    losses: list[dict[str, float]]
    guessed: list[str]


@dataclass
class _Block:
    """A loaded block while it is measured.

    Args:
        run: the block's output `[batch, seqlen, hidden]` for its input in the batch of an index.
        modules: name -> linear layer to choose a scheme for.
        statistics: module name -> of its inputs, for modules that tokens reached.
        outputs: what the block returns for each batch.
        gradients: of the predictions, by those.
    """

    run: Callable[[int], Tensor]
    modules: dict[str, nn.Module]
    statistics: dict[str, Statistics]
    outputs: list[Tensor]
    gradients: list[Tensor]


class SensitivityRun:
    """Measures a decoder that is used for nothing else.

    Args:
        decoder: the streamed model; pieces of it are loaded and freed.
        batches: tokens, int64 `[batch, seqlen]` each.
        masks: bool of the same shapes, True for tokens whose prediction counts; None counts all.
        groups: names of linear layers that share a scheme, each group in one block.
        options: schemes to measure.
        algorithm: quantizes weights.
        seed: draws tokens from the model's predictions.
        progress: told about blocks.
    """

    def __init__(
        self,
        decoder: StreamedDecoder,
        batches: Sequence[Tensor],
        masks: Sequence[Tensor] | None,
        groups: Sequence[Sequence[str]],
        options: Sequence[Scheme],
        algorithm: Algorithm,
        seed: int,
        progress: RunProgress,
    ) -> None:
        self.decoder, self.batches, self.masks = decoder, list(batches), masks
        self.groups, self.options = [list(group) for group in groups], list(options)
        self.algorithm, self.seed, self.progress = algorithm, seed, progress
        # Predictions in the batches that errors are measured on, and how many batches these are.
        self._predictions = 0
        self._judged = max(1, len(self.batches) // 2)

    def measure(self) -> Sensitivities:
        """Returns the loss of every option of every group.

        Weights are quantized by the inputs in all batches; errors are measured on the first half.

        Raises:
            LowbitError: if gradients are not finite, or no token reached any layer.
        """
        depth = len(self.decoder.layers)
        self.progress.stage("sensitivities", 2 * depth)
        activations = self._start()
        inputs: list[list[Tensor]] = []
        for index in range(depth):
            self.progress.describe(f"sensitivities, forward {index + 1}/{depth}")
            # Kept in main memory: on a GPU it is the blocks that need the room.
            inputs.append([hidden.cpu() for hidden in activations.hidden])
            self._load_block(index)
            for batch in range(len(self.batches)):
                activations.hidden[batch] = self.decoder.run_block(index, activations, batch)
            self._free_block(index)
        gradients = self._tail_gradients(activations.hidden)
        losses: dict[str, dict[str, float]] = {}  # by first module of the group
        guessed: set[str] = set()
        for index in reversed(range(depth)):
            self.progress.describe(f"sensitivities, backward {index + 1}/{depth}")
            self._load_block(index)
            block = self._run_block(index, inputs.pop(), activations, gradients)
            guessed |= block.modules.keys() - block.statistics.keys()
            for group in self.groups:
                if group[0] in block.modules and any(name in block.statistics for name in group):
                    losses[group[0]] = self._group_losses(group, block)
            self._free_block(index)
        return self._complete(losses, guessed)

    def _start(self) -> Activations:
        """Returns the inputs of block 0, with what stands outside the blocks loaded for good."""
        decoder = self.decoder
        blocks = [decoder.block_name(index) + "." for index in range(len(decoder.layers))]
        head = decoder.targets(decoder.head_name) if decoder.head_name else []
        decoder.load(
            [t for t in decoder.sources if t not in head and not t.startswith(tuple(blocks))]
        )
        activations = decoder.start(self.batches)
        decoder.free(decoder.model.get_input_embeddings())
        return activations

    def _load_block(self, index: int) -> None:
        self.decoder.load(self.decoder.targets(self.decoder.block_name(index)))
        self.decoder.layers[index].requires_grad_(False)

    def _free_block(self, index: int) -> None:
        self.decoder.free(self.decoder.layers[index])
        release_freed_memory()
        self.progress.advance(1)

    def _tail_gradients(self, hidden: list[Tensor]) -> list[Tensor]:
        """Returns, for each batch, the gradient of -log p of drawn tokens by the last states."""
        decoder, head = self.decoder, self.decoder.head_name
        if head is None:
            raise LowbitError("bit allocation needs a model with an output head to predict tokens")
        targets = decoder.targets(head)
        decoder.load(targets) if targets else decoder.load_tied_head()
        decoder.model.get_output_embeddings().requires_grad_(False)
        generator = torch.Generator("cpu").manual_seed(self.seed)
        gradients = []
        for batch, states in enumerate(hidden):
            leaf = states.detach().clone().requires_grad_(True)
            log_p = decoder.logits(leaf)[:, :-1].float().log_softmax(-1)
            nll = -log_p.gather(-1, _draw(log_p.detach(), generator)).squeeze(-1)
            if self.masks is not None:
                counted = self.masks[batch][:, 1:].to(nll.device)
                nll = nll * counted
            if batch < self._judged:
                self._predictions += nll.numel() if self.masks is None else int(counted.sum())
            (gradient,) = torch.autograd.grad(nll.sum(), leaf)
            if not bool(gradient.isfinite().all()):
                raise LowbitError(
                    "bit allocation: gradients of the model's predictions are not finite; run it "
                    "in bfloat16 or float32, or give other calibration text"
                )
            gradients.append(gradient)
        decoder.free(decoder.model.get_output_embeddings())
        return gradients

    def _run_block(
        self, index: int, inputs: list[Tensor], calls: Activations, gradients: list[Tensor]
    ) -> _Block:
        """Returns block `index`, run forwards and back; `gradients` become those of its inputs."""
        block, prefix = self.decoder.layers[index], self.decoder.block_name(index) + "."
        names = [name for group in self.groups for name in group if name.startswith(prefix)]
        modules = {name: self.decoder.model.get_submodule(name) for name in names}
        device = self.decoder.device
        leaves = [states.to(device).requires_grad_(True) for states in inputs]

        def run(batch: int) -> Tensor:
            return call_block(block, leaves[batch], calls.calls[batch][index])

        shared = input_groups(lambda: run(0), modules) if modules else []
        hessians: dict[str, HessianAccumulator] = {}
        handles = [
            modules[group[0]].register_forward_pre_hook(_accumulate(hessians, group[0]))
            for group in shared
        ]
        outputs, by_output = [], list(gradients)
        try:
            for batch, leaf in enumerate(leaves):
                output = run(batch)
                (gradients[batch],) = torch.autograd.grad(output, leaf, by_output[batch])
                outputs.append(output.detach())
        finally:
            for handle in handles:
                handle.remove()
        statistics: dict[str, Statistics] = {}
        for group in shared:
            found = hessians[group[0]].statistics()
            statistics |= dict.fromkeys(group, found)
        return _Block(run, modules, statistics, outputs, by_output)

    def _group_losses(self, group: list[str], block: _Block) -> dict[str, float]:
        """Returns the loss of each option for the layers `group`, of which some were reached."""
        reached = [name for name in group if name in block.statistics]
        kept = {name: _weight(block.modules[name]).data for name in reached}
        weights = sum(_weight(block.modules[name]).numel() for name in group)
        scale = weights / sum(weight.numel() for weight in kept.values())
        losses = {}
        for scheme in self.options:
            for name, weight in kept.items():
                transposed = weight_is_transposed(block.modules[name])
                rows = (weight.T if transposed else weight).float()
                result = self.algorithm.quantize(rows, scheme, block.statistics[name])
                decoded = result.grid.dequantize(result.codes).to(weight.dtype)
                _weight(block.modules[name]).data = decoded.T if transposed else decoded
            total = 0.0
            for batch in range(self._judged):
                with torch.no_grad():
                    moved = block.run(batch) - block.outputs[batch]
                total += float((moved * block.gradients[batch]).sum(-1).double().square().sum())
            losses[str(scheme)] = scale * total / (2 * self._predictions)
        for name, weight in kept.items():
            _weight(block.modules[name]).data = weight
        return losses

    def _complete(self, losses: dict[str, dict[str, float]], guessed: set[str]) -> Sensitivities:
        """Returns the losses in the order of the groups, with those of unreached ones guessed."""
        if not losses:
            raise LowbitError("bit allocation: no calibration token reached any layer")
        model = self.decoder.model
        sizes = {
            group[0]: sum(_weight(model.get_submodule(name)).numel() for name in group)
            for group in self.groups
        }
        reached = sum(sizes[first] for first in losses)
        per_weight = {
            str(s): sum(found[str(s)] for found in losses.values()) / reached for s in self.options
        }
        complete = [
            losses.get(first) or {s: loss * sizes[first] for s, loss in per_weight.items()}
            for first in sizes
        ]
        return Sensitivities(self.groups, complete, sorted(guessed))


def _weight(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _accumulate(
    hessians: dict[str, HessianAccumulator], name: str
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """Returns a hook that adds the inputs of the module `name` to its H."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if name not in hessians:
            hessians[name] = HessianAccumulator(weight_shape(module)[1], args[0].device)
        hessians[name].add(args[0])

    return hook


def _draw(log_p: Tensor, generator: torch.Generator) -> Tensor:
    """Returns a token drawn from each distribution `[..., vocab]`, int64 `[..., 1]`.

    By the inverse of the cumulative distribution: one random number each, drawn on the CPU, so that
    devices agree.
    """
    uniform = torch.rand((*log_p.shape[:-1], 1), generator=generator).to(log_p.device)
    cumulative = log_p.exp().cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform * cumulative[..., -1:])
    return drawn.clamp_(max=log_p.shape[-1] - 1)
