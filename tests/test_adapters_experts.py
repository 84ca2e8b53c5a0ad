"""Adapters on fused experts, which stay in 16 bits beside low-bit attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_adapters import IDS, logits, randomise, same, stored_bits
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lowbit import LowbitConfig, LowbitError
from lowbit.adapters import expert_parameters
from lowbit.adapters.layer import QuantLoraLinear

_SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**_SIZES, "num_experts": 4, "moe_intermediate_size": 40, "head_dim": 16},
    "mixtral": {**_SIZES, "num_local_experts": 4},
}
NAMES = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a mixture of experts with low-bit attention."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = CONFIG_MAPPING[request.param](**FAMILIES[request.param])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "float")
    quantization = LowbitConfig("NF4_DQ", modules_to_not_convert=["experts", "gate"])
    model = AutoModelForCausalLM.from_pretrained(folder / "float", quantization_config=quantization)
    model.save_pretrained(folder / "base")
    return folder / "base"


def load(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base).eval()


def test_adapters_on_experts_train_save_and_reload(base: Path, tmp_path: Path) -> None:
    model = load(base)
    names = expert_parameters(model)
    assert names == NAMES
    before = stored_bits(model)
    config = LoraConfig(target_modules=["q_proj", "o_proj"], target_parameters=names, r=2)
    peft_model = get_peft_model(model, config)
    kinds = [type(part).__name__ for part in peft_model.modules()]
    assert kinds.count("ParamWrapper") == 4
    assert kinds.count("QuantLoraLinear") == 4
    randomise(peft_model)
    wanted = logits(peft_model)
    assert float((wanted - logits(load(base))).abs().max()) > 1e-3
    peft_model(IDS, labels=IDS).loss.backward()
    trained = [n for n, p in peft_model.named_parameters() if p.grad is not None]
    assert any("experts" in name for name in trained)
    assert any("q_proj" in name for name in trained)
    assert all("lora_" in name for name in trained)
    peft_model.save_pretrained(str(tmp_path / "adapter"))
    assert expert_parameters(peft_model) == NAMES
    again = PeftModel.from_pretrained(load(base), str(tmp_path / "adapter"))
    assert torch.equal(logits(again), wanted)
    assert same(stored_bits(again), before)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged), wanted, atol=2e-3, rtol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    loaded = load(tmp_path / "merged")
    assert torch.equal(logits(loaded), logits(merged))


def test_experts_that_are_misspelled_are_refused(base: Path) -> None:
    wrong = ["mlp.experts.gate_proj"]
    with pytest.raises(LowbitError, match=r"no parameter 'mlp\.experts\.gate_proj'"):
        get_peft_model(load(base), LoraConfig(target_modules=["q_proj"], target_parameters=wrong))


def test_add_adapter_takes_experts_too(base: Path, tmp_path: Path) -> None:
    model = load(base)
    model.add_adapter(LoraConfig(target_modules=["q_proj"], target_parameters=NAMES, r=2))
    assert sum(isinstance(part, QuantLoraLinear) for part in model.modules()) == 2
    randomise(model)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = load(base)
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(again), wanted)


def test_all_linear_says_that_it_passes_over_experts(base: Path) -> None:
    with pytest.warns(UserWarning, match="leaves fused experts without an adapter"):
        get_peft_model(load(base), LoraConfig(target_modules="all-linear"))
