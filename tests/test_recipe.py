"""The full-precision stream, and steps of a recipe that work on whole blocks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY, build_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.algorithms import GPTQ, RTN
from lowbit.algorithms.base import Quantized, Statistics
from lowbit.calibration.statistics import HessianAccumulator
from lowbit.calibration.tokens import load_calibration
from lowbit.checkpoint.journal import Journal
from lowbit.nn.replace import weight_is_transposed
from lowbit.recipe import PRESETS, Recipe, make_recipe
from lowbit.scheme import Scheme
from lowbit.tuning.steps import Tuned
from lowbit.tuning.view import BlockView

SAMPLES, SEQLEN, VOCAB = 6, 48, 256


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ids = torch.randint(1, VOCAB - 1, (8, SEQLEN), generator=torch.Generator().manual_seed(3))
    file = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file({"input_ids": ids.to(torch.int32)}, file)
    return file


def run(model: Path, output: Path, token_file: Path, **options: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "scheme": "W3A16_G32",
        "calibration": str(token_file),
        "samples": SAMPLES,
        "seqlen": SEQLEN,
        "progress": False,
    }
    return lowbit.quantize(model, output, **{**settings, **options}).manifest


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


seen: list[Statistics | None] = []


@dataclass(frozen=True)
class Recorder:
    """Rounds to nearest and remembers the statistics that it was given."""

    name: ClassVar[str] = "recorder"

    @property
    def needs_statistics(self) -> bool:
        return True

    def quantize(self, weight: Tensor, scheme: Scheme, statistics: Statistics | None) -> Quantized:
        seen.append(statistics)
        return RTN().quantize(weight, scheme, None)


def layer_inputs(model: Any, names: list[str], ids: Tensor) -> dict[str, Tensor]:
    """Returns what reaches each linear layer of a whole model, float64 `[tokens, K]`."""
    found: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: found.__setitem__(name, args[0].flatten(0, -2).double())
        )
        for name in names
    ]
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", TINY)
def test_cross_is_the_mean_over_both_models(name: str, tmp_path: Path, token_file: Path) -> None:
    original = build_tiny(name, tmp_path / "model", torch.float32)
    seen.clear()
    recipe = Recipe(Recorder(), mismatch=True)
    manifest = run(tmp_path / "model", tmp_path / "out", token_file, quality=recipe)
    ids = load_calibration(str(token_file), None, VOCAB, SAMPLES, SEQLEN, 0).ids
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    lowbit.nn.replace.restore_modules(quantized, torch.float32)
    layers = [layer for part in manifest["parts"].values() for layer in part["modules"]]
    reference, inputs = (layer_inputs(m, layers, ids) for m in (original, quantized.eval()))
    # The order in which layers were quantized is that of their calls.
    order = [layer for layer in inputs if layer in layers]
    assert len(order) == len(seen)
    for layer, statistics in zip(order, seen, strict=True):
        assert statistics is not None
        assert statistics.cross is not None
        expected = reference[layer].T @ inputs[layer] / len(inputs[layer])
        scale = float(expected.diagonal().mean())
        torch.testing.assert_close(
            statistics.cross.double() / scale, expected / scale, rtol=0, atol=1e-4, msg=layer
        )


def test_plain_recipes_keep_no_reference(tmp_path: Path, token_file: Path) -> None:
    build_tiny("llama", tmp_path / "model", torch.bfloat16)
    seen.clear()
    run(tmp_path / "model", tmp_path / "out", token_file, quality=Recipe(Recorder()))
    assert all(statistics is not None and statistics.cross is None for statistics in seen)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "recipe" not in config["quantization_config"]


def test_a_token_is_left_out_of_both_models_or_of_none() -> None:
    x, ref = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0)).unbind()
    x[2, 1], ref[4, 3] = torch.inf, torch.nan
    accumulator = HessianAccumulator(5)
    kept = [0, 1, 3, 5, 6, 7, 8]
    accumulator.add(x[:5], ref[:5])
    accumulator.add(x[5:], ref[5:])
    accumulator.dropped = 0  # two of nine are too many
    statistics = accumulator.statistics()
    assert statistics.cross is not None
    expected = ref[kept].double().T @ x[kept].double() / 7
    torch.testing.assert_close(statistics.cross.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        statistics.hessian.double(), x[kept].double().T @ x[kept].double() / 7, rtol=1e-5, atol=1e-6
    )
    assert statistics.tokens == 7


def test_references_of_other_tokens_are_refused() -> None:
    with pytest.raises(lowbit.LowbitError, match="turn the correction of input mismatch off"):
        HessianAccumulator(5).add(torch.randn(4, 5), torch.randn(3, 5))


@dataclass(frozen=True)
class NormFold:
    """Moves a factor from the norms into the layers behind them."""

    name: ClassVar[str] = "norm_fold"
    factor: float = 4.0

    def fold(self, view: BlockView) -> dict[str, Any]:
        block, changed = view.module, []
        for norm, layers in (
            ("input_layernorm", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
            ("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"]),
        ):
            block.get_submodule(norm).weight.data.mul_(self.factor)
            changed.append(f"{view.name}.{norm}.weight")
            for layer in layers:
                block.get_submodule(layer).weight.data.div_(self.factor)
                changed.append(f"{view.name}.{layer}.weight")
        with torch.no_grad():
            for batch, (x, target) in enumerate(zip(view.inputs, view.targets, strict=True)):
                if self.factor == 4 and view.name.endswith(".0"):  # nothing is quantized yet
                    torch.testing.assert_close(view.forward(x, batch), target)
        return {"changed": changed, "factor": self.factor}


@dataclass(frozen=True)
class OtherCodes:
    """Tunes by rounding the float weights again, and doubles a norm."""

    name: ClassVar[str] = "other_codes"
    scale: float = 0.5
    batch_tokens: int = 2 * SEQLEN

    def tune(
        self, view: BlockView, weights: dict[str, Tensor], modules: dict[str, Quantized]
    ) -> Tuned:
        assert weights.keys() == modules.keys() == view.schemes.keys()
        for name, result in modules.items():
            linear = view.linear(name).weight
            linear = linear.T if weight_is_transposed(view.linear(name)) else linear
            assert torch.equal(result.grid.dequantize(result.codes), linear)
        norm = view.module.get_submodule("input_layernorm").weight
        norm.data.mul_(self.scale)
        tuned = {n: RTN().quantize(w, view.schemes[n], None) for n, w in weights.items()}
        return Tuned(tuned, (f"{view.name}.input_layernorm.weight",), {"scale": self.scale})


def test_what_a_fold_changes_is_quantized_and_stored(tmp_path: Path, token_file: Path) -> None:
    original = build_tiny("llama", tmp_path / "model", torch.bfloat16)
    recipe = Recipe(RTN(), fold=NormFold())
    run(tmp_path / "model", tmp_path / "plain", token_file, algorithm=RTN())
    manifest = run(tmp_path / "model", tmp_path / "out", token_file, quality=recipe)
    plain, folded = (
        {k: v for f in (tmp_path / d).glob("*.safetensors") for k, v in load_file(f).items()}
        for d in ("plain", "out")
    )
    assert manifest["parts"]["model.layers.1"]["fold"]["factor"] == 4
    norms = 0
    for key, value in folded.items():
        if "layers" in key and "norm" in key:
            assert torch.equal(value, original.get_parameter(key) * 4)
            norms += 1
        elif key.endswith("weight_scale"):
            behind_norm = not any(layer in key for layer in ("o_proj", "down_proj"))
            # A power of two moves through rounding exactly.
            assert torch.equal(value, plain[key] / 4 if behind_norm else plain[key]), key
        elif key.endswith("weight_packed"):
            assert torch.equal(value, plain[key]), key
    assert norms == 6


@pytest.mark.parametrize("parts", range(5))
def test_resume_replays_both_streams(
    parts: int, tmp_path: Path, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_tiny("llama", tmp_path / "model", torch.bfloat16)
    recipe = Recipe(Recorder(), mismatch=True, fold=NormFold(3.0), tuning=OtherCodes())
    options = {"quality": recipe, "quantize_lm_head": True, "quantize_embeddings": True}
    run(tmp_path / "model", tmp_path / "whole", token_file, **options)
    expected = [s.cross for s in seen if s is not None][-22:]
    finish = Journal.finish_part

    def stop_after(journal: Journal, *args: Any, **whole: Any) -> None:
        if len(journal.parts) == parts:
            raise KeyboardInterrupt
        finish(journal, *args, **whole)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finish_part", stop_after)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "model", tmp_path / "out", token_file, **options)
    other = replace(recipe, mismatch=False)
    with pytest.raises(lowbit.LowbitError, match=r"cannot resume, options\.recipe\.mismatch"):
        run(
            tmp_path / "model",
            tmp_path / "out",
            token_file,
            resume=True,
            **{**options, "quality": other},
        )
    seen.clear()
    run(tmp_path / "model", tmp_path / "out", token_file, resume=True, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    for ours, first in zip(reversed(seen), reversed(expected), strict=False):
        assert ours is not None
        assert torch.equal(ours.cross, first)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    seen.clear()


def test_algorithm_and_quality_exclude_each_other() -> None:
    with pytest.raises(lowbit.LowbitError, match="algorithm and quality are both given"):
        make_recipe("gptq", "fast")
    with pytest.raises(lowbit.LowbitError, match="fast"):
        make_recipe(None, "fats")
    assert make_recipe(None, "fast") == Recipe(GPTQ())
    assert make_recipe(None, None) == Recipe(GPTQ())


def test_a_quality_without_data_says_what_to_give(tmp_path: Path) -> None:
    build_tiny("llama", tmp_path / "model", torch.bfloat16)
    with pytest.raises(lowbit.LowbitError, match=r"quality fast needs calibration .*--calib"):
        lowbit.quantize(tmp_path / "model", tmp_path / "out", quality="fast", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("quality", ["balanced", "best"])
def test_presets_on_a_tiny_model(
    name: str, quality: str, tmp_path: Path, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = PRESETS[quality]
    assert recipe.tuning is not None
    short = replace(recipe, tuning=replace(recipe.tuning, iterations=2))  # type: ignore[type-var]
    if short.end_to_end is not None:
        short = replace(short, end_to_end=replace(short.end_to_end, steps=2))  # type: ignore[type-var]
    monkeypatch.setitem(PRESETS, quality, short)
    build_tiny(name, tmp_path / "model", torch.bfloat16)
    manifest = run(tmp_path / "model", tmp_path / "out", token_file, quality=quality)
    assert ("stages" in manifest) == (recipe.end_to_end is not None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert model(torch.arange(1, 33)[None]).logits.isfinite().all()


@dataclass(frozen=True)
class DoubledScales:
    """Tunes end to end by doubling every scale."""

    name: ClassVar[str] = "doubled"

    def tune(self, shards: list[Path], *_: Any) -> DoubledScales:
        stored = {key: value for file in shards for key, value in load_file(file).items()}
        scales = {key: 2 * value for key, value in stored.items() if key.endswith("weight_scale")}
        object.__setattr__(self, "tensors", scales)
        return self

    report: ClassVar[dict[str, Any]] = {"factor": 2}


@pytest.mark.parametrize("stop", ["tune", "begin_stage", "_rewrite", "finish_stage", "remove"])
def test_end_to_end_goes_on_after_a_kill(
    stop: str, tmp_path: Path, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowbit.checkpoint import replacement

    build_tiny("llama", tmp_path / "model", torch.bfloat16)
    options = {"quality": Recipe(GPTQ(), end_to_end=DoubledScales())}
    run(tmp_path / "model", tmp_path / "whole", token_file, **options)
    run(tmp_path / "model", tmp_path / "plain", token_file, algorithm=GPTQ())
    with monkeypatch.context() as patch:
        owner: Any = {"tune": DoubledScales, "_rewrite": replacement}.get(stop, Journal)
        original, calls = getattr(owner, stop), 0

        def killed(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == (2 if stop == "_rewrite" else 1):
                raise KeyboardInterrupt
            return original(*args)

        patch.setattr(owner, stop, killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "model", tmp_path / "out", token_file, **options)
    run(tmp_path / "model", tmp_path / "out", token_file, resume=True, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    plain, out = (
        {k: v for f in (tmp_path / d).glob("*.safetensors") for k, v in load_file(f).items()}
        for d in ("plain", "out")
    )
    for key, value in out.items():
        assert torch.equal(value, plain[key] * (2 if key.endswith("weight_scale") else 1)), key
