"""AWQ against the paper's equations in float64, and what it does to blocks of every family."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY, make_tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.algorithms import GPTQ, RTN
from lowbit.algorithms.base import Statistics
from lowbit.errors import LowbitError
from lowbit.models.layers import find_decoder_layers
from lowbit.recipe import Recipe, make_recipe
from lowbit.scheme import Scheme
from lowbit.tuning.awq import AWQ
from lowbit.tuning.folds import find_folds
from lowbit.tuning.view import BlockView

SCHEME = Scheme.parse("W3A16_G32")


def make_view(
    name: str, selected: Callable[[str], bool] = lambda _: True, outliers: bool = False
) -> BlockView:
    """The second block of a tiny model, with what the first one sends it."""
    model = make_tiny(name)
    layers_name, layers = find_decoder_layers(model)
    block, calls = layers[1], []
    if outliers:
        with_outliers(block)

    def record(_: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append((args, kwargs))

    handle = block.register_forward_pre_hook(record, with_kwargs=True)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _ in range(2):
            ids = torch.randint(3, 250, (3, 32), generator=generator)
            model(input_ids=ids, use_cache=False)
    handle.remove()
    inputs = [args[0] if args else kwargs["hidden_states"] for args, kwargs in calls]

    def forward(hidden: Tensor, batch: int) -> Tensor:
        args, kwargs = calls[batch]
        rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        returned = block(hidden, *args[1:], **rest)
        output: Tensor = returned[0] if isinstance(returned, tuple) else returned
        return output

    prefix = f"{layers_name}.1"
    names = [n for n, m in block.named_modules() if m.__class__.__name__ in ("Linear", "Conv1D")]
    schemes = {f"{prefix}.{n}": SCHEME for n in names if selected(n)}
    with torch.no_grad():
        targets = [forward(hidden, batch) for batch, hidden in enumerate(inputs)]
    return BlockView(prefix, block, schemes, inputs, targets, forward)


def with_outliers(block: nn.Module) -> None:
    """Large activations and small weights in one channel of every fold; the output is the same."""
    for fold in find_folds(block):
        scales = torch.ones(len(fold.rows), dtype=torch.float64)
        scales[7] = 1 / 64
        fold.apply(scales)


def outputs(view: BlockView) -> list[Tensor]:
    with torch.no_grad():
        return [view.forward(hidden, batch) for batch, hidden in enumerate(view.inputs)]


def input_of(view: BlockView, module: nn.Module) -> Tensor:
    """What reaches a linear layer, `[tokens, in_features]`."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    outputs(view)
    handle.remove()
    return torch.cat(seen)


def rounding_error(view: BlockView) -> float:
    """Mean squared change of the block's output when its linear layers are rounded."""
    kept = {}
    for name in view.schemes:
        weight = view.linear(name).weight
        kept[name] = weight.data
        x = input_of(view, view.linear(name))
        result = RTN().quantize(weight.data, SCHEME, Statistics(x.T @ x / len(x), len(x)))
        weight.data = result.grid.dequantize(result.codes)
    error = sum(
        float((out - target).square().mean())
        for out, target in zip(outputs(view), view.targets, strict=True)
    )
    for name, weight in kept.items():
        view.linear(name).weight.data = weight
    return error


@pytest.mark.parametrize("name", TINY)
def test_the_float_block_computes_what_it_did(name: str) -> None:
    view = make_view(name, outliers=True)
    before = {n: p.clone() for n, p in view.module.named_parameters()}
    report = AWQ(steps=4).fold(view)
    changed = {n for n, p in view.module.named_parameters() if not torch.equal(p, before[n])}
    assert {f"{view.name}.{n}" for n in changed} == set(report["changed"])
    assert changed
    assert all(point["loss"] <= point["loss_unfolded"] for point in report["points"])
    for out, target in zip(outputs(view), view.targets, strict=True):
        assert (out - target).abs().max() <= 1e-5 * target.abs().max()


def test_exponent_and_loss_are_the_paper_s() -> None:
    """Equation 4 and 5 for one linear layer, in float64, with the rounding as a black box."""
    only_down = make_view("llama", lambda n: n == "mlp.down_proj", outliers=True)
    down, up = only_down.module.mlp.down_proj, only_down.module.mlp.up_proj
    x = input_of(only_down, down).double()
    weight, rows = down.weight.detach().double(), up.weight.detach().double()
    losses, factors = [], []
    for i in range(5):
        s = x.abs().mean(0) ** (i / 5)
        s = (s / (s.max() * s.min()).sqrt()).log2().round().exp2()
        importance = (x / s).square().mean(0).float()
        grid = lowbit_grid((weight * s).float(), importance)
        rounded = grid.dequantize(grid.round((weight * s).float())).double()
        losses.append(float((x @ (rounded / s - weight).T).square().mean()))
        factors.append(s)
    report = AWQ(steps=5).fold(only_down)
    best = losses.index(min(losses))
    assert best > 0
    (point,) = report["points"]
    assert point["source"] == "mlp.up_proj"
    assert point["exponent"] == best / 5
    assert point["loss"] == pytest.approx(losses[best], rel=1e-3)
    assert point["loss_unfolded"] == pytest.approx(losses[0], rel=1e-3)
    torch.testing.assert_close(down.weight.double(), weight * factors[best], rtol=1e-5, atol=0)
    torch.testing.assert_close(up.weight.double(), rows / factors[best][:, None], rtol=1e-5, atol=0)


def lowbit_grid(weight: Tensor, importance: Tensor) -> Any:
    from lowbit.algorithms.scales import fit_grid

    return fit_grid(weight, SCHEME, importance)


def test_outliers_cost_much_less_after_folding() -> None:
    view = make_view("llama", outliers=True)
    before = rounding_error(view)
    report = AWQ().fold(view)
    assert {p["source"] for p in report["points"] if p["exponent"] > 0.2} >= {
        "input_layernorm",
        "post_attention_layernorm",
        "mlp.up_proj",
    }
    assert rounding_error(view) < 0.7 * before


def test_only_folds_with_a_quantized_reader_are_touched() -> None:
    view = make_view("llama", lambda name: name == "mlp.gate_proj", outliers=True)
    report = AWQ(steps=4).fold(view)
    assert [point["source"] for point in report["points"]] == ["post_attention_layernorm"]
    norm = [f"{view.name}.post_attention_layernorm.weight"]
    readers = [f"{view.name}.mlp.{name}_proj.weight" for name in ("gate", "up")]
    assert report["changed"] == sorted(norm + readers)


def test_a_block_without_known_folds_is_left_alone() -> None:
    view = make_view("llama")

    class Unknown(nn.Module):
        pass

    assert AWQ().fold(replace(view, module=Unknown())) == {"changed": [], "points": []}


def test_masked_tokens_have_no_say() -> None:
    def folded(noise: float) -> tuple[dict[str, Any], Tensor]:
        view = make_view("llama", outliers=True)
        masks = [torch.ones(hidden.shape[:2], dtype=torch.bool) for hidden in view.inputs]
        for hidden, mask in zip(view.inputs, masks, strict=True):
            # The last tokens, which no other token attends to.
            mask[:, -4:] = False
            hidden[:, -4:] += noise * torch.randn(hidden[:, -4:].shape)
        report = AWQ(steps=5).fold(replace(view, masks=masks))
        return report, view.module.mlp.down_proj.weight

    (clean, weight), (noisy, other) = folded(0.0), folded(50.0)
    assert clean == noisy
    assert torch.equal(weight, other)


def test_overflowing_activations_are_left_out() -> None:
    view = make_view("llama")
    view.inputs[0][0, -1, 3] = float("nan")
    report = AWQ(steps=3).fold(view)
    assert all(0 <= point["loss"] < 1 for point in report["points"])
    assert all(parameter.isfinite().all() for parameter in view.module.parameters())


def test_too_little_a_gain_folds_nothing() -> None:
    view = make_view("llama", outliers=True)
    before = {n: p.clone() for n, p in view.module.named_parameters()}
    gains = [1 - p["loss"] / p["loss_unfolded"] for p in AWQ(steps=4).fold(view)["points"]]
    for name, parameter in view.module.named_parameters():
        parameter.data = before[name].clone()
    between = (max(gains) + sorted(gains)[-2]) / 2
    report = AWQ(steps=4, least_gain=between).fold(view)
    assert [point["exponent"] > 0 for point in report["points"]] == [g > between for g in gains]
    untouched = [n for n in before if f"{view.name}.{n}" not in report["changed"]]
    assert 0 < len(untouched) < len(before)
    assert all(torch.equal(view.module.get_parameter(n), before[n]) for n in untouched)


@pytest.mark.parametrize("outliers", [False, True])
def test_the_config_names_a_fold_only_if_something_was_folded(
    outliers: bool, tmp_path: Path
) -> None:
    model = make_tiny("llama", torch.bfloat16)
    for block in find_decoder_layers(model)[1] if outliers else ():
        with_outliers(block)
    model.save_pretrained(tmp_path / "model")
    ids = torch.randint(1, 255, (8, 48), generator=torch.Generator().manual_seed(3))
    save_file({"input_ids": ids.to(torch.int32)}, tmp_path / "tokens.safetensors")
    result = lowbit.quantize(
        tmp_path / "model", tmp_path / "out", scheme="W4A16_G32",
        quality=Recipe(GPTQ(), mismatch=True, fold=AWQ(steps=4, least_gain=0.5)),
        calibration=tmp_path / "tokens.safetensors", samples=8, seqlen=48, progress=False,
    )  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    recipe = config["quantization_config"]["recipe"]
    assert recipe["mismatch"]
    assert ("fold" in recipe) == outliers
    assert "fold" in result.manifest["fingerprint"]["options"]["recipe"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("options", [{"steps": 0}, {"tokens": 0}])
def test_bad_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(LowbitError, match="at least 1"):
        AWQ(**options)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_bad_share_is_refused(share: float) -> None:
    with pytest.raises(LowbitError, match="share"):
        AWQ(least_gain=share)


def test_users_name_awq_like_an_algorithm() -> None:
    assert make_recipe("awq", None) == Recipe(RTN(), fold=AWQ())
    assert make_recipe("AWQ+GPTQ", None) == Recipe(GPTQ(), fold=AWQ())
    assert make_recipe("awq", None).needs_data


@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_a_checkpoint_holds_the_divided_norms(name: str, tmp_path: Path) -> None:
    model = make_tiny(name, torch.bfloat16)
    for block in find_decoder_layers(model)[1]:
        with_outliers(block)
    model.save_pretrained(tmp_path / "model")
    ids = torch.randint(1, 255, (8, 48), generator=torch.Generator().manual_seed(3))
    save_file({"input_ids": ids.to(torch.int32)}, tmp_path / "tokens.safetensors")
    result = lowbit.quantize(
        tmp_path / "model",
        tmp_path / "quantized",
        scheme="W8A16_G32",
        quality=Recipe(RTN(), fold=AWQ(steps=4)),
        calibration=tmp_path / "tokens.safetensors",
        samples=8,
        seqlen=48,
        progress=False,
    )
    before: dict[str, Tensor] = load_file(tmp_path / "model" / "model.safetensors")
    after: dict[str, Tensor] = {}
    for file in sorted(result.path.glob("*.safetensors")):
        after |= load_file(file)
    parts = result.manifest["parts"]
    changed = {name for part in parts.values() for name in part.get("fold", {}).get("changed", ())}
    norms = {n for n in changed if "norm" in n}
    assert norms
    for norm in norms:
        assert after[norm].dtype == torch.bfloat16
        assert not torch.equal(after[norm], before[norm])
    # All else that is not quantized is as it was; the empty tensor stops loaders without lowbit.
    same = {n for n in before if n in after and after[n].numel()} - changed
    assert same
    assert all(torch.equal(before[n], after[n]) for n in same)
    quantized = AutoModelForCausalLM.from_pretrained(result.path, dtype=torch.float32)
    with torch.no_grad():
        wanted, got = model.float()(ids[:2]).logits, quantized(ids[:2]).logits
    assert (got - wanted).abs().max() < 0.03 * wanted.abs().max()
