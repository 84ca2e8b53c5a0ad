"""Experts in 16 bits beside quantized layers: other formats have a tensor for each, as the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import lowbit
from lowbit.engines import findings
from lowbit.formats.hub_names import expert_groups

IDS = torch.arange(1, 33)[None]
COMMON: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16},
}


@pytest.fixture(scope="module", params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with `m`, as the hub has it, and `q`, its attention in 4 bits."""
    path = tmp_path_factory.mktemp(request.param)
    config = CONFIG_MAPPING[request.param](**COMMON, **FAMILIES[request.param])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path / "m")
    lowbit.quantize(
        path / "m", path / "q", scheme="W4A16_G32", algorithm="rtn", progress=False, verify=False,
        modules_to_not_convert=("experts",),
    )  # fmt: skip
    return path


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {k: t for file in path.glob("*.safetensors") for k, t in load_file(file).items()}


@pytest.mark.filterwarnings("ignore:the model is float32, scales are fp16")
@pytest.mark.filterwarnings("ignore:transformers .5.23. cannot load experts")
@pytest.mark.parametrize("to", ["compressed-tensors", "gptq", "awq", "bf16"])
def test_experts_have_the_names_of_the_hub(source: Path, tmp_path: Path, to: str) -> None:
    lowbit.convert(source / "q", tmp_path / "out", to, progress=False, verify=to == "gptq")
    original, made = tensors(source / "m"), tensors(tmp_path / "out")
    plain = [name for name in original if "expert" in name or name.endswith("gate.weight")]
    assert len(plain) == 2 * (4 * 3 + 1)
    assert all(torch.equal(made[name], original[name]) for name in plain)
    assert not any(name.endswith("gate_up_proj") for name in made)
    with torch.no_grad():
        expected = lowbit.load(source / "q")(IDS).logits
        found = lowbit.load(tmp_path / "out", dtype=torch.float32)(IDS).logits
    assert (
        torch.allclose(found, expected, atol=2e-2) if to == "bf16" else torch.equal(found, expected)
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    said = json.dumps(config.get("quantization_config", {}))
    assert said.count("experts") == (0 if to == "bf16" else 2)  # a pattern a layer, not a name each


@pytest.mark.filterwarnings("ignore:the model is float32, scales are fp16")
def test_what_stock_transformers_does_not_read_is_said(source: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"transformers \(5.23\) cannot load experts in 16 bits"):
        lowbit.convert(
            source / "q", tmp_path / "out", "compressed-tensors", progress=False, verify=False
        )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    names = [f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qkvo"]
    schemes = {name: lowbit.Scheme.parse("W4A16_G32") for name in names}
    assert "experts" in findings("transformers", "compressed-tensors", schemes, config)[0]
    assert findings("vllm", "compressed-tensors", schemes, config) == []


def test_experts_are_named_by_what_holds_them() -> None:
    names = ["a.mlp.experts.0.w1", "a.mlp.experts.10.w2", "a.mlp.gate", "b.mlp.experts.3.w1", "x"]
    assert expert_groups(names) == (["a.mlp.experts", "b.mlp.experts"], ["a.mlp.gate", "x"])
