"""`--for ENGINE`: what it would refuse is refused before any work, and the output is its format."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import make_tiny

import lowbit
from lowbit.cli import main
from lowbit.errors import LowbitError
from lowbit.formats import conversion
from lowbit.formats.gguf import converting, digest, verify_file
from lowbit.formats.gguf.converting import Converter
from lowbit.verification import run as verification

IDS = torch.arange(1, 33)[None]
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serving") / "m"
    make_tiny("llama", torch.bfloat16, **SIZES).save_pretrained(path)
    return path


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    file = tmp_path / "tokens.npy"
    np.save(file, np.random.default_rng(0).integers(1, 255, (8, 64)).astype(np.int32))
    return file


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    out = capsys.readouterr()
    return int(stop.value.code or 0), out.out, out.err


def config(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text())
    return dict(found["quantization_config"])


def test_vllm_gets_compressed_tensors_of_the_codes_that_were_chosen(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    status, shown, said = run(capsys, "quantize", model, out, "--for", "vllm", "--tp", 2)
    assert status == 0
    assert f"serve it: vllm serve {out} --tensor-parallel-size 2\n" in shown
    # The engine holds scales in the dtype of the model, so that is what codes are chosen for.
    assert "W4A16_G64_BF16" in shown
    assert "the scheme is W4A16_G64_BF16, for the engine casts scales" in said
    assert config(out)["quant_method"] == "compressed-tensors"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    ours = tmp_path / "ours"
    lowbit.quantize(model, ours, scheme="W4A16_G64_BF16", algorithm="rtn", progress=False)
    with torch.no_grad():
        assert torch.equal(lowbit.load(out)(IDS).logits, lowbit.load(ours)(IDS).logits)
    manifest = json.loads((out / "lowbit_manifest.json").read_text())
    assert manifest["quantized"]["fingerprint"]["options"]["algorithm"] == "rtn"


def test_a_finished_run_is_finished_when_resumed_and_another_one_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def made(scheme: str, resume: bool) -> Path:
        done = lowbit.quantize(
            model, out, scheme=scheme, algorithm="rtn", engine="vllm", resume=resume, progress=False
        )
        return done.path

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(conversion._Run, "_converted", stop)
        with pytest.raises(KeyboardInterrupt):
            made("W4A16_G32", False)
    assert (tmp_path / "out.quantized" / "config.json").exists()
    with pytest.raises(LowbitError, match=r"out: holds an unfinished run.*; add --resume"):
        made("W4A16_G32", False)
    assert made("W4A16_G32", True) == out
    assert not (tmp_path / "out.quantized").exists()
    files = list(out.glob("*.safetensors"))
    before = [file.stat().st_mtime_ns for file in files]
    assert made("W4A16_G32", True) == out
    assert before == [file.stat().st_mtime_ns for file in files]
    with pytest.raises(LowbitError, match="result of another run; choose another output"):
        made("W4A16_G64", True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--for", "vlm"], r"unknown engine 'vlm'; did you mean 'vllm'\? \(known: llama.cpp, "),
        (["--tp", 2], r"--tp is for an engine; name it too"),
        (["--for", "vllm", "--tp", 0], r"--tp is a number of GPUs, 1 or more, got 0"),
        (["--for", "vllm", "--tp", 3], r"4 attention heads do not divide among 3 GPUs"),
        (["--for", "vllm", "--scheme", "NF4"], r"NF4 looks codes up.*--scheme W4A16_G64"),
        (
            ["--for", "vllm", "--scheme", "W4A16_G32", "--dynamic", "k_proj=W8A16_G32"],
            r"q_proj \(2 weights\).*multiplied as one, in W4A16_G32 and W8A16_G32.*W4A16_G32",
        ),
        (
            ["--for", "vllm", "--scheme", "W4A16_G32", "--keep", "k_proj"],
            r"multiplied as one, in W4A16_G32 and 16 bits.*leave .*q_proj.* in 16 bits \(--keep\)",
        ),
        (["--for", "sglang", "--scheme", "W3A16"], r"have 3 bits, but.*--scheme W4A16"),
        (["--for", "vllm", "--quantize-embeddings", "--scheme", "W8A16_G32"], r"an embedding"),
        (["--for", "tensorrt-llm"], r"reads no format of quantized weights.*--to bf16"),
    ],
)
def test_what_an_engine_refuses_is_refused_before_any_work(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[object],
    message: str,
) -> None:
    status, _, said = run(capsys, "quantize", model, tmp_path / "out", *arguments)
    assert status == 2
    assert re.search(message, said), said
    assert len(said.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_default_that_is_refused_becomes_the_nearest_and_that_is_said(
    tmp_path: Path,
) -> None:
    make_tiny("llama", torch.float16, **{**SIZES, "intermediate_size": 160}).save_pretrained(
        tmp_path / "m"
    )
    with pytest.warns(UserWarning, match=r"the scheme is W4A16_G32, for W4A16_G64 would be refus"):
        lowbit.quantize(
            tmp_path / "m", tmp_path / "out", algorithm="rtn", engine="vllm", progress=False
        )
    weights = config(tmp_path / "out")["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"]) == (4, 32)


def test_bit_allocation_chooses_among_what_is_served(
    model: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["quantize", model, tmp_path / "out", "--for", "sglang", "--calibration", tokens]
    common += ["--quality", "fast", "--samples", 4, "--seqlen", 64, "--target-bits", 5]
    status, _, said = run(capsys, *common, "--unfused")
    assert status == 2
    assert "sglang multiplies q, k and v (gate and up) as one" in said
    status, _, said = run(capsys, *common, "--choice", "W4A16_G32", "--choice", "W3A16_G32")
    assert status == 2
    assert "the option W3A16_G32: sglang" in said
    assert not (tmp_path / "out").exists()
    with pytest.warns(UserWarning, match="W2A16_G32, W2A16_G64, W2A16, W3A16_G32.*are left out"):
        lowbit.quantize(
            model,
            tmp_path / "out",
            calibration=tokens,
            quality="fast",
            samples=4,
            seqlen=64,
            target_bits=5.0,
            engine="sglang",
            progress=False,
        )
    groups = config(tmp_path / "out")["config_groups"]
    found = {group["weights"]["num_bits"] for group in groups.values()}
    assert found <= {4, 8}


def test_llama_cpp_gets_one_file(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.gguf"
    status, shown, said = run(capsys, "quantize", model, out, "--for", "llama.cpp")
    assert status == 0, said
    assert f"serve it: llama-server -m {out}\n" in shown
    size = re.search(r"size on disk +([0-9.]+) MB", shown)
    assert size is not None
    assert float(size[1]) == round(out.stat().st_size / 1e6, 1) > 0
    assert out.is_file()
    assert not (tmp_path / "m.gguf.quantized").exists()
    with torch.no_grad():
        assert lowbit.load(out)(IDS).logits.isfinite().all()
    status, _, said = run(capsys, "quantize", model, out, "--for", "llama.cpp")
    assert status == 2
    # A family that the file has no name for is refused before any work.
    make_tiny("gpt_neox", torch.bfloat16).save_pretrained(tmp_path / "neox")
    status, _, said = run(
        capsys, "quantize", tmp_path / "neox", tmp_path / "o", "--for", "llama.cpp"
    )
    assert status == 2
    assert "gpt_neox" in said
    assert not list(tmp_path.glob("o*"))


def changing_digest() -> Callable[[Path], str]:
    """Returns a digest that is another one whenever it is asked for."""
    calls = itertools.count(1)
    return lambda file: f"{next(calls):064x}"


@pytest.mark.parametrize(
    ("stop", "output"),
    [("writing", "m.gguf"), ("checking", "m.gguf"), ("checking", "folder"), ("failing", "folder")],
)
def test_an_interrupted_file_is_finished_with_resume(
    stop: str,
    output: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / output
    command = ["quantize", model, out, "--for", "llama.cpp"]

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if stop == "failing":
            patched.setattr(digest, "data_digest", changing_digest())
        elif stop == "checking":
            patched.setattr(verification, "run_probe", interrupted)
        else:
            patched.setattr(converting, "read_module", interrupted)
        status, _, said = run(capsys, *command)
    assert status == (3 if stop == "failing" else 130)
    assert "--resume goes on" in said or stop == "failing"
    (tmp_path / f"{out.name}.tmp").write_bytes(b"half")
    status, _, said = run(capsys, *command)
    assert status == 2
    assert re.search(rf"{out}: holds an unfinished run.*add --resume", said.replace("\n", " "))
    status, _, said = run(capsys, *command, "--resume")
    assert status == 0, said
    file = out if output == "m.gguf" else out / "model.gguf"
    assert all(passed for _, passed, _ in verify_file(file))
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left - {f"{out.name}.tmp"} == {file.name, *(["README.md"] if output == "folder" else [])}
    # It is whole now, and stays.
    status, _, said = run(capsys, *command, "--resume")
    assert status == 2
    assert f"{file}: is there already; choose another output" in said
    if output == "folder":
        card = (out / "README.md").read_text()
        assert f"lowbit quantize {model.name} QUANTIZED" in card


def test_resuming_never_replaces_a_file_of_something_else(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "m.gguf"
    command = ["quantize", model, out, "--for", "llama.cpp"]

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(converting, "read_module", interrupted)
        assert run(capsys, *command)[0] == 130
    assert run(capsys, "convert", model, out, "--to", "GGUF", "--gguf-type", "q8_0")[0] == 0
    content = out.read_bytes()
    status, _, said = run(capsys, *command, "--resume")
    assert status == 2
    assert "is there already" in said
    assert out.read_bytes() == content


def test_an_interrupted_conversion_says_that_a_file_is_all_or_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "folder"
    command = ["convert", model, out, "--to", "gguf", "--gguf-type", "Q8_0"]

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Converter, "rows", interrupted)
        status, _, said = run(capsys, *command)
    assert status == 130
    assert "written as a whole or not at all" in said
    assert "--resume" not in said
    # What failed its check does not keep the folder occupied.
    with monkeypatch.context() as patched:
        patched.setattr(digest, "data_digest", changing_digest())
        assert run(capsys, *command)[0] == 3
    assert [path.name for path in out.iterdir()] == ["model.gguf.bad"]
    status, _, said = run(capsys, *command)
    assert status == 0, said
    assert {path.name for path in out.iterdir()} == {"model.gguf", "README.md"}


def test_a_type_of_ggml_changes_no_engines_format_silently(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = ["convert", model, out, "--gguf-type", "Q4_K"]
    status, _, said = run(capsys, *given, "--for", "vllm")
    assert status == 2
    assert "--for vllm writes compressed-tensors; leave them out" in said.replace("\n", " ")
    assert not out.exists()
    status, _, said = run(capsys, *given, "--for", "llama.cpp", "--to", "GGUF")
    assert status == 0, said


def test_transformers_reads_our_own_format(model: Path, tmp_path: Path) -> None:
    lowbit.quantize(
        model, tmp_path / "o", scheme="NF4_DQ", algorithm="rtn", engine="transformers",
        progress=False,
    )  # fmt: skip
    assert config(tmp_path / "o")["quant_method"] == "lowbit"


@pytest.fixture(scope="module")
def quantized(model: Path) -> Path:
    out = model.parent / "q"
    lowbit.quantize(model, out, scheme="W4A16_G32_BF16", algorithm="rtn", progress=False)
    return out


def test_convert_picks_what_the_engine_serves_best(
    quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    status, shown, said = run(capsys, "convert", quantized, out, "--for", "vllm", "--tp", 2)
    assert status == 0, said
    assert config(out)["quant_method"] == "compressed-tensors"
    assert f"serve it: vllm serve {out} --tensor-parallel-size 2\n" in shown
    status, _, said = run(capsys, "convert", out, tmp_path / "again", "--for", "vllm")
    assert status == 2
    assert (
        f"is compressed-tensors already, which vllm 0.33.0 serves as it is: vllm serve {out}"
        in said
    )
    status, _, said = run(
        capsys, "convert", out, tmp_path / "gptq", "--for", "vllm", "--to", "gptq"
    )
    assert status == 0, said
    assert config(tmp_path / "gptq")["quant_method"] == "gptq"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"give the format \(--to gptq\) or what will serve it \(--for vllm\)"),
        (["--to", "gptq", "--tp", 2], r"--tp is for an engine"),
        (["--for", "vlm"], r"unknown engine 'vlm'; did you mean 'vllm'"),
        (["--for", "vllm", "--to", "bnb", "--requantize"],
         r"does not serve bnb: bitsandbytes checkpoints are no longer read; vllm reads comp"),
        (["--for", "sglang", "--to", "awq", "--tp", 8], r"8 GPUs"),
        (["--for", "vllm", "--tp", 8], r"4 attention heads do not divide among 8 GPUs"),
        (["--for", "vllm", "--gguf-type", "Q4_K", "--to", "lowbit"], r"does not read lowbit"),
    ],
)  # fmt: skip
def test_what_an_engine_refuses_is_not_converted(
    quantized: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[object],
    message: str,
) -> None:
    status, _, said = run(capsys, "convert", quantized, tmp_path / "out", *arguments)
    assert status == 2
    assert re.search(message, said), said
    assert not list(tmp_path.iterdir())
