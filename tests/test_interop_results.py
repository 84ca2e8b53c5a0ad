"""The table of formats and clients: what it is made of, and that the committed one is green."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lowbit.formats.table import LAYOUTS
from scripts.interop import CLIENTS, summary, variable, with_earlier
from scripts.provenance import RESULTS
from scripts.tables.formats import fuzz, interop

PAIR = ["gptq", "write", "gptqmodel", "equal weights"]


def test_a_pair_has_passed_if_all_of_its_tests_have() -> None:
    passed, failed, skipped = ["passed", ""], ["failed", "off by | one"], ["not run", "no CUDA"]
    rows = [
        summary([{"pair": PAIR, "tests": dict(enumerate(tests))}])[0]
        for tests in ([passed, passed], [passed, failed], [skipped, passed], [skipped])
    ]
    assert [row["outcome"] for row in rows] == ["passed", "failed", "not run", "not run"]
    assert [row["why"] for row in rows] == ["", "off by | one", "no CUDA", "no CUDA"]
    assert variable("llama_cpp") == "LOWBIT_INTEROP_LLAMA_CPP"


def test_the_table_says_why_a_pair_has_not_passed() -> None:
    outcome = {"pair": PAIR, "tests": {"a": ["passed", ""], "b": ["failed", "off by | one"]}}
    result = json.loads((RESULTS / "quality.json").read_text())
    result |= {"clients": {"gptqmodel": {"gptqmodel": "7"}}, "pairs": summary([outcome])}
    table = interop(result)
    row = (
        "| gptq | ours, loaded there | GPTQModel | equal weights | 1 of 2 passed: off by \\| one |"
    )
    assert row in table
    assert "Clients: GPTQModel (gptqmodel 7)." in table


def test_findings_are_shown() -> None:
    result = json.loads((RESULTS / "quality.json").read_text())
    finding = {"case": "gptq:1:2", "kind": "time", "what": "3.0 s", "where": ""}
    result |= {"cases": {"gptq": 1234}, "seconds": 3600.0, "findings": [finding]}
    assert "1,234 damaged files and folders in 60 minutes: **1 findings**" in fuzz(result)
    assert "- `gptq:1:2`: time, 3.0 s" in fuzz(result)


def test_a_run_of_some_clients_keeps_the_rows_of_others(tmp_path: Path) -> None:
    other = ["awq", "read", "autoround", "equal weights"]
    earlier = summary([{"pair": pair, "tests": {"a": ["failed", "x"]}} for pair in (PAIR, other)])
    file = tmp_path / "interop.json"
    origin = {"commit": "abc", "date": "2026-01-01"}
    clients = {"autoround": {"auto-round": "1"}}
    file.write_text(json.dumps({"provenance": origin, "clients": clients, "pairs": earlier}))
    content: dict[str, Any] = {"clients": {"gptqmodel": {"gptqmodel": "7"}}}
    outcomes = [
        {"pair": PAIR, "tests": {"a": ["passed", ""]}},
        {"pair": other, "tests": {"a": ["not run", "no interpreter"]}},
    ]
    rows = with_earlier(summary(outcomes), content, file)
    assert [(row["format"], row["outcome"]) for row in rows] == [
        ("awq", "failed"),
        ("gptq", "passed"),
    ]
    assert rows[0]["commit"] == "abc"
    assert content["clients"].keys() == {"autoround", "gptqmodel"}


@pytest.mark.skipif(not (RESULTS / "interop.json").exists(), reason="not run yet")
def test_the_committed_run_is_green_and_has_every_format() -> None:
    result = json.loads((RESULTS / "interop.json").read_text())
    assert {row["outcome"] for row in result["pairs"]} == {"passed"}
    formats = {row["format"].split(" ")[0] for row in result["pairs"]}
    assert formats >= LAYOUTS.keys() - {"lowbit"}
    assert result["clients"].keys() == CLIENTS.keys()
