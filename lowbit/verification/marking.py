"""The mark of a checkpoint that failed: set, looked behind, and cleared.

A folder is marked in `config.json` (`lowbit/checkpoint/mark.py`). A GGUF file has none: it gets
another name, which no loader looks for.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowbit.checkpoint import write_json
from lowbit.checkpoint.mark import MARK, marked_config, real_config
from lowbit.checkpoint.reader import CONFIG_NAME, read_json
from lowbit.errors import LowbitError
from lowbit.verification.report import Report

GGUF, BAD = ".gguf", ".bad"


def is_marked(path: Path) -> bool:
    """Returns whether a checkpoint, a folder or a GGUF file, is marked as bad."""
    if not path.is_dir():
        return path.name.endswith(GGUF + BAD)
    file = path / CONFIG_NAME
    try:
        return file.is_file() and MARK in read_json(file, "")
    except LowbitError:
        return False  # what cannot be read needs no mark


def mark(report: Report) -> Path:
    """Marks a checkpoint that failed, and returns where it is then."""
    path = report.path
    if path.is_file():
        if is_marked(path):
            return path
        names = (f"{path.stem}-{n}{GGUF}{BAD}" for n in itertools.count(2))
        free = itertools.chain([path.name + BAD], names)
        bad = next(place for name in free if not (place := path.with_name(name)).exists())
        path.rename(bad)
        return bad
    try:
        config = read_json(path / CONFIG_NAME, "")
    except LowbitError:
        return path  # what cannot be read needs no mark
    write_json(path / CONFIG_NAME, marked_config(config, report.failed))
    return path


def stays_marked(report: Report) -> str | None:
    """Returns why the mark of a file that passed is not to be cleared; None if it may be."""
    if not (report.ok and report.path.is_file() and is_marked(report.path)):
        return None
    name = report.path.name.removesuffix(BAD)
    if not any(check.name == "weights" and check.passed for check in report.checks):
        return (
            "it stays marked as bad: the file does not say which weights it should hold, and they "
            f"may be what was wrong; convert again, or rename it to {name} if you know better"
        )
    if report.path.with_name(name).exists():
        return f"it stays marked as bad: there is another {name} beside it; move that away"
    return None


def clear_mark(report: Report) -> bool:
    """Clears the mark of a checkpoint that passed; returns whether there was one to clear."""
    path = report.path
    if not (report.ok and is_marked(path)) or stays_marked(report) is not None:
        return False
    if path.is_file():
        path.rename(path.with_name(path.name.removesuffix(BAD)))
    else:
        file = path / CONFIG_NAME
        write_json(file, real_config(path, read_json(file, "")))
    return True


@contextmanager
def without_mark(path: Path) -> Iterator[Path]:
    """Yields a path that every loader takes for the checkpoint: of a marked one, one in links.

    The mark itself stays until everything has passed; a run that is killed must not clear it.
    """
    if path.name.endswith(GGUF + BAD) and path.is_file():
        with tempfile.TemporaryDirectory(prefix="lowbit-verify-") as folder:
            link = Path(folder) / path.name.removesuffix(BAD)
            link.symlink_to(path.resolve())
            yield link
        return
    if not path.is_dir() or MARK not in read_json(path / CONFIG_NAME, "a checkpoint has one"):
        yield path
        return
    config = real_config(path, read_json(path / CONFIG_NAME, ""))
    with tempfile.TemporaryDirectory(prefix="lowbit-verify-") as folder:
        copy = Path(folder) / path.resolve().name
        copy.mkdir()
        for file in path.resolve().iterdir():
            if file.name != CONFIG_NAME:
                (copy / file.name).symlink_to(file)
        write_json(copy / CONFIG_NAME, config)
        yield copy
