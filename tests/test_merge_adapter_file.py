"""An adapter read from its file: PEFT's own merge of a float32 model is what it must give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from lowbit.adapters.adapter_file import WEIGHTS_NAME, AdapterFile
from lowbit.errors import LowbitError
from lowbit.nn.replace import weight_is_transposed
from tests.tiny_models import make_tiny

LINEARS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


def trained_adapter(model: PreTrainedModel, folder: Path, **options: Any) -> PeftModel:
    """Returns `model` with an adapter whose every tensor is random, saved in `folder`."""
    peft = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, **options}))
    for name, parameter in peft.named_parameters():
        if not parameter.requires_grad:
            continue
        noise = torch.randn_like(parameter)
        whole = "lora_magnitude" in name or "modules_to_save" in name or name.endswith("bias")
        # Magnitudes and whole modules stay near what they were, factors are of the size of weights.
        parameter.data = parameter.data * (1 + 0.2 * noise) if whole else 0.15 * noise
        if name.endswith("lora_B.default.bias"):
            parameter.data = noise
    peft.save_pretrained(folder)
    return peft


def merged_by_file(model: PreTrainedModel, adapter: AdapterFile) -> dict[str, Tensor]:
    """Returns name -> parameter of `model` with `adapter` in it."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in adapter.replaced:
        state[name] = adapter.replacement(name).float()
    for module in adapter.modules:
        transposed = weight_is_transposed(model.get_submodule(module))
        weight = state[f"{module}.weight"]
        merged = adapter.merged(module, weight.T if transposed else weight)
        state[f"{module}.weight"] = merged.T if transposed else merged
        if adapter.has_bias(module):
            state[f"{module}.bias"] = adapter.merged_bias(module, state[f"{module}.bias"])
    return state


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"target_modules": LINEARS}),
        ("llama", {"target_modules": LINEARS, "use_rslora": True}),
        ("llama", {"target_modules": LINEARS, "use_dora": True}),
        (
            "llama",
            {
                "target_modules": LINEARS,
                "rank_pattern": {"q_proj": 7, r"layers\.1\.mlp\.down_proj": 3},
                "alpha_pattern": {"v_proj": 20, "layers.2.self_attn.q_proj": 1},
                "use_rslora": True,
            },
        ),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
        ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
        ("qwen2", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
        ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "all"}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    ],
)
def test_merged_weights_are_those_of_peft(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    base = make_tiny(name)
    peft = trained_adapter(make_tiny(name), tmp_path, **options)
    found = merged_by_file(base, AdapterFile.open(tmp_path))
    expected = peft.merge_and_unload().state_dict()
    changed = 0
    for key, tensor in expected.items():
        # A tied head follows the embedding in PEFT's state dict; what is merged here is one tensor.
        torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-7, msg=key)
        changed += not torch.equal(tensor, base.state_dict()[key])
    assert changed >= 3


def test_ranks_decide_the_scaling(tmp_path: Path) -> None:
    trained_adapter(
        make_tiny("llama"), tmp_path, target_modules=["q_proj"], rank_pattern={"q_proj": 3}
    )
    adapter = AdapterFile.open(tmp_path)
    module = adapter.modules[1]
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    a, b = (tensors[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
    weight = torch.randn(64, 64)
    expected = weight.double() + 6 / 3 * b @ a
    torch.testing.assert_close(adapter.merged(module, weight).double(), expected, rtol=0, atol=1e-6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns the folder of an ordinary adapter."""
    trained_adapter(make_tiny("llama"), tmp_path, target_modules=["q_proj"])
    return tmp_path


def change_config(folder: Path, **changes: Any) -> None:
    """Sets keys of the adapter's configuration."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"use_qalora": True, "use_dora": True}, "use_qalora"),
        ({"an_option_of_the_future": 3}, "an_option_of_the_future"),
        ({"r": 5}, "rank 5"),
        ({"r": "4"}, "'4'"),
        ({"use_dora": True}, "lora_magnitude_vector is missing"),
        ({"rank_pattern": {"(": 3}}, "regular expression"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
    ],
)
def test_what_changes_the_function_is_refused_by_name(
    folder: Path, changes: dict[str, Any], named: str
) -> None:
    change_config(folder, **changes)
    with pytest.raises(LowbitError) as caught:
        AdapterFile.open(folder)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda t, a, b: t.pop(b), "lora_B.weight is missing"),
        (lambda t, a, b: t.update({a: t[a][:3].clone()}), "rank 4"),
        (lambda t, a, b: t.update({a: t[a][0].clone()}), "two matrices"),
        (lambda t, a, b: t.update({"strange": t[a].clone()}), "strange"),
        (lambda t, a, b: t.update({b.replace("lora_B", "lora_C"): t[b].clone()}), "lora_C"),
        (lambda t, a, b: t.update({b.replace("q_proj.", "q_proj.base_layer."): t[b].clone()}),
         "target_parameters"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(folder: Path, damage: Any, named: str) -> None:
    file = folder / WEIGHTS_NAME
    tensors = load_file(file)
    a = next(name for name in tensors if "lora_A" in name)
    damage(tensors, a, a.replace("lora_A", "lora_B"))
    save_file(tensors, file)
    with pytest.raises(LowbitError, match=named):
        AdapterFile.open(folder)


def test_nan_in_an_adapter_is_found_when_it_is_used(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][3, 2] = float("nan")
    save_file(tensors, folder / WEIGHTS_NAME)
    adapter = AdapterFile.open(folder)
    module = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
    with pytest.raises(LowbitError, match="NaN"):
        adapter.merged(module, torch.zeros(64, 64))


def test_another_shape_is_refused(folder: Path) -> None:
    adapter = AdapterFile.open(folder)
    with pytest.raises(LowbitError, match="give the base that it was trained on"):
        adapter.merged(adapter.modules[0], torch.zeros(64, 32))


def test_folders_without_an_adapter_are_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(LowbitError, match="no such folder"):
        AdapterFile.open(tmp_path / "nothing")
    (folder / WEIGHTS_NAME).rename(folder / "adapter_model.bin")
    with pytest.raises(LowbitError, match="pickle"):
        AdapterFile.open(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(LowbitError, match=r"adapter_config\.json: not found"):
        AdapterFile.open(folder)
