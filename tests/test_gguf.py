"""GGUF files read: models, conversions, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import write_model
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.errors import LowbitError
from lowbit.nn import QuantEmbedding, QuantLinear

RNG = np.random.default_rng()
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "vocab_size": 64,
    "num_hidden_layers": 1,
    "head_dim": 64,
}
NARROW = {"intermediate_size": 160, "head_dim": 16}
# The gate has tests of its own.
QUIET: Any = {"progress": False, "verify": False}
IDS = torch.from_numpy(RNG.integers(3, 64, (2, 24)))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits.float()


def require_equal(model: torch.nn.Module, reference: torch.nn.Module) -> None:
    """Compares every weight bit for bit, and the logits."""
    weights = dict(reference.named_parameters())
    found = {
        f"{name}.weight": module.dequantize()
        for name, module in model.named_modules()
        if isinstance(module, (QuantLinear, QuantEmbedding))
    }
    assert found.keys() or not any("Quant" in type(module).__name__ for module in model.modules())
    found |= {name: parameter for name, parameter in model.named_parameters() if name in weights}
    tied = {"lm_head.weight"} if "lm_head.weight" not in weights else set()
    assert found.keys() - tied == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(found[name].float(), weight), name
    expected = logits(reference)
    torch.testing.assert_close(
        logits(model) / expected.std(), expected / expected.std(), rtol=0, atol=2e-3
    )


@pytest.mark.parametrize("family", ["llama", "llama_tied", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_a_file_runs_on_our_kernels(tmp_path: Path, family: str, kind: str) -> None:
    changes = {"sliding_window": None} if family == "mistral" else {}
    reference = write_model(tmp_path / "x.gguf", family, kind, RNG, **NARROW, **changes)
    model = lowbit.load(tmp_path / "x.gguf", dtype=torch.float32)
    assert "QuantLinear" in {type(module).__name__ for module in model.modules()}
    require_equal(model, reference)


@pytest.mark.filterwarnings("ignore:.*decoded to bf16")
@pytest.mark.parametrize(
    "kinds", [["Q4_K", "Q6_K"], ["Q2_K", "Q3_K", "Q5_K"], ["Q4_1", "Q5_0"], ["IQ4_NL"]]
)
def test_what_no_scheme_has_is_decoded(tmp_path: Path, kinds: list[str]) -> None:
    reference = write_model(tmp_path / "x.gguf", "llama", kinds, RNG, **WIDE)
    model = lowbit.load(tmp_path / "x.gguf", dtype=torch.float32)
    require_equal(model, reference)


def test_a_file_of_nothing_but_decoded_types_loads_and_converts_to_bf16(tmp_path: Path) -> None:
    reference = write_model(tmp_path / "x.gguf", "qwen2", "Q4_K", RNG, **WIDE)
    with pytest.warns(UserWarning, match="decoded to bf16 .* of Q4_K"):
        model = lowbit.load(tmp_path / "x.gguf", dtype=torch.float32)
    require_equal(model, reference)
    with pytest.warns(UserWarning, match="decoded to bf16"):
        lowbit.convert(tmp_path / "x.gguf", tmp_path / "out", "bf16", **QUIET)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(stock), logits(reference))
    with pytest.raises(LowbitError, match="--to bf16 decodes it"):
        lowbit.convert(tmp_path / "x.gguf", tmp_path / "no", "lowbit", **QUIET)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("to", ["lowbit", "compressed-tensors", "gptq_v2"])
@pytest.mark.filterwarnings("ignore:the model is bfloat16")
def test_a_file_becomes_another_format_with_equal_values(tmp_path: Path, to: str) -> None:
    reference = write_model(tmp_path / "x.gguf", "llama", "Q4_0", RNG, **NARROW)
    options = {} if to == "lowbit" else {"requantize": True}  # the embedding is decoded
    result = lowbit.convert(tmp_path / "x.gguf", tmp_path / "out", to, **QUIET, **options)
    rounded = set(result.manifest["summary"]["rounded"])
    assert rounded == (set() if to == "lowbit" else {"model.embed_tokens"})
    if to != "lowbit":
        embedding = reference.model.embed_tokens.weight
        embedding.data = embedding.data.bfloat16().float()
    model = lowbit.load(tmp_path / "out", dtype=torch.float32)
    require_equal(model, reference)
