"""From finished cases to rows over seeds, verdicts on the targets, and the figure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError
from scripts.peers.contenders import CLASSES, TARGETS, Target

# Two sizes within this many bits per weight count as equal: shapes and padding are stored too.
SIZE_TOLERANCE = 0.005
OURS = "lowbit"
NOT_RUN = "not run yet"


def rows_of(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns one row for each method and scheme, over the seeds, smallest KL first by class.

    Args:
        results: of cases with `size_class`, `tool`, `name`, `scheme`, `seed` and either scores or
            `refused`; the latter make no row.
    """
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for result in results:
        if "tests" in result:
            key = (result["size_class"], result["name"], result["scheme"])
            groups.setdefault(key, []).append(result)
    rows = [_row(found) for found in groups.values()]
    order = list(CLASSES)
    return sorted(
        rows,
        key=lambda row: (order.index(row["size_class"]), _kl(row, next(iter(row["tests"])))),
    )


def _row(found: list[dict[str, Any]]) -> dict[str, Any]:
    first = found[0]
    return {
        **{key: first[key] for key in ("size_class", "tool", "name", "scheme")},
        "calibrated": first["seed"] is not None,
        "seeds": len(found),
        **{
            key: statistics.fmean(result[key] for result in found)
            for key in ("bits_per_weight", "stored_bits_per_weight")
        },
        # Other work on the machine only ever adds to a time, and does so to some runs.
        **{key: min(result[key] for result in found) for key in ("seconds", "cpu_seconds")},
        "tests": {test: _scores([r["tests"][test] for r in found]) for test in first["tests"]},
    }


def _scores(found: list[dict[str, Any]]) -> dict[str, Any]:
    means = [scores["kl"]["mean"] for scores in found]
    errors = [scores["kl"]["standard_error"] for scores in found]
    return {
        "kl": statistics.fmean(means),
        # Every seed sees the same windows, so their error does not shrink with seeds; the spread
        # over seeds is another source and stands beside it.
        "kl_standard_error": None if None in errors else statistics.fmean(errors),
        "kl_seed_deviation": statistics.stdev(means) if len(means) > 1 else None,
        "flips": statistics.fmean(scores["flips"]["mean"] for scores in found),
        "perplexity": statistics.fmean(scores["perplexity"] for scores in found),
        "perplexity_ratio": statistics.fmean(scores["perplexity_ratio"] for scores in found),
    }


def verdicts(
    rows: Sequence[dict[str, Any]], test: str, targets: Sequence[Target] = TARGETS
) -> list[dict[str, Any]]:
    """Returns what became of every target on one test set.

    Each peer is met by the best of ours that takes no more bits; the worst of these ratios counts,
    so a peer cannot be passed over because another one is easier.
    """
    return [_verdict(rows, test, target) for target in targets]


def _verdict(rows: Sequence[dict[str, Any]], test: str, target: Target) -> dict[str, Any]:
    in_class = [row for row in rows if row["size_class"] == target.size_class]
    ours = [row for row in in_class if row["tool"] == OURS and row["name"] == target.ours]
    peers = [row for row in in_class if row["tool"] != OURS]
    if target.peers:
        peers = [row for row in peers if row["tool"] in target.peers]
    verdict: dict[str, Any] = {"target": str(target), "wanted_ratio": target.ratio, "met": None}
    if not ours:
        return {**verdict, "reason": f"{target.ours} was not measured"}
    if not peers:
        return {**verdict, "reason": "no peer was measured"}
    pairs, smaller = [], []
    for peer in peers:
        allowed = peer["bits_per_weight"] + SIZE_TOLERANCE
        fitting = [row for row in ours if row["bits_per_weight"] <= allowed]
        if not fitting:
            smaller.append(f"{peer['name']} {peer['scheme']}")
            continue
        best = min(fitting, key=lambda row: _kl(row, test))
        ratio = _kl(best, test) / _kl(peer, test)
        if target.time:
            ratio = best["cpu_seconds"] / peer["cpu_seconds"]
        pairs.append((ratio, best, peer))
    if not pairs:
        return {**verdict, "reason": f"all peers are smaller: {', '.join(smaller)}"}
    ratio, best, peer = max(pairs, key=lambda pair: pair[0])
    return {
        **verdict,
        "met": ratio <= target.ratio,
        "ratio": ratio,
        "quantity": "CPU time" if target.time else "KL",
        "ours": best["scheme"],
        "peer": f"{peer['name']} {peer['scheme']}",
        "smaller_peers": smaller,
    }


def _kl(row: dict[str, Any], test: str) -> float:
    return float(row["tests"][test]["kl"])


def sentence(verdict: dict[str, Any]) -> str:
    """Returns a verdict in a line."""
    if verdict["met"] is None:
        return f"not measured: {verdict['target']} ({verdict['reason']})"
    left_out = verdict["smaller_peers"]
    return (
        f"{'met' if verdict['met'] else 'missed'}: {verdict['target']}; "
        f"{verdict['ours']} has {verdict['ratio']:.3f} times the {verdict['quantity']} "
        f"of {verdict['peer']}"
        + (f" (smaller than ours, left out: {', '.join(left_out)})" if left_out else "")
    )


def draw(rows: Sequence[dict[str, Any]], test: str, file: Path, title: str) -> None:
    """Writes a figure of KL against bits per weight, a mark and a colour for each tool.

    Raises:
        LowbitError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise LowbitError(
            "a figure needs matplotlib: pip install -e '.[bench]', or give no --figure"
        ) from error
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    marks = "osD^v<>Pph8d"
    tools = sorted({row["tool"] for row in rows}, key=lambda tool: (tool != OURS, tool))
    for index, tool in enumerate(tools):
        found = [row for row in rows if row["tool"] == tool]
        mine = tool == OURS
        axes.errorbar(
            [row["bits_per_weight"] for row in found],
            [row["tests"][test]["kl"] for row in found],
            [row["tests"][test]["kl_standard_error"] or 0.0 for row in found],
            fmt="*" if mine else marks[index % len(marks)],
            markersize=12 if mine else 6,
            color="black" if mine else f"C{index % 10}",
            alpha=0.8,
            label=tool,
        )
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight, scales and zero points included")
    axes.set_ylabel(f"KL to the 16-bit model on {test}, nats per token")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
