"""Draws speed-ups over torch's bf16 product: a panel per scheme, and the share of the read ceiling.

Every panel has the same axes, so that schemes can be compared by eye. Lines are geometric means
over the shapes, with the fewest threads that were measured.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

COLUMNS = 4
OURS = {"lowbit A16": "#0b6fa4", "lowbit A8": "#d1495b"}
PEERS = {
    "llama.cpp": "#8a6d3b",
    "openvino": "#7b5aa6",
    "torchao": "#b0a030",
    "torch": "#777777",
    "bitsandbytes": "#3a7d44",
    "fp32": "#bbbbbb",
}
STYLES: tuple[Any, ...] = ("--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)))


def draw(result: dict[str, Any], file: Path) -> None:
    """Writes the picture to `file` (PNG); without matplotlib `result["no_picture"]` says so."""
    if importlib.util.find_spec("matplotlib") is None:
        result["no_picture"] = "matplotlib is not installed"
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    threads = min(entry["threads"] for entry in result["summary"])
    mine = [entry for entry in result["summary"] if entry["threads"] == threads]
    schemes = list(dict.fromkeys(entry["scheme"] for entry in mine))
    rows = math.ceil((len(schemes) + 1) / COLUMNS)
    figure, grid = pyplot.subplots(
        rows, COLUMNS, figsize=(3.4 * COLUMNS, 2.7 * rows), squeeze=False, constrained_layout=True
    )
    panels = list(grid.flat)
    top = max((v for entry in mine for v in _shown(entry).values()), default=1.0)
    looks = _looks(mine)
    for panel, scheme in zip(panels, schemes, strict=False):
        _panel(panel, scheme, [entry for entry in mine if entry["scheme"] == scheme], top, looks)
    _shares(panels[len(schemes)], mine)
    lines = {line.get_label(): line for panel in panels for line in panel.get_lines()}
    known = {name: lines[name] for name in looks if name in lines}
    # One legend for all: a name looks the same in every panel.
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=6, fontsize=8,
                  frameon=False, handlelength=3)  # fmt: skip
    for panel in panels[len(schemes) + 1 :]:
        panel.set_visible(False)
    origin = result["provenance"]
    figure.suptitle(
        f"Times as fast as torch's bf16 product, {origin['device']['cpu']} ({result['isa']}), "
        f"{threads} thread{'s' * (threads > 1)}, torch {origin['versions']['torch']}\n"
        "cold weights, geometric mean over shapes; solid: lowbit, broken: peers",
        fontsize=10,
    )
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _shown(entry: dict[str, Any]) -> dict[int, float]:
    """Returns tokens -> speed-up of what is drawn as a line."""
    if entry["kind"] == "ceiling" or entry["candidate"] == "bf16":
        return {}
    return {int(m): value for m, value in entry["vs_bf16"].items()}


def _looks(entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns candidate -> how its line looks: ours in colour and solid, a colour per library."""
    looks: dict[str, dict[str, Any]] = {}
    used: dict[str, int] = {}
    for name in dict.fromkeys(entry["candidate"] for entry in entries if _shown(entry)):
        if name in OURS:
            looks[name] = {"color": OURS[name], "linestyle": "-", "linewidth": 2.0, "zorder": 3}
            continue
        family = name.split(" ")[0]
        style = STYLES[used.get(family, 0) % len(STYLES)]
        used[family] = used.get(family, 0) + 1
        colour = PEERS.get(family, "#777777")
        looks[name] = {"color": colour, "linestyle": style, "linewidth": 1.4}
    return looks


def _panel(
    axes: Any,
    scheme: str,
    entries: list[dict[str, Any]],
    top: float,
    looks: dict[str, dict[str, Any]],
) -> None:
    for entry in entries:
        points, name = _shown(entry), entry["candidate"]
        if points:
            look = {**looks[name], "marker": "o", "markersize": 2.5, "label": name}
            axes.plot(list(points), list(points.values()), **look)
    axes.axhline(1.0, color="#999999", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    ticks = [2.0**power for power in range(-4, math.ceil(math.log2(max(top, 2))) + 1)]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylim(1 / 16, 1.15 * max(top, 2))
    tokens = sorted({m for entry in entries for m in _shown(entry)})
    axes.set_xticks(tokens, [str(m) for m in tokens])
    axes.minorticks_off()
    axes.set_title(scheme, fontsize=10, loc="left")
    axes.set_xlabel("tokens M", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _shares(axes: Any, entries: list[dict[str, Any]]) -> None:
    """Draws how near one token comes to plain reading, a bar per scheme."""
    bars: dict[str, float] = {}
    for entry in entries:
        share = entry["share_of_ceiling"].get("1")
        if entry["kind"] == "ours" and share is not None:
            bars.setdefault(entry["scheme"], share)
    names = list(bars)[::-1]
    axes.barh(names, [bars[name] for name in names], color=OURS["lowbit A16"], height=0.6)
    for index, name in enumerate(names):
        axes.text(bars[name], index, f" {100 * bars[name]:.0f}%", va="center", fontsize=7)
    axes.axvline(1.0, color="#999999", linewidth=0.8)
    axes.set_xlim(0, 1.15)
    axes.set_title("share of the read ceiling, M = 1", fontsize=10, loc="left")
    axes.tick_params(labelsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
