"""Regular expressions from files: those of `re`, and an end for those that have none."""

from __future__ import annotations

import re
import time

import pytest

from lowbit import patterns
from lowbit.errors import LowbitError

NAME = "model.layers.10.self_attn.q_proj"
EXPRESSIONS = (
    r"q_proj$", r"layers\.1\.", r"layers\.1[0-9]\.", r"^model", r"(?i)MODEL", r".*\.(q|k)_proj",
    r"lm_head|embed", r"(.*\.)?(q_proj)$", re.escape(NAME), rf"^{re.escape(NAME)}$", r"\bself", "",
)  # fmt: skip
ENDLESS = (
    r"(?:\w|\w\w|\w\.|\.)*(?=[A-Z])",
    r"(?:\w+\.?)+[A-Z]",
    r"(.*)*[A-Z]$",
    r"(?:a?|\w?){60}(?=[A-Z])",
)


@pytest.mark.parametrize("pattern", EXPRESSIONS)
def test_they_match_as_pythons_own_do(pattern: str) -> None:
    assert patterns.starts_with(pattern, NAME, "x") == (re.match(pattern, NAME) is not None)
    assert patterns.is_in(pattern, NAME, "x") == (re.search(pattern, NAME) is not None)


@pytest.mark.parametrize("pattern", ENDLESS)
def test_no_pattern_runs_for_long(pattern: str) -> None:
    begin = time.process_time()
    try:
        assert not patterns.starts_with(pattern, NAME * 8, "config.json: dynamic")
    except LowbitError as error:
        assert re.match("config.json: dynamic: the pattern .* takes too long", str(error))  # noqa: PT017
    assert time.process_time() - begin < 1


def test_one_of_them_is_stopped() -> None:
    with pytest.raises(LowbitError, match="takes too long"):
        patterns.is_in(ENDLESS[0], NAME * 8, "dynamic")


@pytest.mark.parametrize("pattern", ["(", "[", "a{1,4294967296}", "(" * 5000, "(?P<x>"])
def test_what_is_none_is_refused(pattern: str) -> None:
    with pytest.raises(LowbitError, match=r"dynamic: .* is not a regular expression"):
        patterns.is_in(pattern, NAME, "dynamic")
