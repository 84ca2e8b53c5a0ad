"""The tokenizer of a checkpoint in the words of llama.cpp.

    gpt2     byte-level BPE: tokens, merges, and a name for how text is split before (`pre`)
    llama    BPE of pieces with bytes to fall back on (sentencepiece): tokens and scores

transformers keeps the second as BPE with merges in falling order of their scores; llama.cpp joins
the neighbours whose piece has the highest score. So a piece's score is minus the rank of its first
merge, and both join in the same order.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError
from lowbit.hf.loading import load_tokenizer
from lowbit.models.foreign import one_sentence

# llama_token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# Names of llama.cpp for how text is split, of which transformers has the rules, most common first.
PRE_TOKENIZERS = ("llama-bpe", "qwen2", "gpt-2", "smollm", "tekken", "gpt-4o", "qwen35")
# Wherever two of them differ: letters of several scripts, marks, digits, capitals, blanks.
HARD_TEXT = (
    "Hello  world's   I'LL we'Ve\t\tx\n\n \r\n  y 1 12 123 1234567 a1b2 CamelCaseWORDs fooBAR "
    "don't--stop!!! (a+b)=[c]/{d} \u00e9t\u00e9 e\u0301 na\u00efve \u4f60\u597d\u4e16\u754c "
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u041f\u0440\u0438\u0432\u0435\u0442 "
    "\U0001f999\U0001f680 // https://x.y/z?q=1 \n\tend.\n"
)


def add_vocabulary(writer: Any, directory: Path, vocab_size: int) -> None:
    """Adds the tokenizer in `directory` to a `gguf.GGUFWriter`.

    Args:
        writer: of the file.
        directory: of the checkpoint.
        vocab_size: rows of the embedding.

    Raises:
        LowbitError: for a tokenizer that llama.cpp has no words for.
    """
    import gguf

    tokenizer = load_tokenizer(directory) if directory.is_dir() else None
    if tokenizer is None:
        warnings.warn(
            f"{directory}: has no tokenizer, so the file will take token ids only", stacklevel=2
        )
        writer.add_tokenizer_model("no_vocab")
        return
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = {} if backend is None else json.loads(backend.to_str())
    model = content.get("model", {})
    byte_level = "ByteLevel" in _kinds(content.get("pre_tokenizer"))
    if model.get("type") != "BPE" or not (byte_level or model.get("byte_fallback")):
        raise LowbitError(
            f"{directory}: its tokenizer is {model.get('type', 'not in tokenizer.json')}, needed "
            "byte-level BPE, or BPE with bytes to fall back on"
        )
    if byte_level and not model.get("merges"):
        raise LowbitError(
            f"{directory}: its tokenizer has no merges, and llama.cpp loads no byte-level BPE "
            "without; move the tokenizer away for a file that takes token ids only"
        )
    tokens, types = _tokens(content, vocab_size, directory)
    writer.add_tokenizer_model("gpt2" if byte_level else "llama")
    writer.add_tokenizer_pre(_pre_name(backend, directory) if byte_level else "default")
    writer.add_token_list(tokens)
    if not byte_level:
        writer.add_token_scores(_scores(tokens, types, model["merges"]))
        writer.add_add_space_prefix(_adds_space(content))
    writer.add_token_types(types)
    logging.getLogger("gguf").setLevel(logging.ERROR)
    with one_sentence(str(directory), "tokenizer"):
        special = gguf.SpecialVocab(directory, load_merges=byte_level, n_vocab=vocab_size)
        special.add_to_gguf(writer, quiet=True)


def _tokens(
    content: Mapping[str, Any], vocab_size: int, directory: Path
) -> tuple[list[str], list[int]]:
    """Returns the text and the type of every row of the embedding."""
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [UNUSED] * vocab_size
    model = content["model"]
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    largest = max([*model["vocab"].values(), *added], default=0)
    if largest >= vocab_size:
        raise LowbitError(
            f"{directory}: its tokenizer has the id {largest}, but the embedding has {vocab_size} "
            "rows; they do not belong together"
        )
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, NORMAL
        if model.get("byte_fallback") and _is_byte(token):
            types[index] = BYTE
        elif token == model.get("unk_token"):
            types[index] = UNKNOWN
    for index, token in added.items():
        tokens[index] = token["content"]
        if types[index] != UNKNOWN:
            types[index] = CONTROL if token["special"] else USER_DEFINED
    return tokens, types


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _scores(tokens: list[str], types: list[int], merges: Iterable[Any]) -> list[float]:
    """Returns minus the rank of each piece among the merges; of one that none makes, far below."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    last = len(ranks) + 1
    return [
        -float(ranks.get(token, last)) if kind == NORMAL else 0.0
        for token, kind in zip(tokens, types, strict=True)
    ]


def _adds_space(content: Mapping[str, Any]) -> bool:
    """Returns whether a blank is put in front of a text."""
    normalizer = _kinds(content.get("normalizer"))
    splitter = content.get("pre_tokenizer") or {}
    prepends = splitter.get("prepend_scheme", "never") in ("first", "always")
    return "Prepend" in normalizer or (splitter.get("type") == "Metaspace" and prepends)


def _kinds(part: Mapping[str, Any] | None) -> set[str]:
    """Returns the types in a normalizer or a pre-tokenizer, sequences taken apart."""
    if not part:
        return set()
    inner = [*part.get("pretokenizers", []), *part.get("normalizers", [])]
    return {str(part.get("type"))}.union(*map(_kinds, inner))


def _pre_name(backend: Any, directory: Path) -> str:
    """Returns the name whose rules split text as the tokenizer does; else warns of the nearest."""
    pieces = _pieces(backend.pre_tokenizer)
    agreement = {}
    for name in PRE_TOKENIZERS:
        others = _pieces(_rules(name))
        if others == pieces:
            return name
        agreement[name] = len(set(pieces) & set(others)) / max(len(pieces), len(others))
    nearest = max(agreement, key=lambda name: agreement[name])
    warnings.warn(
        f"{directory}: llama.cpp has no name for how this tokenizer splits text; {nearest!r} is "
        f"nearest ({agreement[nearest]:.0%} of a hard text alike), so some text will become other "
        "tokens there than here",
        stacklevel=3,
    )
    return nearest


def _pieces(splitter: Any) -> list[tuple[str, tuple[int, int]]]:
    return list(splitter.pre_tokenize_str(HARD_TEXT)) if splitter is not None else []


def _rules(name: str) -> Any:
    """Returns the pre-tokenizer that a name stands for."""
    from tokenizers import Regex, pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "gpt-2":
        return plain
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    split = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), behavior="isolated")
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, rest])
