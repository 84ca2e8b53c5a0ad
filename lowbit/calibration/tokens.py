"""Token windows: a text, or ids that somebody else has tokenised, cut into equal lengths.

Protocol (P2048 of the GPTQ paper and its successors, for any length): documents are joined by blank
lines and tokenised *once*, with the one BOS token that the tokenizer adds at the start, then cut
into windows of `seqlen` that do not overlap; the tail is dropped. Tokenising window by window
instead would put a BOS into each and split words at their edges.

A file of token ids is `.safetensors` (tensor `input_ids`) or `.npy`, integers `[rows, length]`.
Each row is a document of its own and is cut by itself, so no window crosses a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowbit.calibration.text import SEPARATOR, Document, read_documents
from lowbit.errors import LowbitError

TOKEN_SUFFIXES = (".safetensors", ".npy")


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
    """

    ids: Tensor
    documents: tuple[str, ...]
    document_of_token: Tensor | None
    tokens: int

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
        )

    @staticmethod
    def from_documents(
        documents: Sequence[Document], tokenizer: Tokenizer, seqlen: int
    ) -> TokenWindows:
        """Returns the windows of `documents`, tokenised as one text."""
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
            _cut(ids, seqlen), names, None if origin is None else _cut(origin, seqlen), ids.numel()
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
    """

    ids: Tensor
    digest: str
    description: dict[str, Any]


def load_calibration(
    source: str,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    samples: int,
    seqlen: int,
    seed: int,
) -> CalibrationTokens:
    """Returns `samples` windows of `source`, drawn without replacement.

    Args:
        source: a text source (see `text.py`) or a file of token ids.
        tokenizer: the model's own; not needed for token ids.
        vocab_size: ids must be below it.
        samples: windows to draw, at least 1.
        seqlen: tokens in a window, at least 2.
        seed: the same seed gives the same windows on every machine and NumPy version.

    Raises:
        LowbitError: the source is unusable or holds too few tokens.
    """
    if samples < 1:
        raise LowbitError(f"calibration needs at least 1 sample, got {samples}")
    if seed < 0:
        raise LowbitError(f"calibration seed must not be negative, got {seed}")
    windows = load_windows(source, tokenizer, vocab_size, seqlen)
    if len(windows) < samples:
        raise LowbitError(
            f"calibration needs {samples} windows of {seqlen} tokens ({samples * seqlen} tokens), "
            f"but {source!r} holds {len(windows)} ({windows.tokens} tokens); lower the samples or "
            "the sequence length, or give more text"
        )
    # Sorting the raw 64-bit stream, which NumPy promises never to change; Generator.choice and
    # permutation carry no such promise.
    order = np.argsort(np.random.PCG64(seed).random_raw(len(windows)), kind="stable")
    ids = windows.ids[torch.from_numpy(order[:samples])].clone()
    description = {
        "source": Path(source).name if Path(source).is_file() else source,
        "samples": samples,
        "seqlen": seqlen,
        "seed": seed,
        "windows_available": len(windows),
        "tokens_available": windows.tokens,
        "documents": len(windows.documents),
    }
    return CalibrationTokens(ids, token_digest(ids), description)


def load_windows(
    source: str, tokenizer: Tokenizer | None, vocab_size: int, seqlen: int
) -> TokenWindows:
    """Returns every window of `source`, a text source or a file of token ids.

    Raises:
        LowbitError: the source is unusable, shorter than one window, or holds ids that the
            vocabulary lacks.
    """
    if seqlen < 2:
        raise LowbitError(f"a window needs at least 2 tokens, got sequence length {seqlen}")
    if Path(source).suffix.lower() in TOKEN_SUFFIXES:
        rows = _read_token_rows(Path(source))
        if rows.shape[1] < seqlen:
            raise LowbitError(
                f"tokens {source!r}: rows of {rows.shape[1]} tokens are shorter than the sequence "
                f"length {seqlen}; lower the sequence length"
            )
        _check_vocabulary(rows, vocab_size, f"tokens {source!r}")
        return TokenWindows.from_rows(rows, seqlen)
    if tokenizer is None:
        raise LowbitError(
            f"text {source!r} needs a tokenizer, but the model has none; give token ids instead "
            "(.safetensors with `input_ids`, or .npy, integers of shape [rows, length])"
        )
    windows = TokenWindows.from_documents(read_documents(source), tokenizer, seqlen)
    if not len(windows):
        raise LowbitError(
            f"text {source!r} gives {windows.tokens} tokens, fewer than one window of {seqlen}; "
            "lower the sequence length or give more text"
        )
    _check_vocabulary(windows.ids, vocab_size, f"the tokenizer's ids of {source!r}")
    return windows


def token_digest(ids: Tensor) -> str:
    """Returns the SHA-256 (hexadecimal) of the shape and the little-endian int64 `ids`."""
    shape = "x".join(map(str, ids.shape))
    content = ids.contiguous().cpu().numpy().astype("<i8").tobytes()
    return hashlib.sha256(f"{shape}\n".encode() + content).hexdigest()


def _cut(tokens: Tensor, seqlen: int) -> Tensor:
    """Returns `tokens` `[n]` as `[n // seqlen, seqlen]`, the tail dropped."""
    count = tokens.numel() // seqlen
    return tokens[: count * seqlen].view(count, seqlen)


def _read_token_rows(path: Path) -> Tensor:
    """Returns the int64 ids `[rows, length]` of a `.safetensors` or `.npy` file."""
    name = f"tokens {str(path)!r}"
    if not path.is_file():
        raise LowbitError(f"{name}: no such file")
    rows = _read_npy(path, name) if path.suffix.lower() == ".npy" else _read_tensor(path, name)
    if not np.issubdtype(rows.dtype, np.integer) or rows.ndim != 2 or not rows.size:
        raise LowbitError(
            f"{name}: got {rows.dtype} of shape {list(rows.shape)}, needed integers (uint16, "
            "int32 or int64) of shape [rows, length]"
        )
    if rows.dtype == np.uint64 and int(rows.max()) > np.iinfo(np.int64).max:
        raise LowbitError(f"{name}: id {int(rows.max())} is no token id")
    return torch.from_numpy(rows.astype(np.int64))


def _read_npy(path: Path, name: str) -> NDArray[Any]:
    try:
        # A pickled array would run code on load; a mapped one is checked against the file's size.
        rows: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise LowbitError(
            f"{name} is not a plain .npy array of integers ({error}); pickled arrays are refused, "
            "save with np.save(path, ids.astype(np.int32))"
        ) from error
    return rows


def _read_tensor(path: Path, name: str) -> NDArray[Any]:
    try:
        with safe_open(path, framework="numpy") as tensors:
            if "input_ids" in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                rows: NDArray[Any] = tensors.get_tensor("input_ids")
                return rows
            found = ", ".join(list(tensors.keys())[:4]) or "nothing"
    except (SafetensorError, OSError, TypeError) as error:
        raise LowbitError(f"{name} is not a readable safetensors file ({error})") from error
    raise LowbitError(f"{name} holds no tensor `input_ids` (found {found}); rename it")


def _check_vocabulary(ids: Tensor, vocab_size: int, name: str) -> None:
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocab_size:
        raise LowbitError(
            f"{name}: id {lowest if lowest < 0 else highest} is outside the model's vocabulary of "
            f"{vocab_size}; tokenise with the model's own tokenizer"
        )
