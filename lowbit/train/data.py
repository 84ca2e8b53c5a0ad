"""The data of a run: examples read, split, and laid in rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowbit.errors import LowbitError
from lowbit.hf.loading import load_config, load_tokenizer
from lowbit.train.examples import Example, Examples, load_examples, split_examples
from lowbit.train.packing import Row, one_each, pack
from lowbit.train.settings import DataSettings

DEFAULT_SEQLEN = 1024


@dataclass(frozen=True)
class Prepared:
    """The data of a run, ready.

    Args:
        seqlen: tokens in a row.
        train: rows to train on.
        validation: rows to validate with, may be empty.
        padding_id: what rows are filled up with.
        description: what is recorded, with digests.
    """

    seqlen: int
    train: Sequence[Row]
    validation: Sequence[Row]
    padding_id: int
    description: dict[str, Any]


def prepare_data(base: str, data: str, settings: DataSettings, seed: int) -> Prepared:
    """Returns the rows of a run.

    Args:
        base: whose tokenizer reads the data.
        data: the source.
        settings: how rows are made of it.
        seed: of the split.

    Raises:
        LowbitError: there is no tokenizer, rows are longer than the model's positions, or the data
            are unusable.
    """
    config = load_config(base)
    tokenizer: Any = load_tokenizer(base)
    if tokenizer is None:
        raise LowbitError(f"{base}: has no tokenizer, so data cannot be read; add its files")
    seqlen = choose_seqlen(config, settings.seqlen)
    examples = load_examples(data, tokenizer, seqlen, settings.counted)
    _check_vocabulary(examples, config.vocab_size, base)
    description: dict[str, Any] = {"seqlen": seqlen, "train": examples.describe()}
    train = examples.examples
    validation: tuple[Example, ...] = ()
    if settings.validation is not None:
        held_out = load_examples(settings.validation, tokenizer, seqlen, settings.counted)
        _check_vocabulary(held_out, config.vocab_size, base)
        description["validation"] = held_out.describe()
        validation = held_out.examples
    elif settings.validation_fraction is not None:
        train, validation = split_examples(examples, settings.validation_fraction, seed)
        description["validation"] = {"examples": len(validation), "of": "train"}
    rows = [
        pack(part, seqlen) if settings.packing else one_each(part) for part in (train, validation)
    ]
    description["rows"] = {"train": len(rows[0]), "validation": len(rows[1])}
    description["fill"] = sum(map(len, rows[0])) / (len(rows[0]) * seqlen)
    padding = next(
        (i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0
    )
    return Prepared(seqlen, rows[0], rows[1], padding, description)


def choose_seqlen(config: Any, asked: int | None) -> int:
    """Returns the tokens in a row: what was asked for, else `DEFAULT_SEQLEN` or the longest.

    Raises:
        LowbitError: it is longer than the model's positions.
    """
    longest = getattr(config, "max_position_embeddings", None)
    if asked is None:
        return min(DEFAULT_SEQLEN, longest or DEFAULT_SEQLEN)
    if longest is not None and asked > longest:
        raise LowbitError(f"seqlen {asked} is longer than the model's {longest} positions")
    return asked


def _check_vocabulary(examples: Examples, vocab_size: int, base: str) -> None:
    highest = max(int(example.ids.max()) for example in examples.examples)
    if highest >= vocab_size:
        raise LowbitError(
            f"data {examples.source!r}: id {highest} is outside the vocabulary of {vocab_size} of "
            f"{base}; its tokenizer does not belong to it"
        )
