"""What each scheme would cost each layer, in nats per token, without running the model again.

A weight that changes by dW moves the layer's outputs by dW x. To second order the divergence of the
model's predictions from its own is 1/2 the mean of (g . dW x)^2, where g is the gradient, at the
layer's outputs, of -log p of a token drawn from the model itself (the Fisher information; drawn
tokens and not the text's make it so). With the outputs' gradients and the inputs taken as
uncorrelated,

    KL = 1/2 * tokens/predictions * sum over rows n of E[g_n^2] * dW_n H dW_n^T

so one backward pass gives E[g^2] for every layer, and then a scheme costs one quantization of the
weight. The values add up over layers. `docs/design/allocation.md` compares them with divergences
that were measured by quantizing one layer at a time.

The pass works block by block. On the way up only the inputs of each block are kept; on the way down
a block is loaded again, run with gradients, and the gradient of its inputs is handed on. The model
is never whole in memory: one block, its H matrices, and the hidden states of all blocks.

References: Kunstner et al. 2019 (Fisher information by sampled labels); Martens and Grosse 2015
(inputs and gradients taken as independent); Frantar et al. 2022 (H).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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

# Elements of dW that are multiplied by H at once.
_CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Sensitivities:
    """Predicted divergence of each option of each module.

    Args:
        losses: module name -> scheme -> mean KL(original || quantized) in nats per token, if
            nothing else were quantized.
        guessed: names of modules that no token reached: they have the mean loss of all others per
            weight.
    """

    losses: dict[str, dict[str, float]]
    guessed: tuple[str, ...] = ()


@dataclass
class _Meter:
    """What is summed over tokens for one block.

    Args:
        groups: names of linear layers that share their input.
        hessians: first name of a group -> accumulator of H.
        gradients: module name -> sum of g^2, float32 `[out_features]`.
        tokens: module name -> vectors seen.
    """

    groups: list[list[str]]
    hessians: dict[str, HessianAccumulator] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def watch(self, modules: Mapping[str, nn.Module]) -> list[Any]:
        """Returns handles of hooks that fill the meter in every forward and backward pass."""
        firsts = {group[0] for group in self.groups}
        handles: list[Any] = []
        for name, module in modules.items():
            if name in firsts:
                handles.append(module.register_forward_pre_hook(self._input_hook(name)))
            handles.append(module.register_forward_hook(self._output_hook(name)))
        return handles

    def _input_hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if name not in self.hessians:
                width = weight_shape(module)[1]
                self.hessians[name] = HessianAccumulator(width, args[0].device)
            self.hessians[name].add(args[0])

        return hook

    def _output_hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def add(gradient: Tensor) -> None:
            squares = gradient.detach().float().square().reshape(-1, gradient.shape[-1])
            total = squares.sum(0)
            self.gradients[name] = self.gradients.get(name, torch.zeros_like(total)) + total
            self.tokens[name] = self.tokens.get(name, 0) + squares.shape[0]

        def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(add)

        return hook


class SensitivityRun:
    """Measures a decoder that is used for nothing else.

    Args:
        decoder: the streamed model; pieces of it are loaded and freed.
        batches: tokens, int64 `[batch, seqlen]` each.
        masks: bool of the same shapes, True for tokens whose prediction counts; None counts all.
        modules: names of linear layers in the blocks.
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
        modules: Sequence[str],
        options: Sequence[Scheme],
        algorithm: Algorithm,
        seed: int,
        progress: RunProgress,
    ) -> None:
        self.decoder, self.batches, self.masks = decoder, list(batches), masks
        self.modules, self.options = list(modules), list(options)
        self.algorithm, self.seed, self.progress = algorithm, seed, progress
        self._predictions = 0

    def measure(self) -> Sensitivities:
        """Returns the loss of every option of every module.

        Raises:
            LowbitError: if gradients are not finite, or no token reached any module.
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
        losses: dict[str, dict[str, float]] = {}
        for index in reversed(range(depth)):
            self.progress.describe(f"sensitivities, backward {index + 1}/{depth}")
            self._load_block(index)
            losses |= self._measure_block(index, inputs.pop(), activations, gradients)
            self._free_block(index)
        return self._complete(losses)

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
                self._predictions += int(counted.sum())
            else:
                self._predictions += nll.numel()
            (gradient,) = torch.autograd.grad(nll.sum(), leaf)
            if not bool(gradient.isfinite().all()):
                raise LowbitError(
                    "bit allocation: gradients of the model's predictions are not finite; run it "
                    "in bfloat16 or float32, or give other calibration text"
                )
            gradients.append(gradient)
        decoder.free(decoder.model.get_output_embeddings())
        return gradients

    def _measure_block(
        self, index: int, inputs: list[Tensor], calls: Activations, gradients: list[Tensor]
    ) -> dict[str, dict[str, float]]:
        """Returns the losses of block `index`, and turns `gradients` into those of its inputs."""
        block, prefix = self.decoder.layers[index], self.decoder.block_name(index) + "."
        modules = {
            name: self.decoder.model.get_submodule(name)
            for name in self.modules
            if name.startswith(prefix)
        }
        device = self.decoder.device

        def run(hidden: Tensor, batch: int) -> Tensor:
            return call_block(block, hidden, calls.calls[batch][index])

        first = inputs[0].to(device)
        meter = _Meter(input_groups(lambda: run(first, 0), modules) if modules else [])
        handles = meter.watch(modules)
        try:
            for batch, states in enumerate(inputs):
                leaf = states.to(device).requires_grad_(True)
                output = run(leaf, batch)
                (gradients[batch],) = torch.autograd.grad(output, leaf, gradients[batch])
        finally:
            for handle in handles:
                handle.remove()
        losses: dict[str, dict[str, float]] = {}
        for group in meter.groups:
            reached = [name for name in group if name in meter.gradients]
            statistics = meter.hessians[group[0]].statistics() if reached else None
            for name in reached:
                assert statistics is not None
                losses[name] = self._losses(modules[name], statistics, meter.gradients[name])
        return losses

    def _losses(
        self, module: nn.Module, statistics: Statistics, squares: Tensor
    ) -> dict[str, float]:
        """Returns the loss of each option for one module.

        Args:
            module: loaded.
            statistics: of its inputs.
            squares: sum of g^2 over tokens, float32 `[out_features]`.
        """
        parameter = module.weight
        assert isinstance(parameter, nn.Parameter)
        weight = (parameter.T if weight_is_transposed(module) else parameter).detach().float()
        losses = {}
        for scheme in self.options:
            result = self.algorithm.quantize(weight, scheme, statistics)
            error = weight - result.grid.dequantize(result.codes)
            moved = _output_errors(error, statistics.hessian)
            losses[str(scheme)] = float((moved * squares).sum()) / (2 * self._predictions)
        return losses

    def _complete(self, losses: dict[str, dict[str, float]]) -> Sensitivities:
        """Returns the losses in the model's order, with those of unreached modules guessed."""
        model = self.decoder.model
        sizes = {name: model.get_submodule(name).weight.numel() for name in self.modules}
        if not losses:
            raise LowbitError("bit allocation: no calibration token reached any layer")
        reached = sum(sizes[name] for name in losses)
        guessed = tuple(name for name in self.modules if name not in losses)
        per_weight = {
            str(s): sum(found[str(s)] for found in losses.values()) / reached for s in self.options
        }
        complete = {
            name: losses.get(name) or {s: loss * sizes[name] for s, loss in per_weight.items()}
            for name in self.modules
        }
        return Sensitivities(complete, guessed)


def _draw(log_p: Tensor, generator: torch.Generator) -> Tensor:
    """Returns a token drawn from each distribution `[..., vocab]`, int64 `[..., 1]`.

    By the inverse of the cumulative distribution: one random number each, drawn on the CPU, so that
    devices agree.
    """
    uniform = torch.rand((*log_p.shape[:-1], 1), generator=generator).to(log_p.device)
    cumulative = log_p.exp().cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform * cumulative[..., -1:])
    return drawn.clamp_(max=log_p.shape[-1] - 1)


def _output_errors(error: Tensor, hessian: Tensor) -> Tensor:
    """Returns dW_n H dW_n^T for each row, float32 `[N]`, of `error` `[N, K]`."""
    rows = max(1, _CHUNK_ELEMENTS // error.shape[1])
    return torch.cat([((part @ hessian) * part).sum(1) for part in error.split(rows)])
