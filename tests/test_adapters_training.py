"""Training through packed weights: gradients, memory, checkpointing, and the trainers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from test_adapters import IDS, KINDS, adapted, one_layer, quantized, randomise, same, stored_bits
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from lowbit.adapters.layer import QuantLoraLinear
from lowbit.nn.replace import restore_modules
from lowbit.nn.stored import StoredWeight


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("scheme", ["NF4_DQ", "W4A16_ASYM_G32", "W2A16_G64"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_on_the_decoded_model(tmp_path: Path, scheme: str, kind: str) -> None:
    """PEFT's own layers on the decoded weights are the reference, in float64."""
    found = []
    for decoded in (True, False):
        model, _ = quantized(tmp_path, "qwen2", scheme)
        if decoded:
            restore_modules(model, torch.float32)
        options = dict(KINDS[kind])
        targets = ["q_proj", "k_proj"] if kind == "bias" else "all-linear"
        torch.manual_seed(1)
        peft_model = get_peft_model(model, LoraConfig(target_modules=targets, r=4, **options))
        torch.manual_seed(2)
        randomise(peft_model)
        if decoded:
            peft_model.double()
        loss = peft_model(IDS, labels=IDS).loss
        loss.backward()
        found.append((loss.detach().double(), gradients(peft_model)))
    (wanted, references), (ours, grads) = found
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
    assert grads.keys() == references.keys()
    for name, reference in references.items():
        scale = float(reference.abs().max())
        error = float((grads[name].double() - reference).abs().max())
        assert error <= 2e-3 * scale + 1e-8, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["lora", "dora", "zero points"])
@pytest.mark.parametrize("prepared", [False, True])
def test_nothing_of_the_size_of_the_weight_lives_until_the_backward_pass(
    dtype: torch.dtype, kind: str, prepared: bool
) -> None:
    options = {"use_qalora": True} if kind == "zero points" else KINDS[kind]
    rows, columns = 160, 168
    lora = adapted(one_layer("W4A16_ASYM_G32", (rows, columns)), lora_dropout=0.3, **options)
    lora.quantized.to(dtype)
    if prepared:
        lora.quantized.prepare()
    lora.train()
    saved: list[Tensor] = []
    x = torch.randn(3, columns, dtype=dtype, requires_grad=True)
    stored = {t.data_ptr() for t in [*lora.quantized.parameters(), *lora.quantized.buffers()]}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in stored:
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = lora(x)
    assert y.dtype == dtype
    assert max(t.numel() for t in saved) < rows * columns / 4
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    trained = {n for n, p in lora.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)
    for name in trained:
        gradient = lora.get_parameter(name).grad
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_16_bit_activations_are_not_kept_a_second_time_in_fp32(kind: str) -> None:
    lora = adapted(one_layer("NF4_DQ"), **KINDS[kind])
    lora.quantized.to(torch.bfloat16)
    x = torch.randn(200, 168, dtype=torch.bfloat16, requires_grad=True)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lora(x).sum().backward()
    assert not [t.shape for t in saved if t.dtype == torch.float32 and t.numel() >= 200 * 48]
    assert any(t.data_ptr() == x.data_ptr() for t in saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(
    tmp_path: Path, dtype: torch.dtype, reentrant: bool
) -> None:
    model, _ = quantized(tmp_path, dtype=dtype)
    before = stored_bits(model)
    peft_model = get_peft_model(model, LoraConfig(target_modules="all-linear", use_dora=True))
    randomise(peft_model)
    peft_model.train()
    peft_model(IDS, labels=IDS).loss.backward()
    wanted = gradients(peft_model)
    peft_model.zero_grad()
    peft_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    peft_model.enable_input_require_grads()
    peft_model(IDS, labels=IDS).loss.backward()
    found = gradients(peft_model)
    assert wanted.keys() == found.keys()
    assert len(wanted) == 63  # A, B and magnitude of 21 layers
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[name], gradient, atol=0, rtol=0)
    assert same(stored_bits(peft_model), before)


@pytest.mark.parametrize("kind", [*KINDS, "zero points"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_compiles_as_one_graph(kind: str, dtype: torch.dtype) -> None:
    options = {"use_qalora": True} if kind == "zero points" else KINDS[kind]
    lora = adapted(one_layer("W4A16_ASYM_G32"), **options)
    lora.quantized.to(dtype).prepare()
    x = torch.randn(3, 168, dtype=dtype)
    wanted = lora(x)
    torch._dynamo.reset()
    compiled = torch.compile(lora, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), wanted)


def test_preparing_for_training_in_low_bits_leaves_every_scale(tmp_path: Path) -> None:
    model, _ = quantized(tmp_path, "qwen3", "W4A16_G32", dtype=torch.bfloat16)
    before = stored_bits(model)
    prepared = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
    assert prepared.is_gradient_checkpointing
    assert same(stored_bits(prepared), before)
    assert {p.dtype for p in prepared.parameters() if p.is_floating_point()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in prepared.parameters())
    peft_model = get_peft_model(prepared, LoraConfig(target_modules="all-linear")).train()
    peft_model(IDS, labels=IDS).loss.backward()
    assert len(gradients(peft_model)) == 42
    assert peft_model.num_parameters() > 0


def arguments(tmp_path: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path / "run"), "max_steps": 3, "per_device_train_batch_size": 2,
        "learning_rate": 1e-2, "report_to": [], "logging_steps": 1, "use_cpu": True,
        "save_strategy": "no", "disable_tqdm": True, **options,
    }  # fmt: skip


ROWS = [{"input_ids": row, "labels": row} for row in IDS.tolist()] * 4


@pytest.mark.parametrize("route", ["get_peft_model", "add_adapter"])
def test_trainer_takes_the_model(tmp_path: Path, route: str) -> None:
    model, _ = quantized(tmp_path, dtype=torch.bfloat16)
    before = stored_bits(model)
    config = LoraConfig(target_modules="all-linear")
    if route == "add_adapter":
        model.add_adapter(config)
    else:
        model = get_peft_model(model, config)
    options = arguments(tmp_path, bf16=True, gradient_checkpointing=True, weight_decay=0.1)
    trainer = Trainer(model, TrainingArguments(**options), train_dataset=ROWS)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert same(stored_bits(model), before)
    trainer.save_model(str(tmp_path / "saved"))
    files = {file.name for file in (tmp_path / "saved").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="no trl")
def test_sft_trainer_takes_the_model(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    books = Path(__file__).parent / "assets" / "books-4m"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(books)
    model, _ = quantized(tmp_path, dtype=torch.bfloat16)
    before = stored_bits(model)
    trainer = SFTTrainer(
        model,
        SFTConfig(**arguments(tmp_path, max_length=16, bf16=True)),
        train_dataset=Dataset.from_list([{"input_ids": row["input_ids"]} for row in ROWS]),
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules="all-linear"),
    )
    assert sum(isinstance(part, QuantLoraLinear) for part in trainer.model.modules()) == 21
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert same(stored_bits(trainer.model), before)
    assert any(isinstance(part, StoredWeight) for part in trainer.model.modules())
