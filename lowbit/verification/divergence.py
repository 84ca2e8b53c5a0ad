"""The divergence of a checkpoint from its original, as a check with a limit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lowbit.calibration.tokens import TOKEN_SUFFIXES, TokenWindows
from lowbit.errors import LowbitError
from lowbit.hf.loading import evaluation_windows, load_config, load_model, load_tokenizer
from lowbit.merging.measure import Measured
from lowbit.progress import RunProgress

DEFAULT_TEXT = "pydoc"


@dataclass(frozen=True)
class Comparison:
    """With what a checkpoint is compared, and on what.

    Args:
        against: its original, a folder or a hub name.
        max_kl: limit of the mean divergence, nats per token; None for none.
        text: as for `lowbit eval`; None for CPython's help topics.
        seqlen: tokens in a window; None for 2048, or the model's longest.
        windows: at most so many.
        ids: the text as token ids, None until it was opened.
    """

    against: str
    max_kl: float | None = None
    text: str | None = None
    seqlen: int | None = None
    windows: int = 16
    ids: TokenWindows | None = None

    def opened(self, path: str) -> Comparison:
        """Returns the same with its text, so that bad input is found before the checks run.

        Args:
            path: the checkpoint. What is wrong with that itself is for the checks to say.

        Raises:
            LowbitError: the original or the text is unusable, or their vocabularies differ.
        """
        vocab_size = load_config(self.against).vocab_size
        text = self.text or DEFAULT_TEXT
        try:
            load_config(path)
            if Path(text).suffix.lower() not in TOKEN_SUFFIXES:
                load_tokenizer(path)
        except LowbitError:
            return self
        ids = evaluation_windows(path, text, self.seqlen, self.windows)
        if int(ids.ids.max()) >= vocab_size:
            raise LowbitError(
                f"--against {self.against}: its vocabulary of {vocab_size} lacks tokens of the "
                "model; give the checkpoint that the model was quantized from"
            )
        return replace(self, ids=ids)


def measure_divergence(
    path: str, comparison: Comparison, device: torch.device, bar: RunProgress
) -> Measured:
    """Returns how far the model of `path` is from its original; both are in memory.

    Args:
        path: folder of a checkpoint.
        comparison: with what, and on what.
        device: where both are run.
        bar: told about windows.

    Raises:
        LowbitError: one of them cannot be run, the text is unusable, or their vocabularies differ.
    """
    from lowbit_eval import evaluate

    against, text = comparison.against, comparison.text or DEFAULT_TEXT
    windows = comparison.ids
    if windows is None:  # something is wrong with the model's own files, and nothing saw it
        windows = evaluation_windows(path, text, comparison.seqlen, comparison.windows)
    bar.stage("measuring", len(windows))
    model, original = load_model(path, device=device), load_model(against, device=device)
    result = evaluate(model, windows, original, advance=lambda: bar.advance(1))
    return Measured.of(result, text)


def judge(measured: Measured, max_kl: float | None) -> str:
    """Returns a measurement as words.

    Raises:
        LowbitError: it is above `max_kl`.
    """
    error = "" if measured.kl_error is None else f" \u00b1 {measured.kl_error:.1g}"
    limit = "" if max_kl is None else f", limit {max_kl:g}"
    words = (
        f"KL {measured.kl:.3g}{error} nats per token{limit}; perplexity "
        f"{measured.perplexity_before:.4g} to {measured.perplexity_after:.4g}; flips "
        f"{measured.flips:.2%}; {measured.text}, {measured.predictions:,} tokens"
    )
    if max_kl is not None and not measured.kl <= max_kl:
        raise LowbitError(f"above the limit: {words}")
    return words
