"""Merging: PEFT's merge of the decoded base is the oracle; kills, bad input, and the limit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kills import killed_at
from safetensors.torch import load_file, save_file
from test_merge_adapter_file import change_config, trained_adapter
from tiny_models import build_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowbit import quantize
from lowbit.checkpoint.journal import Journal
from lowbit.cli import main
from lowbit.errors import LowbitError
from lowbit.merging import HeldOut, merge
from lowbit.pipeline import calibrate

SKIP = HeldOut(skip=True)
LINEARS = ["q_proj", "o_proj", "down_proj"]


def all_tensors(directory: Path) -> dict[str, Tensor]:
    """Returns every tensor of the safetensors files in `directory`."""
    return {
        k: t for f in sorted(directory.glob("model*.safetensors")) for k, t in load_file(f).items()
    }


def make_base(path: Path, name: str, scheme: str | None, **options: Any) -> Path:
    """Returns the folder of a tiny model, quantized to `scheme` if there is one."""
    build_tiny(name, path / "original", torch.bfloat16)
    if scheme is None:
        return path / "original"
    quantize(
        path / "original", path / "base", scheme=scheme, algorithm="rtn", progress=False, **options
    )
    return path / "base"


def make_adapter(base: Path, folder: Path, **options: Any) -> Any:
    """Returns PEFT's model of the decoded `base` in fp32 with an adapter that is saved."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if getattr(model.config, "quantization_config", None) is not None:
        model = model.dequantize()
    return trained_adapter(model, folder, **options)


@pytest.fixture
def tokens(tmp_path: Path) -> str:
    file = tmp_path / "tokens.npy"
    np.save(file, np.random.default_rng().integers(1, 255, (6, 48)).astype(np.int32))
    return str(file)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Returns the folders of a low-bit base and of an adapter."""
    folder = tmp_path_factory.mktemp("pair")
    base = make_base(folder, "llama", "NF4_DQ")
    make_adapter(base, folder / "adapter", target_modules=LINEARS)
    return base, folder / "adapter"


@pytest.mark.parametrize(
    ("name", "scheme", "base_options", "options"),
    [
        ("llama", "NF4_DQ", {}, {"target_modules": LINEARS}),
        ("llama", None, {}, {"target_modules": LINEARS, "use_dora": True}),
        ("gpt2", "W3A16_G32", {}, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("gpt2", None, {}, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
        ("qwen2", "W4A16_ASYM_G64", {"quantize_embeddings": True},
         {"target_modules": LINEARS, "bias": "all", "use_rslora": True}),
        ("qwen2", "W2A16_G64", {}, {"target_modules": ["q_proj"], "lora_bias": True}),
        ("llama", "W8A16", {"quantize_lm_head": True},
         {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["norm"]}),
    ],
)  # fmt: skip
def test_merging_to_16_bits_is_pefts_merge(
    name: str,
    scheme: str | None,
    base_options: dict[str, Any],
    options: dict[str, Any],
    tmp_path: Path,
) -> None:
    base = make_base(tmp_path, name, scheme, **base_options)
    peft = make_adapter(base, tmp_path / "adapter", **options)
    expected = peft.merge_and_unload().state_dict()
    exact = merge(
        base, tmp_path / "adapter", tmp_path / "fp32", to="fp32", held_out=SKIP, progress=False
    )
    merge(base, tmp_path / "adapter", tmp_path / "bf16", held_out=SKIP, progress=False)
    loaded = AutoModelForCausalLM.from_pretrained(exact.path)
    assert loaded.dtype == torch.float32
    assert loaded.state_dict().keys() == expected.keys()
    for key, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-6, atol=1e-7, msg=key)
    rounded = all_tensors(tmp_path / "bf16")
    for key, tensor in all_tensors(exact.path).items():
        assert torch.equal(rounded[key], tensor.bfloat16()), key
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"


@pytest.mark.parametrize("touched", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("way", ["target_modules", "modules_to_save"])
def test_an_adapter_of_one_of_two_tied_weights_parts_them(
    touched: str, way: str, tmp_path: Path
) -> None:
    base = make_base(tmp_path, "llama_tied", "W4A16_G32")
    options: dict[str, Any] = {"target_modules": ["q_proj"]}
    options[way] = [*options.get(way, []), touched]
    peft = make_adapter(base, tmp_path / "adapter", **options)
    ids = torch.randint(3, 255, (2, 20))
    with torch.no_grad():
        expected = peft(ids).logits
        merged = merge(
            base, tmp_path / "adapter", tmp_path / "out", to="fp32", held_out=SKIP, progress=False
        )
        found = AutoModelForCausalLM.from_pretrained(merged.path)
        assert not found.config.tie_word_embeddings
        torch.testing.assert_close(found(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_stock_transformers_loads_the_merge(pair: tuple[Path, Path], tmp_path: Path) -> None:
    merge(*pair, tmp_path / "out", held_out=SKIP, progress=False)
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A;"
        f"m, i = A.from_pretrained({str(tmp_path / 'out')!r}, output_loading_info=True);"
        "print(not any(i.values()), m.dtype, any(n.startswith('lowbit') for n in sys.modules))"
    )
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert found.stdout.split() == ["True", "torch.bfloat16", "False"]


def quantized_tensors(directory: Path) -> dict[str, Tensor]:
    return {k: t for k, t in all_tensors(directory).items() if ".weight_" in k}


@pytest.mark.parametrize("scheme", ["NF4_DQ", "W3A16_ASYM_G64"])
def test_merging_to_a_scheme_is_quantizing_the_exact_merge(
    scheme: str, pair: tuple[Path, Path], tokens: str, tmp_path: Path
) -> None:
    merge(*pair, tmp_path / "fp32", to="fp32", held_out=SKIP, progress=False)
    data: dict[str, Any] = {"calibration": tokens, "samples": 4, "seqlen": 48, "algorithm": "gptq"}
    data["progress"] = False
    quantize(tmp_path / "fp32", tmp_path / "expected", scheme=scheme, **data)
    result = merge(*pair, tmp_path / "out", to=scheme, held_out=SKIP, **data)
    expected, found = quantized_tensors(tmp_path / "expected"), quantized_tensors(result.path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    adapter = result.manifest["fingerprint"]["derivation"]["adapter"]
    assert len(adapter) == 64
    assert AutoModelForCausalLM.from_pretrained(result.path).dtype == torch.bfloat16


def test_a_low_bit_base_decides_what_is_quantized(tmp_path: Path) -> None:
    base = make_base(
        tmp_path, "llama_tied", "W4A16_G64", quantize_embeddings=True,
        modules_to_not_convert=("down_proj",),
    )  # fmt: skip
    make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    merge(
        base, tmp_path / "adapter", tmp_path / "out", to="W3A16_G64", held_out=SKIP, progress=False
    )
    names = quantized_tensors(tmp_path / "out")
    assert "model.embed_tokens.weight_packed" in names
    assert not any("down_proj" in name for name in names)


@pytest.mark.parametrize("low_bit", [True, False])
def test_statistics_of_the_base_serve_the_merge(low_bit: bool, tokens: str, tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama", "W4A16_G64" if low_bit else None)
    make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    options: dict[str, Any] = {"calibration": tokens, "samples": 4, "seqlen": 48, "progress": False}
    calibrate(tmp_path / "original", tmp_path / "stats", **options)
    result = merge(
        base, tmp_path / "adapter", tmp_path / "out", to="W4A16_G32", stats=tmp_path / "stats",
        held_out=SKIP, progress=False,
    )  # fmt: skip
    recorded = result.manifest["fingerprint"]["calibration"]
    assert "before it was changed" in recorded["of"]
    assert {
        r["algorithm"] for p in result.manifest["parts"].values() for r in p["modules"].values()
    } == {"gptq"}
    build_tiny("llama", tmp_path / "other", torch.float32)
    calibrate(tmp_path / "other", tmp_path / "others", **options)
    with pytest.raises(LowbitError, match="another model"):
        merge(
            base, tmp_path / "adapter", tmp_path / "out2", to="W4A16_G32",
            stats=tmp_path / "others", held_out=SKIP, progress=False,
        )  # fmt: skip


def killed_merge(after: int, *arguments: Any, **options: Any) -> None:
    """Merges in a process of its own that is killed when its part `after` is about to be noted."""
    killed_at(after, Journal, "finish_part", lambda: merge(*arguments, **options))


@pytest.mark.parametrize("to", ["bf16", "W4A16_G64"])
def test_a_killed_merge_goes_on_and_ends_bit_identical(
    to: str, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("lowbit.merging.plain.write_plain.__defaults__", (60_000,))
    options: dict[str, Any] = {"to": to, "held_out": SKIP, "progress": False}
    merge(*pair, tmp_path / "whole", **options)
    killed_merge(3, *pair, tmp_path / "out", **options)
    with pytest.raises(LowbitError, match="unfinished"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(LowbitError, match="--resume"):
        merge(*pair, tmp_path / "out", **options)
    first = sorted((tmp_path / "out").glob("model*.safetensors"))[0]
    before = first.stat().st_mtime_ns
    merge(*pair, tmp_path / "out", resume=True, **options)
    assert first.stat().st_mtime_ns == before
    names = {file.name for file in (tmp_path / "whole").iterdir()}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_resuming_with_another_adapter_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"to": "W4A16_G64", "held_out": SKIP, "progress": False}
    killed_merge(2, *pair, tmp_path / "out", **options)
    make_adapter(pair[0], tmp_path / "adapter", target_modules=LINEARS)
    with pytest.raises(LowbitError, match="cannot resume"):
        merge(pair[0], tmp_path / "adapter", tmp_path / "out", resume=True, **options)


def test_what_merging_costs_is_measured_and_limited(
    pair: tuple[Path, Path], tokens: str, tmp_path: Path, monkeypatch: Any
) -> None:
    held_out = HeldOut(tokens, seqlen=48)
    exact = merge(*pair, tmp_path / "fp32", to="fp32", held_out=held_out, progress=False).measured
    assert exact is not None
    assert exact.kl < 1e-7
    assert exact.flips == 0
    options: dict[str, Any] = {"to": "W2A16_G64", "progress": False}
    strict = HeldOut(tokens, seqlen=48, max_kl=0.001)
    with pytest.raises(LowbitError, match=r"above the limit of 0\.001 .*--resume --force"):
        merge(*pair, tmp_path / "w2", held_out=strict, **options)
    recorded = json.loads((tmp_path / "w2" / "lowbit_manifest.json").read_text())["measured"]
    assert recorded["kl"] > 0.01
    assert recorded["accepted"] is False
    AutoModelForCausalLM.from_pretrained(tmp_path / "w2")
    # Accepting it measures nothing again.
    monkeypatch.setattr("lowbit.merging.run.measure", None)
    forced = HeldOut(tokens, seqlen=48, max_kl=0.001, force=True)
    accepted = merge(*pair, tmp_path / "w2", held_out=forced, resume=True, **options)
    assert accepted.measured is not None
    assert accepted.measured.kl == recorded["kl"]
    assert accepted.manifest["measured"]["accepted"] is True


def run(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    """Returns status, standard output and standard error of `lowbit merge`."""
    status = 0
    try:
        main(["merge", *(str(argument) for argument in arguments)])
    except SystemExit as stop:
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_prints_what_it_measured(
    pair: tuple[Path, Path], tokens: str, tmp_path: Path, capsys: Any
) -> None:
    options = ("--text", tokens, "--text-seqlen", 48, "--device", "cpu")
    status, out, _ = run(capsys, *pair, tmp_path / "a", *options, "--json")
    assert status == 0
    found = json.loads(out)
    assert found["target"] == "bfloat16"
    assert 0 < found["measured"]["kl"] < 1e-3
    status, out, _ = run(capsys, *pair, tmp_path / "b", *options, "--to", "w8a16_channel")
    assert status == 0
    assert all(word in out for word in ("W8A16_CHANNEL", "perplexity before", "KL"))


@pytest.mark.parametrize("to", ["bf16", "W4A16_G64"])
def test_a_damaged_base_is_refused(
    pair: tuple[Path, Path], to: str, tmp_path: Path, capsys: Any
) -> None:
    base = tmp_path / "base"
    shutil.copytree(pair[0], base)
    file = next(base.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    options = ("--no-measure", "--device", "cpu", "--to", to)
    status, _, error = run(capsys, base, pair[1], tmp_path / "out", *options)
    assert status == 2
    assert "is not the file that was written" in " ".join(error.split())


def refused_configs() -> dict[str, tuple[dict[str, Any], str]]:
    return {
        "other": ({"peft_type": "LOHA"}, "LOHA"),
        "init": ({"init_lora_weights": "pissa"}, "pissa"),
    }


@pytest.mark.parametrize("case", list(refused_configs()))
def test_the_command_refuses_in_one_sentence(
    case: str, pair: tuple[Path, Path], tmp_path: Path, capsys: Any
) -> None:
    changes, named = refused_configs()[case]
    shutil.copytree(pair[1], tmp_path / "adapter")
    change_config(tmp_path / "adapter", **changes)
    status, _, err = run(capsys, pair[0], tmp_path / "adapter", tmp_path / "out", "--no-measure")
    assert status == 2
    assert named in err
    assert err.startswith("lowbit: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"to": "W5A16"}, "--to W5A16"),
        ({"to": "bf16", "calibration": "x.txt"}, "only rounds and has no use for calibration"),
        ({"to": "W4A16", "stats": "nowhere"}, "no statistics"),
        ({"held_out": HeldOut()}, "--no-measure"),
        ({"held_out": HeldOut("nothing.npy")}, "nothing.npy"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    options: dict[str, Any], named: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(LowbitError) as caught:
        merge(*pair, tmp_path / "out", **{"held_out": SKIP, "progress": False, **options})
    assert named in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused_or_warned_of(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(pair[1], tmp_path / "adapter")
    options: dict[str, Any] = {"held_out": SKIP, "progress": False}
    build_tiny("gpt2", tmp_path / "gpt2", torch.bfloat16)
    with pytest.raises(LowbitError, match="lacks; give the base that it was trained on"):
        merge(tmp_path / "gpt2", pair[1], tmp_path / "out", **options)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_A" in name)
    save_file({**tensors, name: tensors[name][:, :32].contiguous()}, file)
    with pytest.raises(LowbitError, match=r"is for a weight of \[64, 32\]"):
        merge(pair[0], tmp_path / "adapter", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    change_config(pair[1], base_model_name_or_path="somebody/else")
    with pytest.warns(UserWarning, match="somebody/else"):
        merge(*pair, tmp_path / "out", **options)
    change_config(pair[1], base_model_name_or_path=None)


def test_places_that_are_taken_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for taken in pair:
        with pytest.raises(LowbitError, match="is an input of the merge too"):
            merge(*pair, taken, held_out=SKIP, progress=False)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(LowbitError, match="not empty"):
        merge(*pair, tmp_path, held_out=SKIP, progress=False)


def test_a_weight_that_overflows_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(pair[1], tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: 3e3 * tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(LowbitError, match="too large for float16; merge to bf16"):
        merge(
            pair[0],
            tmp_path / "adapter",
            tmp_path / "out",
            to="fp16",
            held_out=SKIP,
            progress=False,
        )


def zero_point_adapter(path: Path, scheme: str, name: str = "llama") -> tuple[Path, Path, Any]:
    """Returns a base, an adapter for its zero points, and PEFT's model of both."""
    base = make_base(path, name, scheme)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = LINEARS if name == "llama" else ["c_attn", "c_proj"]
    peft = trained_adapter(model, path / "adapter", r=1, target_modules=targets, use_qalora=True)
    return base, path / "adapter", peft


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("llama", "W4A16_ASYM_G64"), ("llama", "W2A16_ASYM_G32_DQ"), ("gpt2", "W3A16_ASYM_CHANNEL")],
)
def test_an_adapter_of_zero_points_merges_exactly(
    name: str, scheme: str, tokens: str, tmp_path: Path
) -> None:
    base, adapter, peft = zero_point_adapter(tmp_path, scheme, name)
    held_out = HeldOut(tokens, seqlen=48)
    found = merge(base, adapter, tmp_path / "out", to=scheme, held_out=held_out, progress=False)
    before, after = all_tensors(base), all_tensors(found.path)
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all(key.endswith("weight_zero_point") for key in changed)
    merged = AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.float32)
    decoded = merged.dequantize().state_dict()
    expected = peft.merge_and_unload().state_dict()
    for key in (key.replace("_zero_point", "") for key in changed):
        assert torch.equal(decoded[key], expected[key]), key
    assert found.measured is not None
    assert found.measured.kl < 1e-3  # of bf16 arithmetic
    plain = merge(base, adapter, tmp_path / "plain", to="fp32", held_out=held_out, progress=False)
    assert plain.measured is not None
    assert plain.measured.kl < 1e-7


def test_an_exact_merge_is_resumed(tmp_path: Path) -> None:
    base, adapter, _ = zero_point_adapter(tmp_path, "W4A16_ASYM_G64")
    options: dict[str, Any] = {"to": "W4A16_ASYM_G64", "held_out": SKIP, "progress": False}
    merge(base, adapter, tmp_path / "whole", **options)
    killed_merge(2, base, adapter, tmp_path / "out", **options)
    merge(base, adapter, tmp_path / "out", resume=True, **options)
    names = {file.name for file in (tmp_path / "whole").iterdir()}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    merge(base, adapter, tmp_path / "out", resume=True, **options)


def test_an_adapter_of_zero_points_needs_its_base(tmp_path: Path) -> None:
    _, adapter, _ = zero_point_adapter(tmp_path, "W4A16_ASYM_G64")
    options: dict[str, Any] = {"held_out": SKIP, "progress": False}
    with pytest.raises(LowbitError, match="use_qalora"):
        merge(tmp_path / "original", adapter, tmp_path / "out", **options)
    quantize(
        tmp_path / "original", tmp_path / "b", scheme="W4A16_ASYM_G32", algorithm="rtn",
        progress=False,
    )  # fmt: skip
    with pytest.raises(LowbitError, match="give the base that it was trained on"):
        merge(tmp_path / "b", adapter, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
