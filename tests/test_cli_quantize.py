"""`lowbit quantize`, `lowbit inspect`: bad input is one sentence, status 2, and changes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build_tiny

from lowbit.cli import main


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cli") / "model"
    build_tiny("llama", directory, torch.bfloat16, max_shard_size="60KB")
    return directory


@pytest.fixture
def model(source: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    copy.mkdir()
    for file in source.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    file = tmp_path / "tokens.npy"
    np.save(file, np.random.default_rng(0).integers(1, 255, (8, 64)).astype(np.int32))
    return file


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def first_shard(model: Path) -> Path:
    return sorted(model.glob("*.safetensors"))[0]


def edit_tensors(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    for file in model.glob("*.safetensors"):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})


def poison(value: float) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        if "model.layers.2.mlp.up_proj.weight" in tensors:
            tensors["model.layers.2.mlp.up_proj.weight"][5, 7] = value

    return lambda model: edit_tensors(model, change)


def edit_json(name: str, **fields: object) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        content = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**content, **fields}))

    return change


def truncate(model: Path) -> None:
    first_shard(model).write_bytes(first_shard(model).read_bytes()[:-100])


def drop_tensor(model: Path) -> None:
    index = json.loads((model / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    edit_tensors(model, lambda tensors: [tensors.pop("model.norm.weight", None)].clear())
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def escape(model: Path) -> None:
    edit_json(
        "model.safetensors.index.json", weight_map={"lm_head.weight": "../model.safetensors"}
    )(model)


def pickle_only(model: Path) -> None:
    for file in model.glob("*.safetensors*"):
        file.unlink()
    torch.save({}, model / "pytorch_model.bin")


def no_place(model: Path) -> None:
    """A bias in the file for a model without biases."""
    save_file({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, model / "x.safetensors")
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.0.self_attn.q_proj.bias"] = "x.safetensors"
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def as_integers(model: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith("q_proj.weight"):
                tensors[name] = tensors[name].to(torch.int8)

    edit_tensors(model, change)


BROKEN_MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing shard": (lambda m: first_shard(m).unlink(), "the shard is missing"),
    "truncated shard": (truncate, "is truncated"),
    "corrupt header": (lambda m: first_shard(m).write_bytes(b"x" * 64), "header"),
    "nan": (poison(float("nan")), "'model.layers.2.mlp.up_proj.weight' holds NaN"),
    "inf": (poison(float("inf")), "'model.layers.2.mlp.up_proj.weight' holds Inf"),
    "missing tensor": (drop_tensor, "'model.norm.weight' is missing"),
    "index outside": (escape, "outside the directory"),
    "shapes disagree": (edit_json("config.json", intermediate_size=170), "config.json needs"),
    "fewer blocks than tensors": (edit_json("config.json", num_hidden_layers=2), "has no place"),
    "far too many blocks": (edit_json("config.json", num_hidden_layers=10**9), "blocks, but"),
    "no place for a bias": (no_place, "has no place for tensor"),
    "integers as weights": (as_integers, "needs floats"),
    "a word for a number": (edit_json("config.json", hidden_size="big"), "cannot be loaded"),
    "zero heads": (edit_json("config.json", num_attention_heads=0), "cannot be loaded"),
    "unknown model": (edit_json("config.json", model_type="nonsense"), "config.json"),
    "no json": (lambda m: (m / "config.json").write_text("{") and None, "not valid JSON"),
    "pickles": (pickle_only, "pickled weights"),
    "already quantized": (
        edit_json("config.json", quantization_config={"quant_method": "gptq"}),
        "already quantized",
    ),
}


def assert_one_sentence(capsys: pytest.CaptureFixture[str], expected: str) -> None:
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("lowbit: ")]
    assert len(lines) == 1, error
    assert expected in lines[0]
    assert "Traceback" not in error


@pytest.mark.parametrize("case", BROKEN_MODELS)
def test_broken_models(
    case: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    breaks, expected = BROKEN_MODELS[case]
    breaks(model)
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    assert run("quantize", model, tmp_path / "out", "--algorithm", "rtn") == 2
    assert_one_sentence(capsys, expected)
    assert not (tmp_path / "out").exists()
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before


BAD_OPTIONS: dict[str, tuple[list[str], str]] = {
    "unknown scheme": (["--scheme", "W4A61"], "W4A16"),
    "five bits": (["--scheme", "W5A16"], "5 bits are not supported"),
    "group of 7": (["--scheme", "W4A16_G7"], "group size 7"),
    "unknown algorithm": (["--algorithm", "gtpq"], "did you mean 'gptq'"),
    "unknown option": (["--algorithm", "rtn", "--option", "serch=true"], "did you mean 'search'"),
    "option of wrong type": (["--algorithm", "rtn", "--option", "search=3"], "search"),
    "gptq without data": (["--algorithm", "gptq"], "needs calibration data"),
    "quality without data": (["--quality", "balanced"], "--calibration"),
    "quality beside algorithm": (["--algorithm", "rtn", "--quality", "fast"], "give one of them"),
    "unknown quality": (["--quality", "bets"], "did you mean 'best'"),
    "option without algorithm": (["--option", "search=false"], "--algorithm"),
    "missing text": (["--calibration", "nowhere.txt", "--seqlen", "64"], "nowhere.txt"),
    "text without tokenizer": (["--calibration", "pydoc", "--seqlen", "64"], "tokenizer"),
    "too short": (["--calibration", "TOKENS", "--samples", "9", "--seqlen", "64"], "needs 9"),
    "too long a window": (["--calibration", "TOKENS", "--seqlen", "500"], "128 positions"),
    "bad dynamic": (["--algorithm", "rtn", "--dynamic", "nonsense"], "REGEX=SCHEME"),
    "dynamic without match": (["--algorithm", "rtn", "--dynamic", "dwn_proj=W8A16"], "dwn_proj"),
    "a device that cannot compute": (["--algorithm", "rtn", "--device", "meta"], "meta"),
    "unknown device": (["--algorithm", "rtn", "--device", "gpu9"], "gpu9"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(
    case: str, model: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, expected = BAD_OPTIONS[case]
    options = [str(tokens) if option == "TOKENS" else option for option in options]
    assert run("quantize", model, tmp_path / "out", *options) == 2
    assert_one_sentence(capsys, expected)
    assert not (tmp_path / "out").exists()


def test_code_in_a_checkpoint_is_never_run(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "it ran"
    (model / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit_json("config.json", model_type="evil", auto_map=auto_map)(model)
    for command in (
        ["quantize", model, tmp_path / "out", "--algorithm", "rtn"],
        ["generate", model, "once"],
    ):
        assert run(*command) == 2
        assert_one_sentence(capsys, "config")
    assert not mark.exists()


def test_unfinished_output_is_named_by_every_command(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("quantize", model, tmp_path / "out", "--algorithm", "rtn") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["status"] = "in progress"
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    for command in (["inspect", tmp_path / "out"], ["generate", tmp_path / "out", "once"]):
        assert run(*command) == 2
        assert_one_sentence(capsys, "--resume")


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_damaged_scales_are_refused_on_loading(
    value: float, model: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("quantize", model, tmp_path / "out", "--algorithm", "rtn") == 0

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        if "model.layers.1.mlp.up_proj.weight_scale" in tensors:
            tensors["model.layers.1.mlp.up_proj.weight_scale"][3, 0] = value

    edit_tensors(tmp_path / "out", damage)
    capsys.readouterr()
    assert run("eval", tmp_path / "out", "--text", tokens, "--seqlen", "64") == 2
    assert_one_sentence(capsys, "model.layers.1.mlp.up_proj.weight_scale")


def test_outputs_that_cannot_be_used(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    cases = {
        occupied: "is not empty",
        tmp_path / "file": "is a file",
        tmp_path / "file" / "below": "cannot be written",
        model: "are the same",
    }
    for output, expected in cases.items():
        assert run("quantize", model, output, "--algorithm", "rtn") == 2
        assert_one_sentence(capsys, expected)
    assert [file.name for file in occupied.iterdir()] == ["thesis.txt"]


def test_full_disk_keeps_finished_blocks(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file size limit that only the third block exceeds stands for a full disk."""
    options = ["--algorithm", "rtn", "--dynamic", r"layers\.2\.=none"]
    limited = (
        "import resource, signal, sys, runpy\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))\n"
        "sys.argv = ['lowbit', *sys.argv[1:]]\n"
        "runpy.run_module('lowbit.cli', run_name='__main__')\n"
    )
    command = ["quantize", str(model), str(tmp_path / "out"), *options]
    failed = subprocess.run(
        [sys.executable, "-c", limited, *command], capture_output=True, text=True, check=False
    )
    assert failed.returncode == 2, failed.stderr
    assert "the disk is full" in failed.stderr
    assert "Traceback" not in failed.stderr
    journal = json.loads((tmp_path / "out" / "lowbit_journal.json").read_text())
    assert list(journal["parts"]) == ["outside", "model.layers.0", "model.layers.1"]
    assert run("quantize", model, tmp_path / "out", *options, "--resume") == 0
    assert run("quantize", model, tmp_path / "whole", *options) == 0
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_kill_at_random_moments_ends_bit_identical(
    model: Path, tokens: Path, tmp_path: Path
) -> None:
    """The short form of scripts/kill_resume.py."""
    options = ["--calibration", tokens, "--samples", "8", "--seqlen", "64", "--quality", "fast"]
    assert run("quantize", model, tmp_path / "whole", *options) == 0
    command = [sys.executable, "-m", "lowbit.cli", "quantize", model, tmp_path / "out", *options]
    for delay in (0.05, 0.4, 0.9):
        process = subprocess.Popen(
            [*map(str, command), "--resume"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for_output(tmp_path / "out", process)
        time.sleep(delay)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
    finished = subprocess.run([*map(str, command), "--resume"], capture_output=True, check=False)
    assert finished.returncode == 0, finished.stderr
    whole = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == whole


def wait_for_output(directory: Path, process: subprocess.Popen[bytes]) -> None:
    """Waits until the run has claimed its directory: before that there is nothing to interrupt."""
    deadline = time.monotonic() + 60
    while not directory.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


def test_summary_and_json(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quantize", model, tmp_path / "a", "--algorithm", "rtn", "--scheme", "NF4_DQ") == 0
    shown = capsys.readouterr().out
    assert "bits per weight" in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert run("quantize", model, tmp_path / "b", "--algorithm", "rtn", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["schemes"] == ["W4A16_G64"]
    assert 4 < summary["bits_per_weight"] < 5


def test_inspect_lists_every_tensor_with_its_error(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("quantize", model, tmp_path / "out", "--algorithm", "rtn") == 0
    capsys.readouterr()
    assert run("inspect", tmp_path / "out", "--against", model, "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["tensors"]}
    assert "model.embed_tokens.weight" in rows
    row = rows["model.layers.1.mlp.up_proj"]
    assert row["stored_as"] == "W4A16_G64"
    # A uniform 4-bit grid over a Gaussian group of 64: about a tenth.
    assert 0.05 < row["relative_error"] < 0.15
    assert run("inspect", tmp_path / "out") == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


@pytest.mark.parametrize("command", ["quantize", "eval", "generate", "inspect"])
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    assert "Example" in capsys.readouterr().out


def test_the_default_is_said(
    model: Path,
    tokens: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lowbit.recipe import PRESETS

    assert run("quantize", model, tmp_path / "plain") == 0
    assert "algorithm rtn, the default without data" in capsys.readouterr().out
    monkeypatch.setitem(PRESETS, "balanced", PRESETS["fast"])
    options = ["--calibration", tokens, "--samples", "8", "--seqlen", "64", "--json"]
    assert run("quantize", model, tmp_path / "balanced", *options) == 0
    method = json.loads(capsys.readouterr().out)["method"]
    assert method == "quality balanced, the default with text"
