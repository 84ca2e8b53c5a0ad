"""One evaluation: a model, optionally beside its original, on the same windows.

Both models see a window before the next one starts, so the logits of at most one window pair are
alive, and a run that is interrupted has lost nothing but time.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

import lowbit
from lowbit.calibration.tokens import TokenWindows
from lowbit.errors import LowbitError
from lowbit_eval.divergence import Divergence, divergence
from lowbit_eval.perplexity import Perplexity, PerplexityRatio, perplexity, perplexity_ratio
from lowbit_eval.scores import Scores, score_window
from lowbit_eval.size import CheckpointSize
from lowbit_eval.slices import Slice, slice_scores
from lowbit_eval.speed import Speed, SpeedMeter

BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class Slicing:
    """Which slices to report.

    Args:
        labels: one for each document of the windows; None reports by document.
    """

    labels: Sequence[str] | None = None


@dataclass(frozen=True)
class EvaluationResult:
    """Everything that was measured, and what it was measured on.

    Args:
        windows: windows evaluated.
        seqlen: tokens in each.
        predictions: `windows * (seqlen - 1)`, the tokens behind every mean.
        token_digest: SHA-256 of the ids; two results compare only where it agrees.
        perplexity: of the model.
        base_perplexity: of the baseline; None without one, as the next two.
        perplexity_ratio: model by baseline.
        divergence: from the baseline.
        slices: the worst first; empty where none were asked for.
        speed: of the model's forward passes.
        size: of the checkpoint on disk, where the caller measured it.
        environment: device, dtypes, threads and versions.
    """

    windows: int
    seqlen: int
    predictions: int
    token_digest: str
    perplexity: Perplexity
    base_perplexity: Perplexity | None
    perplexity_ratio: PerplexityRatio | None
    divergence: Divergence | None
    slices: tuple[Slice, ...]
    speed: Speed
    size: CheckpointSize | None
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values; what is infinite is None, which JSON can write."""
        fields: dict[str, Any] = _jsonable(asdict(self))
        return fields


def evaluate(
    model: nn.Module,
    windows: TokenWindows,
    against: nn.Module | None = None,
    slicing: Slicing | None = None,
    size: CheckpointSize | None = None,
    advance: Callable[[], None] | None = None,
) -> EvaluationResult:
    """Returns the scores of `model` on `windows`, beside those of `against` where it is given.

    Args:
        model: a causal language model on its device, in evaluation mode.
        windows: at least one.
        against: the full-precision original.
        slicing: adds scores by document or label.
        size: passed through to the result.
        advance: called after each window.

    Raises:
        LowbitError: NaN logits, vocabularies that differ, or slices without known documents.
    """
    device = next(model.parameters()).device
    meter = SpeedMeter(device)
    by_window: list[Scores] = []
    for ids in windows.ids:
        with meter.measure(len(ids)):
            logits = window_logits(model, ids)
        base_logits = None if against is None else window_logits(against, ids)
        by_window.append(score_window(ids, logits, base_logits))
        # Freed before the next pass, not during it: a third set of logits would set the peak.
        del logits, base_logits
        if advance is not None:
            advance()
    scores = Scores.stack(by_window)
    base_nll = scores.base_nll
    return EvaluationResult(
        windows=len(windows),
        seqlen=windows.seqlen,
        predictions=scores.nll.size,
        token_digest=windows.digest,
        perplexity=perplexity(scores.nll, BOOTSTRAP_SEED),
        base_perplexity=None if base_nll is None else perplexity(base_nll, BOOTSTRAP_SEED),
        perplexity_ratio=None
        if base_nll is None
        else perplexity_ratio(scores.nll, base_nll, BOOTSTRAP_SEED),
        divergence=None if base_nll is None else divergence(scores),
        slices=() if slicing is None else slice_scores(scores, windows, slicing.labels),
        speed=meter.result(),
        size=size,
        environment=_environment(model, against),
    )


def window_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Returns the logits `[seqlen, vocabulary]` of int64 `ids` `[seqlen]`, in the model's dtype.

    The cache is turned off in the call, whatever the config says: it would hold every layer's keys
    and values for nothing.

    Raises:
        LowbitError: the device runs out of memory.
    """
    device = next(model.parameters()).device
    try:
        with torch.inference_mode():
            logits: Tensor = model(input_ids=ids[None].to(device), use_cache=False).logits
    except torch.OutOfMemoryError as error:
        raise LowbitError(
            f"{device} has too little memory for a window of {len(ids)} tokens; use shorter ones "
            "(--seqlen) or --device cpu"
        ) from error
    return logits[0]


def _environment(model: nn.Module, against: nn.Module | None) -> dict[str, Any]:
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or "cpu",
        "device_type": device.type,
        "dtype": _dtype_name(model),
        "base_dtype": None if against is None else _dtype_name(against),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {
            "lowbit": lowbit.__version__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
    }


def _dtype_name(model: nn.Module) -> str:
    return str(getattr(model, "dtype", torch.get_default_dtype())).removeprefix("torch.")


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
