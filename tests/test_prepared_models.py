"""Models of prepared weights: loading, saving, offloading, compiling, adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_backend import LAUNCHES, fake, kernel_names  # noqa: F401 - a fixture
from test_hf import IDS, WHOLE, load, logits
from tiny_models import build_tiny
from torch import nn

from lowbit import backends
from lowbit.hf.config import LowbitConfig
from lowbit.nn.replace import restore_modules
from lowbit.nn.stored import StoredWeight

pytestmark = pytest.mark.usefixtures("fake")


def quantized(family: str, path: Path, scheme: str = "W4A16_G32", **options: Any) -> nn.Module:
    """Returns a model that was saved quantized and loaded prepared."""
    build_tiny(family, path / "source")
    config = LowbitConfig(scheme, **WHOLE)
    load(path / "source", quantization_config=config).save_pretrained(path / "saved")
    return load(path / "saved", **options)


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.glob("*.safetensors"))}


@pytest.mark.parametrize(
    ("family", "scheme"),
    [("llama_tied", "NF4_DQ"), ("gpt2", "W3A16_ASYM_G32"), ("qwen2", "W4A16_G32")],
)
def test_models_load_prepared_and_save_the_same_bytes(
    family: str, scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantized(family, tmp_path, scheme)
    stored = [m for m in model.modules() if isinstance(m, StoredWeight)]
    # All but position embeddings, which no head multiplies by.
    assert all(m.prepare() for m in stored if m.multiplies)
    assert kernel_names(model)
    monkeypatch.setattr(backends, "BACKENDS", backends.BACKENDS[-1:])
    backends.select.cache_clear()
    reference = load(tmp_path / "saved")
    assert not kernel_names(reference)
    torch.testing.assert_close(logits(model), logits(reference))
    model.save_pretrained(tmp_path / "prepared")
    reference.save_pretrained(tmp_path / "canonical")
    assert (
        files(tmp_path / "prepared") == files(tmp_path / "canonical") == files(tmp_path / "saved")
    )


def test_restoring_and_dequantizing_a_prepared_model(tmp_path: Path) -> None:
    model = quantized("llama_tied", tmp_path)
    expected = logits(model)
    assert kernel_names(model)
    twin = copy.deepcopy(model)
    restore_modules(twin, torch.float32)
    assert not any(isinstance(m, StoredWeight) for m in twin.modules())
    torch.testing.assert_close(logits(twin), expected)
    model.dequantize()
    model.save_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits(load(tmp_path / "plain")), expected)


def test_the_footprint_counts_prepared_tensors_and_no_others(tmp_path: Path) -> None:
    model = quantized("llama", tmp_path)
    counted = model.get_memory_footprint()
    kernel = sum(b.nbytes for n, b in model.named_buffers() if "kernel_" in n)
    embedding = model.get_input_embeddings().scheme.stored_bytes((256, 64))
    plain = sum(p.nbytes for n, p in model.named_parameters() if "norm" in n)
    rotary = sum(b.nbytes for n, b in model.named_buffers() if "inv_freq" in n)
    assert counted == kernel + embedding + plain + rotary


def test_offloaded_modules_stay_canonical(tmp_path: Path) -> None:
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
                  "model.layers.2": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu",
                  "lm_head": "cpu"}  # fmt: skip
    (tmp_path / "offload").mkdir()
    model = quantized("llama", tmp_path, device_map=device_map, offload_folder=tmp_path / "offload")
    assert kernel_names(model.model.layers[0])
    assert not kernel_names(model.model.layers[1])
    torch.testing.assert_close(logits(model), logits(load(tmp_path / "saved")))


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_offloading_a_prepared_model_works(tmp_path: Path, offload_buffers: bool) -> None:
    from accelerate import cpu_offload

    model = quantized("llama", tmp_path)
    expected = logits(model)
    cpu_offload(model, torch.device("cpu"), offload_buffers=offload_buffers)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("family", ["llama_tied", "gpt2"])
def test_prepared_models_compile_as_one_graph(family: str, tmp_path: Path) -> None:
    model = quantized(family, tmp_path)
    with torch.no_grad():
        eager = model(IDS, use_cache=False).logits
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, eager)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_adapters_train_on_a_prepared_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = quantized("llama", tmp_path, "NF4_DQ")
    expected = logits(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"]))
    assert torch.equal(logits(adapted), expected)
    adapted.train()
    LAUNCHES.clear()
    adapted(IDS, labels=IDS, use_cache=False).loss.backward()
    # Two adapters a block, and nothing below the first one needs a gradient.
    assert LAUNCHES["grad_input"]
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    assert any(p.grad.abs().sum() > 0 for p in trained)
    adapted.eval()
    assert torch.equal(logits(adapted), expected)
    base = adapted.unload()
    assert torch.equal(logits(base), expected)
