"""What a merge has changed: base + adapter, as PEFT computes it, against the merged checkpoint.

PEFT is the independent side: it adds the adapter's product to what the base's layers return, and
never sees a merged weight.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowbit.calibration.tokens import TokenWindows
from lowbit.errors import LowbitError
from lowbit.hf.loading import load_model
from lowbit.models.foreign import one_sentence

if TYPE_CHECKING:
    from lowbit_eval import EvaluationResult


@dataclass(frozen=True)
class Measured:
    """How far a model is from what it was made of, on held-out text.

    Args:
        kl: mean KL(before || after), nats per token; before a merge there were base + adapter.
        kl_error: its standard error over windows; None for one window.
        perplexity_before: of the original.
        perplexity_after: of the model.
        flips: share of tokens whose most likely successor changed.
        predictions: tokens behind each mean.
        text: what was measured on.
        token_digest: SHA-256 of the ids.
    """

    kl: float
    kl_error: float | None
    perplexity_before: float
    perplexity_after: float
    flips: float
    predictions: int
    text: str
    token_digest: str

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values."""
        return asdict(self)

    @staticmethod
    def of(result: EvaluationResult, text: str) -> Measured:
        """Returns what counts of an evaluation against an original, on the text of that name."""
        divergence, perplexity_before = result.divergence, result.base_perplexity
        assert divergence is not None
        assert perplexity_before is not None
        return Measured(
            kl=divergence.mean.mean,
            kl_error=divergence.mean.standard_error,
            perplexity_before=perplexity_before.perplexity,
            perplexity_after=result.perplexity.perplexity,
            flips=divergence.flips.mean,
            predictions=result.predictions,
            text=text,
            token_digest=result.token_digest,
        )


def measure(
    base: str,
    adapter: Path,
    merged: Path,
    windows: TokenWindows,
    text: str,
    dtype: str,
    device: torch.device,
    advance: Callable[[], None],
) -> Measured:
    """Returns what merging has changed; both models are in memory, as for `lowbit eval --against`.

    Args:
        base: 16-bit model or checkpoint of ours.
        adapter: folder of the adapter.
        merged: the result.
        windows: of the held-out text.
        text: its name.
        dtype: of both models' arithmetic; "auto", as each is stored.
        device: where both are run.
        advance: called after each window.

    Raises:
        LowbitError: PEFT is not installed or refuses the adapter, or a model gives NaN.
    """
    from lowbit_eval import evaluate

    before = load_adapted(base, adapter, dtype, device)
    after = load_model(str(merged), dtype, device)
    result = evaluate(after, windows, before, advance=advance)
    return Measured.of(result, text)


def load_adapted(base: str, adapter: Path, dtype: str, device: torch.device) -> nn.Module:
    """Returns the model of `base` with PEFT's layers of `adapter` on it, in evaluation mode.

    Raises:
        LowbitError: PEFT is not installed, or one of them cannot be loaded.
    """
    require_peft()
    from peft import PeftModel

    model = load_model(base, dtype, device)
    with one_sentence(str(adapter), "adapter"):
        adapted: nn.Module = PeftModel.from_pretrained(model, str(adapter)).eval()
    return adapted


def require_peft() -> None:
    """Refuses to measure where PEFT is not installed.

    Raises:
        LowbitError: saying how to go on.
    """
    with suppress(ImportError):
        import peft  # noqa: F401

        return
    raise LowbitError(
        "measuring a merge runs base and adapter by PEFT, which is not installed; `pip install "
        "peft`, or merge without measuring (--no-measure)"
    )
