"""The tables of README and docs are those of the committed JSON results."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowbit.errors import LowbitError
from scripts.provenance import RESULTS
from scripts.readme_tables import pages, render
from scripts.tables.markdown import markdown_table

PAGE = "before\n<!-- table:quality -->\nold\n<!-- /table:quality -->\nafter\n"


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_page_shows_the_committed_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert render(text, RESULTS) == text, "run: python scripts/readme_tables.py"


def test_rendering_replaces_the_block_and_nothing_else(tmp_path: Path) -> None:
    rendered = render(PAGE, tmp_path)
    assert rendered.startswith("before\n<!-- table:quality -->\nNot measured yet.\n")
    assert rendered.endswith("<!-- /table:quality -->\nafter\n")
    assert render(rendered, tmp_path) == rendered


def test_unknown_marker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match="table:speed is unknown"):
        render(PAGE.replace("quality", "speed"), tmp_path)


def test_table_has_one_cell_a_column() -> None:
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"
