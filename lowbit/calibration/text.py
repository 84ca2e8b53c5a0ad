"""Documents: the text that calibrates a quantizer or measures its damage.

A source is a file, a name known here, or a data set on the hub:

    corpus.txt              one document, UTF-8
    corpus.jsonl            one document a line: a "text" field, or chat "messages", or a field
                            that the caller names and that holds either
    wikitext2               the test split of WikiText-2 (raw), joined by blank lines: one document
    pydoc                   CPython's own help topics, always at hand, one document a topic
    owner/name[:config[:split]]   the first rows of a hub data set, one document a row

Documents keep their order and blank ones keep their place, so that a file of labels, one a
document, can be laid beside them.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError

NAMED_SOURCES = ("wikitext2", "pydoc")
SEPARATOR = "\n\n"
MESSAGE_KEYS = ("role", "content")

# A hub data set is streamed and cut here: 128 calibration windows need a few hundred rows, and some
# sets (C4) hold 300 GB.
HUB_ROWS = 10_000

ROW_SUFFIXES = (".jsonl", ".ndjson")
FILE_SUFFIXES = (".txt", ".md", ".json", *ROW_SUFFIXES)

# Of a file in every common file system, in bytes; a system call refuses more.
_LONGEST_NAME = 255

HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+)(:(?P<split>[\w.-]+))?)?")


@dataclass(frozen=True)
class Document:
    """One text, in the order of its source.

    Args:
        name: the topic, the file's name, or its name and line ("corpus.jsonl:12").
        text: the text itself, possibly blank; of a conversation, one "role: content" a line.
        messages: of a conversation, its turns with "role" and "content"; None for plain text.
    """

    name: str
    text: str
    messages: tuple[dict[str, str], ...] | None = None


def read_documents(source: str, field: str | None = None) -> list[Document]:
    """Returns the documents of `source` in order; at least one of them is not blank.

    Args:
        source: a path or a name, see the head of this module. An existing file wins over a name.
        field: of each row, the field that holds a text or a list of messages; None takes "text",
            else "messages".

    Raises:
        LowbitError: nothing is there, it is a folder, it is not UTF-8, it is empty, it has no rows
            with fields though one was named, or `datasets` or the network is missing.
    """
    path = Path(source)
    if len(path.name.encode()) > _LONGEST_NAME or "\n" in source:
        raise LowbitError(
            f"text {source[:40]!r}... is a text itself; write it to a .txt file and give its path"
        )
    if path.is_dir():
        raise LowbitError(f"text {source!r} is a folder; give one .txt or .jsonl file")
    rows_of_file = path.suffix.lower() in ROW_SUFFIXES
    if field is not None and (source in NAMED_SOURCES or (path.is_file() and not rows_of_file)):
        raise LowbitError(
            f"text {source!r} has no fields, so there is no {field!r} in it; give JSONL or a hub "
            "data set, or leave the field out"
        )
    if path.is_file():
        documents = _read_file(path, field)
    elif source == "pydoc":
        documents = _read_pydoc()
    elif source == "wikitext2":
        rows = stream_hub("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
        documents = [Document("wikitext2", SEPARATOR.join(row["text"] for row in rows))]
    elif path.suffix.lower() not in FILE_SUFFIXES and (hub := HUB_NAME.fullmatch(source)):
        rows = stream_hub(hub["name"], hub["config"], hub["split"] or "train")
        documents = [
            _document_of_row(row, f"{source}:{number}", field)
            for number, row in enumerate(rows, start=1)
        ]
    else:
        raise LowbitError(
            f"text {source!r}: no such file; give a .txt or .jsonl file, a hub data set "
            f"(owner/name) or one of {', '.join(NAMED_SOURCES)}"
        )
    if not any(document.text.strip() for document in documents):
        raise LowbitError(f"text {source!r} is empty; give a source with some text in it")
    return documents


def decode_utf8(path: Path) -> str:
    """Returns the text of a UTF-8 file, newlines untouched, a byte order mark dropped.

    Raises:
        LowbitError: naming the byte offset of the first byte that is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LowbitError(f"text {str(path)!r} cannot be read: {error.strerror}") from error
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise LowbitError(
            f"text {str(path)!r} is not UTF-8: byte 0x{content[error.start]:02x} at offset "
            f"{error.start}; convert the file to UTF-8"
        ) from error


def _read_file(path: Path, field: str | None) -> list[Document]:
    if path.suffix.lower() not in ROW_SUFFIXES:
        return [Document(path.name, decode_utf8(path))]
    return [_document_of_row(row, where, field) for where, row in read_json_lines(path)]


def read_json_lines(path: Path) -> list[tuple[str, Any]]:
    """Returns the rows of a JSONL file, each with its place ("corpus.jsonl:12").

    Raises:
        LowbitError: see `decode_utf8`; or a line is not JSON.
    """
    rows = []
    # Not str.splitlines: JSON strings may hold U+2028 and other line breaks unescaped.
    for number, line in enumerate(decode_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append((f"{path.name}:{number}", json.loads(line)))
        except ValueError as error:
            raise LowbitError(
                f"text {str(path)!r}: line {number} is not JSON ({error}); write one object a line"
            ) from error
    return rows


def _document_of_row(row: Any, where: str, field: str | None) -> Document:
    """Returns the document of one JSON object: a text, or the turns of a conversation."""
    fields: Mapping[str, Any] = row if isinstance(row, Mapping) else {}
    for name in ("text", "messages") if field is None else (field,):
        content = fields.get(name)
        if isinstance(content, str):
            return Document(where, content)
        if isinstance(content, list) and content and all(map(_is_message, content)):
            turns = tuple({key: message[key] for key in MESSAGE_KEYS} for message in content)
            return Document(where, "\n".join(map("{role}: {content}".format_map, turns)), turns)
    if field is None:
        wanted = 'neither a string "text" nor a list "messages" of'
        repair = "add one of them, or name the field"
    else:
        wanted = f'no field "{field}" with a string or a list of'
        found = ", ".join(map(str, list(fields)[:6])) or "none"
        repair = f"name another (found {found})"
    raise LowbitError(f'{where} has {wanted} {{"role": ..., "content": ...}} strings; {repair}')


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and all(
        isinstance(message.get(key), str) for key in MESSAGE_KEYS
    )


def _read_pydoc() -> list[Document]:
    # The text follows the Python version: the token digest in every report tells them apart.
    from pydoc_data.topics import topics

    return [Document(name, topics[name]) for name in sorted(topics)]


def stream_hub(
    name: str, config: str | None, split: str, limit: int | None = HUB_ROWS
) -> Iterable[Mapping[str, Any]]:
    """Returns the first `limit` rows of a split; only the files that hold them are fetched.

    Raises:
        LowbitError: `datasets` or the network is missing, or the hub has no such split.
    """
    try:
        import datasets
    except ImportError as error:
        raise LowbitError(
            f"data set {name!r} needs the package `datasets`: pip install 'lowbit[data]'"
        ) from error
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        return list(itertools.islice(rows, limit))
    # Every way a download fails (offline, gated, no such name, config or split) ends in one of
    # these; httpx and requests errors are OSError or RuntimeError under `datasets`.
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LowbitError(
            f"data set {name!r} cannot be read from the hub ({reason}); check the name and the "
            "network, or give a file"
        ) from error
