"""Ten seconds of damaged files for every reader, and that damage to the readers would be seen.

A failure names its case: `python scripts/fuzz_formats.py --replay CASE` shows it again.
"""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lowbit.errors import LowbitError
from scripts.fuzzing import sandbox
from scripts.fuzzing.files import put_together, take_apart, write_files
from scripts.fuzzing.junk import mutated_json
from scripts.fuzzing.mutations import mutated
from scripts.fuzzing.readers import TARGETS, Reader, Target
from scripts.fuzzing.sandbox import Case, judge
from scripts.fuzzing.session import Session

SECONDS = 10.0
SAMPLES = [
    (name, index)
    for name, target in TARGETS.items()
    for index in range(len(target.samples))
    if name not in ("convert", "load", "verify")
]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Keeps transformers' reports of damaged models off the terminal."""
    from transformers.utils import logging

    before, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(before)
    if shown:
        logging.enable_progress_bar()


def test_no_damaged_file_does_more_than_be_refused(tmp_path: Path) -> None:
    session = Session(tmp_path, TARGETS.values(), random.SystemRandom().randrange(1 << 32))
    begin, findings = time.process_time(), []
    while time.process_time() - begin < SECONDS:
        finding = session.step()
        if finding is not None:
            findings.append(finding)
    assert not findings, "\n".join(f"{f.case}: {f.kind}: {f.what}\n{f.trace}" for f in findings)
    assert min(session.done.values()) >= 3


@pytest.mark.parametrize(("name", "index"), SAMPLES)
def test_damage_starts_from_files_that_are_read(name: str, index: int, tmp_path: Path) -> None:
    target = TARGETS[name]
    write_files(target.samples[index](), tmp_path / "sound")
    target.read(tmp_path / "sound", random.Random(0))


def test_cases_are_made_again_from_their_numbers() -> None:
    for name, target in TARGETS.items():
        files = [Case(name, 7, number).files(target) for number in range(20)]
        assert files == [Case(name, 7, number).files(target) for number in range(20)]
        assert len({str(each) for each in files}) > 15
    assert Case.parse(str(Case("gptq", 7, 12))) == Case("gptq", 7, 12)
    with pytest.raises(LowbitError, match="is no case"):
        Case.parse("gptq:7")


def test_every_case_is_damaged_and_most_headers_still_fit() -> None:
    sound = TARGETS["gptq"].samples[0]()
    original = sound["model.safetensors"]
    assert original is not None
    parts = take_apart(original)
    assert parts is not None
    assert take_apart(put_together(parts)) == parts
    chance = random.Random(3)
    made = [mutated(sound, chance) for _ in range(300)]
    assert sum(files == sound for files in made) < 60
    weights = [files.get("model.safetensors") for files in made]
    assert sum(bool(w) and take_apart(w or b"") is not None for w in weights) > 150
    assert mutated_json({"a": [1, {"b": "c"}]}, random.Random(1)) != {"a": [1, {"b": "c"}]}


def hangs(folder: Path, chance: random.Random) -> None:
    while True:
        pass


def spends(folder: Path, chance: random.Random) -> None:
    torch.ones(400 << 20, dtype=torch.uint8)


def claims(folder: Path, chance: random.Random) -> None:
    torch.empty(1 << 45, dtype=torch.uint8)


def strays(folder: Path, chance: random.Random) -> None:
    (folder.parent / "outside.txt").read_text()


def runs(folder: Path, chance: random.Random) -> None:
    subprocess.run(["true"], check=True)


def fails(folder: Path, chance: random.Random) -> None:
    raise KeyError("scales")


def hides(folder: Path, chance: random.Random) -> None:
    try:
        torch.empty(1 << 45, dtype=torch.uint8)
    except RuntimeError as error:
        raise LowbitError(f"the model cannot be loaded: {error}") from error


@pytest.mark.parametrize(
    ("reader", "kind"),
    [
        (hangs, "time"), (spends, "memory"), (claims, "memory"), (hides, "memory"),
        (strays, "outside"), (runs, "outside"), (fails, "exception"),
    ],
)  # fmt: skip
def test_what_a_reader_must_not_do_is_found(
    reader: Reader, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.3 if reader is hangs else 20.0)
    (tmp_path / "outside.txt").write_text("secret")
    target = Target("tokens", TARGETS["tokens"].samples, reader)
    finding = judge(Case("tokens", 1, 1), target, tmp_path / "case")
    assert finding is not None
    assert finding.kind == kind, finding
    assert finding.case == "tokens:1:1"


def test_a_reader_that_returns_is_no_finding(tmp_path: Path) -> None:
    target = Target("tokens", TARGETS["tokens"].samples, lambda *_: None)
    assert judge(Case("tokens", 1, 1), target, tmp_path / "case") is None
