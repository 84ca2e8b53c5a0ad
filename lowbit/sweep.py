"""A sweep: schemes x methods from one calibration, each weighed and measured, resumable.

    OUT/sweep.json      what was measured, replaced after every point
    OUT/sweep.png       size on disk against KL
    OUT/statistics/     what `lowbit calibrate` writes, unless it was there before
    OUT/points/NAME/    the checkpoint of a point, until it has been measured

Measuring itself belongs to the evaluation, which is above this package: it is passed in.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.algorithms import make_algorithm
from lowbit.checkpoint.reader import read_json
from lowbit.checkpoint.writer import disk_errors, write_json
from lowbit.errors import LowbitError
from lowbit.recipe import make_recipe
from lowbit.scheme import Scheme

RESULT_NAME = "sweep.json"
PLOT_NAME = "sweep.png"

Measured = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One quantized model of a sweep.

    Args:
        scheme: of every linear layer.
        algorithm: name of an algorithm, None where `quality` is given.
        quality: name of a preset.
    """

    scheme: str
    algorithm: str | None
    quality: str | None = None

    @property
    def method(self) -> str:
        """The algorithm or the preset."""
        return self.algorithm if self.algorithm is not None else str(self.quality)

    @property
    def name(self) -> str:
        """The name of its folder and of its entry in the result."""
        return f"{self.scheme}-{self.method}"

    @property
    def runs_the_model(self) -> bool:
        """True if stored statistics are not enough."""
        return bool(make_recipe(self.algorithm, self.quality).surroundings())


def grid(
    schemes: Iterable[str], algorithms: Iterable[str], qualities: Iterable[str]
) -> list[Point]:
    """Returns every scheme with every algorithm and every preset, without repetitions.

    Raises:
        LowbitError: for an unknown name, or an empty grid.
    """
    names = [str(Scheme.parse(scheme)) for scheme in schemes]
    methods: list[tuple[str | None, str | None]] = [
        (make_algorithm(name).name, None) for name in algorithms
    ]
    for quality in qualities:
        make_recipe(None, quality)
        methods.append((None, quality.lower()))
    points = dict.fromkeys(Point(name, *method) for name in names for method in methods)
    if not points:
        raise LowbitError("nothing to sweep: give at least one scheme and one algorithm or quality")
    return list(points)


class Sweep:
    """The results of a sweep in a directory.

    Args:
        directory: new or empty, or with `resume` one of an earlier sweep.
        fingerprint: what all points are measured on, JSON values.
        resume: keep the points that are there.

    Raises:
        LowbitError: the directory holds something else, or points measured otherwise.
    """

    def __init__(self, directory: Path, fingerprint: dict[str, Any], resume: bool) -> None:
        self.directory, self.fingerprint = directory, fingerprint
        self.results: dict[str, Measured] = {}
        file = directory / RESULT_NAME
        if file.is_file() and not resume:
            raise LowbitError(
                f"{directory}: holds a sweep; go on with --resume, or choose a new folder"
            )
        if file.is_file():
            self._take(read_json(file, ""))
        elif directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
            raise LowbitError(f"{directory}: is not empty; choose a new folder")
        with disk_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
        self._write()

    def _take(self, stored: dict[str, Any]) -> None:
        """Takes over the points of an earlier run."""
        known, points = stored.get("fingerprint"), stored.get("points")
        if not isinstance(known, dict) or not isinstance(points, dict):
            raise LowbitError(f"{self.directory / RESULT_NAME}: is corrupt; start a new folder")
        for field, value in self.fingerprint.items():
            if known.get(field) != value:
                raise LowbitError(
                    f"{self.directory}: its points were measured with another {field} "
                    f"({known.get(field)}, now {value}), so they do not compare; start a new folder"
                )
        self.results = points

    def run(
        self,
        points: list[Point],
        quantize: Callable[[Point, Path], dict[str, Any]],
        measure: Callable[[Path], dict[str, Any]],
        finished: Callable[[], None],
        keep: bool,
    ) -> list[Measured]:
        """Brings every point to a result and returns them, in the order of `points`.

        A point that cannot be made is recorded with the reason, and tried again another time.

        Args:
            points: the grid.
            quantize: makes the checkpoint of a point in a folder, going on with what is there;
                returns what is to be recorded of it.
            measure: scores the checkpoint in a folder.
            finished: called after each point.
            keep: leave the checkpoints there.
        """
        for point in points:
            if "kl" not in self.results.get(point.name, {}):
                folder = self.directory / "points" / point.name
                self.results[point.name] = self._result(point, folder, quantize, measure)
                self._write()
                if not keep:
                    shutil.rmtree(folder, ignore_errors=True)
            finished()
        with suppress(OSError):
            (self.directory / "points").rmdir()  # stays if checkpoints are in it
        found = [self.results[point.name] for point in points]
        best = {id(result) for result in pareto(found)}
        return [{**result, "pareto": id(result) in best} for result in found]

    def _result(
        self,
        point: Point,
        folder: Path,
        quantize: Callable[[Point, Path], dict[str, Any]],
        measure: Callable[[Path], dict[str, Any]],
    ) -> Measured:
        about = {"name": point.name, "scheme": point.scheme, "method": point.method}
        try:
            made = quantize(point, folder)
            return {**about, **made, **measure(folder)}
        except LowbitError as error:
            return {**about, "refused": str(error)}

    def _write(self) -> None:
        content = {"fingerprint": self.fingerprint, "points": self.results}
        write_json(self.directory / RESULT_NAME, content)


def pareto(results: list[Measured]) -> list[Measured]:
    """Returns the results that no other one beats in size and KL, the smallest first.

    One of several with the same size and KL is enough to beat none of them: all are returned.
    """
    measured = [result for result in results if "kl" in result]

    def beaten(result: Measured) -> bool:
        return any(
            other["bytes"] <= result["bytes"]
            and other["kl"] <= result["kl"]
            and (other["bytes"], other["kl"]) != (result["bytes"], result["kl"])
            for other in measured
        )

    return sorted(
        (result for result in measured if not beaten(result)), key=lambda result: result["bytes"]
    )


def require_plotting() -> None:
    """Refuses before any work if `draw` could not.

    Raises:
        LowbitError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise LowbitError(
            "drawing needs matplotlib: pip install 'lowbit[plot]', or leave the picture out with "
            "--no-plot"
        ) from error


def draw(results: list[Measured], title: str, file: Path) -> None:
    """Writes a PNG of size on disk (MB) against KL (nats per token, logarithmic).

    A colour for each method; the line joins the points that no other one beats.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [result for result in results if "kl" in result]
    figure = Figure(figsize=(8, 5.5), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    best = pareto(measured)
    axes.plot(
        [result["bytes"] / 1e6 for result in best],
        [result["kl"] for result in best],
        color="0.6",
        linewidth=1,
        zorder=1,
        label="best at its size",
    )
    for index, method in enumerate(dict.fromkeys(result["method"] for result in measured)):
        group = [result for result in measured if result["method"] == method]
        axes.errorbar(
            [result["bytes"] / 1e6 for result in group],
            [result["kl"] for result in group],
            yerr=[result["kl_standard_error"] for result in group],
            fmt="osD^vP*X"[index % 8],
            color=f"C{index % 10}",
            capsize=2,
            label=method,
        )
    for result in best:
        place = (result["bytes"] / 1e6, result["kl"])
        axes.annotate(result["scheme"], place, (5, 5), textcoords="offset points", fontsize=8)
    axes.set_yscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel("size on disk, MB (everything in the files)")
    axes.set_ylabel("KL to the full-precision model, nats per token")
    axes.set_title(title)
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend()
    with disk_errors(file):
        figure.savefig(file)
