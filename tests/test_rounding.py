"""Block tuning: gradients against autograd in float64, and what it never does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from schemes import every_scheme
from tiny_models import TINY, build_tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import lowbit
from lowbit.algorithms import GPTQ, RTN
from lowbit.algorithms.base import Quantized
from lowbit.quant import Grid, QuantizedWeight
from lowbit.recipe import Recipe
from lowbit.scheme import Scheme
from lowbit.tuning.rounding import BlockTuning
from lowbit.tuning.trainable import TrainableWeight
from lowbit.tuning.view import BlockView

N, K = 24, 80  # two or more groups, the last one short


def matrix(seed: int = 0) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * 0.1


def trainable(scheme: Scheme, weight: Tensor, search: bool = True) -> TrainableWeight:
    module = nn.Linear(K, N, bias=False)
    return TrainableWeight(module, weight, RTN(search).quantize(weight, scheme, None))


def same(ours: Quantized, other: Quantized) -> bool:
    packed = [QuantizedWeight.from_codes(q.codes, q.grid).tensors() for q in (ours, other)]
    return all(torch.equal(packed[0][key], packed[1][key]) for key in packed[0])


@every_scheme
def test_the_start_is_exactly_what_the_algorithm_chose(scheme: Scheme) -> None:
    weight = matrix()
    chosen = RTN().quantize(weight, scheme, None)
    # Codes that feedback moved far from their weights stay what they are, too.
    shuffled = Quantized(chosen.codes.flip(1), chosen.grid)
    for start in (chosen, shuffled):
        module = nn.Linear(K, N, bias=False)
        ours = TrainableWeight(module, weight, start)
        ours.put()
        assert torch.equal(module.weight, start.grid.dequantize(start.codes))
        assert same(ours.result(), start)


@every_scheme
def test_what_is_computed_with_is_what_is_stored(scheme: Scheme) -> None:
    ours = trainable(scheme, matrix())
    generator = torch.Generator().manual_seed(1)
    ours.positions += torch.randn(N, K, generator=generator)
    ours.factors *= 1 + 0.2 * torch.rand(ours.factors.shape, generator=generator)
    if ours.zeros is not None:
        ours.zeros += torch.randn(ours.zeros.shape, generator=generator)
    ours.put()
    result = ours.result()
    stored = QuantizedWeight.from_codes(result.codes, result.grid).tensors()
    read = QuantizedWeight.from_tensors(scheme, (N, K), stored)
    assert torch.equal(ours.parameter, read.dequantize(torch.float32))
    assert not torch.equal(result.codes, ours.start.codes)


def oracle_gradients(ours: TrainableWeight, scheme: Scheme, upstream: Tensor) -> dict[str, Tensor]:
    """Autograd in float64 through w = s f (l(t) - z), each rounding passed straight through."""

    def straight(rounded: Tensor, exact: Tensor) -> Tensor:
        return exact + (rounded - exact).detach()

    group = torch.arange(K) // scheme.group_width(K)
    t, f = ours.positions.double().requires_grad_(), ours.factors.double().requires_grad_()
    trained = {"positions": t, "factors": f}
    if scheme.levels is None:
        levels = straight(t.round(), t) + scheme.code_min
    else:
        # Piecewise linear through the midpoints of neighbours has the slope of the mean gap.
        table = sorted({float(level) for level in scheme.levels})
        rank = t.detach().round().long()
        slope = torch.tensor(
            [
                (table[min(i + 1, len(table) - 1)] - table[i]) / 2
                + (table[i] - table[max(i - 1, 0)]) / 2
                for i in range(len(table))
            ],
            dtype=torch.float64,
        )
        # At the ends there is one neighbour only.
        slope[0], slope[-1] = table[1] - table[0], table[-1] - table[-2]
        value = torch.tensor(table, dtype=torch.float64)[rank]
        levels = value + (t - t.detach()) * slope[rank]
    scales = ours.grid.scales.double() * f
    if ours.zeros is not None:
        z = trained["zeros"] = ours.zeros.double().requires_grad_()
        levels = levels - straight(z.round(), z)[:, group]
    (levels * scales[:, group] * upstream.double()).sum().backward()
    return {name: tensor.grad for name, tensor in trained.items() if tensor.grad is not None}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["W2A16_G64", "W4A16_ASYM_G32", "W4A16_G64_DQ", "NF4", "FP4_DQ"])
def test_gradients_are_those_of_autograd(name: str, transposed: bool) -> None:
    scheme, weight = Scheme.parse(name), matrix()
    module = Conv1D(N, K) if transposed else nn.Linear(K, N, bias=False)
    ours = TrainableWeight(module, weight, RTN().quantize(weight, scheme, None))
    ours.put()
    upstream = matrix(5)
    (ours.parameter * (upstream.T if transposed else upstream)).sum().backward()
    ours.take_gradient()
    for key, expected in oracle_gradients(ours, scheme, upstream).items():
        found = ours.trained()[key].grad
        assert found is not None
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6, msg=key)
    assert ours.parameter.grad is None


def test_positions_beyond_the_last_level_only_come_back() -> None:
    ours = trainable(Scheme.parse("W2A16_G64"), matrix())
    ours.positions[0], ours.positions[1] = -0.9, 3.9
    ours.put()
    for sign, stuck in ((1.0, 0), (-1.0, 1)):
        # A step goes against the gradient: a positive one pushes down.
        direction = sign * ours.grid.per_column(ours.grid.scales).sign()
        (ours.parameter * direction).sum().backward()
        ours.take_gradient()
        assert ours.positions.grad is not None
        assert (ours.positions.grad[stuck] == 0).all()
        assert (ours.positions.grad[1 - stuck] * sign > 0).all()


def view_of_one_layer(scheme: Scheme, batches: int = 8) -> tuple[BlockView, dict[str, Tensor]]:
    """A block of one linear layer, so that its tuning is least squares."""
    generator = torch.Generator().manual_seed(2)
    block = nn.Sequential(nn.Linear(K, N, bias=False))
    mixing = torch.randn(K, K, generator=generator) / K**0.5
    inputs = [torch.randn(2, 40, K, generator=generator) @ mixing for _ in range(batches)]
    weight = matrix()
    targets = [x @ weight.T for x in inputs]
    view = BlockView(
        "block", block, {"block.0": scheme}, inputs, targets, lambda hidden, _: block(hidden)
    )
    return view, {"block.0": weight}


def error_of(view: BlockView, weight: Tensor) -> float:
    pairs = zip(view.inputs, view.targets, strict=True)
    return sum(float((x @ weight.T - y).square().mean()) for x, y in pairs)


@pytest.mark.parametrize(
    "name", ["W2A16_G64", "W3A16_ASYM_G64", "W4A16_G64_DQ", "NF4", "FP4", "W8A8"]
)
def test_tuning_lowers_the_error(name: str) -> None:
    scheme = Scheme.parse(name)
    view, weights = view_of_one_layer(scheme)
    start = {"block.0": RTN().quantize(weights["block.0"], scheme, None)}
    tuned = BlockTuning(iterations=60, rounding_rate=0.01).tune(view, weights, start)
    before, after = (
        error_of(view, q.grid.dequantize(q.codes))
        for q in (start["block.0"], tuned.modules["block.0"])
    )
    assert after < 0.97 * before
    assert tuned.report["error_after"] < tuned.report["error_before"]
    again = BlockTuning(iterations=60, rounding_rate=0.01).tune(view, weights, start)
    assert same(tuned.modules["block.0"], again.modules["block.0"])


def test_a_start_that_is_not_beaten_is_returned() -> None:
    scheme = Scheme.parse("W4A16_G64")
    view, weights = view_of_one_layer(scheme)
    start = {"block.0": RTN().quantize(weights["block.0"], scheme, None)}
    # Steps of many levels find nothing.
    tuned = BlockTuning(iterations=5, rounding_rate=50.0, scale_rate=0.9).tune(view, weights, start)
    assert tuned.modules["block.0"] is start["block.0"]
    assert tuned.report["iteration"] == 0
    assert tuned.report["error_after"] == tuned.report["error_before"]


def test_held_out_batches_judge_and_do_not_train() -> None:
    scheme = Scheme.parse("W3A16_G64")
    view, weights = view_of_one_layer(scheme)
    start = {"block.0": RTN().quantize(weights["block.0"], scheme, None)}
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0)).tolist()
    options = BlockTuning(iterations=10, held_out=0.25)
    expected = options.tune(view, weights, start)
    held = order[:2]
    wrong = [y if i in held else y + 3 for i, y in enumerate(view.targets)]
    q = start["block.0"]
    decoded = q.grid.dequantize(q.codes)
    by_hand = sum(
        float((view.inputs[i] @ decoded.T - view.targets[i]).square().mean()) for i in held
    )
    assert expected.report["error_before"] == pytest.approx(by_hand / 2, rel=1e-5)
    misled = BlockView(view.name, view.module, view.schemes, view.inputs, wrong, view.forward)
    report = options.tune(misled, weights, start).report
    assert report["error_before"] == expected.report["error_before"]


def test_masked_tokens_do_not_count() -> None:
    scheme = Scheme.parse("W3A16_G64")
    view, weights = view_of_one_layer(scheme)
    start = {"block.0": RTN().quantize(weights["block.0"], scheme, None)}
    masks = [torch.arange(40).expand(2, -1) < 30 for _ in view.inputs]
    results = []
    for noise in (0.0, 5.0):
        targets = [y + noise * ~m[..., None] for y, m in zip(view.targets, masks, strict=True)]
        masked = BlockView(
            view.name, view.module, view.schemes, view.inputs, targets, view.forward, masks
        )
        results.append(BlockTuning(iterations=8).tune(masked, weights, start))
    assert results[0].report == results[1].report
    assert same(results[0].modules["block.0"], results[1].modules["block.0"])


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ids = torch.randint(1, 255, (8, 48), generator=torch.Generator().manual_seed(3))
    file = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file({"input_ids": ids.to(torch.int32)}, file)
    return file


@pytest.mark.parametrize("name", TINY)
def test_every_family_is_tuned(name: str, tmp_path: Path, token_file: Path) -> None:
    build_tiny(name, tmp_path / "model", torch.bfloat16)
    recipe = Recipe(GPTQ(), tuning=BlockTuning(iterations=6, batch_tokens=96))
    options: dict[str, Any] = {"samples": 8, "seqlen": 48, "progress": False}
    manifest = lowbit.quantize(
        tmp_path / "model", tmp_path / "out", scheme="W3A16_G32", quality=recipe,
        calibration=token_file, **options,
    ).manifest  # fmt: skip
    reports = [part["tuning"] for part in manifest["parts"].values() if "tuning" in part]
    assert len(reports) == len([n for n in manifest["parts"] if n[-1].isdigit()])
    assert all(r["error_after"] <= r["error_before"] for r in reports)
    assert any(r["iteration"] for r in reports)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert model(torch.arange(1, 33)[None]).logits.isfinite().all()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["recipe"]["tuning"]["iterations"] == 6


def test_one_batch_is_too_few() -> None:
    view, weights = view_of_one_layer(Scheme.parse("W4A16_G64"), batches=1)
    start = {"block.0": RTN().quantize(weights["block.0"], Scheme.parse("W4A16_G64"), None)}
    with pytest.raises(lowbit.LowbitError, match="at least 2 batches"):
        BlockTuning().tune(view, weights, start)


@pytest.mark.parametrize("options", [{"iterations": 0}, {"held_out": 1.0}, {"batch_tokens": 0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(lowbit.LowbitError, match="block tuning"):
        BlockTuning(**options)


def test_a_grid_is_not_changed_in_place() -> None:
    start = RTN().quantize(matrix(), Scheme.parse("W4A16_ASYM_G64"), None)
    kept = Grid(start.grid.scheme, K, start.grid.scales.clone(), start.grid.zeros.clone())
    ours = TrainableWeight(nn.Linear(K, N, bias=False), matrix(), start)
    ours.zeros += 1
    ours.factors *= 2
    ours.put()
    assert torch.equal(start.grid.scales, kept.scales)
    assert torch.equal(start.grid.zeros, kept.zeros)
