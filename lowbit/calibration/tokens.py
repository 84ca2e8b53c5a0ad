"""Token windows: a text, or ids that somebody else has tokenised, cut into equal lengths.

Protocol (P2048 of the GPTQ paper and its successors, for any length): documents are joined by blank
lines and tokenised *once*, with the one BOS token that the tokenizer adds at the start, then cut
into windows of `seqlen` that do not overlap; the tail is dropped. Tokenising window by window
instead would put a BOS into each and split words at their edges.

Conversations are rendered by the tokenizer's chat template and tokenised one by one (`chat.py`),
then laid end to end and cut in the same way. A tokenizer without a template reads them as plain
text, one "role: content" a line.

Each row of a file of token ids (`token_files.py`) is a document of its own and is cut by itself, so
no window crosses a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lowbit.calibration.chat import encode_conversation, has_template
from lowbit.calibration.text import SEPARATOR, Document, read_documents
from lowbit.calibration.token_files import TOKEN_SUFFIXES, read_token_rows
from lowbit.errors import LowbitError

__all__ = [
    "TOKEN_SUFFIXES",
    "CalibrationTokens",
    "TokenWindows",
    "Tokenizer",
    "load_calibration",
    "load_windows",
    "token_digest",
]


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    is_fast: bool

    def __call__(self, text: str, **options: Any) -> Mapping[str, Any]:
        """Returns at least `input_ids`."""
        ...


@dataclass(frozen=True)
class TokenWindows:
    """Every window of a source, in order.

    Args:
        ids: int64 `[windows, seqlen]`.
        documents: names of the documents, in order.
        document_of_token: int32 `[windows, seqlen]`, index into `documents`; None where a slow
            tokenizer cannot tell.
        tokens: tokens found in the source, the dropped tail included.
        mask: bool `[windows, seqlen]`, True for the tokens of answers; None where all count alike.
        templated: conversations were rendered by the tokenizer's chat template; None where there
            are none.
    """

    ids: Tensor
    documents: tuple[str, ...]
    document_of_token: Tensor | None
    tokens: int
    mask: Tensor | None = None
    templated: bool | None = None

    @property
    def seqlen(self) -> int:
        """Tokens in a window."""
        return int(self.ids.shape[1])

    @property
    def digest(self) -> str:
        """SHA-256 of the shape and the ids: two runs saw the same tokens if these agree."""
        return token_digest(self.ids)

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def first(self, count: int) -> TokenWindows:
        """Returns the first `count` windows (all of them where there are fewer)."""
        origin = self.document_of_token
        return TokenWindows(
            self.ids[:count],
            self.documents,
            None if origin is None else origin[:count],
            self.tokens,
            None if self.mask is None else self.mask[:count],
            self.templated,
        )

    @staticmethod
    def from_documents(
        documents: Sequence[Document], tokenizer: Tokenizer, seqlen: int
    ) -> TokenWindows:
        """Returns the windows of `documents`, tokenised as one text."""
        conversations = any(document.messages for document in documents)
        if conversations and has_template(tokenizer):
            return TokenWindows.from_conversations(documents, tokenizer, seqlen)
        text = SEPARATOR.join(document.text for document in documents)
        names = tuple(document.name for document in documents)
        several = len(documents) > 1
        # verbose=False: a whole corpus is longer than any model, which is the point of windows.
        encoded = tokenizer(
            text, return_offsets_mapping=several and tokenizer.is_fast, verbose=False
        )
        ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)
        origin: Tensor | None = torch.zeros_like(ids, dtype=torch.int32)
        if several and not tokenizer.is_fast:
            origin = None
        elif several:
            starts = np.cumsum([0] + [len(d.text) + len(SEPARATOR) for d in documents[:-1]])
            first_characters = np.array([start for start, _ in encoded["offset_mapping"]])
            index = np.searchsorted(starts, first_characters, side="right") - 1
            origin = torch.from_numpy(index.astype(np.int32))
        return TokenWindows(
            _cut(ids, seqlen),
            names,
            None if origin is None else _cut(origin, seqlen),
            ids.numel(),
            templated=False if conversations else None,
        )

    @staticmethod
    def from_conversations(
        documents: Sequence[Document], tokenizer: Tokenizer, seqlen: int, with_mask: bool = False
    ) -> TokenWindows:
        """Returns the windows of `documents`, tokenised one by one, conversations by template.

        Args:
            documents: conversations and, without a mask, plain texts among them.
            tokenizer: has a chat template.
            seqlen: tokens in a window.
            with_mask: mark the tokens of answers.

        Raises:
            LowbitError: see `encode_conversation`; also for a mask without what it needs.
        """
        if with_mask:
            _require_answers(documents, tokenizer)
        ids: list[int] = []
        answers: list[bool] = []
        lengths = []
        for document in documents:
            if document.messages is None:
                new, mask = list(tokenizer(document.text, verbose=False)["input_ids"]), None
            else:
                new, mask = encode_conversation(document, tokenizer, with_mask)
            ids += new
            answers += mask or []
            lengths.append(len(new))
        origin = torch.arange(len(documents), dtype=torch.int32)
        origin = origin.repeat_interleave(torch.tensor(lengths))
        return TokenWindows(
            _cut(torch.tensor(ids, dtype=torch.int64), seqlen),
            tuple(document.name for document in documents),
            _cut(origin, seqlen),
            len(ids),
            _cut(torch.tensor(answers), seqlen) if with_mask else None,
            templated=True,
        )

    @staticmethod
    def from_rows(rows: Tensor, seqlen: int) -> TokenWindows:
        """Returns the windows of int64 `rows` `[rows, length]`, each row a document."""
        count, length = rows.shape
        per_row = length // seqlen
        names = tuple(f"row {index}" for index in range(count))
        origin = torch.arange(count, dtype=torch.int32).repeat_interleave(per_row)
        return TokenWindows(
            rows[:, : per_row * seqlen].reshape(count * per_row, seqlen),
            names,
            origin[:, None].expand(-1, seqlen),
            rows.numel(),
        )


@dataclass(frozen=True)
class CalibrationTokens:
    """The windows an algorithm calibrates on.

    Args:
        ids: int64 `[samples, seqlen]`.
        digest: SHA-256 of the shape and the ids, hexadecimal.
        description: what the manifest records: source, samples, seqlen, seed, tokens, windows.
        mask: bool `[samples, seqlen]`, True for tokens that statistics count; None counts all.
    """

    ids: Tensor
    digest: str
    description: dict[str, Any]
    mask: Tensor | None = None

    @property
    def counted(self) -> int:
        """Tokens that statistics count."""
        return self.ids.numel() if self.mask is None else int(self.mask.sum())


def load_calibration(
    source: str,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    samples: int,
    seqlen: int,
    seed: int,
    text_field: str | None = None,
    loss_mask: bool = False,
) -> CalibrationTokens:
    """Returns `samples` windows of `source`, drawn without replacement.

    Args:
        source: a text source (see `text.py`) or a file of token ids.
        tokenizer: the model's own; not needed for token ids.
        vocab_size: ids must be below it.
        samples: windows to draw, at least 1.
        seqlen: tokens in a window, at least 2.
        seed: the same seed gives the same windows on every machine and NumPy version.
        text_field: the field of JSONL or hub rows that holds a text or messages.
        loss_mask: count only the answers of conversations; windows without any are not drawn.

    Raises:
        LowbitError: the source is unusable or holds too few tokens.
    """
    if samples < 1:
        raise LowbitError(f"calibration needs at least 1 sample, got {samples}")
    if seed < 0:
        raise LowbitError(f"calibration seed must not be negative, got {seed}")
    windows = load_windows(source, tokenizer, vocab_size, seqlen, text_field, loss_mask)
    usable = torch.arange(len(windows))
    if windows.mask is not None:
        usable = windows.mask.any(1).nonzero().squeeze(1)
    if len(usable) < samples:
        answers = " with answers in them" if loss_mask else ""
        raise LowbitError(
            f"calibration needs {samples} windows of {seqlen} tokens ({samples * seqlen} tokens), "
            f"but {source!r} holds {len(usable)}{answers} ({windows.tokens} tokens); lower the "
            "samples or the sequence length, or give more text"
        )
    # Sorting the raw 64-bit stream, which NumPy promises never to change; Generator.choice and
    # permutation carry no such promise.
    order = np.argsort(np.random.PCG64(seed).random_raw(len(usable)), kind="stable")
    drawn = usable[torch.from_numpy(order[:samples])]
    ids = windows.ids[drawn].clone()
    mask = None if windows.mask is None else windows.mask[drawn].clone()
    description = {
        "source": Path(source).name if Path(source).is_file() else source,
        "samples": samples,
        "seqlen": seqlen,
        "seed": seed,
        "windows_available": len(usable),
        "tokens_available": windows.tokens,
        "documents": len(windows.documents),
        **({"text_field": text_field} if text_field is not None else {}),
        **({} if windows.templated is None else {"chat_template": windows.templated}),
    }
    if mask is not None:
        description["loss_mask"] = {"counted": int(mask.sum()), "digest": token_digest(mask)}
    return CalibrationTokens(ids, token_digest(ids), description, mask)


def load_windows(
    source: str,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    seqlen: int,
    text_field: str | None = None,
    loss_mask: bool = False,
) -> TokenWindows:
    """Returns every window of `source`, a text source or a file of token ids.

    Args:
        source: see `load_calibration`, as all arguments.
        tokenizer: the model's own.
        vocab_size: ids must be below it.
        seqlen: tokens in a window.
        text_field: the field of JSONL or hub rows.
        loss_mask: mark the tokens of answers.

    Raises:
        LowbitError: the source is unusable, shorter than one window, or holds ids that the
            vocabulary lacks.
    """
    if seqlen < 2:
        raise LowbitError(f"a window needs at least 2 tokens, got sequence length {seqlen}")
    if Path(source).suffix.lower() in TOKEN_SUFFIXES:
        if loss_mask or text_field is not None:
            raise LowbitError(
                f"tokens {source!r} have neither fields nor answers; leave the text field and the "
                "loss mask out, or give JSONL"
            )
        return _windows_of_token_file(Path(source), vocab_size, seqlen)
    if tokenizer is None:
        raise LowbitError(
            f"text {source!r} needs a tokenizer, but the model has none; give token ids instead "
            "(.safetensors with `input_ids`, or .npy, integers of shape [rows, length])"
        )
    documents = read_documents(source, text_field)
    if loss_mask:
        windows = TokenWindows.from_conversations(documents, tokenizer, seqlen, with_mask=True)
    else:
        windows = TokenWindows.from_documents(documents, tokenizer, seqlen)
    if not len(windows):
        raise LowbitError(
            f"text {source!r} gives {windows.tokens} tokens, fewer than one window of {seqlen}; "
            "lower the sequence length or give more text"
        )
    _check_vocabulary(windows.ids, vocab_size, f"the tokenizer's ids of {source!r}")
    return windows


def _windows_of_token_file(file: Path, vocab_size: int, seqlen: int) -> TokenWindows:
    rows = read_token_rows(file)
    if rows.shape[1] < seqlen:
        raise LowbitError(
            f"tokens {str(file)!r}: rows of {rows.shape[1]} tokens are shorter than the sequence "
            f"length {seqlen}; lower the sequence length"
        )
    _check_vocabulary(rows, vocab_size, f"tokens {str(file)!r}")
    return TokenWindows.from_rows(rows, seqlen)


def _require_answers(documents: Sequence[Document], tokenizer: Tokenizer) -> None:
    """Refuses a loss mask where answers cannot be told from the rest."""
    plain = next((document.name for document in documents if document.messages is None), None)
    if plain is not None:
        raise LowbitError(
            f"{plain} is plain text, which has no answers to count; give chat messages, or leave "
            "the loss mask out"
        )
    if not has_template(tokenizer):
        raise LowbitError(
            "the loss mask needs the tokenizer's chat template, and it has none; add "
            "chat_template.jinja to the model's folder, or leave the loss mask out"
        )
    if not tokenizer.is_fast:
        raise LowbitError(
            "the loss mask needs a tokenizer that knows the characters of each token (a fast one, "
            "tokenizer.json); leave the loss mask out"
        )


def token_digest(ids: Tensor) -> str:
    """Returns the SHA-256 (hexadecimal) of the shape and the little-endian int64 `ids`."""
    shape = "x".join(map(str, ids.shape))
    content = ids.contiguous().cpu().numpy().astype("<i8").tobytes()
    return hashlib.sha256(f"{shape}\n".encode() + content).hexdigest()


def _cut(tokens: Tensor, seqlen: int) -> Tensor:
    """Returns `tokens` `[n]` as `[n // seqlen, seqlen]`, the tail dropped."""
    count = tokens.numel() // seqlen
    return tokens[: count * seqlen].view(count, seqlen)


def _check_vocabulary(ids: Tensor, vocab_size: int, name: str) -> None:
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocab_size:
        raise LowbitError(
            f"{name}: id {lowest if lowest < 0 else highest} is outside the model's vocabulary of "
            f"{vocab_size}; tokenise with the model's own tokenizer"
        )
