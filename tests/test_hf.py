"""`from_pretrained` and `save_pretrained` with lowbit models, and what must fail loudly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_ops import SCHEMES
from tiny_models import TINY, build_tiny, make_tiny
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from lowbit.algorithms import RTN
from lowbit.errors import LowbitError
from lowbit.hf.config import LowbitConfig, sentinel_key
from lowbit.models.selection import Selection, select_modules
from lowbit.nn import QuantEmbedding, QuantLinear, TiedQuantLinear
from lowbit.nn.replace import tied_head_name, weight_is_transposed
from lowbit.quant import QuantizedWeight
from lowbit.scheme import Scheme

# Logits are compared bit for bit with those of models whose weights were decoded beforehand.
pytestmark = pytest.mark.usefixtures("reference_backend")

IDS = torch.arange(3, 27).view(2, 12)
SCHEME = "W4A16_G32"
WHOLE = {"quantize_embeddings": True, "quantize_lm_head": True}
FLAGS: list[dict[str, bool]] = [{}, {"quantize_lm_head": True}, WHOLE]


def load(path: Path, **options: Any) -> PreTrainedModel:
    """Returns the model after checking that nothing was missing, unexpected or mismatched."""
    model, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS, use_cache=False).logits


@torch.no_grad()
def fake_quantized(model: PreTrainedModel, config: LowbitConfig) -> PreTrainedModel:
    """Returns the stock model with every selected weight rounded to the grid."""
    for name, scheme in select_modules(model, config.selection()).items():
        module = model.get_submodule(name)
        if name == tied_head_name(model):
            module.weight = nn.Parameter(module.weight.clone())
        transposed = weight_is_transposed(module)
        weight = module.weight.T if transposed else module.weight
        quantized = RTN().quantize(weight, scheme, None)
        qweight = QuantizedWeight.from_codes(quantized.codes, quantized.grid)
        rounded = qweight.dequantize(weight.dtype)
        # A transposed view: then Conv1D's addmm is the very call that F.linear makes.
        module.weight.data = rounded.T if transposed else rounded
    return model


def tensors(path: Path) -> dict[str, Tensor]:
    return {k: v for file in sorted(path.glob("*.safetensors")) for k, v in load_file(file).items()}


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"].update(changes)
    for derived in ("bits", "group_size", "sym") if "scheme" in changes else ():
        del config["quantization_config"][derived]
    (path / "config.json").write_text(json.dumps(config))


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized llama on disk."""
    path = tmp_path_factory.mktemp("saved")
    build_tiny("llama", path / "source")
    model = load(path / "source", quantization_config=LowbitConfig(SCHEME))
    model.save_pretrained(path / "quantized", max_shard_size="60KB")
    return path / "quantized"


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("flags", FLAGS, ids=["blocks", "head", "whole"])
@pytest.mark.parametrize("family", TINY)
def test_quantizing_while_loading_then_saving_and_loading(
    family: str, flags: dict[str, bool], tmp_path: Path
) -> None:
    dtype = torch.bfloat16
    config = LowbitConfig(SCHEME, **flags)
    source = build_tiny(family, tmp_path / "source", dtype, max_shard_size="60KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 1
    results = []
    for device_map in (None, "cpu", "auto"):
        model = load(
            tmp_path / "source",
            quantization_config=LowbitConfig(SCHEME, **flags),
            device_map=device_map,
        )
        results.append(logits(model))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[0], logits(fake_quantized(source, config)))

    model.save_pretrained(tmp_path / "first", max_shard_size="60KB")
    again = load(tmp_path / "first")
    assert again.dtype == dtype
    assert torch.equal(logits(again), results[0])
    again.save_pretrained(tmp_path / "second", max_shard_size="60KB")
    first, second = tensors(tmp_path / "first"), tensors(tmp_path / "second")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert second[name].dtype == tensor.dtype
        assert torch.equal(second[name], tensor)
    assert not [
        name for name, p in again.named_parameters() if p.requires_grad and "_scale" in name
    ]
    generated = again.generate(IDS[:1], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 15)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_survives_the_round_trip(scheme: str, tmp_path: Path) -> None:
    source = build_tiny("llama_tied", tmp_path / "source")
    config = LowbitConfig(scheme, **WHOLE)
    model = load(tmp_path / "source", quantization_config=config)
    assert torch.equal(logits(model), logits(fake_quantized(source, config)))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_mixed_schemes_and_exclusions_survive_the_round_trip(tmp_path: Path) -> None:
    source = build_tiny("llama", tmp_path / "source")
    config = LowbitConfig(
        "W3A16_G32",
        # The first wins; sorted by name, as transformers saves dictionaries, it would be the last.
        dynamic={r"layers\.1\.": None, r"down_proj": "NF4_DQ"},
        modules_to_not_convert=["layers.2.mlp.up_proj"],
    )
    model = load(tmp_path / "source", quantization_config=config)
    assert type(model.model.layers[1].mlp.down_proj) is nn.Linear
    assert type(model.model.layers[2].mlp.up_proj) is nn.Linear
    assert model.model.layers[0].mlp.down_proj.scheme == Scheme.parse("NF4_DQ")
    assert torch.equal(logits(model), logits(fake_quantized(source, config)))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "gemma3_text"])
def test_a_tied_quantized_embedding_is_stored_once(family: str, tmp_path: Path) -> None:
    build_tiny(family, tmp_path / "source")
    model = load(
        tmp_path / "source", quantization_config=LowbitConfig(SCHEME, quantize_embeddings=True)
    )
    model.save_pretrained(tmp_path / "saved")
    assert not [name for name in tensors(tmp_path / "saved") if "lm_head" in name]
    again = load(tmp_path / "saved")
    again.tie_weights()
    head, embedding = again.get_output_embeddings(), again.get_input_embeddings()
    assert type(head) is TiedQuantLinear
    assert type(embedding) is QuantEmbedding
    assert head.qweight.data_ptr() == embedding.qweight.data_ptr()
    assert again.config.tie_word_embeddings


def test_quantizing_only_the_head_unties_it(tmp_path: Path) -> None:
    build_tiny("llama_tied", tmp_path / "source")
    config = LowbitConfig(SCHEME, quantize_lm_head=True)
    model = load(tmp_path / "source", quantization_config=config)
    model.save_pretrained(tmp_path / "saved")
    assert (
        json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is False
    )
    again = load(tmp_path / "saved")
    again.tie_weights()
    assert type(again.get_output_embeddings()) is QuantLinear
    source = make_tiny("llama_tied")
    assert torch.equal(again.get_input_embeddings().weight, source.get_input_embeddings().weight)


def test_a_second_copy_of_a_tied_head_in_the_file_is_ignored(tmp_path: Path) -> None:
    build_tiny("llama_tied", tmp_path)
    stored = tensors(tmp_path)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    for flags in FLAGS[1:]:
        load(tmp_path, quantization_config=LowbitConfig(SCHEME, **flags))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["W4A16_G32", "W4A16_G32_BF16", "W4A16_G32_FP32", "NF4_DQ"])
def test_loading_in_another_dtype_casts_no_stored_tensor(
    scheme: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    build_tiny("qwen2", tmp_path / "source", torch.bfloat16)
    config = LowbitConfig(scheme, **WHOLE)
    load(tmp_path / "source", quantization_config=config).save_pretrained(tmp_path / "saved")
    model = load(tmp_path / "saved", dtype=dtype)
    assert model.dtype == dtype
    state = model.state_dict()
    for name, tensor in tensors(tmp_path / "saved").items():
        if ".weight_" in name:
            assert state[name].dtype == tensor.dtype
            assert torch.equal(state[name], tensor)
        elif tensor.numel():
            assert state[name].dtype == dtype
    assert logits(model).dtype == dtype


def test_a_policy_that_keeps_modules_in_fp32_casts_no_scales(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"o_proj", "norm"})
    model = load(saved, dtype=torch.bfloat16)
    assert model.model.norm.weight.dtype == torch.float32
    assert model.model.layers[0].self_attn.o_proj.weight_scale.dtype == torch.float16


def test_dequantized_models_are_stock_models_again(tmp_path: Path) -> None:
    for family in ("llama_tied", "gpt2", "gemma2"):
        build_tiny(family, tmp_path / family)
        model = load(tmp_path / family, quantization_config=LowbitConfig(SCHEME, **WHOLE))
        expected = logits(model)
        model.dequantize()
        model.save_pretrained(tmp_path / f"{family}_plain")
        again = load(tmp_path / f"{family}_plain")
        assert "quantization_config" not in again.config.to_dict()
        assert torch.equal(logits(again), expected)


def test_device_map_counts_low_bit_sizes(tmp_path: Path) -> None:
    from accelerate.utils import compute_module_sizes

    build_tiny("llama", tmp_path)
    model = load(tmp_path, quantization_config=LowbitConfig(SCHEME), device_map="auto")
    stored = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert compute_module_sizes(model)[""] == pytest.approx(stored, rel=0.05)


def test_offloaded_to_disk_gives_the_same_logits(saved: Path, tmp_path: Path) -> None:
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
                  "model.layers.2": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu",
                  "lm_head": "cpu"}  # fmt: skip
    model = load(saved, device_map=device_map, offload_folder=tmp_path)
    assert torch.equal(logits(model), logits(load(saved)))


def test_the_body_alone_loads(saved: Path) -> None:
    body, report = AutoModel.from_pretrained(saved, output_loading_info=True)
    assert not report["missing_keys"]
    assert set(report["unexpected_keys"]) == {"lm_head.weight"}
    assert type(body.layers[0].mlp.up_proj) is QuantLinear
    with torch.no_grad():
        hidden = body(IDS).last_hidden_state
        assert torch.equal(load(saved).lm_head(hidden), logits(load(saved)))


def test_the_config_round_trips_through_the_selection() -> None:
    selection = Selection(
        Scheme.parse("NF4_DQ"),
        dynamic=((r"down", Scheme.parse("W8A16")), (r"up", None)),
        modules_to_not_convert=("q_proj",),
        quantize_lm_head=True,
    )
    config = LowbitConfig(
        "NF4_DQ",
        {"down": "W8A16", "up": None},
        ["q_proj"],
        quantize_lm_head=True,
        algorithm="gptq",
        manifest="m.json",
    )
    stored = json.loads(json.dumps(config.to_dict()))
    again = LowbitConfig(**stored)
    assert again.selection() == selection
    assert json.loads(json.dumps(again.to_dict())) == stored
    assert (stored["bits"], stored["group_size"], stored["sym"], stored["desc_act"]) == (
        4,
        64,
        True,
        False,
    )


def test_gradients_reach_inputs_through_a_loaded_model(saved: Path) -> None:
    model = load(saved)
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embedded, labels=IDS).loss.backward()
    assert embedded.grad is not None
    assert embedded.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"schem": "W4A16"}, "did you mean 'scheme'"),
        ({"format_version": 2}, "upgrade"),
        ({"status": "in progress"}, "--resume"),
        ({"scheme": "W5A16"}, "5 bits"),
        ({"bits": 3}, "bits=3 disagrees with scheme W4A16"),
        ({"modules_to_not_convert": "lm_head"}, "list of names"),
        ({"modules_to_not_convert": 5}, "list of names"),
        ({"dynamic": 5}, "dynamic maps regexes"),
        ({"dynamic": [["(", "W8A16"]]}, "not a regular expression"),
        ({"scheme": ["W4A16"]}, "a scheme is a string"),
        ({"format_version": 2, "rotation": "hadamard"}, "upgrade"),
        ({"format_version": 0}, "quantize the model again"),
        ({"dynamic": {"up": "W5A16"}}, "5 bits"),
    ],
)
def test_bad_configs_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(LowbitError, match=message):
        LowbitConfig(**keys)


def test_gptq_while_loading_names_the_command(tmp_path: Path) -> None:
    build_tiny("llama", tmp_path)
    with pytest.raises(LowbitError, match="did you mean 'rtn'"):
        load(tmp_path, quantization_config=LowbitConfig(SCHEME, algorithm="rtm"))
    with pytest.raises(LowbitError, match="lowbit quantize"):
        load(tmp_path, quantization_config=LowbitConfig(SCHEME, algorithm="gptq"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheme": "W4A16_G64"}, "weight_scale'.* needs"),
        ({"scheme": "W8A16_G32"}, "weight_packed'.* needs"),
        ({"scheme": "W4A16_ASYM_G32"}, "weight_zero_point' is missing"),
        ({"quantize_lm_head": True}, "lm_head.weight_packed' is missing"),
        ({"modules_to_not_convert": ["up_proj"]}, "up_proj is quantized, but"),
        ({"format_version": 7}, "upgrade"),
        ({"status": "in progress"}, "unfinished"),
        ({"manifest": "lowbit_manifest.json"}, "lowbit_manifest.json: missing"),
    ],
)
def test_a_config_that_disagrees_with_the_file_is_refused(
    copied: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(copied, **changes)
    with pytest.raises(LowbitError, match=message):
        load(copied)


def test_a_config_of_another_model_size_is_refused(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config["intermediate_size"] = 160
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(LowbitError, match="do not belong together"):
        load(copied)


def test_a_width_that_fills_as_many_words_is_refused(copied: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight_shape"
    file = next(file for file in copied.glob("*.safetensors") if name in load_file(file))
    stored = load_file(file)
    # 166 and 168 codes of 4 bits fill 21 words and 6 groups of 32.
    stored[name] = torch.tensor([64, 166])
    save_file(stored, file, {"format": "pt"})
    with pytest.raises(LowbitError, match=r"weight_shape' says \[64, 166\]"):
        load(copied)


def test_a_missing_stored_tensor_is_named(copied: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight_scale"
    file = next(file for file in copied.glob("*.safetensors") if name in load_file(file))
    stored = load_file(file)
    del stored[name]
    save_file(stored, file, {"format": "pt"})
    with pytest.raises(LowbitError, match=f"'{name}' is missing"):
        load(copied)


def test_a_manifest_is_required_once_and_not_promised_again(copied: Path, tmp_path: Path) -> None:
    edit_config(copied, manifest="lowbit_manifest.json")
    (copied / "lowbit_manifest.json").write_text("{}")
    model = load(copied)
    model.save_pretrained(tmp_path / "again")
    assert (
        "manifest"
        not in json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    )
    load(tmp_path / "again")


def test_pickled_weights_are_refused(copied: Path, tmp_path: Path) -> None:
    state = tensors(copied)
    for file in copied.glob("*.safetensors*"):
        file.unlink()
    torch.save(state, copied / "pytorch_model.bin")
    with pytest.raises(LowbitError, match="pickled"):
        load(copied)
    config = json.loads((copied / "config.json").read_text())
    del config["quantization_config"]
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(LowbitError, match="pickled"):
        load(copied, quantization_config=LowbitConfig(SCHEME))


def test_a_wrong_shape_is_found_before_quantizing(tmp_path: Path) -> None:
    build_tiny("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["intermediate_size"] = 160
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LowbitError, match=r"gate_proj.weight' is \[168, 64\]"):
        load(tmp_path, quantization_config=LowbitConfig(SCHEME))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    build_tiny("llama", tmp_path)
    stored = tensors(tmp_path)
    stored["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LowbitError, match=r"layers\.1\.mlp\.up_proj\.weight' holds NaN or Inf"):
        load(tmp_path, quantization_config=LowbitConfig(SCHEME))


def test_the_sentinel_is_the_first_module_and_empty(saved: Path) -> None:
    stored = tensors(saved)
    key = sentinel_key(["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"])
    assert (stored[key].dtype, stored[key].numel()) == (torch.uint8, 0)
    assert [name for name, tensor in stored.items() if not tensor.numel()] == [key]


def test_without_lowbit_transformers_raises_instead_of_guessing(saved: Path) -> None:
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(saved)!r})"
    run = run_python(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert run.returncode == 1
    assert "RuntimeError" in run.stderr
    assert "q_proj.weight" in run.stderr


def test_importing_lowbit_is_enough_in_any_order(saved: Path) -> None:
    check = (
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(saved)!r});"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)"
    )
    for imports in (
        "import lowbit; import transformers; import lowbit;",
        "import transformers; transformers.AutoModelForCausalLM; import lowbit;",
        "import transformers.quantizers.auto; import lowbit; import transformers;",
    ):
        run = run_python(imports + check, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
        assert run.stdout.strip() == "QuantLinear", run.stderr


@pytest.mark.skipif(
    not any(entry.name == "lowbit" for entry in entry_points(group="torch.backends")),
    reason="lowbit is not installed, so torch does not find its entry point",
)
def test_the_entry_point_loads_with_no_import_at_all(saved: Path) -> None:
    for imports in ("import transformers;", "import transformers.quantizers.auto, transformers;"):
        run = run_python(
            imports + f"model = transformers.AutoModelForCausalLM.from_pretrained({str(saved)!r});"
            "print(type(model.model.layers[0].mlp.up_proj).__name__)"
        )
        assert run.stdout.strip() == "QuantLinear", run.stderr
