"""Every way to damage a checkpoint, and the check that sees it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build_tiny, make_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.checkpoint.journal import MANIFEST_NAME
from lowbit.checkpoint.mark import MARK, marked_config
from lowbit.checkpoint.reader import INDEX_NAME
from lowbit.checkpoint.writer import ShardWriter
from lowbit.cli import main
from lowbit.errors import LowbitError, VerificationError
from lowbit.nn import QuantLinear
from lowbit.verification import Report, gate, verify
from lowbit.verification.marking import clear_mark, stays_marked
from lowbit.verification.report import Check

UP, NORM = "model.layers.1.mlp.up_proj", "model.layers.1.input_layernorm.weight"
# Layout -> the tensor of scales, and the scheme that it is made of.
SCALES = {
    "lowbit": ("weight_scale", "W4A16_G32"),
    "compressed-tensors": ("weight_scale", "W4A16_ASYM_G32"),
    "gptq": ("scales", "W4A16_G32"),
    "awq": ("scales", "W4A16_ASYM_G32"),
    "bnb": ("weight.absmax", "NF4_G32_FP32"),
}
Damage = Callable[[dict[str, Tensor]], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with `m` and a checkpoint in each layout of `SCALES`, in several shards."""
    path = tmp_path_factory.mktemp("made")
    model = make_tiny("llama", torch.float32, intermediate_size=160, num_hidden_layers=2)
    model.save_pretrained(path / "m", max_shard_size="200KB")
    (path / "m" / "tokenizer_config.json").write_text('{"model_max_length": 128}')
    for layout, (_, scheme) in SCALES.items():
        source = path / scheme
        if not source.exists():
            lowbit.quantize(path / "m", source, scheme=scheme, algorithm="rtn", progress=False)
        if layout == "lowbit":
            shutil.copytree(source, path / layout)
        else:
            lowbit.convert(source, path / layout, layout, progress=False)
    return path


@pytest.fixture(params=list(SCALES))
def copy(request: pytest.FixtureRequest, made: Path, tmp_path: Path) -> Path:
    """Returns a copy of a sound checkpoint, its folder named by its layout."""
    shutil.copytree(made / request.param, tmp_path / request.param)
    return tmp_path / str(request.param)


@pytest.fixture(params=["lowbit", "gptq"])
def one(request: pytest.FixtureRequest, made: Path, tmp_path: Path) -> Path:
    """Returns the same of two layouts, for what no layout has a part in."""
    shutil.copytree(made / request.param, tmp_path / request.param)
    return tmp_path / str(request.param)


def edit(path: Path, name: str, damage: Damage, honest: bool = False) -> None:
    """Changes the shard that holds tensor `name`; `honest` keeps its old hash in the manifest."""
    file = next(f for f in sorted(path.glob("*.safetensors")) if name in load_file(f))
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file, {"format": "pt"})
    index = json.loads((path / INDEX_NAME).read_text())
    others = {n: f for n, f in index["weight_map"].items() if f != file.name}
    index["weight_map"] = {**others, **dict.fromkeys(tensors, file.name)}
    (path / INDEX_NAME).write_text(json.dumps(index))
    if not honest:
        forge_hashes(path)


def forge_hashes(path: Path) -> None:
    """Writes the hashes that the files have now into the manifest."""
    manifest = json.loads((path / MANIFEST_NAME).read_text())
    for part in manifest["parts"].values():
        part["sha256"] = hashlib.sha256((path / part["file"]).read_bytes()).hexdigest()
    (path / MANIFEST_NAME).write_text(json.dumps(manifest))


def scale_of(path: Path) -> str:
    return f"{UP}.{SCALES[path.name][0]}"


def checks(report: Report) -> dict[str, bool | None]:
    return {check.name: check.passed for check in report.checks}


def only_failure(path: Path) -> tuple[str, str]:
    failed = verify(path).failed
    assert len(failed) == 1, failed
    return next(iter(failed.items()))


def test_what_is_sound_passes_everything(copy: Path) -> None:
    report = verify(copy)
    assert report.ok
    assert report.layout == copy.name
    names = ["files", "hashes", "layout", "quantized", "tensors", "values", "weights", "probe"]
    assert checks(report) == dict.fromkeys(names, True)
    details = {check.name: check.detail for check in report.checks}
    assert "14 weights" in details["quantized"]
    assert details["weights"].startswith("14 decode")
    assert "logits of kernels and of decoded weights" in details["probe"]


def test_one_bit(one: Path) -> None:
    file = sorted(one.glob("*.safetensors"))[-1]
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    assert file.name in verify(one).failed["hashes"]


def test_nothing_is_made_of_a_damaged_checkpoint(
    one: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    (one / "tokenizer_config.json").unlink()  # of no tokenizer
    sound, to = tmp_path / "x.gguf", "gptq" if one.name == "lowbit" else "lowbit"
    with pytest.warns(UserWarning, match=r"tokenizer_config.json: is missing; what is there"):
        lowbit.convert(one, sound, "gguf", progress=False)
    edit(one, scale_of(one), lambda t: t[scale_of(one)].mul_(1.5), honest=True)
    content = bytearray(sound.read_bytes())
    content[-40] ^= 1
    sound.write_bytes(content)
    for source, target, words in (
        (one, to, "is not the file that was written"),
        (one, "bf16", "is not the file that was written"),
        (one, "gguf", "is not the file that was written"),
        (sound, "gptq", "the data has changed since it was written"),
    ):
        assert status(["convert", str(source), str(tmp_path / "out"), "--to", target]) == 2
        assert words in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "out").exists()


def test_a_wrong_scale_under_honest_looking_hashes(copy: Path) -> None:
    """Both sides of the probe read the same wrong scale: only what was in memory tells."""
    name = scale_of(copy)
    edit(copy, name, lambda t: t[name].view(-1)[3:4].mul_(1.25))
    check, detail = only_failure(copy)
    assert (check, UP in detail) == ("weights", True)


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (0.0, "zero")])
def test_scales_that_are_none(copy: Path, value: float, word: str) -> None:
    name = scale_of(copy)
    edit(copy, name, lambda t: t[name].view(-1)[5:6].fill_(value))
    failed = verify(copy).failed
    assert word in failed["values"]
    assert "hashes" not in failed


def test_scales_of_another_dtype(one: Path) -> None:
    name = scale_of(one)
    edit(one, name, lambda t: t.update({name: t[name].double()}))
    check, detail = only_failure(one)
    assert check == "layout"
    assert name in detail


def test_a_lost_scale(copy: Path) -> None:
    name = scale_of(copy)
    edit(copy, name, lambda t: t.__delitem__(name))
    check, detail = only_failure(copy)
    assert check == "layout"
    assert name in detail


def test_a_lost_parameter(one: Path) -> None:
    edit(one, NORM, lambda t: t.__delitem__(NORM))
    report = verify(one)
    assert NORM in report.failed["tensors"]
    assert checks(report)["probe"] is None


def test_an_orphan(one: Path) -> None:
    orphan = "model.layers.7.mlp.left_over"
    edit(one, NORM, lambda t: t.update({orphan: torch.ones(8)}))
    assert orphan in verify(one).failed["tensors"]


def test_a_layer_left_in_16_bits(copy: Path) -> None:
    """Its tensors are gone, a plain weight is in their place, and config.json knows nothing."""

    def damage(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(f"{UP}.")]:
            del tensors[name]
        tensors[f"{UP}.weight"] = torch.randn(160, 64)

    edit(copy, scale_of(copy), damage)
    assert UP in verify(copy).failed["quantized"]


def test_a_layer_that_config_leaves_out(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    quantization = config["quantization_config"]
    key = {
        "lowbit": "modules_to_not_convert",
        "compressed-tensors": "ignore",
        "awq": "modules_to_not_convert",
        "bnb": "llm_int8_skip_modules",
    }.get(copy.name)
    if key is None:
        quantization["dynamic"] = {rf"-:^{UP}$": {}}
    else:
        quantization[key] = [*(quantization.get(key) or []), UP]
    (copy / "config.json").write_text(json.dumps(config))
    failed = verify(copy).failed
    assert UP in " ".join(failed.values())
    assert failed.keys() & {"layout", "quantized"}


def test_twice_over_shards(one: Path) -> None:
    other = next(f for f in sorted(one.glob("*.safetensors")) if NORM not in load_file(f))
    save_file({**load_file(other), NORM: torch.ones(64)}, other, {"format": "pt"})
    check, detail = only_failure(one)
    assert check == "files"
    assert "is in both" in detail


def test_files_that_do_not_hold_together(one: Path) -> None:
    first, *_, last = sorted(one.glob("*.safetensors"))
    whole, index = last.read_bytes(), (one / INDEX_NAME).read_text()
    last.write_bytes(whole[:-40])
    assert "truncated" in only_failure(one)[1]
    last.unlink()
    assert "missing" in only_failure(one)[1]
    last.write_bytes(whole)
    (one / "stray.safetensors").write_bytes(first.read_bytes())
    assert "stray.safetensors" in only_failure(one)[1]
    (one / "stray.safetensors").unlink()
    shorter = json.loads(index)
    del shorter["weight_map"][NORM]
    (one / INDEX_NAME).write_text(json.dumps(shorter))
    assert NORM in only_failure(one)[1]
    (one / INDEX_NAME).write_text(index)
    assert verify(one).ok


def test_another_tokenizer(one: Path) -> None:
    (one / "tokenizer_config.json").write_text('{"model_max_length": 129}')
    check, detail = only_failure(one)
    assert (check, detail.partition(":")[0]) == ("hashes", "tokenizer_config.json")


def test_a_manifest_of_another_model(one: Path) -> None:
    manifest = json.loads((one / MANIFEST_NAME).read_text())
    for part in manifest["parts"].values():
        report = part["modules"].pop(UP, None)
        if report is not None:
            part["modules"]["model.layers.9.mlp.up_proj"] = report
    (one / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert "layers.9" in verify(one).failed["quantized"]


def test_bits_beyond_the_last_code(made: Path, tmp_path: Path) -> None:
    build_tiny("llama", tmp_path / "m")  # rows of 168 three-bit codes end inside of a word
    out = tmp_path / "q"
    lowbit.quantize(tmp_path / "m", out, scheme="W3A16_G32", algorithm="rtn", progress=False)
    name = "model.layers.0.mlp.down_proj.weight_packed"
    edit(out, name, lambda t: t[name][0, -1:].bitwise_or_(-(1 << 31)))
    check, detail = only_failure(out)
    assert (check, "beyond the last code" in detail) == ("values", True)


def test_kernels_that_compute_something_else(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = QuantLinear.forward
    monkeypatch.setattr(QuantLinear, "forward", lambda self, x: real(self, x) * 1.01)
    check, detail = only_failure(copy)
    assert (check, "model.layers.0 " in detail) == ("probe", True)
    assert verify(copy, probe=False).ok


@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        ("gpt2", "W2A16_ASYM_G32_DQ"),
        ("gemma3_text", "W8A8"),
        ("gemma3_text", "FP4_BF16"),
        ("llama_tied", "W8A8"),
        ("llama_tied", "FP4_BF16"),
    ],
)
def test_the_probe_agrees_for_other_models(family: str, scheme: str, tmp_path: Path) -> None:
    build_tiny(family, tmp_path / "m", torch.bfloat16)
    embeddings = scheme == "FP4_BF16" and family != "gpt2"
    options = {"scheme": scheme, "algorithm": "rtn", "quantize_embeddings": embeddings}
    options["quantize_lm_head"] = scheme == "W8A8" and family == "llama_tied"
    lowbit.quantize(tmp_path / "m", tmp_path / "q", progress=False, **options)
    report = verify(tmp_path / "q")
    assert report.ok
    assert checks(report)["probe"]


def test_a_model_in_memory_with_other_weights(made: Path) -> None:
    model = lowbit.load(made / "lowbit")
    assert verify(made / "lowbit", model=model).ok
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    assert "model in memory" in verify(made / "lowbit", model=model).failed["probe"]


def test_16_bits_and_strangers(made: Path, tmp_path: Path) -> None:
    """Without a manifest there is less to hold against, and what is not run says so."""
    report = verify(made / "m")
    assert report.ok
    assert checks(report) == {
        "files": True, "hashes": None, "layout": True, "quantized": True, "tensors": True,
        "values": True, "weights": None, "probe": True,
    }  # fmt: skip
    shutil.copytree(made / "gptq", tmp_path / "gptq")
    (tmp_path / "gptq" / MANIFEST_NAME).unlink()
    report = verify(tmp_path / "gptq")
    assert report.ok
    assert checks(report)["weights"] is None


def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets every save write one scale wrong."""
    real = ShardWriter.add

    def add(self: ShardWriter, name: str, tensor: Tensor) -> None:
        wrong = name.startswith(UP) and tensor.is_floating_point()
        real(self, name, tensor * 1.5 if wrong else tensor)

    monkeypatch.setattr(ShardWriter, "add", add)


@pytest.mark.parametrize("to", ["lowbit", "gptq"])
def test_the_gate_marks_a_bad_save_and_verify_clears_it(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    to: str,
) -> None:
    out = tmp_path / "out"
    command = ["convert", str(made / "W4A16_G32"), str(out), "--to", to]
    if to == "lowbit":
        command = ["quantize", str(made / "m"), str(out), "--algorithm", "rtn"]
        command += ["--scheme", "W4A16_G32"]
    with monkeypatch.context() as patch:
        spoil(patch)
        assert status(command) == 3
    error = capsys.readouterr().err.replace("\n", " ")
    assert f"fails verification (weights: {UP}: decode to other weights" in error
    files = {file.name for file in out.iterdir()}
    assert {MANIFEST_NAME, INDEX_NAME, "config.json"} <= files  # nothing is deleted
    assert MARK in json.loads((out / "config.json").read_text())
    with pytest.raises(LowbitError, match=r"is marked as bad, it failed verification \(weights: "):
        lowbit.load(out)
    with pytest.raises(ValueError, match="marked as bad by `lowbit verify`: weights"):
        AutoModelForCausalLM.from_pretrained(out)
    assert status(["verify", str(out)]) == 3  # and stays marked
    assert MARK in json.loads((out / "config.json").read_text())
    assert status([*command, "--resume"]) == 3
    # Somebody repairs it: the shard of a run that was not spoiled.
    for file in (made / ("W4A16_G32" if to == "lowbit" else "gptq")).iterdir():
        if file.name != "config.json":
            shutil.copy(file, out / file.name)
    capsys.readouterr()
    assert status(["verify", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mark_cleared"]
    sound = made / ("W4A16_G32" if to == "lowbit" else "gptq") / "config.json"
    assert (out / "config.json").read_bytes() == sound.read_bytes()
    lowbit.load(out)


def test_no_verify_writes_what_the_gate_would_refuse(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch)
    out = tmp_path / "out"
    command = ["convert", str(made / "W4A16_G32"), str(out), "--to", "gptq", "--no-verify"]
    assert status(command) == 0
    with pytest.raises(VerificationError, match="fails verification"):
        gate(out)


def status(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    code = exit_info.value.code
    return int(code or 0)


def test_status_and_json(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(["verify", str(made / "awq"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert report["format"] == "awq"
    assert status(["verify", str(made / "awq")]) == 0
    assert "passes" in capsys.readouterr().out
    for arguments, words in (
        ([str(tmp_path / "absent")], "no such folder"),
        ([str(tmp_path)], "config.json: not found"),
        ([str(made / "awq"), "--max-kl", "1"], "add --against"),
        ([str(made / "awq"), "--card"], "give the original too"),
    ):
        assert status(["verify", *arguments]) == 2
        assert words in capsys.readouterr().err.replace("\n", " ")


def test_the_release_gate(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["verify", str(made / "W4A16_G32"), "--against", str(made / "m")]
    common += ["--text", tokens_for(tmp_path), "--json"]
    assert status([*common, "--max-kl", "5"]) == 0
    measured = json.loads(capsys.readouterr().out)["measured"]
    assert 1e-4 < measured["kl"] < 1
    limit = str(measured["kl"] * 0.9)
    assert status([*common, "--max-kl", limit]) == 3
    last = json.loads(capsys.readouterr().out)["checks"][-1]
    assert (last["name"], last["passed"]) == ("divergence", False)
    assert "above the limit" in last["detail"]
    # A limit is for this run: it marks nothing.
    assert verify(made / "W4A16_G32").ok


@pytest.mark.parametrize("names", [[[{}]], [{}], [[["x"]]], [1, None]])
def test_lists_of_names_that_hold_none(made: Path, tmp_path: Path, names: object) -> None:
    out = tmp_path / "gptq"
    shutil.copytree(made / "gptq", out)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["modules_in_block_to_quantize"] = names
    (out / "config.json").write_text(json.dumps(config))
    assert verify(out, probe=False).ok


@pytest.fixture(scope="module")
def no_tokenizer(made: Path) -> Path:
    """Returns a checkpoint of no tokenizer, as GGUF takes one of these vocabularies."""
    out = made / "no_tokenizer"
    shutil.copytree(made / "m", made / "m_no_tokenizer")
    (made / "m_no_tokenizer" / "tokenizer_config.json").unlink()
    source = made / "m_no_tokenizer"
    lowbit.quantize(source, out, scheme="W4A16_G32", algorithm="rtn", progress=False)
    return out


def test_a_bad_gguf_file_gets_another_name(
    no_tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("gguf")
    out, bad = tmp_path / "x.gguf", tmp_path / "x.gguf.bad"
    command = ["convert", str(no_tokenizer), str(out), "--to", "gguf"]
    real = QuantLinear.forward
    with monkeypatch.context() as patch:
        patch.setattr(QuantLinear, "forward", lambda self, x: real(self, x) * 1.01)
        assert status(command) == 3
        assert status(["verify", str(bad)]) == 3
        shutil.copy(bad, out)
        bad.write_bytes(b"of somebody else")
        with pytest.raises(VerificationError, match=r"`lowbit verify .*x-2.gguf.bad`"):
            gate(out)
        second = tmp_path / "x-2.gguf.bad"
        assert bad.read_bytes() == b"of somebody else"  # nothing is overwritten
        capsys.readouterr()
    assert not out.exists()
    # The file may hold wrong weights, and nothing in it says which ones it should.
    assert status(["verify", str(second), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["mark_cleared"]
    assert "it stays marked as bad: the file does not say" in found["mark_stays"]
    assert status(["verify", str(second)]) == 0
    assert "it stays marked as bad" in capsys.readouterr().out
    second.rename(out)
    report = verify(out)
    assert report.ok
    assert checks(report)["probe"]
    content = bytearray(out.read_bytes())
    content[-40] ^= 1
    out.write_bytes(content)
    assert "digest" in verify(out).failed


def test_a_mark_of_a_file_is_cleared_where_its_weights_were_compared(tmp_path: Path) -> None:
    bad, free = tmp_path / "x.gguf.bad", tmp_path / "x.gguf"
    bad.write_bytes(b"content")
    report = Report(bad, "gguf", (Check("weights", True, "14 decode"),))
    free.write_bytes(b"another")
    assert "another x.gguf beside it" in (stays_marked(report) or "")
    assert not clear_mark(report)
    assert free.read_bytes() == b"another"
    free.unlink()
    assert clear_mark(report)
    assert free.read_bytes() == b"content"
    assert not bad.exists()


def test_the_folder_of_a_gguf_file_stands_for_it(
    no_tokenizer: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    folder, tokens = tmp_path / "folder", tokens_for(tmp_path)
    lowbit.convert(no_tokenizer, folder, "gguf", progress=False)
    against = ["--against", str(made / "m"), "--text", tokens]
    assert status(["verify", str(folder), *against, "--json"]) == 0
    kl = json.loads(capsys.readouterr().out)["measured"]["kl"]
    assert status(["eval", str(folder), *against, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)["divergence"]["mean"]
    assert found["mean"] == pytest.approx(kl)
    assert status(["verify", str(folder), *against, "--card"]) == 2
    assert "has no manifest, and --card" in " ".join(capsys.readouterr().err.split())


def test_a_folder_may_end_in_gguf(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.gguf"
    lowbit.convert(made / "W4A16_G32", out, "gptq", progress=False)
    assert verify(out).layout == "gptq"
    shutil.rmtree(out)
    spoil(monkeypatch)
    assert status(["convert", str(made / "W4A16_G32"), str(out), "--to", "gptq"]) == 3
    assert f"`lowbit verify {out}`" in " ".join(capsys.readouterr().err.split())
    assert MARK in json.loads((out / "config.json").read_text())


def test_a_finished_conversion_keeps_its_mark(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = ["convert", str(made / "W4A16_G32"), str(out), "--to", "gptq"]
    with monkeypatch.context() as patch:
        spoil(patch)
        assert status(command) == 3
    assert status([*command, "--resume", "--no-verify"]) == 2
    assert MARK in json.loads((out / "config.json").read_text())


def never(*_: object, **__: object) -> None:
    raise AssertionError("it must not come to this")


def test_bad_input_of_the_measurement_costs_no_checks(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a damaged checkpoint is still a report, whatever it is compared with."""
    damaged, tokens = tmp_path / "awq", tokens_for(tmp_path)
    shutil.copytree(made / "awq", damaged)
    edit(damaged, NORM, lambda t: t.pop(NORM))
    assert status(["verify", str(damaged), "--against", str(made / "m"), "--text", tokens]) == 3
    (made / "gptq_strange").mkdir()
    for file in (made / "gptq").iterdir():
        if file.name != MANIFEST_NAME:
            shutil.copy(file, made / "gptq_strange")
    monkeypatch.setattr("lowbit.verification.run._Verification", never)
    for path, arguments, words in (
        ("awq", ["--against", str(tmp_path / "absent")], "no such directory"),
        ("awq", ["--against", str(made / "m"), "--text", str(tmp_path / "a.npy")], "a.npy"),
        ("gptq_strange", ["--against", str(made / "m"), "--card"], "has no manifest"),
    ):
        capsys.readouterr()
        assert status(["verify", str(made / path), *arguments]) == 2
        assert words in " ".join(capsys.readouterr().err.split())


def test_the_card_comes_last_and_never_to_what_is_marked(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "awq"
    shutil.copytree(made / "awq", out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(marked_config(config, {"weights": "wrong"})))
    command = ["verify", str(out), "--against", str(made / "m"), "--text", tokens_for(tmp_path)]
    command += ["--card", "--json"]
    card = (out / "README.md").read_text()
    assert status([*command, "--max-kl", "0"]) == 3
    assert json.loads(capsys.readouterr().out)["measured"]["kl"] > 0
    assert (out / "README.md").read_text() == card
    with monkeypatch.context() as patch:
        patch.setattr("lowbit.model_card.write_measured", refused)
        assert status(command) == 2
    assert json.loads(capsys.readouterr().out)["mark_cleared"]  # the report was printed
    assert status(command) == 0
    assert "KL divergence" in (out / "README.md").read_text()


def refused(*_: object) -> None:
    raise LowbitError("a card that cannot be written")


def tokens_for(tmp_path: Path) -> str:
    """Returns a file of token ids."""
    tokens = torch.randint(1, 250, (4, 128), generator=torch.Generator().manual_seed(1))
    save_file({"input_ids": tokens.to(torch.int32)}, tmp_path / "tokens.safetensors")
    return str(tmp_path / "tokens.safetensors")
