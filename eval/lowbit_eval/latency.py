"""How fast a model reads a prompt and writes tokens, beside the same model in 16 bits.

Both models are measured in turns, so that whatever else the machine does meets both; what is
compared are medians. The key-value cache is static: a step costs the same from the first to the
last token, and nothing is allocated for it.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Batches that are tried for the one from which 16 bits are faster.
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
STEPS_PER_BATCH = 3


@dataclass(frozen=True)
class Latency:
    """What one model did.

    Args:
        prefill_tokens_per_second: prompt tokens, median over the rounds.
        decode_tokens_per_second: one over the median step.
        p50_ms: median time of a decoding step, milliseconds.
        p90_ms: nine of ten steps took no longer.
        p99_ms: 99 of 100 took no longer.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    p50_ms: float
    p90_ms: float
    p99_ms: float

    @staticmethod
    def of(prompt_tokens: int, prefills: Sequence[float], steps: Sequence[float]) -> Latency:
        """Returns the summary of prefill and step times, both in seconds."""
        ordered = sorted(steps)
        p50, p90, p99 = (1e3 * _quantile(ordered, share) for share in (0.5, 0.9, 0.99))
        return Latency(prompt_tokens / statistics.median(prefills), 1e3 / p50, p50, p90, p99)


@dataclass(frozen=True)
class Comparison:
    """The quantized model and, where it was asked for, the same one in 16 bits.

    Args:
        quantized: of the model as stored.
        baseline: of the 16-bit one, or None.
        step_ratio: batch -> median time of a 16-bit step over that of a quantized step.
    """

    quantized: Latency
    baseline: Latency | None
    step_ratio: dict[int, float]

    def to_dict(self) -> dict[str, Any]:
        """Returns the result for JSON."""
        return {**dataclasses.asdict(self), "baseline_wins_from_batch": self.baseline_wins_from}

    @property
    def baseline_wins_from(self) -> int | None:
        """The smallest batch tried at which 16 bits are faster; None if they never are."""
        return next((batch for batch, ratio in self.step_ratio.items() if ratio < 1), None)


@dataclass(frozen=True)
class Workload:
    """What is measured.

    Args:
        prompt_tokens: read at once.
        new_tokens: written one by one, at least 2.
        rounds: times that both are repeated.
        batches: for the comparison of steps, ascending.
        seed: of the token ids, which are random.
    """

    prompt_tokens: int = 512
    new_tokens: int = 64
    rounds: int = 3
    batches: tuple[int, ...] = BATCHES
    seed: int = 0


def compare(
    quantized: nn.Module,
    baseline: nn.Module | None,
    work: Workload,
    advance: Callable[[], None] = lambda: None,
) -> Comparison:
    """Returns times of both models, measured in turns, after one round that warms up.

    Args:
        quantized: a causal language model in evaluation mode.
        baseline: the same with 16-bit weights, or None.
        work: what to measure.
        advance: called after each of `pieces_of(work, ...)` pieces of work.
    """
    models = [quantized] if baseline is None else [quantized, baseline]
    prefills: list[list[float]] = [[] for _ in models]
    steps: list[list[float]] = [[] for _ in models]
    generator = torch.Generator().manual_seed(work.seed)
    for number in range(work.rounds + 1):
        for i, model in enumerate(models):
            length = work.prompt_tokens + work.new_tokens
            session = Session(model, 1, length, generator)
            prefill = session.step(work.prompt_tokens)
            times = [session.step(1) for _ in range(work.new_tokens - 1)]
            if number:
                prefills[i].append(prefill)
                steps[i] += times
            advance()
    results = [
        Latency.of(work.prompt_tokens, *times) for times in zip(prefills, steps, strict=True)
    ]
    ratios: dict[int, float] = {}
    if baseline is not None:
        for batch in work.batches:
            ratios[batch] = _step_ratio(quantized, baseline, batch, generator)
            advance()
    return Comparison(results[0], results[1] if baseline is not None else None, ratios)


def pieces_of(work: Workload, with_baseline: bool) -> int:
    """Returns how often `compare` calls `advance`."""
    models = 2 if with_baseline else 1
    return (work.rounds + 1) * models + (len(work.batches) if with_baseline else 0)


def warm_up(model: nn.Module, work: Workload) -> None:
    """Reads the prompt and writes two tokens, after which the memory in use is at its peak."""
    length = work.prompt_tokens + work.new_tokens
    session = Session(model, 1, length, torch.Generator().manual_seed(work.seed))
    for tokens in (work.prompt_tokens, 1, 1):
        session.step(tokens)


class Session:
    """One batch of sequences in a model's static cache."""

    def __init__(
        self, model: nn.Module, batch: int, length: int, generator: torch.Generator
    ) -> None:
        from transformers import StaticCache

        self._model, self._batch, self._generator = model, batch, generator
        self._device: torch.device = model.device  # type: ignore[assignment]
        self._cache = StaticCache(config=model.config, max_cache_len=length)

    def step(self, tokens: int) -> float:
        """Runs `tokens` random tokens per sequence; returns the seconds it took."""
        ids = self._random_ids(tokens).to(self._device)
        self._synchronize()
        start = time.perf_counter()
        with torch.no_grad():  # as in `generate`; in inference mode siblings run one by one
            logits: Tensor = self._model(
                input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1
            ).logits
            logits.argmax(-1)
        self._synchronize()
        return time.perf_counter() - start

    def _random_ids(self, tokens: int) -> Tensor:
        vocabulary = self._model.config.get_text_config(decoder=True).vocab_size  # type: ignore
        return torch.randint(vocabulary, (self._batch, tokens), generator=self._generator)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _step_ratio(
    quantized: nn.Module, baseline: nn.Module, batch: int, generator: torch.Generator
) -> float:
    """Returns the time of a 16-bit decoding step over that of a quantized one, short context."""
    sessions = [
        Session(model, batch, 2 * STEPS_PER_BATCH + 2, generator) for model in (quantized, baseline)
    ]
    times: list[list[float]] = [[], []]
    for number in range(STEPS_PER_BATCH + 1):
        for i, session in enumerate(sessions):
            seconds = session.step(1)
            if number:
                times[i].append(seconds)
    return statistics.median(times[1]) / statistics.median(times[0])


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Returns the smallest value that at least `share` of the sorted values do not exceed."""
    return ordered[max(0, math.ceil(len(ordered) * share) - 1)]
