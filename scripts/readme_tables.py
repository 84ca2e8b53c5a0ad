"""Renders the JSON results into README.md and docs, between `<!-- table:NAME -->` markers.

python scripts/readme_tables.py            rewrite what is stale
python scripts/readme_tables.py --check    change nothing, exit with 1 where something is stale
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError
from scripts import command_line
from scripts.peers.summary import NOT_RUN, OURS, sentence
from scripts.provenance import RESULTS, ROOT

BLOCK = re.compile(r"(<!-- table:(?P<name>\w+) -->\n).*?(<!-- /table:(?P=name) -->)", re.DOTALL)


def quality(result: dict[str, Any]) -> str:
    """Returns the tables of `quality_table.py`, one for each test set."""
    parts = []
    for test, measured in result["tests"].items():
        original = measured["original_perplexity"]["perplexity"]
        rows = [
            [
                f"{row['scheme']} {row['method']}",
                f"{row['bits_per_weight']:.3f}",
                f"{row['kl']:.4f} ± {row['kl_standard_error']:.4f}",
                "-" if row["kl_seed_deviation"] is None else f"{row['kl_seed_deviation']:.5f}",
                f"{100 * row['flips']:.2f}%",
                f"{row['perplexity_ratio']:.4f} ({row['perplexity_ratio_interval']['low']:.4f} to "
                f"{row['perplexity_ratio_interval']['high']:.4f})",
            ]
            for row in result["summary"]
            if row["test"] == test
        ]
        header = ["", "bits", "KL", "sd over seeds", "flips", "perplexity / original (95%)"]
        title = (
            f"`{test}`: {measured['predictions']:,} predictions, original perplexity "
            f"{original:.2f}\n\n"
        )
        parts.append(title + markdown_table(header, rows))
    return "\n\n".join(parts) + "\n\n" + footnote(result)


def memory(result: dict[str, Any]) -> str:
    """Returns the table of `measure_memory.py`."""
    model = result["model"]
    tokens = result["samples"] * result["seqlen"]
    blocks = f"{result['gptq_blocks']} of {model['blocks']} blocks"
    names = {
        "imports": "imports alone",
        "rtn": f"quantize, {result['scheme']}, rtn",
        "gptq": f"quantize, {result['scheme']}, gptq, {blocks}, {tokens:,} tokens",
        "load": "`from_pretrained` and one reading of "
        f"{gigabytes(result['quantized_bytes_on_disk'])} GB",
        "forward": "the same and a forward pass of 16 tokens",
        "on_load": "`from_pretrained` of the 16-bit model, quantizing while it loads",
    }
    rows = [
        [
            label,
            gigabytes(result["cases"][case]["peak_rss_bytes"]),
            gigabytes(result["cases"][case]["peak_anonymous_bytes"]),
            gigabytes(result["cases"][case]["peak_file_bytes"]),
            f"{result['cases'][case]['seconds']:,.0f} s",
        ]
        for case, label in names.items()
    ]
    introduction = (
        f"A random Llama of {model['parameters'] / 1e9:.2f}e9 parameters, "
        f"{gigabytes(model['bytes_on_disk'])} GB on disk, {gigabytes(model['block_bytes'])} GB a "
        f"block. Loading takes {result['load_ratio']:.2f} times the size of the files beyond the "
        "imports.\n\n"
    )
    header = ["", "peak RSS, GB", "of it allocated", "mapped files", "time"]
    return introduction + markdown_table(header, rows) + "\n\n" + footnote(result)


def kill_resume(result: dict[str, Any]) -> str:
    """Returns the sentence of `kill_resume.py`."""
    spread = [shards for trial in result["trials"] for shards in trial["shards_at_kill"]]
    return (
        f"{result['runs']} runs of `{result['scheme']}` with {result['algorithm']} got SIGKILL "
        f"{result['kills']} times at random moments, with {min(spread, default=0)} to "
        f"{max(spread, default=0)} shards finished; resumed, "
        f"**{result['runs_with_identical_files']} of {result['runs']}** had the "
        f"{result['files_compared']} files of an uninterrupted run, byte for byte.\n\n"
        f"{footnote(result)}"
    )


def allocation(result: dict[str, Any]) -> str:
    """Returns the table of `allocation_table.py`."""
    rows = [
        [
            f"{row['budget']}, {row['method']}",
            f"{row['bits_per_weight']:.3f}",
            f"{row['kl']:.5f} ± {row['kl_standard_error']:.5f}",
            "-" if row["kl_seed_deviation"] is None else f"{row['kl_seed_deviation']:.5f}",
        ]
        for row in result["summary"]
    ]
    seeds, windows = result["summary"][0]["seeds"], result["tests"]["sampled"]["windows"]
    title = (
        f"The bundled model, plain GPTQ, {result['calibration']['samples']} calibration windows, "
        f"{seeds} seeds; KL to the original in nats per token on {windows} windows of text "
        "sampled from it. Every budget is the bits of the uniform scheme.\n\n"
    )
    header = ["", "bits", "KL", "sd over seeds"]
    return title + markdown_table(header, rows) + "\n\n" + footnote(result)


def activations(result: dict[str, Any]) -> str:
    """Returns the cost of int8 activations, from `activation_table.py`."""
    rows = []
    for run in result["runs"]:
        kl, flips = run["divergence"]["mean"], run["divergence"]["flips"]
        covers = run["scale"] if run["scale"] is None or isinstance(run["scale"], str) else None
        scale = covers or ("-" if run["scale"] is None else f"percentile {run['scale']:g}")
        rows.append(
            [
                f"{run['scheme']} {run['algorithm']}",
                scale,
                f"{kl['mean']:.5f} ± {kl['standard_error']:.5f}",
                f"{100 * flips['mean']:.2f}%",
                f"{run['perplexity_ratio']['ratio']:.4f}",
            ]
        )
    header = ["", "calibrated scale", "KL", "flips", "perplexity / original"]
    return markdown_table(header, rows) + "\n\n" + footnote(result)


def kernels(result: dict[str, Any]) -> str:
    """Returns the code of the fused kernels for sm_90, from `inspect_kernels.py`."""
    entries = result["kernels"]
    fused = [
        entry
        for entry in entries
        if entry["target"] == "sm_90" and entry["instructions_per_weight"] is not None
    ]
    rows = [
        [
            entry["case"],
            f"{entry['instructions_per_weight']:.2f}",
            str(entry["registers"]),
            f"{entry['shared'] / 1024:.0f}",
        ]
        for entry in fused
    ]
    title = (
        f"{len({entry['case'] for entry in entries})} kernels, compiled for "
        f"{len({entry['target'] for entry in entries})} targets: "
        f"{sum(entry['spilled'] > 0 for entry in entries)} of {len(entries)} spill registers. The "
        f"fused ones on sm_90; {sum(entry['multiplies_from_registers'] for entry in fused)} of "
        f"{len(fused)} feed wgmma from registers:\n\n"
    )
    header = ["", "instructions per weight", "registers", "shared, KiB"]
    return title + markdown_table(header, rows) + "\n\n" + footnote(result, ("triton",))


def cpu(result: dict[str, Any]) -> str:
    """Returns the speed-ups of the CPU kernels and the decoder, from `make bench-cpu`."""
    parts = []
    for threads in sorted({entry["threads"] for entry in result["summary"]}):
        mine = [entry for entry in result["summary"] if entry["threads"] == threads]
        tokens = sorted({int(m) for entry in mine for m in entry["vs_bf16"]})
        rows = []
        for scheme in dict.fromkeys(entry["scheme"] for entry in mine):
            found = {e["candidate"]: e for e in mine if e["scheme"] == scheme}
            peers = [entry for entry in found.values() if entry["kind"] == "peer"]
            cells = []
            for m in map(str, tokens):
                own = [found.get(name, {"vs_bf16": {}})["vs_bf16"].get(m) for name in CPU_OWN]
                best = max((e["vs_bf16"][m] for e in peers if m in e["vs_bf16"]), default=None)
                cells.append(" / ".join("-" if x is None else f"{x:.2f}" for x in (*own, best)))
            shares = [found[n]["share_of_ceiling"].get("1") for n in CPU_OWN if n in found]
            share = next((x for x in shares if x is not None), None)
            rows.append([f"`{scheme}`", *cells, "-" if share is None else f"{100 * share:.0f}%"])
        title = (
            f"Times torch's bf16 product, threads: {threads}, {result['isa']}: 16-bit activations "
            "/ 8-bit activations / the fastest peer. The last column is the share of plain "
            "reading's speed at one token.\n\n"
        )
        header = ["", *(f"M = {m}" for m in tokens), "of reading"]
        parts.append(title + markdown_table(header, rows))
    if result["decoder"]:
        parts.append(_cpu_decoder(result["decoder"]))
    return "\n\n".join(parts) + "\n\n" + footnote(result)


def _cpu_decoder(measured: list[dict[str, Any]]) -> str:
    rows = [
        [
            f"{name}, threads: {row['threads']}",
            f"{entry['prefill_tokens_per_second']:.1f}",
            f"{entry['decode_tokens_per_second']:.1f}",
        ]
        for row in measured
        for name, entry in row["candidates"].items()
    ]
    first = measured[0]
    title = (
        f"A random Llama of 1B's shape in `{first['scheme']}`, the same weights everywhere: tokens "
        f"per second of a prompt of {first['prompt']}, and of {first['new']} new ones.\n\n"
    )
    return title + markdown_table(["", "prefill", "decode"], rows)


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


# Candidates of ours in cpu.json, the default first.
CPU_OWN = ("lowbit A16", "lowbit A8")
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "allocation": allocation,
    "quality": quality,
    "memory": memory,
    "kill_resume": kill_resume,
    "activations": activations,
    "kernels": kernels,
    "cpu": cpu,
    "peers": peers,
    "peers_outliers": peers,
}


def gigabytes(size: int) -> str:
    """Returns bytes in GB (1e9) with two decimals."""
    return f"{size / 1e9:.2f}"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table, all columns but the first right-aligned."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def footnote(result: dict[str, Any], packages: Sequence[str] = ("torch", "transformers")) -> str:
    """Returns how and where a result was measured, with the versions of `packages`."""
    origin = result["provenance"]
    device, versions = origin["device"], origin["versions"]
    place = device["gpu"] or f"{device['cpu']}, {device['cores']} cores"
    commit = (origin["commit"] or "unknown")[:12]
    used = ", ".join(f"{package} {versions[package]}" for package in packages)
    return f"<sub>`{result['command']}`, {place}, {used}, commit {commit}, {origin['date']}.</sub>"


def render(text: str, results: Path) -> str:
    """Returns `text` with every marked block rendered anew.

    Raises:
        LowbitError: a marker names no table.
    """

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise LowbitError(f"marker table:{name} is unknown; known are {', '.join(TABLES)}")
        file = results / f"{name}.json"
        if not file.exists():
            return f"{match[1]}Not measured yet.\n{match[3]}"
        return f"{match[1]}{TABLES[name](json.loads(file.read_text()))}\n{match[3]}"

    return BLOCK.sub(block, text)


def pages() -> list[Path]:
    """Returns the Markdown files that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
    """Runs the command."""
    parser = command_line.parser(__doc__, "python scripts/readme_tables.py --check")
    parser.add_argument("--check", action="store_true", help="only report, exit with 1 if stale")
    command_line.run(parser, _run)


def _run(arguments: argparse.Namespace) -> None:
    stale = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        rendered = render(text, RESULTS)
        if rendered == text:
            continue
        stale.append(page)
        if not arguments.check:
            page.write_text(rendered, encoding="utf-8")
    for page in stale:
        print(f"{page.relative_to(ROOT)}: {'stale' if arguments.check else 'rewritten'}")
    if stale and arguments.check:
        sys.exit(1)


if __name__ == "__main__":
    main()
