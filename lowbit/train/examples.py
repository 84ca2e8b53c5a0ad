"""Examples: what a model is to learn from, as ids and labels.

A source is a JSONL file, a text file, `pydoc`, or a data set on the hub. Each row is one example,
and its fields say what it is (the first that fits; rows of several kinds may be mixed):

    messages                            a conversation, through the tokenizer's chat template
    prompt, completion                  joined as they are, whatever the tokenizer; as two lists of
                                        messages, one conversation
    instruction, [input], response      a conversation of two turns; where the tokenizer has no chat
    (or output)                         template, the plain one below
    text                                plain text

    ### Instruction:                    the plain template; "### Input:" and what follows it only
    {instruction}                       where there is an input

    ### Input:
    {input}

    ### Response:
    {response}

Answers are counted, what is asked is not (unless asked for): label -100, which every loss of
transformers leaves out. Counted too is the token that ends an answer. A model that never sees it
behind an answer unlearns to stop. In conversations it is the special token that the template
writes there; elsewhere, and where a template writes none, the tokenizer's EOS.

The first token of an example has no label: in a packed row it would be predicted from the
example before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lowbit.calibration.chat import (
    ANSWERING_ROLE,
    encode_conversation,
    has_template,
    special_ids,
)
from lowbit.calibration.text import (
    HUB_NAME,
    MESSAGE_KEYS,
    ROW_SUFFIXES,
    Document,
    read_documents,
    read_json_lines,
    stream_hub,
)
from lowbit.errors import LowbitError, unknown_name

if TYPE_CHECKING:
    from lowbit.calibration.tokens import Tokenizer

IGNORED = -100
COUNTED = ("answers", "all")
RESPONSES = ("response", "output")


@dataclass(frozen=True)
class Example:
    """One example, at most as long as a row.

    Args:
        name: where it came from ("train.jsonl:12").
        ids: int32 `[tokens]`.
        labels: int32 `[tokens]`, the id where the token is counted, else -100.
    """

    name: str
    ids: np.ndarray[Any, np.dtype[np.int32]]
    labels: np.ndarray[Any, np.dtype[np.int32]]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def counted(self) -> int:
        """Tokens that the loss counts."""
        return int((self.labels != IGNORED).sum())


@dataclass(frozen=True)
class Examples:
    """The examples of one source, in its order.

    Args:
        source: what was read, without the folder.
        examples: those with anything to learn.
        rows: how many rows the source has.
        truncated: names of those that were longer than a row and lost their end.
        dropped: names of those in which nothing is counted.
    """

    source: str
    examples: tuple[Example, ...]
    rows: int
    truncated: tuple[str, ...]
    dropped: tuple[str, ...]

    def digest(self) -> str:
        """Returns the SHA-256 over ids and labels in order."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(len(example).to_bytes(8, "little"))
            digest.update(example.ids.astype("<i4").tobytes())
            digest.update(example.labels.astype("<i4").tobytes())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Returns what is recorded of the data, JSON values."""
        return {
            "source": self.source,
            "rows": self.rows,
            "examples": len(self.examples),
            "tokens": sum(map(len, self.examples)),
            "counted_tokens": sum(example.counted for example in self.examples),
            "truncated": len(self.truncated),
            "dropped": len(self.dropped),
            "digest": self.digest(),
        }


def load_examples(
    source: str, tokenizer: Tokenizer, seqlen: int, counted: str = "answers"
) -> Examples:
    """Returns the examples of `source`.

    A plain text that is longer than a row goes on in the next example; everything else loses its
    end, because the rest of an answer means nothing without the question.

    Args:
        source: see the head of this module.
        tokenizer: the model's own; a fast one where only answers are counted.
        seqlen: tokens in a row, at least 2.
        counted: "answers", or "all" tokens.

    Raises:
        LowbitError: with the file and the line, for what cannot be read; and if nothing is left.
    """
    if counted not in COUNTED:
        raise unknown_name("choice of counted tokens", counted, COUNTED)
    if seqlen < 2:
        raise LowbitError(f"a row needs at least 2 tokens, got sequence length {seqlen}")
    encoder = _Encoder(tokenizer, counted == "all")
    examples: list[Example] = []
    truncated, dropped = [], []
    rows = 0
    for where, row in _rows(source):
        rows += 1
        ids, labels, splits = encoder.encode(where, row)
        if len(ids) > seqlen and not splits:
            truncated.append(where)
        pieces = range(0, len(ids) if splits else min(1, len(ids)), seqlen)
        cut = [_example(where, ids[at : at + seqlen], labels[at : at + seqlen]) for at in pieces]
        kept = [example for example in cut if example.counted]
        examples += kept
        if not kept:
            dropped.append(where)
    name = Path(source).name if Path(source).is_file() else source
    if not examples:
        raise LowbitError(
            f"data {source!r}: none of its {rows} rows has a token to learn within "
            f"{seqlen} tokens"
            + (f" (answers of {dropped[0]} are empty or begin later)" if dropped else "")
            + "; raise the sequence length, or give rows with answers"
        )
    return Examples(name, tuple(examples), rows, tuple(truncated), tuple(dropped))


def split_examples(
    examples: Examples, fraction: float, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Returns (those to train on, those to validate with), drawn without replacement.

    Pieces of one text stay together: what is validated with was not seen.

    Args:
        examples: all of them.
        fraction: of the rows to validate with, above 0 and below 1; at least one row goes to each.
        seed: the same seed gives the same split on every machine.

    Raises:
        LowbitError: for another fraction, or a single row.
    """
    if not 0 < fraction < 1:
        raise LowbitError(f"the share to validate with must be between 0 and 1, got {fraction}")
    names = list(dict.fromkeys(example.name for example in examples.examples))
    if len(names) < 2:
        raise LowbitError(
            f"data {examples.source!r} has one usable row, which cannot be split; give a file of "
            "its own to validate with"
        )
    # Raw bits of a stream that NumPy promises never to change, as for calibration.
    order = np.argsort(np.random.PCG64(seed).random_raw(len(names)), kind="stable")
    count = min(max(1, round(fraction * len(names))), len(names) - 1)
    held_out = {names[index] for index in order[:count]}
    return (
        tuple(example for example in examples.examples if example.name not in held_out),
        tuple(example for example in examples.examples if example.name in held_out),
    )


def _rows(source: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """Returns (where, fields) of every row of `source`."""
    path = Path(source)
    rows: Iterable[tuple[str, Any]]
    if path.is_file() and path.suffix.lower() in ROW_SUFFIXES:
        rows = read_json_lines(path)
        if not rows:
            raise LowbitError(f"data {source!r} is empty; give one JSON object a line")
    elif not path.exists() and not path.suffix and (hub := HUB_NAME.fullmatch(source)):
        found = stream_hub(hub["name"], hub["config"], hub["split"] or "train", limit=None)
        rows = [(f"{source}:{number}", row) for number, row in enumerate(found, start=1)]
    else:
        rows = [(document.name, {"text": document.text}) for document in read_documents(source)]
    return rows


class _Encoder:
    """Turns rows into ids and labels."""

    def __init__(self, tokenizer: Any, count_all: bool) -> None:
        self._tokenizer = tokenizer
        self._count_all = count_all
        self._eos: int | None = tokenizer.eos_token_id
        self._special = special_ids(tokenizer)

    def encode(self, where: str, row: Any) -> tuple[list[int], list[bool], bool]:
        """Returns (ids, which are counted, whether it may be cut into several examples)."""
        fields: Mapping[str, Any] = row if isinstance(row, Mapping) else {}
        if "messages" in fields:
            return (*self._conversation(where, _messages(where, "messages", fields)), False)
        if "prompt" in fields or "completion" in fields:
            return (*self._completion(where, fields), False)
        if "instruction" in fields:
            return (*self._instruction(where, fields), False)
        if "text" in fields:
            ids = list(self._tokenizer(_text(where, "text", fields), verbose=False)["input_ids"])
            blank = not fields["text"].strip()
            return (*self._ended(ids, [not blank] * len(ids)), True)
        found = ", ".join(map(str, list(fields)[:6])) or type(row).__name__
        raise LowbitError(
            f'{where} has none of the fields "messages", "prompt" and "completion", "instruction" '
            f'and "response", or "text" (found {found}); rename its fields'
        )

    def _completion(self, where: str, fields: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
        if isinstance(fields.get("prompt"), list) and isinstance(fields.get("completion"), list):
            turns = [*_messages(where, "prompt", fields), *_messages(where, "completion", fields)]
            return self._conversation(where, turns)
        prompt, answer = _text(where, "prompt", fields), _text(where, "completion", fields)
        return self._answered(prompt, answer)

    def _instruction(self, where: str, fields: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
        answer_field = next((name for name in RESPONSES if name in fields), RESPONSES[0])
        asked = _text(where, "instruction", fields)
        given = _text(where, "input", fields) if fields.get("input") is not None else ""
        answer = _text(where, answer_field, fields)
        if has_template(self._tokenizer):
            question = f"{asked}\n\n{given}" if given.strip() else asked
            turns = [
                {"role": "user", "content": question},
                {"role": ANSWERING_ROLE, "content": answer},
            ]
            return self._conversation(where, turns)
        return self._answered(plain_prompt(asked, given), answer)

    def _conversation(
        self, where: str, turns: Sequence[dict[str, str]]
    ) -> tuple[list[int], list[bool]]:
        if not has_template(self._tokenizer):
            raise LowbitError(
                f"{where} is a conversation, and the tokenizer has no chat template to read it by; "
                "add chat_template.jinja to the model's folder, or give instruction and response"
            )
        self._require_offsets()
        document = Document(where, "", tuple(turns))
        ids, mask = encode_conversation(
            document, self._tokenizer, with_mask=not self._count_all, with_ends=True
        )
        if mask is None:
            mask = [any(turn["content"].strip() for turn in turns)] * len(ids)
        # A template that ends answers by nothing special leaves the model no way to stop.
        ends = turns[-1]["role"] == ANSWERING_ROLE and any(mask)
        last = len(ids) - 1
        while ends and (not mask[last] or not self._tokenizer.decode(ids[last]).strip()):
            last -= 1
        if ends and self._eos is not None and ids[last] not in self._special:
            return [*ids[: last + 1], self._eos], [*mask[: last + 1], True]
        return ids, mask

    def _answered(self, prompt: str, answer: str) -> tuple[list[int], list[bool]]:
        self._require_offsets()
        # One text, so that the tokens at the seam are those that the model knows.
        encoded = self._tokenizer(
            prompt + answer, return_offsets_mapping=not self._count_all, verbose=False
        )
        ids = list(encoded["input_ids"])
        if not answer.strip():
            return ids, [False] * len(ids)
        if self._count_all:
            return self._ended(ids, [True] * len(ids))
        counts = [last > max(first, len(prompt)) for first, last in encoded["offset_mapping"]]
        return self._ended(ids, counts)

    def _ended(self, ids: list[int], counts: list[bool]) -> tuple[list[int], list[bool]]:
        """Adds the EOS token, which is counted, unless the tokenizer has."""
        if self._eos is None or not any(counts):
            return ids, counts
        if ids[-1] == self._eos:
            return ids, [*counts[:-1], True]
        return [*ids, self._eos], [*counts, True]

    def _require_offsets(self) -> None:
        if not self._count_all and not self._tokenizer.is_fast:
            raise LowbitError(
                "counting answers only needs a tokenizer that knows the characters of each token "
                "(a fast one, tokenizer.json); count all tokens instead"
            )


def plain_prompt(instruction: str, given: str = "") -> str:
    """Returns what comes before the answer where the tokenizer has no chat template.

    Args:
        instruction: what is asked.
        given: what it is asked about, may be blank.
    """
    middle = f"### Input:\n{given}\n\n" if given.strip() else ""
    return f"### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def _example(name: str, ids: list[int], counts: list[bool]) -> Example:
    array = np.asarray(ids, dtype=np.int32)
    labels = np.where(np.asarray(counts, dtype=bool), array, np.int32(IGNORED))
    labels[:1] = IGNORED
    return Example(name, array, labels)


def _text(where: str, field: str, fields: Mapping[str, Any]) -> str:
    """Returns a field that must be a string."""
    value = fields.get(field)
    if isinstance(value, str):
        return value
    got = "lacks it" if field not in fields else f"has {type(value).__name__} there"
    names = "response or output" if field in RESPONSES and field not in fields else field
    raise LowbitError(f'{where} needs the field "{names}" with a string, but {got}')


def _messages(where: str, field: str, fields: Mapping[str, Any]) -> list[dict[str, str]]:
    """Returns a field that must be a list of turns."""
    turns = fields[field]
    if (
        not isinstance(turns, list)
        or not turns
        or not all(
            isinstance(turn, Mapping)
            and all(isinstance(turn.get(key), str) for key in MESSAGE_KEYS)
            for turn in turns
        )
    ):
        raise LowbitError(
            f'{where}: "{field}" must be a list of {{"role": ..., "content": ...}} with strings'
        )
    return [{key: turn[key] for key in MESSAGE_KEYS} for turn in turns]
