"""Tables of the formats: what clients made of them, and what damaged files did."""

from __future__ import annotations

from typing import Any

from scripts.tables.markdown import footnote, markdown_table

CLIENT_NAMES = {
    "transformers": "transformers",
    "gptqmodel": "GPTQModel",
    "llmcompressor": "llm-compressor",
    "autoround": "AutoRound",
    "llama_cpp": "llama.cpp",
}
DIRECTIONS = {"write": "ours, loaded there", "read": "theirs, loaded here"}
LONGEST_REASON = 160


def interop(result: dict[str, Any]) -> str:
    """Returns the table of `interop.py`: format, direction, client, and what came of it."""
    rows = []
    for pair in result["pairs"]:
        passed, total = pair["tests"].get("passed", 0), sum(pair["tests"].values())
        state = "not run" if pair["outcome"] == "not run" else f"{passed} of {total} passed"
        if pair["why"]:
            state += f": {pair['why'][:LONGEST_REASON]}".replace("|", "\\|")
        client = CLIENT_NAMES.get(pair["client"], pair["client"])
        direction = DIRECTIONS[pair["direction"]]
        rows.append([pair["format"], direction, client, pair["equality"], state])
    used = [
        f"{CLIENT_NAMES[name]} ({', '.join(f'{p} {v}' for p, v in found.items() if v)})"
        for name, found in result["clients"].items()
        if any(found.values())
    ]
    header = ["format", "direction", "client", "demanded", "tests"]
    clients = f"Clients: {'; '.join(used)}."
    return f"{clients}\n\n{markdown_table(header, rows)}\n\n{footnote(result)}"


def fuzz(result: dict[str, Any]) -> str:
    """Returns the sentence and the table of `fuzz_formats.py`."""
    rows = [[name, f"{count:,}"] for name, count in result["cases"].items()]
    found = result["findings"]
    title = (
        f"{sum(result['cases'].values()):,} damaged files and folders in "
        f"{result['seconds'] / 60:.0f} minutes: **{len(found)} findings**"
        + "".join(f"\n- `{f['case']}`: {f['kind']}, {f['what'][:LONGEST_REASON]}" for f in found)
    )
    return f"{title}\n\n{markdown_table(['reader', 'cases'], rows)}\n\n{footnote(result)}"
