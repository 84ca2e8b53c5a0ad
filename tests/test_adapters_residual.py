"""Adapters that begin with what quantization lost, against float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_adapters import IDS, logits, quantized, same, stored_bits
from tiny_models import build_tiny, make_tiny
from transformers import AutoModelForCausalLM

import lowbit
from lowbit import LowbitError
from lowbit.adapters import init_residual
from lowbit.adapters.layer import QuantLoraLinear
from lowbit.adapters.low_rank import best_low_rank, hessian_factor, top_singular
from lowbit.algorithms.gptq import damping
from lowbit.pipeline.stored_statistics import StoredStatistics

EVERY = ("NF4_DQ", "FP4", "W2A16_G64", "W3A16_G32", "W4A16_ASYM_G64", "W8A16_CHANNEL", "W8A8")


def layers(model: Any) -> dict[str, QuantLoraLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantLoraLinear)}


def optimum(error: np.ndarray, hessian: np.ndarray | None, rank: int) -> float:
    """Returns the smallest ||(E - X) H^1/2|| over X of rank `rank`, in float64."""
    root = np.eye(error.shape[1])
    if hessian is not None:
        values, vectors = np.linalg.eigh(hessian)
        root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    singular = np.linalg.svd(error @ root, compute_uv=False)
    return float(np.sqrt((singular[rank:] ** 2).sum()))


@pytest.mark.parametrize("weighted", [False, True])
def test_no_matrix_of_that_rank_is_closer(weighted: bool) -> None:
    error = torch.randn(48, 168)
    x = torch.randn(400, 168) * torch.logspace(-1, 1, 168)
    hessian = (x.T @ x / 400) if weighted else None
    factor = None if hessian is None else hessian_factor(hessian, 0.01)
    damped = None
    if hessian is not None:
        damped = hessian.double().numpy() + 0.01 * float(hessian.diagonal().mean()) * np.eye(168)
    b, a = best_low_rank(error, 5, factor)
    left = (error - b @ a).double().numpy()
    root = np.eye(168) if damped is None else np.linalg.cholesky(damped)
    assert np.linalg.norm(left @ root) <= 1.00001 * optimum(error.double().numpy(), damped, 5)
    torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1))


def test_large_matrices_get_nearly_the_best() -> None:
    """Noise has the flattest spectrum there is, and so the hardest one."""
    matrix = torch.randn(1100, 1200)
    u, s, vh = top_singular(matrix, 8)
    exact = torch.linalg.svdvals(matrix)[:8]
    assert float(s.square().sum()) > 0.985 * float(exact.square().sum())
    again = top_singular(matrix, 8)
    assert torch.equal(u, again[0])
    assert torch.equal(vh, again[2])


@pytest.mark.parametrize("scheme", EVERY)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_scheme_gets_the_best_approximation(tmp_path: Path, scheme: str, name: str) -> None:
    model, folder = quantized(tmp_path, name, scheme)
    before = stored_bits(model)
    config = LoraConfig(target_modules="all-linear", r=6, lora_alpha=20, use_rslora=True)
    peft_model = get_peft_model(model, config)
    reports = init_residual(peft_model, folder)
    assert same(stored_bits(peft_model), before)
    float_model = make_tiny(name)
    adapted = layers(peft_model.get_base_model())
    assert [report.name for report in reports] == list(adapted)
    for report in reports:
        layer = adapted[report.name]
        weight = float_model.get_submodule(report.name).weight.detach().double().numpy()
        weight = weight.T if name == "gpt2" else weight
        error = weight - layer.quantized.quantized_weight.dequantize().double().numpy()
        left = error - layer.delta("default").detach().double().numpy()
        size = np.linalg.norm(weight)
        assert report.before == pytest.approx(np.linalg.norm(error) / size, rel=1e-4)
        assert np.linalg.norm(left) / size == pytest.approx(report.after, rel=1e-3)
        assert np.linalg.norm(left) == pytest.approx(optimum(error, None, 6), rel=1e-3)
        assert report.after < report.before


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Returns the folders of a model and of its statistics."""
    from lowbit.pipeline import calibrate

    folder = tmp_path_factory.mktemp("measured")
    build_tiny("llama", folder / "model")
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(3, 256, (32, 32)))
    calibrate(
        folder / "model", folder / "stats", calibration=folder / "tokens.npy", samples=32, seqlen=32
    )
    return folder / "model", folder / "stats"


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_statistics_weigh_the_error(measured: tuple[Path, Path], kind: str) -> None:
    folder, stats = measured
    config = lowbit.LowbitConfig("W2A16_G32")
    found = []
    for statistics in (None, stats):
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
        options = LoraConfig(target_modules="all-linear", r=4, use_dora=kind == "dora")
        peft_model = get_peft_model(model, options)
        reports = init_residual(peft_model, folder, statistics=statistics)
        found.append((layers(peft_model.get_base_model()), reports))
    stored = StoredStatistics.open(stats)
    float_model = make_tiny("llama")
    part = stored.manifest["parts"]
    for part_name in part:
        names = [name for name in found[0][0] if name.startswith(f"{part_name}.")]
        for members, one in stored.groups(part_name, names, torch.device("cpu")):
            assert one is not None
            hessian = one.hessian.double().numpy()
            damp = damping(0.01, one) * hessian.diagonal().mean()
            hessian = hessian + damp * np.eye(len(hessian))
            for name in members:
                weight = float_model.get_submodule(name).weight.detach().double().numpy()
                losses = []
                for adapted, _ in found:
                    sums = adapted[name].merged_weight(["default"]).double().numpy()
                    error = weight - sums
                    losses.append(np.sqrt(np.einsum("nk,kl,nl->", error, hessian, error)))
                q = found[0][0][name].quantized.quantized_weight.dequantize().double().numpy()
                assert losses[1] == pytest.approx(optimum(weight - q, hessian, 4), rel=2e-3)
                assert losses[1] < losses[0]


def test_the_model_comes_nearer_to_the_16_bit_one(tmp_path: Path) -> None:
    wanted = logits(make_tiny("llama"))
    model, folder = quantized(tmp_path, "llama", "W2A16_G64")
    before = float((logits(model) - wanted).norm())
    model.add_adapter(LoraConfig(target_modules="all-linear", r=32))
    init_residual(model, folder)
    assert float((logits(model) - wanted).norm()) < 0.7 * before


@pytest.mark.parametrize("with_statistics", [False, True])
def test_alternating_writes_the_base_that_the_adapter_belongs_to(
    measured: tuple[Path, Path], tmp_path: Path, with_statistics: bool
) -> None:
    folder, stats = measured
    statistics = stats if with_statistics else None
    config = lowbit.LowbitConfig("W2A16_G32")
    reports = []
    for iterations in (1, 4):
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
        peft_model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=8))
        output = {} if iterations == 1 else {"base_output": tmp_path / "base"}
        reports.append(
            init_residual(peft_model, folder, "default", statistics, iterations, **output)
        )
    for once, often in zip(*reports, strict=True):
        assert often.after <= once.after
    assert sum(r.after for r in reports[1]) < 0.95 * sum(r.after for r in reports[0])
    wanted = logits(peft_model)
    peft_model.save_pretrained(str(tmp_path / "adapter"))
    content = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == str(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), wanted)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(again), wanted)


def test_where_nothing_was_lost_the_adapter_can_still_learn(tmp_path: Path) -> None:
    model, _folder = quantized(tmp_path, "llama", "W8A16_G32")
    model.dequantize()
    model.save_pretrained(tmp_path / "exact")
    config = lowbit.LowbitConfig("W8A16_G32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exact", quantization_config=config)
    peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=4))
    init_residual(peft_model, tmp_path / "exact")
    peft_model(IDS, labels=IDS).loss.backward()
    for layer in layers(peft_model).values():
        weight_a, weight_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        gradients = [weight_a.grad, weight_b.grad]
        assert any(bool((gradient != 0).any()) for gradient in gradients if gradient is not None)


def test_what_does_not_belong_together_is_refused(
    measured: tuple[Path, Path], tmp_path: Path
) -> None:
    model, folder = quantized(tmp_path)
    plain = model
    with pytest.raises(LowbitError, match="no low-bit layer has an adapter 'default'"):
        init_residual(plain, folder)
    peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"]))
    weights = [p.clone() for p in peft_model.parameters()]
    other = make_tiny("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn_like(parameter))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(LowbitError, match="differs from the base's by more than itself"):
        init_residual(peft_model, tmp_path / "other")
    build_tiny("gpt2", tmp_path / "gpt2")
    with pytest.raises(LowbitError, match="the 16-bit model that the base was quantized from"):
        init_residual(peft_model, tmp_path / "gpt2")
    with pytest.raises(LowbitError, match="must then be written"):
        init_residual(peft_model, folder, iterations=2)
    with pytest.raises(LowbitError, match="was measured on another model"):
        init_residual(peft_model, tmp_path / "other", statistics=measured[1])
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    with pytest.raises(LowbitError, match="not empty"):
        init_residual(peft_model, folder, iterations=2, base_output=tmp_path / "used")
    peft_model.config.quantization_config.recipe = {"fold": {"name": "awq"}}
    with pytest.raises(LowbitError, match=r"folded \(awq\)"):
        init_residual(peft_model, folder)
    assert all(torch.equal(a, b) for a, b in zip(peft_model.parameters(), weights, strict=True))
