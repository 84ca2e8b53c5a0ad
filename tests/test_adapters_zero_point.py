"""Adapters that merge into zero points: what training multiplied by is what the merge stores."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import unpack_row
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from test_adapters import IDS, adapted, logits, one_layer, quantized, same, stored_bits
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from lowbit import LowbitError
from lowbit.adapters import merged_zero_points
from lowbit.adapters.layer import QuantLoraLinear
from lowbit.adapters.zero_point import with_merged_zero_points
from lowbit.nn.stored import StoredWeight

ASYMMETRIC = ("W4A16_ASYM_G32", "W2A16_ASYM_G64", "W3A16_ASYM_G64", "W8A16_ASYM_G64",
              "W4A16_ASYM_CHANNEL", "W4A16_ASYM_G64_DQ", "W4A16_ASYM_G32_BF16")  # fmt: skip


def zero_point_layer(scheme: str, **options: Any) -> Any:
    lora = adapted(one_layer(scheme), use_qalora=True, r=2 if "CHANNEL" not in scheme else 1)
    with torch.no_grad():  # large enough to move zero points by several steps
        lora.lora_B["default"].weight.mul_(20)
    return lora


def trained_zeros(lora: Any) -> np.ndarray:
    """Returns clamp(round(z - d / s)) in float64, element by element."""
    grid = lora.quantized.quantized_weight.grid()
    a = lora.lora_A["default"].weight.detach().double().numpy()
    b = lora.lora_B["default"].weight.detach().double().numpy()
    delta = lora.scaling["default"] * b @ a
    target = grid.zeros.double().numpy() - delta / grid.scales.double().numpy()
    low = -(2 ** (grid.scheme.bits - 1))
    return np.clip(np.round(target), low, -low - 1)


@pytest.mark.parametrize("scheme", ASYMMETRIC)
def test_forward_is_that_of_rounded_zero_points(scheme: str) -> None:
    lora = zero_point_layer(scheme)
    weight = lora.quantized.quantized_weight
    grid, columns = weight.grid(), 168
    zeros = trained_zeros(lora)
    moved = zeros - grid.zeros.numpy()
    assert np.abs(moved).max() >= 1
    group = np.arange(columns) // weight.scheme.group_width(columns)
    codes = weight.codes().double().numpy()
    exact = grid.scales.double().numpy()[:, group] * (codes - zeros[:, group])
    x = torch.randn(2, 3, columns)
    bias = lora.quantized.bias.detach().double().numpy()
    wanted = x.double().numpy() @ exact.T + bias
    for prepared in (False, True):
        if prepared:
            lora.quantized.prepare()
        found = lora(x).detach().double().numpy()
        np.testing.assert_allclose(found, wanted, atol=3e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("scheme", ASYMMETRIC)
def test_the_merge_stores_exactly_these_integers(scheme: str) -> None:
    lora = zero_point_layer(scheme)
    weight = lora.quantized.quantized_weight
    a, b = lora.lora_A["default"].weight.detach(), lora.lora_B["default"].weight.detach()
    packed = merged_zero_points(weight, a, b, lora.scaling["default"])
    assert packed.dtype == torch.int32
    assert packed.shape == weight.zero_point.shape
    columns = packed.T.tolist()
    stored = np.array([unpack_row(words, weight.scheme.bits, 48) for words in columns]).T
    assert np.array_equal(stored, trained_zeros(lora))
    merged = dataclasses.replace(weight, zero_point=packed)
    assert torch.equal(merged.codes(), weight.codes())
    # Bit for bit what the model with the adapter multiplies by.
    assert torch.equal(lora.merged_weight(["default"]), merged.dequantize())
    lora.merge()
    assert torch.equal(lora.base_layer.weight, merged.dequantize())


def test_the_gradient_goes_straight_through_where_nothing_is_clamped() -> None:
    lora = zero_point_layer("W2A16_ASYM_G32")
    grid = lora.quantized.quantized_weight.grid()
    x = torch.randn(40, 168)
    output_gradient = torch.randn(40, 48)
    (lora(x) * output_gradient).sum().backward()
    a = lora.lora_A["default"].weight.detach().double()
    b = lora.lora_B["default"].weight.detach().double()
    scaling = lora.scaling["default"]
    target = grid.zeros.double() - scaling * (b @ a) / grid.scales.double()
    moves = (target >= -2.5) & (target <= 1.5)
    assert 0 < int(moves.sum()) < moves.numel()
    pooled = torch.stack([part.sum(1) for part in x.double().split(32, dim=1)], dim=1)
    of_delta = (output_gradient.double().T @ pooled) * moves
    torch.testing.assert_close(
        lora.lora_A["default"].weight.grad.double(), scaling * b.T @ of_delta, atol=1e-3, rtol=1e-4
    )
    torch.testing.assert_close(
        lora.lora_B["default"].weight.grad.double(), scaling * of_delta @ a.T, atol=1e-3, rtol=1e-4
    )


def test_a_new_adapter_changes_nothing() -> None:
    layer = one_layer("W4A16_ASYM_G32")
    x = torch.randn(5, 168)
    wanted = layer(x)
    config = LoraConfig(target_modules=["layer"], use_qalora=True)
    holder: Any = torch.nn.Module()
    holder.layer = layer
    with pytest.raises(LowbitError, match=r"rank 8 is larger than the layer .*in 6 groups"):
        get_peft_model(holder, config)
    config = LoraConfig(target_modules=["layer"], use_qalora=True, r=4, qalora_group_size=32)
    get_peft_model(holder, config)
    assert holder.layer.lora_A["default"].weight.shape == (4, 6)
    assert torch.equal(holder.layer(x), wanted)
    with torch.no_grad():
        merged = holder.layer.merged_weight(["default"])
    assert torch.equal(merged, layer.quantized_weight.dequantize())


def test_trained_saved_reloaded_and_merged_it_is_one_model(tmp_path: Path) -> None:
    """The whole way: Trainer, PEFT's file, the merged checkpoint in the same scheme."""
    model, _ = quantized(tmp_path, "llama", "W4A16_ASYM_G32")
    before = stored_bits(model)
    model.save_pretrained(tmp_path / "base")
    peft_model = get_peft_model(
        model, LoraConfig(target_modules="all-linear", use_qalora=True, r=2)
    )
    rows = [{"input_ids": row, "labels": row} for row in IDS.tolist()] * 4
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=6, learning_rate=3e-2, report_to=[],
        save_strategy="no", logging_steps=1, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(peft_model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert same(stored_bits(peft_model), before)
    wanted = logits(peft_model.eval())
    peft_model.save_pretrained(str(tmp_path / "adapter"))
    content = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert content["use_qalora"] is True
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        name = "base_model.model.model.layers.0.mlp.down_proj"
        assert file.get_slice(f"{name}.lora_A.weight").get_shape() == [2, 6]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(again), wanted)
    changed = 0
    for part in list(again.modules()):
        if isinstance(part, QuantLoraLinear):
            changed += _merge_in_place(part)
    assert changed > 0
    plain = again.unload()
    torch.testing.assert_close(logits(plain), wanted, atol=2e-3, rtol=1e-3)
    plain.save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert sum(isinstance(part, StoredWeight) for part in merged.modules()) == 21
    assert same(stored_bits(merged), stored_bits(plain))
    torch.testing.assert_close(logits(merged), wanted, atol=2e-3, rtol=1e-3)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "llama-float"), tmp_path / "adapter"
        )


def _merge_in_place(lora: QuantLoraLinear) -> int:
    """Stores merged zero points in the base; returns how many differ."""
    a, b = lora.lora_A["default"].weight.detach(), lora.lora_B["default"].weight.detach()
    before = lora.quantized.quantized_weight
    after = with_merged_zero_points(before, a, b, lora.scaling["default"])
    wanted = lora.merged_weight(["default"])
    lora.quantized.restore()
    lora.quantized._register_stored(after.tensors())
    assert torch.equal(lora.quantized.dequantize(torch.float32), wanted)
    assert before.zero_point is not None
    assert after.zero_point is not None
    return int((before.zero_point != after.zero_point).sum())


@pytest.mark.parametrize(
    ("scheme", "nearest"),
    [("W4A16_G32", "W4A16_ASYM_G32"), ("NF4_DQ", "W4A16_ASYM_G64"), ("W8A8", "W4A16_ASYM_G64"),
     ("W2A16_G64_DQ", "W2A16_ASYM_G64_DQ")],
)  # fmt: skip
def test_schemes_without_zero_points_are_refused(scheme: str, nearest: str) -> None:
    with pytest.raises(LowbitError, match=f"stores no zero points .* as {nearest},"):
        adapted(one_layer(scheme), use_qalora=True, r=2)


def test_what_does_not_fit_is_refused() -> None:
    layer = one_layer("W4A16_ASYM_G32")
    for options, sentence in (
        ({"qalora_group_size": 64}, "qalora_group_size 64 is not the group size"),
        ({"init_lora_weights": "eva"}, "goes with init_lora_weights True"),
    ):
        with pytest.raises(LowbitError, match=sentence):
            adapted(layer, use_qalora=True, r=2, **options)
    weight = layer.quantized_weight
    a, b = torch.randn(2, 6), torch.randn(48, 2)
    wrong: list[tuple[Tensor, Tensor, str]] = [
        (torch.randn(2, 168), b, r"has \[r, 6\] and \[48, r\]"),
        (a, torch.randn(48, 3), r"has \[r, 6\] and \[48, r\]"),
        (a, b * torch.nan, "NaN or Inf"),
    ]
    for wrong_a, wrong_b, sentence in wrong:
        with pytest.raises(LowbitError, match=sentence):
            merged_zero_points(weight, wrong_a, wrong_b, 1.0)
