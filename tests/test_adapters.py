"""The LoRA layer on packed weights, against float64, and what must not change the base."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import build_tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lowbit import LowbitConfig, LowbitError, QuantizedWeight, Scheme
from lowbit.adapters.layer import QuantLoraLinear
from lowbit.algorithms import RTN
from lowbit.nn import QuantLinear
from lowbit.nn.stored import StoredWeight

SCHEMES = ("NF4_DQ", "W4A16_ASYM_G32", "W3A16_G64", "W2A16_G64_DQ", "W8A16_CHANNEL", "FP4_G32_FP32")
IDS = torch.arange(3, 27).view(2, 12)


def quantized(tmp_path: Path, name: str = "llama", scheme: str = "NF4_DQ", **options: Any) -> Any:
    """Returns the tiny model of family `name` in low bits, and the folder of the 16-bit one."""
    folder = tmp_path / f"{name}-float"
    if not folder.exists():
        build_tiny(name, folder)
    dtype = options.pop("dtype", torch.float32)
    config = LowbitConfig(scheme, **options)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)
    return model, folder


def one_layer(scheme: str, shape: tuple[int, int] = (48, 168), bias: bool = True) -> QuantLinear:
    result = RTN().quantize(torch.randn(shape) * 0.1, Scheme.parse(scheme), None)
    weight = QuantizedWeight.from_codes(result.codes, result.grid)
    return QuantLinear.from_quantized(
        weight, torch.randn(shape[0]) if bias else None, torch.float32
    )


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result


def adapted(layer: QuantLinear, **options: Any) -> Any:
    """Returns `layer` with an adapter of random A and B."""
    config = LoraConfig(**{"target_modules": ["layer"], "r": 4, "lora_alpha": 12, **options})
    holder: Any = Holder(layer)
    get_peft_model(holder, config)
    randomise(holder)
    return holder.layer


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.add_(torch.randn_like(parameter) * 0.1)


def oracle(lora: Any, x: Tensor, adapter: str = "default") -> Any:
    """Returns what the layer computes, in float64 from the papers."""
    weight = lora.quantized.quantized_weight.dequantize().double().numpy()
    a = lora.lora_A[adapter].weight.detach().double().numpy()
    b = lora.lora_B[adapter].weight.detach().double().numpy()
    weight = weight + lora.scaling[adapter] * b @ a
    if adapter in lora.lora_magnitude_vector:
        magnitude = lora.lora_magnitude_vector[adapter].weight.detach().double().numpy()
        weight = magnitude[:, None] * weight / np.linalg.norm(weight, axis=1, keepdims=True)
    bias = 0.0 if lora.quantized.bias is None else lora.quantized.bias.detach().double().numpy()
    if lora.lora_bias[adapter]:
        bias = bias + lora.scaling[adapter] * lora.lora_B[adapter].bias.detach().double().numpy()
    return x.double().numpy() @ weight.T + bias


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
}


@pytest.mark.parametrize("scheme", [*SCHEMES, "W8A8"])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_the_papers(scheme: str, kind: str) -> None:
    lora = adapted(one_layer(scheme), **KINDS[kind])
    assert type(lora) is QuantLoraLinear
    assert lora.scaling["default"] == (12 / 2 if kind == "rslora" else 12 / 4)
    x = torch.randn(2, 5, 168)
    for prepared in (False, True):
        if prepared:
            lora.quantized.prepare()
        tolerance = 2e-4 if prepared else 2e-5  # the kernels' own levels are rounded
        if scheme == "W8A8":
            tolerance = 3e-2  # activations in 8 bits
        error = np.abs(lora(x).detach().numpy() - oracle(lora, x)).max()
        assert error < tolerance * np.abs(oracle(lora, x)).max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES[:2])
def test_merging_is_exact_and_unmerging_restores_every_bit(scheme: str, kind: str) -> None:
    lora = adapted(one_layer(scheme), **KINDS[kind])
    before = {name: t.clone() for name, t in lora.quantized.state_dict().items()}
    x = torch.randn(3, 168)
    y, wanted = lora(x), oracle(lora, x)
    lora.merge()
    assert type(lora.base_layer) is nn.Linear
    np.testing.assert_allclose(lora(x).detach().numpy(), wanted, atol=2e-5 * np.abs(wanted).max())
    if kind != "dora":
        b, a = lora.lora_B["default"].weight, lora.lora_A["default"].weight
        delta = lora.scaling["default"] * (b @ a)
        sums = lora.quantized.quantized_weight.dequantize() + delta
        assert torch.equal(lora.base_layer.weight, sums)
    lora.unmerge()
    after = lora.quantized.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(lora(x), y)


def test_several_adapters_merge_one_after_the_other() -> None:
    lora = adapted(one_layer("NF4"))
    second = LoraConfig(r=3, lora_alpha=5)
    lora.update_layer("second", 3, 5, second)
    randomise(lora)
    lora.set_adapter(["default", "second"])
    x = torch.randn(4, 168)
    y = lora(x)
    lora.merge(adapter_names=["default"])
    assert lora.merged_adapters == ["default"]
    lora.merge(adapter_names=["second"])
    torch.testing.assert_close(lora(x), y)
    lora.unmerge()
    assert lora.merged_adapters == []
    assert torch.equal(lora(x), y)


def test_a_broken_adapter_merges_nothing() -> None:
    lora = adapted(one_layer("NF4"))
    with torch.no_grad():
        lora.lora_B["default"].weight[1, 2] = torch.nan
    with pytest.raises(LowbitError, match="NaN or Inf"):
        lora.merge()
    assert isinstance(lora.base_layer, QuantLinear)
    assert not lora.merged


def test_a_bias_without_a_place_is_not_merged() -> None:
    with pytest.warns(UserWarning, match="has no bias"):
        lora = adapted(one_layer("NF4", bias=False), lora_bias=True)
    with pytest.raises(LowbitError, match="lora_bias=False"):
        lora.merge()


def test_dora_with_dropout_multiplies_what_was_dropped() -> None:
    lora = adapted(one_layer("W4A16_G32"), use_dora=True, lora_dropout=0.5).train()
    lora.set_adapter("default")
    x = torch.randn(64, 168)
    torch.manual_seed(3)
    y = lora(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    base = lora.quantized
    assert base.bias is not None
    q = base.dequantize().double()
    change = torch.from_numpy(oracle(lora, dropped)) - base.bias.double().detach()
    # PEFT drops inputs of the adapter's part only: y = Q x + bias + (what DoRA makes - Q) dropped.
    wanted = x.double() @ q.T + base.bias.double() + change - dropped.double() @ q.T
    torch.testing.assert_close(y.double(), wanted, atol=1e-4, rtol=1e-4)


def merge_order(model: nn.Module) -> list[str]:
    return [name for name, part in model.named_modules() if isinstance(part, QuantLoraLinear)]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    result: Tensor = model(IDS, use_cache=False).logits
    return result


def stored_bits(model: nn.Module) -> list[Tensor]:
    """Returns every stored tensor of the base, in order."""
    return [
        tensor.clone()
        for part in model.modules()
        if isinstance(part, StoredWeight) and part._names()
        for tensor in part.quantized_weight.tensors().values()
    ]


def same(ours: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, others, strict=True))


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merge_and_unload_gives_a_model_that_saves_and_loads(
    tmp_path: Path, name: str, kind: str
) -> None:
    """The adapted layers are 16-bit ones then, the others stay as they are."""
    whole = {"quantize_embeddings": True} if name == "qwen3" else {}
    model, _ = quantized(tmp_path, name, "W4A16_G32", **whole)
    targets = ["c_attn"] if name == "gpt2" else ["q_proj", "down_proj"]
    config = LoraConfig(target_modules=targets, fan_in_fan_out=name == "gpt2", r=4, **KINDS[kind])
    peft_model = get_peft_model(model, config)
    assert len(merge_order(peft_model)) == 3 * len(targets)
    randomise(peft_model)
    wanted = logits(peft_model)
    merged = peft_model.merge_and_unload()
    torch.testing.assert_close(logits(merged), wanted, atol=2e-3, rtol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not any(report.values()), report
    assert torch.equal(logits(loaded), logits(merged))
    left = sum(isinstance(part, StoredWeight) for part in loaded.modules())
    assert left == sum(isinstance(part, StoredWeight) for part in model.modules()) > 0


def test_merging_everything_leaves_a_stock_model(tmp_path: Path) -> None:
    model, _ = quantized(tmp_path)
    peft_model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    randomise(peft_model)
    merged = peft_model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    code = (
        "import sys; sys.modules['lowbit'] = None; import torch;"
        "from transformers import AutoModelForCausalLM as A;"
        f"m = A.from_pretrained({str(tmp_path / 'merged')!r});"
        "print(m(torch.arange(3, 27).view(2, 12)).logits.double().sum().item())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"},
        check=True,
    )
    assert float(run.stdout) == pytest.approx(float(logits(merged).double().sum()), rel=1e-5)


@pytest.mark.parametrize("route", ["get_peft_model", "add_adapter"])
def test_adapters_reload_bit_equal(tmp_path: Path, route: str) -> None:
    model, _ = quantized(tmp_path)
    model.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = stored_bits(model)
    config = LoraConfig(target_modules="all-linear", use_rslora=True, r=3)
    if route == "add_adapter":
        model.add_adapter(config)
    else:
        model = get_peft_model(model, config)
    randomise(model)
    assert len(merge_order(model)) == 21
    assert same(stored_bits(model), before)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if route == "add_adapter":
        again.load_adapter(str(tmp_path / "adapter"))
    else:
        again = PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert torch.equal(logits(again), wanted)
    directly = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(directly), wanted)
    assert len(merge_order(directly)) == 21
