"""`lowbit calibrate`, `lowbit sweep`: one calibration, each point measured once, kept on resume."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import build_tiny

import lowbit.sweep as sweep_module
from lowbit.calibration.coverage import warn_of_few_tokens
from lowbit.cli import main
from lowbit.errors import LowbitError
from lowbit.sweep import Point, Sweep, grid, pareto


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, calibration tokens and other tokens to measure on."""
    directory = tmp_path_factory.mktemp("sweep")
    build_tiny("llama", directory / "model", torch.bfloat16)
    random = np.random.default_rng(0)
    for name in ("calibration", "test"):
        np.save(directory / f"{name}.npy", random.integers(1, 255, (4, 32)).astype(np.int32))
    return directory


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def sweep(folder: Path, out: Path, *more: object) -> int:
    inputs = ("sweep", folder / "model", out, "--text", folder / "test.npy", "--text-seqlen", 32)
    data = ("--calibration", folder / "calibration.npy", "--samples", 4, "--seqlen", 32)
    return run(*inputs, *(() if "--stats" in more else data), *more)


def test_calibrate_and_quantize_from_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stats = tmp_path / "stats"
    data = ("--calibration", folder / "calibration.npy", "--samples", 4, "--seqlen", 32)
    assert run("calibrate", folder / "model", stats, *data, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["tokens"] == 128
    assert summary["tokens_per_dimension"] == pytest.approx(128 / 168)
    assert run("quantize", folder / "model", tmp_path / "w4", "--stats", stats) == 0
    shown = capsys.readouterr()
    assert "lowbit: warning: calibration has 0.8 tokens per input dimension" in shown.err
    assert run("calibrate", folder / "model", stats, *data) == 2
    assert "lowbit: " in capsys.readouterr().err


def test_a_sweep_measures_every_point_draws_and_leaves_no_weights(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    points = ("--scheme", "W4A16_G32", "--scheme", "W2A16_G32")
    assert sweep(folder, out, *points, "--json") == 0
    results = json.loads(capsys.readouterr().out)["points"]
    assert [result["name"] for result in results] == [
        f"{scheme}-{method}" for scheme in ("W4A16_G32", "W2A16_G32") for method in ("gptq", "rtn")
    ]
    by_scheme = {(result["scheme"], result["method"]): result for result in results}
    assert by_scheme["W4A16_G32", "gptq"]["kl"] < by_scheme["W2A16_G32", "gptq"]["kl"]
    assert by_scheme["W4A16_G32", "gptq"]["bytes"] > by_scheme["W2A16_G32", "gptq"]["bytes"]
    assert any(result["pareto"] for result in results)
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert not (out / "points").exists()
    # Again: nothing is measured twice, a new point is added, and the table fits the screen.
    before = json.loads((out / "sweep.json").read_text())["points"]
    assert sweep(folder, out, *points) == 2
    assert "--resume" in capsys.readouterr().err
    assert sweep(folder, out, *points, "--scheme", "W3A16_G32", "--resume", "--keep") == 0
    after = json.loads((out / "sweep.json").read_text())["points"]
    assert {name: after[name] for name in before} == before
    assert sorted(path.name for path in (out / "points").iterdir()) == [
        "W3A16_G32-gptq",
        "W3A16_G32-rtn",
    ]
    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) <= 100
    assert sweep(folder, out, "--text-seqlen", 16, "--resume") == 2
    assert "measured with another test tokens" in capsys.readouterr().err


def test_bad_grids_are_one_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, needle in (
        (("--scheme", "W9"), "W9"),
        (("--algorithm", "gptk"), "did you mean 'gptq'"),
        (("--quality", "bestest"), "unknown quality"),
        (("--stats", tmp_path / "none"), "holds no statistics"),
    ):
        assert sweep(folder, tmp_path / "out", *more) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert needle in error[-1]
        assert error[-1].startswith("lowbit: ")


def result(name: str, size: int, kl: float) -> dict[str, Any]:
    return {"name": name, "scheme": name, "method": "m", "bytes": size, "kl": kl}


def test_pareto_keeps_what_no_other_point_beats() -> None:
    points = [result("a", 1, 9.0), result("b", 2, 9.0), result("c", 2, 3.0), result("d", 3, 4.0)]
    points += [result("e", 3, 1.0), {"name": "f", "refused": "why"}, result("g", 3, 1.0)]
    assert [point["name"] for point in pareto(points)] == ["a", "c", "e", "g"]


def test_a_grid_has_no_repetitions_and_knows_its_names() -> None:
    points = grid(["w4a16_g64", "W4A16_G64"], ["gptq", "rtn"], ["fast"])
    assert [point.name for point in points] == [f"W4A16_G64-{m}" for m in ("gptq", "rtn", "fast")]
    assert not any(point.runs_the_model for point in points)
    with pytest.raises(LowbitError, match="nothing to sweep"):
        grid(["W4A16_G64"], [], [])


def test_a_refused_point_is_recorded_and_tried_again(tmp_path: Path) -> None:
    tried = []

    def quantize(point: Point, folder: Path) -> dict[str, Any]:
        tried.append(point.name)
        if len(tried) == 1:
            raise LowbitError("it does not fit")
        return {"bits_per_weight": 4.25}

    def measure(folder: Path) -> dict[str, Any]:
        return {"bytes": 1, "kl": 0.5}

    points = grid(["W4A16_G64"], ["gptq", "rtn"], [])
    first = Sweep(tmp_path, {}, resume=False)
    refused, made = first.run(points, quantize, measure, lambda: None, keep=False)
    assert refused["refused"] == "it does not fit"
    assert made["pareto"]
    again = Sweep(tmp_path, {}, resume=True)
    assert all("kl" in r for r in again.run(points, quantize, measure, lambda: None, keep=False))
    assert tried == ["W4A16_G64-gptq", "W4A16_G64-rtn", "W4A16_G64-gptq"]


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("text")
    with pytest.raises(LowbitError, match="is not empty"):
        Sweep(tmp_path, {}, resume=True)


def test_drawing_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(LowbitError, match="--no-plot"):
        sweep_module.require_plotting()


def test_few_tokens_are_warned_of_with_the_figure_of_the_widest_layer() -> None:
    widths = {"narrow": 10, "wide": 20}
    with pytest.warns(UserWarning, match=r"45\.0 tokens per input dimension of wide"):
        warn_of_few_tokens(900, widths)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_few_tokens(1000, widths)
