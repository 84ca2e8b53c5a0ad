"""Tables of what quantizing costs: schemes, allocations, int8 activations."""

from __future__ import annotations

from typing import Any

from scripts.tables.markdown import footnote, markdown_table


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
