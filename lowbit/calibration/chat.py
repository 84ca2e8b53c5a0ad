"""Conversations as the model was trained to read them, and which tokens of them are answers.

The tokenizer's chat template renders a conversation; its text is then tokenised without special
tokens, because the template has written them.

Where a template puts an answer is found by rendering the conversation up to that turn: the whole
must begin with it, and the answer's text comes next. Only that text is counted, not what the
template puts around it: the mark that ends a turn predicts the header of the next one, which the
model never had to learn. Training counts that mark as well: it is how a model stops. Reading the
template's own `{% generation %}` marks was rejected: few templates have them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lowbit.calibration.text import Document
from lowbit.errors import LowbitError

if TYPE_CHECKING:
    from lowbit.calibration.tokens import Tokenizer

ANSWERING_ROLE = "assistant"

Messages = Sequence[dict[str, str]]


def has_template(tokenizer: Tokenizer) -> bool:
    """Returns True if `tokenizer` knows how the model reads conversations."""
    return bool(getattr(tokenizer, "chat_template", None))


def encode_conversation(
    document: Document, tokenizer: Tokenizer, with_mask: bool, with_ends: bool = False
) -> tuple[list[int], list[bool] | None]:
    """Returns the ids of a conversation and, with a mask, which of them belong to answers.

    Args:
        document: with `messages`.
        tokenizer: has a chat template; a fast one if a mask is asked for.
        with_mask: also return the mask.
        with_ends: the mask holds the special token that ends an answer too, and blanks before it.

    Raises:
        LowbitError: the template refuses the conversation, or the answers cannot be found in what
            it makes of it.
    """
    assert document.messages is not None
    render = _renderer(document, tokenizer)
    text = render(document.messages, False)
    encoded = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=with_mask, verbose=False
    )
    ids = list(encoded["input_ids"])
    if not with_mask:
        return ids, None
    mask = [False] * len(ids)
    for start, end in answer_spans(document.name, document.messages, text, render):
        for index, (first, last) in enumerate(encoded["offset_mapping"]):
            # A word's token may begin with the blank before it: any overlap counts.
            mask[index] |= max(first, start) < min(last, end)
        if with_ends:
            for index in _end_of_turn(ids, encoded["offset_mapping"], text, end, tokenizer):
                mask[index] = True
    return ids, mask


def special_ids(tokenizer: Any) -> set[int]:
    """Returns the ids of the tokens that stand for no text: those that begin and end turns, too."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(id_ for id_, token in added.items() if token.special)}


def _end_of_turn(
    ids: list[int], offsets: Sequence[tuple[int, int]], text: str, end: int, tokenizer: Any
) -> range:
    """Returns the tokens that end the answer whose text ends at character `end`; none without."""
    special = special_ids(tokenizer)
    begin = next((index for index, (first, _) in enumerate(offsets) if first >= end), len(ids))
    for index in range(begin, len(ids)):
        if ids[index] in special:
            return range(begin, index + 1)
        if text[slice(*offsets[index])].strip():
            break
    return range(0)


def answer_spans(
    name: str, messages: Messages, text: str, render: Callable[[Messages, bool], str]
) -> list[tuple[int, int]]:
    """Returns where the answers are in `text`, as (first character, last + 1).

    Args:
        name: of the conversation, for the error.
        messages: its turns.
        text: what the template makes of all of them.
        render: (turns, append the header of an answer) -> text.

    Raises:
        LowbitError: the template writes earlier turns differently once later ones follow.
    """
    spans = []
    for turn, message in enumerate(messages):
        content = message["content"].strip()  # as most templates do
        if message["role"] != ANSWERING_ROLE or not content:
            continue
        # Some templates open the header of an answer with text that finished ones lack: then
        # without it.
        before = [render(messages[:turn], header) for header in (True, False)] if turn else [""]
        known = next((len(part) for part in before if text.startswith(part)), None)
        start = -1 if known is None else text.find(content, known)
        if start < 0:
            raise LowbitError(
                f"{name}: the chat template rewrites turn {turn + 1} of the conversation, so "
                "its answers cannot be told from the rest; leave the loss mask out"
            )
        spans.append((start, start + len(content)))
    return spans


def _renderer(document: Document, tokenizer: Any) -> Callable[[Messages, bool], str]:
    """Returns (turns, append the header of an answer) -> text, by the tokenizer's template."""
    from jinja2 import TemplateError

    def render(messages: Messages, header: bool) -> str:
        try:
            text: str = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=header
            )
        except (TemplateError, TypeError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise LowbitError(
                f"{document.name}: the tokenizer's chat template refuses this conversation "
                f"({reason}); drop or repair it"
            ) from error
        return text

    return render
