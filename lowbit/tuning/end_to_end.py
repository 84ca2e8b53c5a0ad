"""End-to-end tuning: the scales of a finished checkpoint, trained against the original's logits.

Every step before this one looks at a matrix or at a block; this one sees what the whole model says.
Codes and zero points stay bit for bit, scales (and, on request, the vectors that are not quantized:
norm weights and biases) move to lower the divergence KL(original || quantized) of the next token,
averaged over calibration tokens. The stage is the second one of EfficientQAT (Chen et al. 2024,
sec. 3.3), with the original model's distribution in the place of the text's next token: a teacher
says more per token, and cannot pull the model towards the calibration text.

The original is not in memory beside the quantized model. It runs once, block by block, and what its
last block returns is kept; its final norm and output head make logits of that when they are wanted.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from lowbit.checkpoint.reader import TensorEntry, read_header
from lowbit.models.layers import find_decoder_layers
from lowbit.models.streaming import StreamedDecoder
from lowbit.progress import RunProgress
from lowbit.scheme import Scheme
from lowbit.tuning.packed_model import checkpoint_blocks, packed_model

# Logits that exist at a time, [tokens, vocabulary]; several fp32 tensors of that size do.
_LOGITS = 1 << 26
# Of Adam. Few steps are taken, so the second moment must not remember longer than they last; the
# epsilon stays below any gradient, or it would decide about small ones.
_BETAS, _EPSILON = (0.9, 0.99), 1e-12
# Bits of a code -> learning rate: the coarser the codes, the further scales are from their best.
# The figures behind 2, 3 and 4 bits are in the commit that set them.
_RATES = {2: 7e-3, 3: 3e-3, 4: 1.2e-3, 8: 5e-4}
# Tokens that the original runs at a time.
_TOKENS = 4096


@dataclass(frozen=True)
class TunedScales:
    """What tuning found.

    Args:
        tensors: stored name -> tensor that replaces it, of the same shape and dtype; empty if
            nothing was better than the start (written by `checkpoint/replacement.py`).
        report: `kl_before` and `kl_after` in nats per token on windows that were not trained on,
            `step` of the result, `kept` whether it replaces the start, `judged` (step, KL) of every
            judgement; JSON values.
    """

    tensors: dict[str, Tensor]
    report: dict[str, Any]


@dataclass(frozen=True)
class ScaleTuning:
    """Trains scales end to end by Adam; a step changes a scale by at most about its rate times it.

    Args:
        steps: of the optimizer.
        learning_rate: largest relative step of a scale; None chooses for each layer by its bits.
        vector_rate: the same for norm weights and biases, relative to their RMS; 0 leaves them:
            they fit the calibration text, and the model pays for it on any other.
        batch_windows: calibration windows per step.
        held_out: share of the windows that only judge.
        evaluations: how often the held-out windows judge; the best is kept.
        warmup: share of the steps in which the rate rises, before it falls as a cosine.
        seed: which windows are held out, and the order of the others.
    """

    steps: int = 200
    learning_rate: float | None = None
    vector_rate: float = 0.0
    batch_windows: int = 4
    held_out: float = 0.125
    evaluations: int = 10
    warmup: float = 0.05
    seed: int = 0
    name: ClassVar[str] = "end_to_end"

    def tune(
        self,
        shards: list[Path],
        decoder: StreamedDecoder,
        selected: Mapping[str, Scheme],
        tokens: Tensor,
        progress: RunProgress,
        mask: Tensor | None = None,
    ) -> TunedScales:
        """Returns better scales for the quantized model in `shards`, or none.

        Args:
            shards: the files of the finished checkpoint.
            decoder: the original; its pieces are not touched.
            selected: module name -> scheme of what is quantized.
            tokens: int64 `[windows, seqlen]`.
            progress: told about steps.
            mask: bool `[windows, seqlen]`, the tokens that count; None for all.

        It warns, and the report says under `skipped`, where there is nothing that it could do: for
        a single window, which cannot both be learned from and judge, and for schemes that round
        activations, which this stage does not.
        """
        skipped = _reason_to_skip(selected, len(tokens))
        if skipped is not None:
            warnings.warn(f"end-to-end tuning is left out: {skipped}", stacklevel=2)
            return TunedScales({}, {"kept": False, "skipped": skipped})
        entries = {entry.name: entry for file in shards for entry in read_header(file)}
        return _Tuner(self, decoder, entries, selected, tokens, mask, progress).run()


def _reason_to_skip(selected: Mapping[str, Scheme], windows: int) -> str | None:
    if windows < 2:
        return f"it needs at least 2 calibration windows, got {windows}"
    for name, scheme in selected.items():
        if scheme.activations is not None:
            return f"it is for weight-only schemes, but {scheme} of {name} rounds activations"
    return None


class _Tuner:
    """The state of one run."""

    def __init__(
        self,
        options: ScaleTuning,
        decoder: StreamedDecoder,
        entries: dict[str, TensorEntry],
        selected: Mapping[str, Scheme],
        tokens: Tensor,
        mask: Tensor | None,
        progress: RunProgress,
    ) -> None:
        self.options, self.progress = options, progress
        self.tokens, self.mask = tokens, mask
        evaluations = min(options.evaluations, options.steps)
        self.teacher = Teacher(decoder, tokens, progress)
        self.model, self.weights = packed_model(decoder, entries, selected)
        checkpoint_blocks(find_decoder_layers(self.model)[1])
        self.vectors = []
        if options.vector_rate:
            self.vectors = [
                _Vector(name, parameter, entries[name].dtype)
                for name, parameter in self.model.named_parameters()
                if parameter.ndim == 1 and name in entries
            ]
        self.device = decoder.device
        self.generator = torch.Generator().manual_seed(options.seed)
        order = torch.randperm(len(tokens), generator=self.generator).tolist()
        held = min(max(1, round(options.held_out * len(tokens))), len(tokens) - 1)
        self.held, self.training = order[:held], order[held:]
        vocab = self.teacher.decoder.model.config.get_text_config(decoder=True).vocab_size
        self.together = max(1, _LOGITS // (tokens.shape[1] * vocab))
        self.judged_at = {round(options.steps * (i + 1) / evaluations) for i in range(evaluations)}

    def run(self) -> TunedScales:
        """Returns the best that was seen."""
        options = self.options
        scales = [weight.log_factor.requires_grad_(True) for weight in self.weights]
        changes = [vector.change for vector in self.vectors]
        rates = [options.learning_rate or _RATES[weight.scheme.bits] for weight in self.weights]
        rates += [options.vector_rate] * len(changes)
        parameters: list[Tensor] = [*scales, *changes]
        groups = [{"params": [p]} for p in parameters]
        optimizer = torch.optim.Adam(groups, lr=0.0, betas=_BETAS, eps=_EPSILON)
        self.progress.stage("tuning end to end", options.steps)
        judged = [[0, self.judge()]]
        best_step, best_values, best = 0, [p.detach().clone() for p in parameters], judged[0][1]
        for step, windows in enumerate(self._batches(), 1):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * self._schedule(step)
            self._accumulate(windows)
            optimizer.step()
            optimizer.zero_grad()
            if step in self.judged_at:
                judged.append([step, self.judge()])
                if judged[-1][1] < best:
                    best_step, best = step, judged[-1][1]
                    best_values = [p.detach().clone() for p in parameters]
            self.progress.describe(f"tuning end to end   KL {best:.4f}")
            self.progress.advance(1)
        tensors: dict[str, Tensor] = {}
        if best_step:
            with torch.no_grad():
                for parameter, value in zip(parameters, best_values, strict=True):
                    parameter.copy_(value)
            for weight in self.weights:
                tensors |= weight.tensors()
            for vector in self.vectors:
                tensors |= vector.tensors()
        report = {
            "kl_before": judged[0][1],
            "kl_after": best,
            "step": best_step,
            "kept": best_step > 0,
            "judged": judged,
        }
        return TunedScales(tensors, report)

    def _batches(self) -> Iterator[list[int]]:
        """Yields the windows of each step: all in a new order, and again."""
        queue: list[int] = []
        for _ in range(self.options.steps):
            while len(queue) < self.options.batch_windows:
                order = torch.randperm(len(self.training), generator=self.generator)
                queue += [self.training[i] for i in order.tolist()]
            yield queue[: self.options.batch_windows]
            queue = queue[self.options.batch_windows :]

    def _schedule(self, step: int) -> float:
        """Returns the factor on the rate in step `step` (from 1): up linearly, down as a cosine."""
        rising = max(1, round(self.options.warmup * self.options.steps))
        if step <= rising:
            return step / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / (self.options.steps - rising + 1)))

    def _accumulate(self, windows: list[int]) -> None:
        """Adds the gradient of the mean divergence over `windows`."""
        total = sum(self._count(window) for window in windows)
        for vector in self.vectors:
            vector.put()
        for start in range(0, len(windows), self.together):
            (self._divergence(windows[start : start + self.together]) / max(total, 1)).backward()
        for vector in self.vectors:
            vector.take_gradient()

    @torch.no_grad()
    def judge(self) -> float:
        """Returns the mean divergence over the held-out windows, in nats per token."""
        for vector in self.vectors:
            vector.put()
        total = 0.0
        for start in range(0, len(self.held), self.together):
            total += float(self._divergence(self.held[start : start + self.together]))
        return total / max(sum(self._count(window) for window in self.held), 1)

    def _count(self, window: int) -> int:
        return self.tokens.shape[1] if self.mask is None else int(self.mask[window].sum())

    def _divergence(self, windows: list[int]) -> Tensor:
        """Returns the sum over the tokens of `windows` of KL(original || quantized)."""
        ids = self.tokens[windows].to(self.device)
        logits = self.model(input_ids=ids, use_cache=False).logits
        log_p = log_softmax(self.teacher.logits(windows).float(), -1)
        log_q = log_softmax(logits.float(), -1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        return (kl if self.mask is None else kl[self.mask[windows].to(self.device)]).sum()


class Teacher:
    """The original's logits for every window, from what its last block returned.

    Args:
        decoder: the original; a second one is made of it.
        tokens: int64 `[windows, seqlen]`.
        progress: told about blocks.
    """

    def __init__(self, decoder: StreamedDecoder, tokens: Tensor, progress: RunProgress) -> None:
        fresh = StreamedDecoder(decoder.checkpoint, decoder.dtype, decoder.device)
        self.decoder = fresh
        progress.stage("running the original", len(fresh.layers))
        outside = [n for n in fresh.sources if not n.startswith(fresh.layers_name + ".")]
        fresh.load(outside)
        states = fresh.start(list(tokens.split(max(1, _TOKENS // tokens.shape[1]))))
        for block, layer in enumerate(fresh.layers):
            fresh.load(fresh.targets(fresh.block_name(block)))
            for batch in range(len(states.hidden)):
                states.hidden[batch] = fresh.run_block(block, states, batch)
            fresh.free(layer)
            progress.advance(1)
        self.hidden = torch.cat(states.hidden)
        assert fresh.head_name is not None
        if fresh.targets(fresh.head_name):
            fresh.free(fresh.model.get_input_embeddings())
        else:
            fresh.load_tied_head()

    def logits(self, windows: list[int]) -> Tensor:
        """Returns the logits `[len(windows), seqlen, vocab]`."""
        return self.decoder.logits(self.hidden[windows])


class _Vector:
    """A parameter that is not quantized: `start + RMS(start) * change`, as it would be stored."""

    def __init__(self, name: str, parameter: nn.Parameter, stored: torch.dtype) -> None:
        self.name, self.parameter, self.stored = name, parameter, stored
        self.start = parameter.detach().float().clone()
        self.size = max(float(self.start.square().mean().sqrt()), 1e-3)
        self.change = torch.zeros_like(self.start)
        parameter.requires_grad_(True)

    def value(self) -> Tensor:
        """Returns it in the dtype of the checkpoint."""
        return (self.start + self.size * self.change).to(self.stored)

    def put(self) -> None:
        """Lets the model use the value of now."""
        self.parameter.data.copy_(self.value())

    def take_gradient(self) -> None:
        """Moves the parameter's gradient to `change`."""
        assert self.parameter.grad is not None
        self.change.grad = self.parameter.grad.float() * self.size
        self.parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Returns stored name -> tensor."""
        return {self.name: self.value().cpu()}
