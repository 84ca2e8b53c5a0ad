"""Bit allocation: sensitivities against float64 oracles, sizes against files, choices optimal."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import build_tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.algorithms import RTN
from lowbit.algorithms.base import Statistics
from lowbit.allocation import sensitivity
from lowbit.allocation.allocate import Allocation, dynamic_rules
from lowbit.allocation.budget import parse_size
from lowbit.allocation.fusion import fusion_groups
from lowbit.allocation.sensitivity import Sensitivities, SensitivityRun
from lowbit.checkpoint import Checkpoint
from lowbit.cli import main
from lowbit.models.layers import find_decoder_layers
from lowbit.models.streaming import StreamedDecoder
from lowbit.nn.replace import weight_is_transposed
from lowbit.pipeline.sizes import written_bytes
from lowbit.progress import RunProgress
from lowbit.scheme import Scheme

SEQLEN, SAMPLES = 32, 4
OPTIONS = ("W2A16_G32", "W4A16_ASYM_G32", "W8A16_G64")
# Without a search: its steps would turn the last bits of H into other scales.
ROUNDING = RTN(search=False)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(file, np.random.default_rng(5).integers(3, 250, (8, SEQLEN)))
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("allocation") / "llama"
    build_tiny("llama", directory)
    return directory


def quantize(model: Path, output: Path, tokens: Path | None, **options: Any) -> Any:
    settings = {"algorithm": ROUNDING, "samples": SAMPLES, "seqlen": SEQLEN, "progress": False}
    return lowbit.quantize(model, output, **{"calibration": tokens, **settings, **options})


def measure(model: Path, ids: Tensor, mask: Tensor | None = None) -> Sensitivities:
    decoder = StreamedDecoder(Checkpoint.open(model), torch.float32, torch.device("cpu"))
    names = [n for n, m in decoder.model.named_modules() if is_linear(n, m)]
    groups = fusion_groups(names)
    batches, masks = list(ids.split(3)), None if mask is None else list(mask.split(3))
    schemes = [Scheme.parse(option) for option in OPTIONS]
    with RunProgress(False) as bar:
        run = SensitivityRun(decoder, batches, masks, groups, schemes, ROUNDING, 0, bar)
        return run.measure()


def is_linear(name: str, module: nn.Module) -> bool:
    inside = ".layers." in name or ".h." in name
    return inside and (isinstance(module, nn.Linear) or weight_is_transposed(module))


def most_likely(log_p: Tensor, _: object) -> Tensor:
    """Stands in for drawing, so that an oracle can have the same tokens."""
    return log_p.argmax(-1, keepdim=True)


def keep_input(inputs: dict[str, Tensor], name: str) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor]) -> None:
        inputs.setdefault(name, args[0].detach().flatten(0, -2))

    return hook


def keep_output(outputs: dict[int, Tensor], index: int) -> Any:
    def hook(_: nn.Module, __: tuple[Tensor], output: Any) -> None:
        outputs[index] = output if isinstance(output, Tensor) else output[0]

    return hook


def rounding_error(weight: Tensor, option: str, hessian: Tensor, tokens: int) -> Tensor:
    result = ROUNDING.quantize(weight, Scheme.parse(option), Statistics(hessian, tokens))
    return result.grid.dequantize(result.codes).double() - weight.double()


@pytest.mark.parametrize(
    ("family", "masked"), [("llama_tied", False), ("gemma2", True), ("gpt2", False)]
)
def test_sensitivities_are_those_of_the_whole_model_in_float64(
    family: str, masked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "_draw", most_likely)
    build_tiny(family, tmp_path / "model")
    ids = torch.randint(3, 250, (5, SEQLEN), generator=torch.Generator().manual_seed(1))
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    found = measure(tmp_path / "model", ids, mask if masked else None)

    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    inputs: dict[str, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    modules = {n: m for n, m in whole.named_modules() if is_linear(n, m)}
    for name, module in modules.items():
        module.register_forward_pre_hook(keep_input(inputs, name))
    for index, block in enumerate(find_decoder_layers(whole)[1]):
        block.register_forward_hook(keep_output(outputs, index))
    log_p = whole(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    counted = mask[:, 1:] if masked else torch.ones_like(mask[:, 1:])
    base = dict(outputs)
    nll = (-log_p.max(-1).values * counted).sum()
    gradients = torch.autograd.grad(nll, list(base.values()))
    assert [group[0] for group in found.groups] == [g[0] for g in fusion_groups(modules)]
    for group, losses in zip(found.groups, found.losses, strict=True):
        index = int(re.findall(r"\d+", group[0])[0])
        for option in OPTIONS:
            kept = {name: modules[name].weight.data for name in group}
            for name, weight in kept.items():
                x, transposed = inputs[name], weight_is_transposed(modules[name])
                rows = (weight.T if transposed else weight).float()
                hessian = (x.T @ x / len(x)).float()
                decoded = rows.double() + rounding_error(rows, option, hessian, len(x))
                modules[name].weight.data = decoded.T if transposed else decoded
            with torch.no_grad():
                whole(ids, use_cache=False)
            for name, weight in kept.items():
                modules[name].weight.data = weight
            moved = (outputs[index] - base[index]).detach()[:3]
            squares = (moved * gradients[index][:3]).sum(-1).square()
            expected = float(squares.sum()) / (2 * int(counted[:3].sum()))
            assert losses[option] == pytest.approx(expected, rel=1e-3), (group, option)


def test_predicted_losses_are_divergences(model: Path) -> None:
    """Against KL measured on the whole model, with one group quantized at a time."""
    ids = torch.randint(3, 250, (60, SEQLEN), generator=torch.Generator().manual_seed(1))
    found = measure(model, ids)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    ratios = []
    with torch.no_grad():
        base = whole(ids).logits.log_softmax(-1)
        for group, losses in zip(found.groups, found.losses, strict=True):
            modules = [whole.get_submodule(name) for name in group]
            kept = [module.weight.data for module in modules]
            for option in OPTIONS[:2]:
                for module, weight in zip(modules, kept, strict=True):
                    # Without a search, H is not used.
                    unused = torch.eye(weight.shape[1])
                    error = rounding_error(weight.float(), option, unused, 1)
                    module.weight.data = weight + error
                other = whole(ids).logits.log_softmax(-1)
                divergence = float((base.exp() * (base - other)).sum(-1).mean())
                ratios.append(losses[option] / divergence)
            for module, weight in zip(modules, kept, strict=True):
                module.weight.data = weight
    # Less than all of it: what errors of several tokens do together is left out.
    assert 0.6 < np.mean(ratios) < 1.1, ratios
    assert all(0.4 < ratio < 1.6 for ratio in ratios), ratios


def test_drawn_tokens_follow_the_distribution() -> None:
    p = torch.tensor([0.5, 0.0, 0.3, 0.2])
    drawn = sensitivity._draw(p.log().expand(40_000, 4), torch.Generator().manual_seed(0))
    frequencies = torch.bincount(drawn.flatten(), minlength=4) / 40_000
    assert frequencies[1] == 0
    torch.testing.assert_close(frequencies, p, atol=0.01, rtol=0)


def test_engines_fuse_siblings_and_experts() -> None:
    names = [
        f"m.layers.{block}.{leaf}"
        for block in (0, 1)
        for leaf in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj")
    ]
    names += ["m.layers.0.mlp.gate_proj", "m.layers.0.mlp.down_proj", "m.layers.0.mlp.up_proj"]
    names += [f"m.layers.1.moe.experts.{e}.{leaf}" for e in (0, 1) for leaf in ("w1", "w2", "w3")]
    assert [[name.split(".", 2)[2] for name in group] for group in fusion_groups(names)] == [
        ["0.attn.q_proj", "0.attn.k_proj", "0.attn.v_proj"],
        ["0.attn.o_proj"],
        ["1.attn.q_proj", "1.attn.k_proj", "1.attn.v_proj"],
        ["1.attn.o_proj"],
        ["0.mlp.gate_proj", "0.mlp.up_proj"],
        ["0.mlp.down_proj"],
        [f"1.moe.experts.{e}.{leaf}" for e in (0, 1) for leaf in ("w1", "w2", "w3")],
    ]
    assert fusion_groups(names, fused=False) == [[name] for name in names]


@pytest.mark.parametrize(
    ("text", "size"),
    [("4.2GB", 4_200_000_000), ("4.2GiB", 4_509_715_660), ("900MB", 900_000_000), (1234, 1234),
     ("1 kib", 1024), ("0.0000015MB", 1)],
)  # fmt: skip
def test_sizes_are_read(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "4.2 bits", "0MB", "1e9", "4,2GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(lowbit.LowbitError, match=r"is no size; give .* 4\.2GB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama_tied", {"quantize_embeddings": True, "target_size": "120KB"}),
        ("qwen2", {"quantize_lm_head": True, "scheme": "NF4_DQ"}),
        ("gpt2", {}),
        ("opt", {"dynamic": {r"fc2": None, r"fc1": "W3A16_G64"}}),
        ("gemma3_text", {"allocation": Allocation(target_size="190KB", fused=False)}),
    ],
)
def test_files_are_as_large_as_was_planned_and_within_the_budget(
    family: str, options: dict[str, Any], tokens: Path, tmp_path: Path
) -> None:
    build_tiny(family, tmp_path / "model", torch.bfloat16)
    full = sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    options = {"target_size": int(full * 0.6), **options}
    if "allocation" in options:
        del options["target_size"]
    result = quantize(tmp_path / "model", tmp_path / "out", tokens, **options)
    report = result.manifest["allocation"]
    assert written_bytes(tmp_path / "out") == report["bytes"] <= report["budget_bytes"]
    assert sum(count > 0 for count in report["modules"].values()) > 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("fused", [True, False])
def test_no_better_choice_would_have_fitted(
    model: Path, tokens: Path, tmp_path: Path, fused: bool
) -> None:
    file = tmp_path / "sensitivities.json"
    # Few enough for brute force: two options for each of the free layers.
    dynamic = {r"layers\.[12]\.": "W4A16_G64"}
    allocation = Allocation(
        target_size=221_000, options=OPTIONS[:2], fused=fused, sensitivities=file
    )
    result = quantize(model, tmp_path / "out", tokens, allocation=allocation, dynamic=dynamic)
    report, stored = result.manifest["allocation"], json.loads(file.read_text())
    groups = stored["groups"]
    sizes = []
    for picks in itertools.product(OPTIONS[:2], repeat=len(groups)):
        size = 0
        for group, option in zip(groups, picks, strict=True):
            for name in group:
                shape = tuple(Checkpoint.open(model).entries[f"{name}.weight"].shape)
                specs = Scheme.parse(option).tensor_specs((shape[0], shape[1]))
                size += sum(-(-(len(name) + 1 + len(key) + 162) // 8) * 8 for key in specs)
                size += Scheme.parse(option).stored_bytes((shape[0], shape[1]))
        loss = sum(row[option] for row, option in zip(stored["losses"], picks, strict=True))
        sizes.append((loss, size))
    chosen = min(sizes, key=lambda row: abs(row[0] - report["predicted_loss"]))
    assert chosen[0] == pytest.approx(report["predicted_loss"])
    beside = written_bytes(tmp_path / "out") - chosen[1]
    assert beside + chosen[1] <= 221_000
    better = [size for loss, size in sizes if loss < chosen[0] * (1 - 1e-9)]
    assert better
    assert all(beside + size > 221_000 for size in better)


def test_target_bits_are_those_of_the_manifest(model: Path, tokens: Path, tmp_path: Path) -> None:
    result = quantize(model, tmp_path / "out", tokens, target_bits=4.0)
    assert 3.9 < result.bits_per_weight <= 4.0
    found = {r["scheme"] for p in result.manifest["parts"].values() for r in p["modules"].values()}
    assert len(found) > 1
    again = quantize(model, tmp_path / "out", tokens, target_bits=4.0, resume=True)
    assert again.manifest == result.manifest


def test_a_file_of_sensitivities_serves_other_budgets_and_nothing_else(
    model: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "sensitivities.json"

    def run(output: str, bits: float, options: tuple[str, ...] = OPTIONS, **others: Any) -> Any:
        allocation = Allocation(bits, options=options, sensitivities=file)
        return quantize(model, tmp_path / output, tokens, allocation=allocation, **others)

    first = run("first", 4.0)
    monkeypatch.setattr(SensitivityRun, "measure", lambda _: pytest.fail("measured again"))
    assert run("second", 3.0).bits_per_weight <= 3.0 < first.bits_per_weight
    assert quantize(model, tmp_path / "third", tokens).manifest.get("allocation") is None
    with pytest.raises(lowbit.LowbitError, match="measured with other tokens; give another"):
        run("other", 4.0, seed=1)
    with pytest.raises(lowbit.LowbitError, match="no measurement of W3A16_G64; give another"):
        run("other", 4.0, (*OPTIONS, "W3A16_G64"))


def test_rules_of_the_user_come_first_and_count(model: Path, tokens: Path, tmp_path: Path) -> None:
    dynamic = {r"layers\.0\..*q_proj": "W8A16", "down_proj": None}
    result = quantize(model, tmp_path / "out", tokens, target_bits=3.5, dynamic=dynamic)
    reports = {n: r for p in result.manifest["parts"].values() for n, r in p["modules"].items()}
    assert reports["model.layers.0.self_attn.q_proj"]["scheme"] == "W8A16"
    assert not any("down_proj" in name for name in reports)
    assert result.bits_per_weight <= 3.5
    alike = [reports[f"model.layers.2.self_attn.{leaf}_proj"]["scheme"] for leaf in "qkv"]
    assert len(set(alike)) == 1


def test_rules_name_every_module_and_no_other() -> None:
    schemes = {
        f"model.layers.{index}.{leaf}": Scheme.parse(option)
        for index, option in ((0, "W2A16"), (1, "W4A16"), (10, "W2A16"))
        for leaf in ("mlp.up_proj", "mlp.gate_proj")
    }
    rules = dynamic_rules(schemes, Scheme.parse("W4A16"), "model.layers")
    assert len(rules) == 1
    assert [n for n in schemes if re.search(rules[0][0], n)] == [
        n for n in schemes if "s.1." not in n
    ]
    assert not re.search(rules[0][0], "model_layers.0.mlp.up_proj")
    assert not re.search(rules[0][0], "model.layers.0.mlp.up_proj.more")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_bits": 1.5},
            r"target bits: 1\.5.* cannot be met; .* smallest possible is 2\.\d+",
        ),
        ({"target_size": "5KB"}, r"target size: 5,000 bytes \(5\.00 KB\) cannot be met; .* no use"),
        ({"target_bits": 3, "target_size": 9}, "both given"),
        ({"target_bits": float("nan")}, "above 0, for example 3.5, got nan"),
        ({"target_bits": 3.0, "dynamic": {"layers": "W4A16"}}, "every layer has a scheme"),
        ({"target_bits": 3.0, "calibration": None}, "needs calibration data"),
    ],
)
def test_what_cannot_be_met_is_refused_in_a_sentence(
    model: Path, tokens: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(lowbit.LowbitError, match=message) as caught:
        quantize(model, tmp_path / "out", **{"tokens": tokens, **options})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_options_that_are_not_of_weights_only_are_refused() -> None:
    with pytest.raises(lowbit.LowbitError, match="W8A8 rounds activations as well"):
        Allocation(3.5, options=("W4A16", "W8A8"))


def test_the_command_prints_what_was_chosen(
    model: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = [
        "quantize", str(model), str(tmp_path / "out"), "--calibration", str(tokens),
        "--samples", "4", "--seqlen", str(SEQLEN), "--algorithm", "rtn",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as exited:
        main([*shared, "--choice", "W4A16"])
    assert exited.value.code == 2
    assert "--choice is for bit allocation" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exited:
        main([*shared, "--target-size", "200KB"])
    assert exited.value.code == 0
    shown = capsys.readouterr().out
    assert "200,000 bytes (200.00 KB)" in shown
    assert written_bytes(tmp_path / "out") <= 200_000
