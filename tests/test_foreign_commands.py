"""Checkpoints of other tools in every command: each does what it does with the same one of ours."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetune_cases import build_base, pairs, write_rows
from peft import PeftModel

import lowbit
from lowbit.cli import main
from lowbit.formats.view import open_as_own
from lowbit.hf.loading import load_model
from lowbit.merging import HeldOut, merge
from lowbit.nn import QuantLinear
from lowbit.train import finetune
from lowbit.train.memory import forecast
from lowbit.train.settings import (
    AdapterSettings,
    BaseSettings,
    DataSettings,
    Settings,
    TrainSettings,
)

# format -> scheme that it holds, of weights that equal ours bit for bit
FORMATS = {
    "gptq": "W4A16_G32",
    "awq": "W4A16_ASYM_G32",
    "compressed-tensors": "W4A16_ASYM_G32",
    "bnb": "NF4_G32_FP32",
}
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "vocab_size": 128,
}
FILES = ["gptq", "awq", "compressed-tensors", "bnb"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("foreign")
    build_base(path / "original", **SIZES)
    return path


def pair(folder: Path, name: str) -> tuple[Path, Path]:
    """Returns a checkpoint of ours and the same one in another format."""
    ours, theirs = folder / f"ours-{FORMATS[name]}", folder / f"theirs-{name}"
    if not ours.exists():
        lowbit.quantize(
            folder / "original", ours, scheme=FORMATS[name], algorithm="rtn", progress=False
        )
    if not theirs.exists():
        lowbit.convert(ours, theirs, name, progress=False)
    return ours, theirs


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    out = capsys.readouterr()
    return int(stop.value.code or 0), out.out, out.err


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    status, out, said = run(capsys, *arguments, "--json")
    assert status == 0, said
    return json.loads(out)


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    file = tmp_path / "tokens.npy"
    np.save(file, np.random.default_rng(0).integers(1, 127, (4, 48)).astype(np.int32))
    return file


@pytest.mark.filterwarnings("ignore:the model is float32, scales are fp16")
@pytest.mark.parametrize("name", FILES)
def test_eval_generate_bench_and_inspect_take_them_as_ours(
    folder: Path, tokens: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = pair(folder, name)
    found = []
    for path in (ours, theirs):
        file = tokens.with_name("eval.json")
        common = ["--text", tokens, "--seqlen", 48, "--against", ours, "--json", file]
        status, _, said = run(capsys, "eval", path, *common)
        assert status == 0, said
        found.append(json.loads(file.read_text()))
    assert found[0]["perplexity"] == found[1]["perplexity"]
    assert found[1]["divergence"]["mean"]["mean"] == 0
    made = [
        shown(capsys, "generate", path, "abc", "--max-new-tokens", 8) for path in (ours, theirs)
    ]
    assert made[0]["text"] == made[1]["text"]
    speed = shown(
        capsys, "bench", theirs, "--prompt-tokens", 4, "--new-tokens", 2, "--rounds", 1,
        "--no-baseline",
    )  # fmt: skip
    assert speed["kernels"]
    listed = [
        shown(capsys, "inspect", path, "--against", folder / "original")["tensors"]
        for path in (ours, theirs)
    ]
    errors = [
        {row["name"]: row["relative_error"] for row in rows if row["relative_error"] is not None}
        for rows in listed
    ]
    assert errors[0] == errors[1]
    assert len(errors[0]) == 14
    stored = {row["name"]: row["stored_as"] for row in listed[1]}
    assert stored["model.layers.0.mlp.up_proj"] == f"{name} {FORMATS[name]}"
    weights = sum(file.stat().st_size for file in theirs.glob("*.safetensors"))
    counted = sum(row["bytes"] for row in listed[1])
    assert 0 <= weights - counted < 0.5 * weights  # headers


def settings(steps: int = 2, rank: int = 4, **adapter: Any) -> Settings:
    return Settings(
        base=BaseSettings(device="cpu"),
        adapter=AdapterSettings(rank=rank, **adapter),
        data=DataSettings(seqlen=64),
        train=TrainSettings(max_steps=steps, batch=2, precision="fp32", checkpointing=False),
    )


@pytest.mark.filterwarnings("ignore:the model is float32, scales are fp16")
@pytest.mark.parametrize("name", ["bnb"])
def test_qlora_on_a_foreign_base_is_qlora_on_ours(folder: Path, tmp_path: Path, name: str) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", pairs(8))
    adapters, logits = [], []
    for index, base in enumerate(pair(folder, name)):
        out = tmp_path / f"adapter{index}"
        finetune(base, rows, out, settings=settings(), progress=False)
        model = load_model(str(base), "float32", torch.device("cpu"))
        assert model.hqq_quantized  # what PEFT and Trainer ask of a quantized model
        adapted = PeftModel.from_pretrained(model, str(out)).eval()
        adapters.append((out / "adapter_model.safetensors").read_bytes())
        with torch.no_grad():
            logits.append(adapted(torch.arange(1, 33)[None]).logits)
        assert json.loads((out / "adapter_config.json").read_text())[
            "base_model_name_or_path"
        ] == str(base)
    assert adapters[0] == adapters[1]
    assert torch.equal(*logits)


@pytest.mark.filterwarnings("ignore:the model is float32, scales are fp16")
@pytest.mark.filterwarnings("ignore:.*was trained on")
@pytest.mark.parametrize("name", ["gptq"])
def test_merging_into_a_foreign_base_is_merging_into_ours(
    folder: Path, tmp_path: Path, name: str
) -> None:
    ours, theirs = pair(folder, name)
    rows = write_rows(tmp_path / "rows.jsonl", pairs(8))
    finetune(theirs, rows, tmp_path / "adapter", settings=settings(), progress=False)
    skip = HeldOut(skip=True)
    for to in ("fp32", FORMATS[name]):
        made = []
        for index, base in enumerate((ours, theirs)):
            out = tmp_path / f"{to}{index}"
            merge(base, tmp_path / "adapter", out, to=to, held_out=skip, progress=False)
            model = load_model(str(out), "float32", torch.device("cpu"))
            with torch.no_grad():
                made.append(model(torch.arange(1, 33)[None]).logits)
            assert sum(isinstance(m, QuantLinear) for m in model.modules()) == (
                0 if to == "fp32" else 14
            )
        assert torch.equal(*made)


@pytest.mark.filterwarnings("ignore:the model is float32, scales are fp16")
@pytest.mark.filterwarnings("ignore:.*was trained on")
def test_zero_points_of_a_foreign_base_are_merged_exactly(folder: Path, tmp_path: Path) -> None:
    _, theirs = pair(folder, "awq")
    rows = write_rows(tmp_path / "rows.jsonl", pairs(8))
    chosen = settings(rank=2, qa_lora=True)
    finetune(theirs, rows, tmp_path / "adapter", settings=chosen, progress=False)
    result = merge(
        theirs,
        tmp_path / "adapter",
        tmp_path / "out",
        to=FORMATS["awq"],
        held_out=HeldOut(skip=True),
        progress=False,
    )
    base = load_model(str(theirs), "float32", torch.device("cpu"))
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    merged = load_model(str(result.path), "float32", torch.device("cpu"))
    with torch.no_grad():
        ids = torch.arange(1, 33)[None]
        assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=2e-5)


def test_the_forecast_of_memory_is_that_of_the_same_base_of_ours(folder: Path) -> None:
    ours, theirs = pair(folder, "gptq")
    assert forecast(theirs, settings()) == forecast(ours, settings())


def test_a_view_has_our_tensors_and_reads_shapes_without_decoding(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowbit.formats import view
    from lowbit.inventory import module_schemes

    ours, theirs = pair(folder, "gptq")
    seen = open_as_own(theirs)
    expected = open_as_own(ours)
    assert seen.entries.keys() == expected.entries.keys()
    with monkeypatch.context() as patched:
        patched.setattr(view, "read_module", None)
        assert module_schemes(seen) == module_schemes(expected)
    for name, entry in expected.entries.items():
        assert (seen.entries[name].shape, seen.entries[name].dtype) == (entry.shape, entry.dtype)
        assert torch.equal(seen.entries[name].read(), entry.read()), name
    assert seen.verify().keys() == {file.name for file in theirs.glob("*.safetensors")}


def ordered(folder: Path) -> Path:
    """Returns a GPTQ checkpoint whose g_idx says that columns have an order of their own."""
    from safetensors.torch import load_file, save_file

    _, theirs = pair(folder, "gptq")
    out = folder / "ordered"
    if out.exists():
        return out
    out.mkdir()
    for file in theirs.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith("g_idx"):
                tensors[name] = tensor.flip(0).contiguous()
                tensors[name] = tensor[torch.randperm(len(tensor))].contiguous()
        save_file(tensors, file, {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("command", ["eval", "generate", "bench", "finetune", "merge"])
def test_what_no_kernel_here_runs_is_one_sentence_everywhere(
    folder: Path, tmp_path: Path, tokens: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ordered(folder)
    rows = write_rows(tmp_path / "rows.jsonl", pairs(4))
    adapter = tmp_path / "adapter"
    if command == "merge":
        base, _ = pair(folder, "gptq")
        finetune(base, rows, adapter, settings=settings(1), progress=False)
    arguments: dict[str, list[object]] = {
        "eval": [path, "--text", tokens, "--seqlen", 48],
        "generate": [path, "abc", "--max-new-tokens", 4],
        "bench": [path, "--prompt-tokens", 4, "--new-tokens", 2],
        "finetune": [path, "--data", rows, "--output", tmp_path / "out", "--seqlen", 64],
        "merge": [path, adapter, tmp_path / "out", "--no-measure"],
    }
    status, _, said = run(capsys, command, *arguments[command])
    assert status == 2
    assert re.search(r"lowbit: .*grouped in the order of desc_act.*--to bf16 keeps", said), said
    assert not (tmp_path / "out").exists()
    # Its weights can be listed all the same.
    rows_of = shown(capsys, "inspect", path, "--against", folder / "original")["tensors"]
    assert any(row["relative_error"] is not None for row in rows_of)
