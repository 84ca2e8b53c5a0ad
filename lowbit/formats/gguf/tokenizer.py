"""The tokenizer in a GGUF file, as Hugging Face's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError
from lowbit.formats.gguf.header import GgufHeader, read_gguf_header
from lowbit.models.foreign import one_sentence

TOKENS = "tokenizer.ggml.tokens"
# Keys of the metadata -> arguments of transformers' tokenizers.
SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def tokenizer_of(header: GgufHeader) -> Any | None:
    """Returns the tokenizer of a file, None if it has no vocabulary.

    transformers' own converter makes it; whatever it cannot make of a damaged vocabulary is said.

    Raises:
        LowbitError: for a vocabulary that is impossible, or of a kind that transformers lacks.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer

    metadata, where = header.metadata, str(header.path)
    if metadata.get("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
        return None
    _require_vocabulary(header)
    known = {
        name: metadata[f"tokenizer.{key}"]
        for key, name in GGUF_TOKENIZER_MAPPING["tokenizer"].items()
        if f"tokenizer.{key}" in metadata
    }
    known = {name: _plain(value) for name, value in known.items()}
    tokens = known["tokens"]
    options: dict[str, Any] = {}
    for name, key in SPECIAL.items():
        token = metadata.get(f"tokenizer.ggml.{key}")
        if isinstance(token, int) and 0 <= token < len(tokens):
            options[name] = tokens[token]
    spm = known.get("tokenizer_type") == "llama"
    options["add_bos_token"] = bool(metadata.get("tokenizer.ggml.add_bos_token", spm))
    options["add_eos_token"] = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        options["chat_template"] = template
    with one_sentence(where, "tokenizer"):
        backend, more = convert_gguf_tokenizer(metadata["general.architecture"], known)
        return PreTrainedTokenizerFast(tokenizer_object=backend, **options, **more)


def load_gguf_tokenizer(path: str | Path) -> Any | None:
    """Returns the tokenizer in the file at `path`, None if it has no vocabulary."""
    return tokenizer_of(read_gguf_header(path))


def write_tokenizer(header: GgufHeader, directory: Path) -> None:
    """Writes the files of the tokenizer in a GGUF file, if there is one."""
    tokenizer = tokenizer_of(header)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def _require_vocabulary(header: GgufHeader) -> None:
    """Refuses lists of other types or lengths than a vocabulary has."""
    metadata, where = header.metadata, header.path
    tokens = metadata.get(TOKENS)
    if not isinstance(tokens, list) or not tokens:
        raise LowbitError(f"{where}: {TOKENS} is no list of strings; fetch the file again")
    if len(set(tokens)) != len(tokens):
        raise LowbitError(f"{where}: {TOKENS} has a token twice; fetch the file again")
    for key in ("scores", "token_type"):
        values = metadata.get(f"tokenizer.ggml.{key}")
        if values is not None and (isinstance(values, (list, str)) or len(values) != len(tokens)):
            raise LowbitError(
                f"{where}: tokenizer.ggml.{key} is not a number for each of {len(tokens)} tokens"
            )
    merges, known = metadata.get("tokenizer.ggml.merges", []), set(tokens)
    if not isinstance(merges, list) or not all(_is_merge(merge, known) for merge in merges):
        raise LowbitError(f"{where}: tokenizer.ggml.merges is no list of pairs of its tokens")


def _is_merge(merge: str, known: set[str]) -> bool:
    left, space, right = merge.partition(" ")
    return bool(space) and {left, right, left + right} <= known


def _plain(value: Any) -> Any:
    """Returns a numpy array as a list."""
    return value.tolist() if hasattr(value, "tolist") else value
