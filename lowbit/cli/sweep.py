"""`lowbit sweep`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from lowbit.cli.options import Device, LossMask, Model, OptionalCalibration, Output, Samples, Stats
from lowbit.cli.screen import screen
from lowbit.errors import LowbitError

if TYPE_CHECKING:
    import torch

    from lowbit.calibration.tokens import TokenWindows
    from lowbit.sweep import Measured, Point

DEFAULT_SCHEMES = ("W4A16_G64", "W3A16_G64", "W2A16_G64")


def sweep_command(
    model: Model,
    output: Output,
    text: Annotated[
        str, typer.Option(help="What to measure on: as --text of `lowbit eval`, not calibration.")
    ],
    calibration: OptionalCalibration = None,
    stats: Stats = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option(help=f"Repeatable; {', '.join(DEFAULT_SCHEMES)} by default."),
    ] = None,
    algorithm: Annotated[
        list[str] | None, typer.Option(help="Repeatable; gptq and rtn by default.")
    ] = None,
    quality: Annotated[
        list[str] | None,
        typer.Option(help="A preset beside the algorithms; repeatable. It may run the model."),
    ] = None,
    samples: Samples = 128,
    seqlen: Annotated[int, typer.Option(help="Tokens per calibration window.")] = 512,
    seed: Annotated[int, typer.Option(help="Chooses the calibration windows.")] = 0,
    text_field: Annotated[
        str | None, typer.Option(help="Field of calibration rows; text or messages.")
    ] = None,
    loss_mask: LossMask = False,
    windows: Annotated[int | None, typer.Option(help="Measure on the first N windows.")] = None,
    text_seqlen: Annotated[
        int | None, typer.Option(help="Tokens per measured window; 2048 or the model's longest.")
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the quantized checkpoints in OUT/points.")
    ] = False,
    plot: Annotated[bool, typer.Option(help="Draw OUT/sweep.png.")] = True,
    device: Device = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the points that are there and go on.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Quantize in many ways from one calibration; draw size against KL.

    Example: lowbit sweep ./llama ./sweep --calibration text.txt --text wikitext2 --windows 32
    """
    from lowbit.cli.quantize import exit_interrupted
    from lowbit.hf.loading import choose_device, evaluation_windows, quiet_libraries
    from lowbit.sweep import PLOT_NAME, draw, grid, require_plotting

    quiet_libraries()
    points = grid(scheme or DEFAULT_SCHEMES, _algorithms(algorithm, quality), quality or ())
    if (calibration is None) == (stats is None):
        raise LowbitError("give either --calibration or --stats, one of them")
    if plot:
        require_plotting()
    target = choose_device(device)
    chosen = evaluation_windows(model, text, text_seqlen, windows)
    data = Calibration(calibration, samples, seqlen, seed, text_field, loss_mask)
    with exit_interrupted():
        results = _Measuring(model, output, data, stats, chosen, target).run(points, resume, keep)
    if plot and any("kl" in result for result in results):
        draw(results, f"{Path(model).name}, {len(chosen)} windows", output / PLOT_NAME)
    if json_output:
        typer.echo(json.dumps({"path": str(output), "points": results}, indent=2))
    else:
        _print(results, output, plot)
    if not any("kl" in result for result in results):
        raise LowbitError(f"none of the points could be made; {results[0]['refused']}")


@dataclass(frozen=True)
class Calibration:
    """The calibration options of the command line, as `quantize` takes them."""

    calibration: str | None
    samples: int
    seqlen: int
    seed: int
    text_field: str | None
    loss_mask: bool


@dataclass(frozen=True)
class _Measuring:
    """A sweep's inputs, checked."""

    model: str
    output: Path
    data: Calibration
    stats: Path | None
    windows: TokenWindows
    device: torch.device

    def run(self, points: list[Point], resume: bool, keep: bool) -> list[Measured]:
        """Calibrates if need be, then makes and measures every point."""
        from rich.console import Console

        from lowbit.hf.loading import load_model
        from lowbit.progress import RunProgress
        from lowbit.sweep import Sweep

        shown = Console(stderr=True).is_terminal
        fingerprint = {"test tokens": self.windows.digest, "device": self.device.type}
        sweep = Sweep(self.output, fingerprint, resume)
        stats = self.stats if self.stats is not None else self._calibrate(resume, shown)
        base = load_model(self.model, device=self.device)
        with RunProgress(shown) as bar:
            # Quantizing counts as much as measuring: how they compare shows only on the way.
            share = len(self.windows)
            bar.stage("sweep", 2 * share * len(points))

            def quantize(point: Point, folder: Path) -> dict[str, Any]:
                bar.describe(f"{point.scheme} {point.method}")
                return self._quantize(point, folder, stats)

            done = 0

            def finished() -> None:
                # A point that was finished before, or refused, counts too.
                nonlocal done
                done += 1
                bar.complete(2 * share * done)

            return sweep.run(
                points,
                quantize,
                lambda folder: self._measure(folder, base, lambda: bar.advance(1)),
                finished,
                keep,
            )

    def _calibrate(self, resume: bool, shown: bool) -> Path:
        from lowbit.pipeline import calibrate

        folder = self.output / "statistics"
        calibrate(
            self.model,
            folder,
            **{**vars(self.data), "calibration": str(self.data.calibration)},
            device=self.device,
            resume=resume,
            progress=shown,
        )
        return folder

    def _quantize(self, point: Point, folder: Path, stats: Path) -> dict[str, Any]:
        from lowbit.pipeline import quantize

        start = time.perf_counter()
        if point.runs_the_model and self.data.calibration is None:
            raise LowbitError(
                f"quality {point.quality} must run the model; give --calibration instead of --stats"
            )
        data = vars(self.data) if point.runs_the_model else {"stats": stats}
        result = quantize(
            self.model,
            folder,
            scheme=point.scheme,
            algorithm=point.algorithm,
            quality=point.quality,
            **data,
            device=self.device,
            resume=True,
            progress=False,
        )
        return {
            "bits_per_weight": result.bits_per_weight,
            "fallbacks": result.manifest["summary"]["fallbacks"],
            "seconds": time.perf_counter() - start,
        }

    def _measure(self, folder: Path, base: Any, advance: Callable[[], None]) -> dict[str, Any]:
        from lowbit_eval import evaluate, measure_size

        from lowbit.hf.loading import load_model

        quantized = load_model(str(folder), device=self.device)
        result = evaluate(quantized, self.windows, base, advance=advance)
        assert result.divergence is not None
        assert result.base_perplexity is not None
        kl = result.divergence.mean
        return {
            "bytes": measure_size(folder).bytes_on_disk,
            "kl": kl.mean,
            "kl_standard_error": kl.standard_error,
            "flips": result.divergence.flips.mean,
            "perplexity": result.perplexity.perplexity,
            "base_perplexity": result.base_perplexity.perplexity,
        }


def _algorithms(asked: list[str] | None, qualities: list[str] | None) -> tuple[str, ...]:
    """Returns the algorithms of the grid: the default ones where nothing was asked for."""
    if asked:
        return tuple(asked)
    return () if qualities else ("gptq", "rtn")


def _print(results: list[Measured], output: Path, plot: bool) -> None:
    from lowbit.sweep import PLOT_NAME, RESULT_NAME

    table = Table(title="size against KL; * is beaten by no other point")
    table.add_column("", no_wrap=True)
    table.add_column("scheme", overflow="fold")
    table.add_column("method", overflow="fold")
    for heading in ("MB", "bits/weight", "KL", "± s.e.", "flips", "perplexity"):
        table.add_column(heading, justify="right", no_wrap=True)
    measured = [result for result in results if "kl" in result]
    for result in sorted(measured, key=lambda result: result["bytes"]):
        table.add_row(
            "*" if result["pareto"] else "",
            result["scheme"],
            result["method"],
            f"{result['bytes'] / 1e6:,.2f}",
            f"{result['bits_per_weight']:.3f}",
            f"{result['kl']:.5f}",
            f"{result['kl_standard_error']:.5f}",
            f"{result['flips']:.2%}",
            f"{result['perplexity']:.3f}",
        )
    console = screen()
    if measured:
        console.print(table)
        console.print(f"perplexity of the original: {measured[0]['base_perplexity']:.3f}")
        console.print(f"written: {output / (PLOT_NAME if plot else RESULT_NAME)}", soft_wrap=True)
    for result in results:
        if "refused" in result:
            console.print(f"[yellow]left out[/] {result['name']}: {result['refused']}")
