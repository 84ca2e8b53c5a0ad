"""Makes instruction and response pairs of CPython's own help topics, for `lowbit finetune`.

    python scripts/make_finetune_data.py --output pydoc.jsonl

A topic ("ASSIGNMENT") becomes an instruction, and each paragraph group of its text up to
`--characters` an answer, so that answers fit into a row. The text follows the Python version.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from lowbit.calibration.text import read_documents
from lowbit.checkpoint.writer import write_bytes
from lowbit.errors import LowbitError
from scripts import command_line

CHARACTERS = 600


def pairs(characters: int) -> Iterator[dict[str, str]]:
    """Yields {"instruction", "response"} for every topic, in order.

    Args:
        characters: longest answer, whole paragraphs only; one that is longer goes alone.
    """
    for document in read_documents("pydoc"):
        paragraphs = [part.strip("\n") for part in document.text.split("\n\n") if part.strip()]
        for number, text in enumerate(_joined(paragraphs, characters), start=1):
            part = "" if number == 1 else f", part {number}"
            yield {"instruction": f"Explain {document.name} in Python{part}.", "response": text}


def _joined(paragraphs: list[str], characters: int) -> Iterator[str]:
    """Yields paragraphs joined while they fit."""
    text = ""
    for paragraph in paragraphs:
        if text and len(text) + len(paragraph) + 2 > characters:
            yield text
            text = ""
        text = f"{text}\n\n{paragraph}" if text else paragraph
    if text:
        yield text


def main() -> None:
    """Runs the command."""
    parser = command_line.parser(
        __doc__, "python scripts/make_finetune_data.py --output pydoc.jsonl"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSONL file to write")
    parser.add_argument("--characters", type=int, default=CHARACTERS, help="longest answer")
    command_line.run(parser, _run)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.characters < 1:
        raise LowbitError(f"--characters must be at least 1, got {arguments.characters}")
    lines = [json.dumps(pair, ensure_ascii=False) for pair in pairs(arguments.characters)]
    write_bytes(arguments.output, ("\n".join(lines) + "\n").encode())
    print(f"{arguments.output}: {len(lines)} examples")


if __name__ == "__main__":
    main()
