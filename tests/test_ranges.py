"""Scales of activations: the histogram, the search, and what a run stores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import build_tiny
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.calibration import capture
from lowbit.calibration.ranges import InputRange
from lowbit.checkpoint.journal import Journal
from lowbit.errors import LowbitError
from lowbit.hf.config import LowbitConfig
from lowbit.nn.linear import QuantLinear

RUN = {"samples": 6, "seqlen": 48, "progress": False}
STATIC = "W8A8_STATIC"


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    ids = torch.randint(1, 255, (8, 48), generator=torch.Generator().manual_seed(3))
    file = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file({"input_ids": ids.to(torch.int32)}, file)
    return str(file)


def scale_of(*parts: torch.Tensor) -> float:
    inputs = InputRange()
    for part in parts:
        inputs.add(part)
    scale = inputs.scale()
    assert scale.dtype == torch.float32
    assert scale.shape == (1,)
    return float(scale)


def squared_error(x: torch.Tensor, scale: float) -> float:
    """Returns the squared rounding error of x, float64, value by value."""
    values = x.double().numpy().ravel()
    return float(((values - np.clip(np.rint(values / scale), -127, 127) * scale) ** 2).sum())


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**31),
)
def test_order_and_batches_do_not_matter(sizes: list[int], dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(sum(sizes), generator=generator) * 10).exp().clamp(max=6e4).to(dtype)
    whole = scale_of(x)
    assert scale_of(*x.split(sizes)) == whole
    assert scale_of(*x.flip(0).split(sizes), torch.zeros(3)) == whole


@pytest.mark.parametrize("degrees", [None, 8, 4, 3])
def test_scale_is_that_of_least_squared_error(degrees: int | None) -> None:
    torch.manual_seed(0)
    x = torch.randn(1 << 15)
    if degrees is not None:
        x = torch.distributions.StudentT(degrees).sample((1 << 15,))
    largest = float(x.abs().max())
    tried = [largest / 127 * clip / 200 for clip in range(1, 201)]
    best = min(squared_error(x, scale) for scale in tried)
    assert squared_error(x, scale_of(x)) <= 1.01 * best
    if degrees == 3:  # heavy tails: saturating them is worth something
        assert squared_error(x, scale_of(x)) < 0.9 * squared_error(x, largest / 127)


def test_even_magnitudes_are_not_clipped() -> None:
    x = torch.linspace(-5, 5, 50001)
    assert scale_of(x) == pytest.approx(5 / 127, rel=0.02)


def test_what_is_not_finite_is_left_out() -> None:
    x = torch.linspace(-1, 1, 1000)
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf])
    assert scale_of(x, bad, torch.cat([bad, x])) == scale_of(x, x)
    assert scale_of(torch.zeros(4), bad) == 1.0


@pytest.mark.parametrize("value", [1e-45, 1e-38, 3e38])
def test_extreme_magnitudes_have_a_scale(value: float) -> None:
    scale = scale_of(torch.full((8,), value))
    assert torch.finfo(torch.float32).tiny <= scale < float("inf")


def quantized(path: Path, token_file: str, **options: object) -> dict[str, torch.Tensor]:
    settings: dict[str, object] = {"scheme": STATIC, "calibration": token_file, **RUN, **options}
    if not (path / "model").exists():
        build_tiny("llama", path / "model", torch.bfloat16)
    lowbit.quantize(path / "model", path / "out", **settings)  # type: ignore[arg-type]
    files = sorted((path / "out").glob("*.safetensors"))
    return {k: v for file in files for k, v in load_file(file).items()}


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_a_run_stores_the_scale_of_what_layers_saw(
    algorithm: str, tmp_path: Path, token_file: str
) -> None:
    tensors = quantized(tmp_path, token_file, algorithm=algorithm)
    # The first layer sees what the 16-bit model gives it; those after it see quantized outputs.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    inputs = InputRange()
    first = model.model.layers[0].self_attn.q_proj
    first.register_forward_pre_hook(lambda _, args: inputs.add(args[0]))
    ids = lowbit.calibration.tokens.load_calibration(token_file, None, 256, 6, 48, 0).ids
    with torch.no_grad():
        model(ids)
    block = "model.layers.0.self_attn"
    for name in ("q_proj", "k_proj", "v_proj"):
        assert torch.equal(tensors[f"{block}.{name}.input_scale"], inputs.scale())
    manifest = json.loads((tmp_path / "out" / "lowbit_manifest.json").read_text())
    report = manifest["parts"]["model.layers.0"]["modules"][f"{block}.q_proj"]
    assert report["input_scale"] == float(inputs.scale())

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    held = {n: m for n, m in loaded.named_modules() if isinstance(m, QuantLinear)}
    assert len(held) == 21
    for name, module in held.items():
        held_scale = module.quantized_weight.input_scale
        assert held_scale is not None
        assert torch.equal(held_scale, tensors[f"{name}.input_scale"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_survive_loading_and_saving(
    dtype: torch.dtype, tmp_path: Path, token_file: str
) -> None:
    tensors = quantized(tmp_path, token_file, algorithm="rtn")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    scales = [name for name in tensors if name.endswith("_scale")]
    assert len(scales) == 2 * 21
    for name in scales:
        assert again[name].dtype == tensors[name].dtype
        assert torch.equal(again[name], tensors[name])


@pytest.mark.parametrize("parts", range(5))
def test_resume_is_bit_identical(
    parts: int, tmp_path: Path, token_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quantized(tmp_path, token_file)
    (tmp_path / "out").rename(tmp_path / "whole")
    finish = Journal.finish_part

    def stop(journal: Journal, *arguments: object) -> None:
        if len(journal.parts) == parts:
            raise KeyboardInterrupt
        finish(journal, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finish_part", stop)
        with pytest.raises(KeyboardInterrupt):
            quantized(tmp_path, token_file)
    again = quantized(tmp_path, token_file, resume=True)
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_static_scales_without_data_are_refused(tmp_path: Path) -> None:
    build_tiny("llama", tmp_path / "model")
    with pytest.raises(LowbitError, match="needs calibration data; give a text"):
        lowbit.quantize(tmp_path / "model", tmp_path / "out", scheme=STATIC, algorithm="rtn")
    with pytest.raises(LowbitError, match="needs calibration data; give a text"):
        lowbit.quantize(
            tmp_path / "model", tmp_path / "out", dynamic={"down_proj": STATIC}, algorithm="rtn"
        )
    config = LowbitConfig(STATIC)
    with pytest.raises(LowbitError, match="cannot be had while loading"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=config)
    assert not (tmp_path / "out").exists()


def test_a_layer_that_calibration_does_not_reach_is_refused(
    tmp_path: Path, token_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_but_last(*arguments: Any) -> list[list[str]]:
        return capture.input_groups(*arguments)[:-1]

    monkeypatch.setattr("lowbit.pipeline.run.input_groups", all_but_last)
    with pytest.raises(LowbitError, match=r"down_proj: calibration never reached .* such as W8A8"):
        quantized(tmp_path, token_file)


def test_dynamic_scales_need_no_data(tmp_path: Path) -> None:
    model = build_tiny("llama", tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=LowbitConfig("W8A8", quantize_lm_head=True)
    )
    ids = torch.arange(1, 33)[None]
    with torch.no_grad():
        error = (loaded(ids).logits - model(ids).logits).square().mean().sqrt()
        assert 0 < error < 0.05 * model(ids).logits.std()


def test_embeddings_have_no_activations(tmp_path: Path, token_file: str) -> None:
    build_tiny("llama_tied", tmp_path / "model")
    options = {"quantize_embeddings": True, "quantize_lm_head": True}
    with pytest.raises(LowbitError, match=r"model.embed_tokens: W8A8_STATIC .* W8A16_CHANNEL"):
        quantized(tmp_path, token_file, **options)
    tensors = quantized(tmp_path, token_file, dynamic={"embed_tokens": "W8A16_CHANNEL"}, **options)
    assert "model.embed_tokens.input_scale" not in tensors
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("damage", [0.0, -1.0, float("nan"), float("inf")])
def test_a_damaged_scale_is_refused(damage: float, tmp_path: Path, token_file: str) -> None:
    quantized(tmp_path, token_file, algorithm="rtn")
    file = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("input_scale"))
    save_file({**tensors, name: torch.tensor([damage])}, file, {"format": "pt"})
    with pytest.raises(LowbitError, match=f"{name}' holds NaN, Inf or a zero"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
