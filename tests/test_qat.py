"""QAT: gradients of the papers in float64, and a checkpoint that is what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from schemes import every_scheme
from tiny_models import build_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowbit import LowbitConfig, quantize
from lowbit.algorithms import RTN
from lowbit.errors import LowbitError
from lowbit.inventory import inventory
from lowbit.quant import QuantizedWeight
from lowbit.scheme import Scheme
from lowbit.train.fake_quant import FakeQuantLinear, TrainedScalesLinear, TrainedWeightLinear
from lowbit.train.qat import prepare_qat, save_qat

ROWS, COLUMNS = 24, 168


def make_layer(scheme: Scheme, mode: str) -> FakeQuantLinear:
    """Returns a layer that has been moved away from where it started."""
    weight = 0.1 * torch.randn(ROWS, COLUMNS)
    found = RTN().quantize(weight, scheme, None)
    start = QuantizedWeight.from_codes(found.codes, found.grid)
    bias = torch.nn.Parameter(torch.randn(ROWS))
    layer: FakeQuantLinear
    if mode == "scales":
        layer = TrainedScalesLinear(start, bias)
    else:
        layer = TrainedWeightLinear(weight + 0.05 * torch.randn_like(weight), start, bias)
    with torch.no_grad():
        layer.log_factor.normal_(0, 0.2)
        if layer.zero_shift is not None:
            layer.zero_shift.normal_(0, 0.1)
    return layer


def expand(values: Tensor, scheme: Scheme) -> Tensor:
    width = COLUMNS if scheme.group_size is None else scheme.group_size
    return values.repeat_interleave(width, dim=1)[:, :COLUMNS]


def straight_through(rounded: Tensor, exact: Tensor) -> Tensor:
    return exact + (rounded - exact).detach()


def scaled_gradient(tensor: Tensor, factor: float) -> Tensor:
    """Returns `tensor` whose gradient is `factor` times as large (LSQ, appendix A)."""
    return (tensor - tensor * factor).detach() + tensor * factor


def oracle(layer: FakeQuantLinear, mode: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the fake-quantized weight and its variables, float64, with autograd's gradients."""
    scheme, stored = layer.scheme, layer.quantized()
    given: dict[str, Tensor] = {"log_factor": layer.log_factor}
    if mode == "weights":
        given["weight"] = layer.weight
    if layer.zero_shift is not None:
        given["zero_shift"] = layer.zero_shift
    variables = {k: t.detach().double().requires_grad_() for k, t in given.items()}
    width = min(scheme.group_size or COLUMNS, COLUMNS)
    top = max(scheme.levels) if scheme.levels else scheme.code_max
    share = 1 / (width * max(top, 1)) ** 0.5 if mode == "weights" else 1.0
    factor = scaled_gradient(variables["log_factor"], share)
    grid = stored.grid()
    # The exponent's slope is taken at the scale that is stored.
    slope = grid.scales.double() * (factor - factor.detach())
    scales = expand(grid.scales.double() + slope, scheme)
    zeros = torch.zeros_like(scales)
    if layer.zero_shift is not None:
        assert grid.zeros is not None
        shift = scaled_gradient(variables["zero_shift"], share)
        exact = layer.start_zeros.double() + 2**scheme.bits * shift
        zeros = expand(straight_through(grid.zeros.double(), exact), scheme)
    codes = stored.codes().long()
    if scheme.levels is not None:
        levels = torch.tensor(scheme.levels, dtype=torch.float64)[codes - scheme.code_min]
        low, high = min(scheme.levels), max(scheme.levels)
    else:
        levels, low, high = codes.double(), scheme.code_min, scheme.code_max
    if mode == "weights":
        position = variables["weight"] / scales + zeros
        levels = straight_through(levels, position.clamp(low, high))
    return scales * (levels - zeros), variables


@every_scheme
@pytest.mark.parametrize("mode", ["weights", "scales"])
def test_gradients_are_those_of_straight_through_rounding(scheme: Scheme, mode: str) -> None:
    layer = make_layer(scheme, mode)
    x, seen = torch.randn(5, COLUMNS), torch.randn(5, ROWS)
    expected, variables = oracle(layer, mode)
    (x.double() @ expected.T * seen.double()).sum().backward()
    found = layer.fake_weight()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)
    (layer(x) * seen).sum().backward()
    for name, variable in variables.items():
        grad, exact = getattr(layer, name).grad.double(), variable.grad
        assert exact is not None
        assert (grad - exact).norm() <= 1e-5 * exact.norm(), name
        assert exact.norm() > 0


@every_scheme
@pytest.mark.parametrize("mode", ["weights", "scales"])
def test_what_is_stored_decodes_to_what_was_computed_with(scheme: Scheme, mode: str) -> None:
    layer = make_layer(scheme, mode)
    with torch.no_grad():
        assert torch.equal(layer.quantized().dequantize(), layer.fake_weight())


def train(model: Any, steps: int, lr: float = 3e-3) -> tuple[float, float]:
    """Returns the losses before and after some steps on a fixed batch."""
    ids = torch.randint(3, 255, (4, 24))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        losses.append(float(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses[0], losses[-1]


@pytest.mark.parametrize(
    ("name", "scheme", "mode", "dtype"),
    [
        ("llama", "W2A16_G32", "weights", torch.float32),
        ("llama_tied", "NF4_DQ", "weights", torch.bfloat16),
        ("gpt2", "W3A16_ASYM_G64", "weights", torch.bfloat16),
        ("qwen2", "W4A16_ASYM_G64_DQ", "scales", torch.bfloat16),
        ("gemma3_text", "FP4_DQ", "scales", torch.float32),
    ],
)
def test_a_trained_model_is_saved_as_it_computes(
    name: str, scheme: str, mode: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    build_tiny(name, tmp_path / "base", dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    prepare_qat(model, scheme, mode)
    before, after = train(model, 12)
    assert after < before - 0.05
    result = save_qat(model, tmp_path / "base", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    checked = 0
    for part_name, part in model.named_modules():
        if isinstance(part, FakeQuantLinear):
            with torch.no_grad():
                stored = loaded.get_submodule(part_name).dequantize(torch.float32)
                assert torch.equal(stored, part.fake_weight()), part_name
            checked += 1
    assert checked == sum(len(part["modules"]) for part in result.manifest["parts"].values())
    ids = torch.randint(3, 255, (2, 30))
    with torch.no_grad():
        expected = model(ids).logits
        # Kernels sum in another order and precision; decoded, nothing is left of that.
        assert (loaded(ids).logits - expected).norm() < 1e-3 * expected.norm()
        torch.testing.assert_close(loaded.dequantize()(ids).logits, expected, rtol=0, atol=1e-6)
    rows = {row.name: row.stored_as for row in inventory(tmp_path / "out")}
    assert scheme in rows.values()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["recipe"] == {"qat": {"mode": mode}}
    # Stored in the dtype of the base, whatever training computed in.
    assert str(dtype).removeprefix("torch.") in rows.values()


def test_scales_of_a_low_bit_checkpoint_train_and_its_codes_stay(tmp_path: Path) -> None:
    build_tiny("llama_tied", tmp_path / "original", torch.bfloat16)
    quantize(
        tmp_path / "original", tmp_path / "base", scheme="W3A16_ASYM_G64", algorithm="rtn",
        quantize_embeddings=True, dynamic={"down_proj": "W8A16_CHANNEL"}, progress=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    prepare_qat(model, mode="scales")
    before, after = train(model, 12)
    assert after < before - 0.02
    save_qat(model, tmp_path / "base", tmp_path / "out")
    loaded, start = (
        AutoModelForCausalLM.from_pretrained(tmp_path / f, dtype=torch.float32)
        for f in ("out", "base")
    )
    changed = 0
    for key, tensor in start.state_dict().items():
        same = torch.equal(tensor, loaded.state_dict()[key])
        assert same or key.endswith(("weight_scale", "weight_zero_point")), key
        changed += not same
    assert changed > 10
    ids = torch.randint(3, 255, (2, 30))
    with torch.no_grad():
        expected = model(ids).logits
        assert (loaded(ids).logits - expected).norm() < 1e-3 * expected.norm()


def test_training_goes_on_from_a_state_dict(tmp_path: Path) -> None:
    build_tiny("llama", tmp_path / "base")
    models = []
    for _ in range(2):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        models.append(prepare_qat(model, "W4A16_ASYM_G64", "weights"))
    train(models[0], 5)
    missing = models[1].load_state_dict(models[0].state_dict())
    assert not missing.missing_keys
    ids = torch.randint(3, 255, (2, 30))
    with torch.no_grad():
        assert torch.equal(models[0](ids).logits, models[1](ids).logits)


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    build_tiny("llama_tied", tmp_path / "base")

    def load(folder: str = "base") -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / folder)

    for scheme, mode, named in (
        ("W8A8", "weights", "weight-only"),
        ("W4A16", "everything", "unknown QAT mode"),
        (None, "weights", "needs a scheme"),
        (LowbitConfig("W4A16", quantize_embeddings=True), "weights", "embeddings"),
        (LowbitConfig("W4A16", quantize_lm_head=True), "weights", "tied head"),
    ):
        with pytest.raises(LowbitError, match=named):
            prepare_qat(load(), scheme, mode)
    with pytest.raises(LowbitError, match="prepare_qat did not make"):
        save_qat(load(), tmp_path / "base", tmp_path / "out")
    quantize(tmp_path / "base", tmp_path / "low", scheme="W4A16", algorithm="rtn", progress=False)
    with pytest.raises(LowbitError, match="begins with the 16-bit model"):
        prepare_qat(load("low"))
    with pytest.raises(LowbitError, match="is quantized to W4A16 already"):
        prepare_qat(load("low"), "W3A16", "scales")


def test_a_nan_is_not_saved(tmp_path: Path) -> None:
    build_tiny("llama", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    prepare_qat(model, "W4A16")
    with torch.no_grad():
        model.get_submodule("model.norm").weight[3] = float("nan")
    with pytest.raises(LowbitError, match=r"model\.norm\.weight became NaN"):
        save_qat(model, tmp_path / "base", tmp_path / "out")
    with pytest.raises(LowbitError, match="unfinished"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
