"""The tables beside other quantizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scripts.peers.summary import NOT_RUN, OURS, sentence
from scripts.tables.markdown import footnote, markdown_table

PEER_CLASSES = {
    "4": "4 bits, groups of 128 asked for",
    "3": "3 bits, groups of 128 asked for",
    "2": "2 bits, groups of 64 asked for",
    "nf4": "NF4, scales quantized again",
}


def peers(result: dict[str, Any]) -> str:
    """Returns the tables of `compare_peers.py`, one for each class, and the verdicts."""
    parts = [_peers_protocol(result)]
    if result["figure"]:
        parts.append(f"![KL against bits per weight](results/{result['figure']})")
    tests, draws = list(result["tests"]), len(result["calibration"]["digests"])
    header = ["", "bits", *(f"KL, `{test}`" for test in tests), "sd over seeds", "flips"]
    header += ["perplexity / original", "CPU seconds"]
    for size_class, title in PEER_CLASSES.items():
        rows = [
            _peer_row(row, tests, draws)
            for row in result["rows"]
            if row["size_class"] == size_class
        ]
        if rows:
            parts.append(f"{title}:\n\n{markdown_table(header, rows)}")
    for test, verdicts in result["verdicts"].items():
        lines = "\n".join(f"- {sentence(verdict)}" for verdict in verdicts)
        parts.append(f"Targets, on `{test}`:\n\n{lines}")
    missing = [(entry, entry["reason"]) for entry in result["refused"]]
    # A row that lacks draws which nobody has run says so itself; one that failed says why.
    shown = {(row["name"], row["scheme"]) for row in result["rows"]}
    missing += [
        (entry, entry["failed"])
        for entry in result["failed"]
        if entry["failed"] != NOT_RUN or (entry["name"], entry["scheme"]) not in shown
    ]
    if missing:
        # One line for all seeds.
        lines = "\n".join(
            dict.fromkeys(f"- {e['name']}, {e['scheme']}: {why}" for e, why in missing)
        )
        parts.append(f"Not run:\n\n{lines}")
    return "\n\n".join([*parts, footnote(result)])


def peers_short(result: dict[str, Any]) -> str:
    """Returns the best result of each tool, and of each recipe of ours, one class below the other.

    From the result of `peers`; of several schemes of a class the one with the least KL is shown.
    """
    test = next(iter(result["tests"]))
    rows = []
    for size_class, title in PEER_CLASSES.items():
        best: dict[str, dict[str, Any]] = {}
        for row in result["rows"]:
            who = f"{OURS} {row['name']}" if row["tool"] == OURS else row["tool"]
            if row["size_class"] == size_class and (
                who not in best or row["tests"][test]["kl"] < best[who]["tests"][test]["kl"]
            ):
                best[who] = row
        for row in sorted(best.values(), key=lambda row: row["tests"][test]["kl"]):
            name, *cells = _peer_row(row, [test], 0)
            rows.append([title.split(",")[0], name, *(cells[i] for i in (0, 1, 3, 4, 5))])
    header = ["", "", "bits", "KL", "flips", "perplexity / original", "CPU seconds"]
    return markdown_table(header, rows) + "\n\n" + footnote(result)


def _peers_protocol(result: dict[str, Any]) -> str:
    calibration, outliers = result["calibration"], result["outliers"]
    used = [
        version if package == "source" else f"{package} {version}"
        for found in result["peers"].values()
        for package, version in found.items()
        if version and package not in ("torch", "transformers")
    ]
    text = (
        f"`{result['model']}`"
        + (
            f", with synthetic outliers: {outliers['share']:.0%} of the channels "
            f"{outliers['factor']:.0f} times as large"
            if outliers
            else ""
        )
        + f". {len(calibration['digests'])} draws of {calibration['samples']} windows of "
        f"{calibration['seqlen']} tokens to calibrate on; "
        + ", ".join(f"{test['windows']} of `{name}`" for name, test in result["tests"].items())
        + " to measure on."
    )
    return text + (f" Peers: {', '.join(used)}." if used else "")


def _peer_row(row: dict[str, Any], tests: Sequence[str], draws: int) -> list[str]:
    first = row["tests"][tests[0]]
    name = f"{row['name']}, {row['scheme']}"
    if row["seeds"] < draws and row["calibrated"]:
        name += f" ({row['seeds']} of {draws} draws)"
    divergences = [
        f"{row['tests'][test]['kl']:.4f} ± {row['tests'][test]['kl_standard_error']:.4f}"
        for test in tests
    ]
    deviation = first["kl_seed_deviation"]
    return [
        f"**{row['tool']}** {name}" if row["tool"] == OURS else name,
        f"{row['bits_per_weight']:.3f}",
        *divergences,
        "-" if deviation is None else f"{deviation:.5f}",
        f"{100 * first['flips']:.2f}%",
        f"{first['perplexity_ratio']:.4f}",
        f"{row['cpu_seconds']:,.1f}",
    ]
