"""Whole checkpoints from one format to another, back, and straight onto our kernels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build_tiny, make_tiny
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.checkpoint.journal import MANIFEST_NAME
from lowbit.cli import main
from lowbit.errors import LowbitError
from lowbit.formats import conversion
from lowbit.quant import pack
from lowbit.quant.packing import unpack

IDS = torch.arange(1, 33)[None]
UP = "model.layers.1.mlp.up_proj"
MIXED = {"down_proj": "W8A16_G32", UP: None}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with `m`, a model whose widths groups of 32 divide, in several shards."""
    path = tmp_path_factory.mktemp("models")
    model = make_tiny("llama", torch.float32, intermediate_size=160, num_hidden_layers=2)
    model.save_pretrained(path / "m", max_shard_size="200KB")
    (path / "m" / "tokenizer.json").write_text('{"version": "1.0"}')
    return path


def quantized(models: Path, scheme: str, **options: object) -> Path:
    """Returns the folder of `m` under a scheme, quantized once."""
    out = models / (f"{scheme}{abs(hash(str(options)))}" if options else scheme)
    if not out.exists():
        lowbit.quantize(
            models / "m", out, scheme=scheme, algorithm="rtn", progress=False, **options
        )
    return out


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return lowbit.load(path)(IDS).logits


@pytest.mark.filterwarnings("ignore:the model is float32, scales are fp16")
@pytest.mark.filterwarnings("ignore:transformers .5.23. cannot load")
@pytest.mark.parametrize(
    ("scheme", "to", "mixed"),
    [
        ("W4A16_ASYM_G32", "compressed-tensors", True),
        ("W3A16_G32", "compressed-tensors", False),
        ("W8A8", "compressed-tensors", False),
        ("W4A16_G32", "gptq", True),
        ("W3A16_ASYM_G32", "gptq_v2", True),
        ("W2A16_G32_BF16", "gptq", False),
        ("W4A16_ASYM_G32", "awq", False),
        ("W4A16_G32", "awq", False),
        ("NF4_G32_FP32", "bnb", False),
        ("FP4BNB_G32", "bnb", False),
    ],
)
def test_there_and_back_gives_the_same_logits(
    models: Path, tmp_path: Path, scheme: str, to: str, mixed: bool
) -> None:
    dynamic = MIXED if mixed else {UP: None}
    source = quantized(models, scheme, dynamic=dynamic, quantize_lm_head=to != "awq")
    there = lowbit.convert(source, tmp_path / "there", to, progress=False)
    assert there.manifest["summary"]["exact"] == (14 if to != "awq" else 13)
    assert not there.manifest["summary"]["rounded"]
    back = lowbit.convert(there.path, tmp_path / "back", "lowbit", progress=False)
    expected = logits(source)
    assert torch.equal(logits(back.path), expected)
    assert torch.equal(logits(there.path), expected)  # straight from the foreign files
    for path in (there.path, back.path):
        assert (path / "tokenizer.json").read_text() == '{"version": "1.0"}'
        assert len(list(path.glob("*.safetensors"))) > 1
        assert not list(path.glob("*.tmp"))
    plain = {n: t for file in there.path.glob("*.safetensors") for n, t in load_file(file).items()}
    original = {n: t for file in (models / "m").glob("*.st*") for n, t in load_file(file).items()}
    assert f"{UP}.weight" in plain
    assert all(torch.equal(plain[n], t) for n, t in original.items() if n in plain)
    assert all(all(tensor.shape) for tensor in plain.values())


def test_what_clients_would_do_to_it_is_said(models: Path, tmp_path: Path) -> None:
    source = quantized(models, "W4A16_ASYM_G32", dynamic=MIXED, quantize_lm_head=True)
    with pytest.warns(UserWarning, match="scheme") as told:
        lowbit.convert(source, tmp_path / "out", "compressed-tensors", progress=False)
    said = " ".join(str(warning.message) for warning in told)
    assert "cannot load layers with zero points beside layers of another scheme" in said
    assert "the model is float32, scales are fp16" in said
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "dequantize" not in config
    assert len(config["config_groups"]) == 2


def test_bf16_is_the_decoded_model(models: Path, tmp_path: Path) -> None:
    source = quantized(models, "W4A16_G32")
    lowbit.convert(source, tmp_path / "out", "bf16", progress=False)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours = lowbit.load(source)
    for name, module in ours.named_modules():
        if isinstance(module, lowbit.QuantLinear):
            expected = module.dequantize(torch.bfloat16)
            assert torch.equal(stock.get_submodule(name).weight, expected)


def test_gpt2_stores_decoded_weights_the_other_way_round(tmp_path: Path) -> None:
    build_tiny("gpt2", tmp_path / "m")
    lowbit.quantize(tmp_path / "m", tmp_path / "q", scheme="W4A16_G32", algorithm="rtn")
    lowbit.convert(tmp_path / "q", tmp_path / "out", "bf16", progress=False)
    stock, ours = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        lowbit.load(tmp_path / "q"),
    )
    layer = "transformer.h.1.mlp.c_fc"
    expected = ours.get_submodule(layer).dequantize(torch.bfloat16)
    assert torch.equal(stock.get_submodule(layer).weight.T, expected)
    with pytest.raises(LowbitError, match=r"gptq cannot hold 12 weights \(transformer.*Conv1D"):
        lowbit.convert(tmp_path / "q", tmp_path / "x", "gptq", progress=False)


@pytest.mark.parametrize(
    ("scheme", "to", "message"),
    [
        ("W4A16_G32_DQ", "gptq", r"double-quantizes.*nearest that it holds is W4A16_G32: "),
        ("W4A16_G64", "compressed-tensors", r"short \(160 input.*nearest that it holds is W4A16_G"),
        ("W3A16_G32", "awq", r"has 3 bits.*nearest that it holds is W4A16_ASYM_G32: --requantize"),
        ("NF4", "gptq_v2", r"looks codes up.*nearest that it holds is W4A16_G"),
        ("W4A16_G32", "bnb", r"integers.*nearest that it holds is NF4_G32_FP32"),
        ("FP4_G32", "bnb", r"levels of E2M1.*FP4BNB_G32_FP32"),
        ("W8A8", "gptq", r"rounds activations.*W8A16_CHANNEL"),
        ("W4A16_G32_FP32", "gptq", r"scales of fp16, which do not hold those of model.layers.0"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_or_rounded_on_request(
    models: Path, tmp_path: Path, scheme: str, to: str, message: str
) -> None:
    source = quantized(models, scheme)
    with pytest.raises(LowbitError, match=message):
        lowbit.convert(source, tmp_path / "out", to, progress=False)
    assert not (tmp_path / "out" / "config.json").exists()
    made = lowbit.convert(source, tmp_path / "new", to, requantize=True, progress=False)
    summary = made.manifest["summary"]
    exact = scheme.endswith("DQ") or to == "awq" or scheme in ("W8A8", "W4A16_G64")
    assert (summary["exact"] == 14) == exact
    assert all(error < 0.2 for error in summary["rounded"].values())
    # Of W8A8 the weights are kept, the rounding of activations is not.
    change = (logits(made.path) - logits(source)).abs().max()
    assert change < (1e-3 if exact and scheme != "W8A8" else 2.0)


def test_embeddings_are_for_our_format_alone(tmp_path: Path) -> None:
    build_tiny("llama_tied", tmp_path / "m")
    options = {"scheme": "W8A16_CHANNEL", "quantize_embeddings": True, "algorithm": "rtn"}
    lowbit.quantize(tmp_path / "m", tmp_path / "q", progress=False, **options)
    with pytest.raises(LowbitError, match=r"a weight \(model.embed_tokens\): it is an embedding"):
        lowbit.convert(tmp_path / "q", tmp_path / "x", "compressed-tensors", progress=False)
    made = lowbit.convert(
        tmp_path / "q", tmp_path / "y", "compressed-tensors", requantize=True, progress=False
    )
    assert made.manifest["summary"]["rounded"] == {"model.embed_tokens": None}
    assert (logits(made.path) - logits(tmp_path / "q")).abs().max() < 0.1


def test_an_interrupted_conversion_goes_on(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, whole = quantized(models, "W4A16_G32"), tmp_path / "whole"
    lowbit.convert(source, whole, "gptq", progress=False)
    real, calls = conversion.read_module, []

    def interrupted(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(conversion, "read_module", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lowbit.convert(source, tmp_path / "out", "gptq", progress=False)
    with pytest.raises(LowbitError, match="holds an unfinished run; add --resume"):
        lowbit.convert(source, tmp_path / "out", "gptq", progress=False)
    with pytest.raises(LowbitError, match=r"config.json: not found"):
        lowbit.load(tmp_path / "out")
    with pytest.raises(LowbitError, match=r"cannot resume, to differs"):
        lowbit.convert(source, tmp_path / "out", "gptq_v2", resume=True, progress=False)
    finished = len(list((tmp_path / "out").glob("*.safetensors")))
    assert 0 < finished < len(list(whole.glob("*.safetensors")))
    lowbit.convert(source, tmp_path / "out", "gptq", resume=True, progress=False)
    for file in whole.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name
    assert len(calls) < 2 * 14  # finished shards were not written again


def with_act_order(path: Path, out: Path) -> torch.Tensor:
    """Writes a GPTQ checkpoint whose columns are grouped in another order; returns it for `UP`.

    The values of a column move with it, so the decoded weight is that of `path`, its columns
    shuffled alike.
    """
    out.mkdir()
    shuffled = torch.empty(0)
    for file in path.iterdir():
        if file.name == MANIFEST_NAME:
            continue  # it is a checkpoint of another tool now
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
            continue
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith("g_idx")]:
            columns = len(tensors[name])
            order = torch.randperm(columns)
            words = f"{name.removesuffix('g_idx')}qweight"
            codes = unpack(tensors[words].T, 4, columns)[:, order]
            tensors[words] = pack(codes, 4).T.contiguous()
            tensors[name] = tensors[name][order].contiguous()
            shuffled = order if name == f"{UP}.g_idx" else shuffled
        save_file(tensors, out / file.name, {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (out / "config.json").write_text(json.dumps(config))
    return shuffled


def test_columns_in_an_order_of_their_own(models: Path, tmp_path: Path) -> None:
    source = quantized(models, "W4A16_G32")
    lowbit.convert(source, tmp_path / "plain", "gptq", progress=False)
    order = with_act_order(tmp_path / "plain", tmp_path / "ordered")
    for to in ("lowbit", "compressed-tensors", "awq"):
        with pytest.raises(LowbitError, match=r"order of desc_act.*gptq_v2 keep the order"):
            lowbit.convert(tmp_path / "ordered", tmp_path / "x", to, progress=False)
    with pytest.raises(LowbitError, match="order of desc_act"):
        lowbit.load(tmp_path / "ordered")
    lowbit.convert(tmp_path / "ordered", tmp_path / "v2", "gptq_v2", progress=False)
    made = {}
    for name in ("ordered", "v2"):
        lowbit.convert(tmp_path / name, tmp_path / f"{name}16", "bf16", progress=False)
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}16")
        made[name] = stock.get_submodule(UP).weight
    expected = lowbit.load(source).get_submodule(UP).dequantize(torch.bfloat16)
    assert torch.equal(made["ordered"], expected[:, order])
    assert torch.equal(made["v2"], made["ordered"])
    rounded = lowbit.convert(
        tmp_path / "ordered", tmp_path / "new", "lowbit", requantize=True, progress=False
    )
    assert max(rounded.manifest["summary"]["rounded"].values()) < 0.15
    near = lowbit.load(rounded.path).get_submodule(UP).dequantize()
    error = (near - made["ordered"].float()).norm() / near.norm()
    assert error < 0.15


def test_a_foreign_checkpoint_is_a_base_for_adapters(models: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lowbit.convert(quantized(models, "W4A16_G32"), tmp_path / "q", "gptq", progress=False)
    model = lowbit.load(tmp_path / "q")
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=4))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    losses = []
    for _ in range(4):
        loss = model(IDS, labels=IDS).loss
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m", "x", "--to", "gptq"], "is not quantized; run `lowbit quantize` first"),
        (["W4A16_G32", "x", "--to", "gptqv3"], "unknown format 'gptqv3'; did you mean 'gptq"),
        (["W4A16_G32", "x", "--to", "lowbit"], "is lowbit already"),
        (["W4A16_G32", "W4A16_G32", "--to", "gptq"], "output and source are the same"),
        (["W4A16_G32", "m", "--to", "gptq"], "not empty"),
        (["absent", "x", "--to", "gptq"], "no such directory"),
        (["NF4", "x", "--to", "awq"], "awq cannot hold 14 weights"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    models: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for scheme in ("W4A16_G32", "NF4"):
        quantized(models, scheme)
    paths = [str(models / argument) for argument in arguments[:2]]
    with pytest.raises(SystemExit) as exit_info:
        main(["convert", *paths, *arguments[2:]])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (models / "x").exists()


@pytest.mark.parametrize("depth", [-1, 0])
def test_a_model_of_no_blocks_is_refused_before_anything_is_written(
    models: Path, tmp_path: Path, depth: int, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(quantized(models, "W4A16_G32"), source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": depth}))
    with pytest.raises(SystemExit) as exit_info:
        main(["convert", str(source), str(tmp_path / "out"), "--to", "bf16"])
    assert exit_info.value.code == 2
    assert f"says {depth} blocks, needed at least 1" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_the_command_prints_a_summary(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = quantized(models, "W4A16_G32")
    with pytest.raises(SystemExit) as exit_info:
        main(["convert", str(source), str(tmp_path / "out"), "--to", "awq", "--json"])
    assert exit_info.value.code == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["exact"] == 14
    assert summary["format"] == "awq"
    assert summary["schemes"] == ["W4A16_ASYM_G32"]


def test_loading_names_the_damaged_tensor(models: Path, tmp_path: Path) -> None:
    source = quantized(models, "W4A16_G32")
    out = lowbit.convert(source, tmp_path / "q", "gptq", progress=False).path
    file = next(f for f in sorted(out.glob("*.safetensors")) if f"{UP}.scales" in load_file(f))
    tensors = load_file(file)
    tensors[f"{UP}.scales"][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(LowbitError, match=rf"{file.name}: tensor '{UP}.scales' holds NaN"):
        lowbit.load(out)


def test_what_other_tools_say_of_the_quantization_is_not_carried_along(
    models: Path, tmp_path: Path
) -> None:
    source = lowbit.convert(
        quantized(models, "W4A16_G32"), tmp_path / "gptq", "gptq", progress=False
    ).path
    for name in ("quantize_config.json", "quant_config.json", "quantization_config.json"):
        (source / name).write_text('{"bits": 4, "checkpoint_format": "gptq"}')
    out = lowbit.convert(source, tmp_path / "v2", "gptq_v2", progress=False).path
    assert not list(out.glob("quant*.json"))
    assert (out / "tokenizer.json").exists()
