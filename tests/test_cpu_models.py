"""Whole models on the native CPU kernels, beside the same models with decoded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lowbit_kernels.cpu.library import unavailable_reason
from test_hf import IDS, WHOLE, load, logits, tensors
from tiny_models import TINY, build_tiny

from lowbit import prepare_model
from lowbit.hf.config import LowbitConfig
from lowbit.nn.replace import restore_modules
from lowbit.nn.stored import StoredWeight

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason="no native kernels")


def few_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS[:1, :4], use_cache=False).logits
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", TINY)
def test_every_family_gives_the_logits_of_its_decoded_weights(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = build_tiny(family, tmp_path / "source")
    del source
    config = LowbitConfig("W4A16_G32", **WHOLE)
    load(tmp_path / "source", quantization_config=config).save_pretrained(tmp_path / "saved")
    model = load(tmp_path / "saved", dtype=dtype)
    stored = [module for module in model.modules() if isinstance(module, StoredWeight)]
    assert all(module.operand.backend == "cpu" for module in stored if module.multiplies)
    found, few = logits(model), few_logits(model)
    model.save_pretrained(tmp_path / "again")
    before, after = tensors(tmp_path / "saved"), tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if tensor.dtype in (torch.int32, torch.uint8):
            assert torch.equal(after[name], tensor)
    restore_modules(model, dtype)
    expected = logits(model)
    limit = 2e-3 if dtype == torch.float32 else 3e-2
    assert float((found - expected).norm() / expected.norm()) < limit
    # A few tokens never decode the weight first, on any instruction set: equal logits would mean
    # that no kernel ran.
    assert not torch.equal(few, few_logits(model))


def test_generating_with_int8_activations(tmp_path: Path) -> None:
    build_tiny("llama", tmp_path / "source")
    model = load(tmp_path / "source", quantization_config=LowbitConfig("W4A16_G32"))
    exact = logits(model)
    prepare_model(model, activations="int8")
    rounded = logits(model)
    assert 0 < float((rounded - exact).norm() / exact.norm()) < 5e-2
    assert model.generate(IDS[:1], max_new_tokens=4, do_sample=False).shape == (1, 16)
