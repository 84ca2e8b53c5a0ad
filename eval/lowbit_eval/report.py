"""An evaluation as tables for a terminal of 100 columns."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table

from lowbit_eval.evaluate import EvaluationResult
from lowbit_eval.slices import Slice
from lowbit_eval.statistics import Estimate, Interval

SLICES_SHOWN = 20
MISSING = "-"


def render(result: EvaluationResult) -> RenderableType:
    """Returns the report of `result`: one row a measurement, then the worst slices."""
    parts: list[RenderableType] = [_measurements(result)]
    if result.slices:
        parts.append(_slices(result.slices))
    return Group(*parts)


def _measurements(result: EvaluationResult) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("measurement", style="bold", max_width=34)
    table.add_column("value", justify="right", max_width=22)
    table.add_column("note", style="dim", max_width=40)
    rows = [
        (
            "perplexity",
            f"{result.perplexity.perplexity:.4f}",
            _interval(result.perplexity.interval),
        ),
        *_comparison(result),
        *_size(result),
        *_speed(result),
    ]
    for row in rows:
        table.add_row(*row)
    environment = result.environment
    table.add_section()
    table.add_row(
        "windows",
        f"{result.windows} x {result.seqlen}",
        f"{environment['dtype']}, {environment['device_type']}, digest {result.token_digest[:12]}",
    )
    return table


def _comparison(result: EvaluationResult) -> list[tuple[str, str, str]]:
    base, ratio, distance = result.base_perplexity, result.perplexity_ratio, result.divergence
    if base is None or ratio is None or distance is None:
        return []
    return [
        ("  baseline", f"{base.perplexity:.4f}", _interval(base.interval)),
        ("  model / baseline", f"{ratio.ratio:.5f}", _interval(ratio.interval, "paired ")),
        ("KL to baseline, nats per token", f"{distance.mean.mean:.3g}", _error(distance.mean)),
        ("  median", f"{distance.median:.3g}", ""),
        (
            "  99% | 99.9% | max",
            f"{distance.percentile_99:.2g} | {distance.percentile_999:.2g} | "
            f"{distance.maximum:.2g}",
            "",
        ),
        ("top-1 flips", _percent(distance.flips.mean), _error(distance.flips, percent=True)),
        ("mean log P/Q of the text", f"{distance.log_ratio.mean:.3g}", _error(distance.log_ratio)),
    ]


def _size(result: EvaluationResult) -> list[tuple[str, str, str]]:
    size = result.size
    if size is None:
        return []
    rows = [("size on disk", f"{size.bytes_on_disk / 1e6:,.1f} MB", "")]
    if size.bits_per_parameter is not None:
        note = f"of {size.parameters:,} parameters"
        rows.append(("  bits per parameter", f"{size.bits_per_parameter:.3f}", note))
    if size.quantized_bits_per_weight is not None:
        note = f"of {size.quantized_weights:,} weights, scales included"
        rows.append(("  bits per quantized weight", f"{size.quantized_bits_per_weight:.3f}", note))
    return rows


def _speed(result: EvaluationResult) -> list[tuple[str, str, str]]:
    speed = result.speed
    note = f"batch 1, {result.environment['threads']} threads"
    rows = [("prefill, tokens per second", f"{speed.prefill_tokens_per_second:,.0f}", note)]
    if speed.peak_rss_bytes is not None:
        rows.append(("peak memory", f"{speed.peak_rss_bytes / 1e6:,.0f} MB", "resident set"))
    if speed.peak_device_bytes is not None:
        rows.append(("peak device memory", f"{speed.peak_device_bytes / 1e6:,.0f} MB", ""))
    return rows


def _slices(slices: tuple[Slice, ...]) -> Table:
    hidden = len(slices) - SLICES_SHOWN
    table = Table(
        box=None,
        pad_edge=False,
        title="slices, the worst first",
        title_justify="left",
        caption=f"{hidden} more in the JSON result" if hidden > 0 else None,
        caption_justify="left",
    )
    table.add_column("slice", max_width=28, no_wrap=True)
    for heading in ("tokens", "perplexity", "/ base", "KL", "+-", "flips"):
        table.add_column(heading, justify="right", max_width=11, no_wrap=True)
    for found in slices[:SLICES_SHOWN]:
        kl, flips = found.divergence, found.flips
        table.add_row(
            found.label,
            f"{found.tokens:,}",
            f"{found.perplexity:.3f}",
            MISSING if found.perplexity_ratio is None else f"{found.perplexity_ratio:.4f}",
            MISSING if kl is None else f"{kl.mean:.3g}",
            MISSING if kl is None or kl.standard_error is None else f"{kl.standard_error:.2g}",
            MISSING if flips is None else _percent(flips.mean),
        )
    return table


def _interval(interval: Interval | None, kind: str = "") -> str:
    return "" if interval is None else f"{kind}95%: {interval.low:.5g} to {interval.high:.5g}"


def _error(estimate: Estimate, percent: bool = False) -> str:
    error = estimate.standard_error
    if error is None:
        return "standard error needs two windows"
    return f"+- {_percent(error) if percent else f'{error:.2g}'} standard error"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"
