"""Draws what was measured beside what the machine allows: one panel per question.

Left, how near a product comes to the roofline: the larger of its bytes over the bandwidth of a copy
and its operations over the rate of a large cuBLAS product, both measured in the same run. Right,
how much faster than cuBLAS bf16 it is. Lines are geometric means over the weights of 25 MB and
more, bands reach from the worst to the best of them.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

from targets import large, rows_of

COLOURS = ("#0b6fa4", "#d1495b", "#3a7d44", "#8d5a97", "#c77d0a", "#4c5760", "#111111")


def draw(result: dict[str, Any], file: Path) -> None:
    """Writes the picture of the linear layers in `result` to `file` (PNG).

    Without matplotlib, `result["no_picture"]` says so.

    Raises:
        ValueError: there is nothing to draw.
    """
    if importlib.util.find_spec("matplotlib") is None:
        result["no_picture"] = "matplotlib is not installed"
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows_of(result) if row["name"] != "bf16"]
    if not rows:
        raise ValueError("roofline: no row of a linear layer was measured; nothing to draw")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5.4), constrained_layout=True)
    names = list(dict.fromkeys(r["name"] for r in rows if not r["peer"]))
    peers = list(dict.fromkeys(r["name"] for r in rows if r["peer"]))
    for index, name in enumerate(names):
        colour = COLOURS[index % len(COLOURS)]
        _line(left, rows, name, "roofline_fraction", colour, "-", band=True)
        _line(right, rows, name, "vs_bf16", colour, "-", band=True)
    for index, name in enumerate(peers):
        style = ("--", ":", "-.", (0, (1, 3)))[index % 4]
        _line(left, rows, name, "roofline_fraction", "#777777", style, band=False)
        _line(right, rows, name, "vs_bf16", "#777777", style, band=False)
    linear = result.get("linear", {})
    bandwidth, rate = (linear.get(name, 0) for name in ("copy_bandwidth_gbps", "matmul_tflops"))
    _dress(
        left,
        rows,
        "share of the roofline",
        "the larger of bytes over bandwidth and operations over rate",
    )
    left.set_ylim(0, 1.05)
    left.axhline(0.7, color="#999999", linewidth=0.8, linestyle=":")
    _dress(right, rows, "times as fast as cuBLAS bf16", "same shapes, same run")
    right.axhline(1.0, color="#999999", linewidth=0.8, linestyle=":")
    right.set_ylim(bottom=0)
    right.legend(fontsize=8, frameon=False, loc="upper right", handlelength=3.5)
    gpu = result.get("gpu", {}).get("name") or "CPU (smoke test)"
    versions = result.get("provenance", {}).get("versions", {})
    figure.suptitle(
        f"Linear layers of Llama-3-8B and 70B on {gpu}, torch {versions.get('torch')}, Triton "
        f"{versions.get('triton')}\nweights of 25 MB and more, geometric mean and range; copy "
        f"{bandwidth:,.0f} GB/s, cuBLAS bf16 {rate:,.0f} TFLOP/s",
        fontsize=10,
    )
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def _line(
    axes: Any,
    rows: list[dict[str, Any]],
    name: str,
    field: str,
    colour: str,
    style: Any,
    band: bool,
) -> None:
    by_m: dict[int, list[float]] = {}
    mine = [row for row in rows if row["name"] == name and field in row]
    # Small weights are left out; where nothing else was measured they are all there is.
    for row in [row for row in mine if large(row)] or mine:
        by_m.setdefault(row["M"], []).append(row[field])
    ms = sorted(by_m)
    means = [math.exp(sum(map(math.log, by_m[m])) / len(by_m[m])) for m in ms]
    axes.plot(ms, means, color=colour, linestyle=style, linewidth=1.8, marker="o", markersize=3,
              label=name)  # fmt: skip
    if band:
        low, high = [min(by_m[m]) for m in ms], [max(by_m[m]) for m in ms]
        axes.fill_between(ms, low, high, color=colour, alpha=0.10, linewidth=0)


def _dress(axes: Any, rows: list[dict[str, Any]], title: str, below: str) -> None:
    ms = sorted({row["M"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ms, [str(m) for m in ms])
    axes.set_xlabel("tokens M")
    axes.set_title(f"{title}\n", fontsize=11)
    axes.text(0.5, 1.01, below, ha="center", transform=axes.transAxes, fontsize=8, color="#555555")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
