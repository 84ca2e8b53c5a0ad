"""A plain scheme is served by compressed-tensors after nothing but an edit of config.json."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import build_tiny, make_tiny
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.errors import LowbitError
from lowbit.export import compressed_tensors_config, export_int_quantized
from lowbit.scheme import Scheme

pytest.importorskip("compressed_tensors")
# Its decoded weights are multiplied by torch: so must ours be, to be equal bit for bit.
pytestmark = pytest.mark.usefixtures("reference_backend")

# Run without lowbit registered: stock transformers and compressed-tensors alone.
LOAD_AND_COMPARE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
expected = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    logits = model(torch.arange(1, 33)[None]).logits
assert "lowbit" not in sys.modules
assert torch.equal(logits, expected), (logits - expected).abs().max()
"""


def edit_config(directory: Path, scheme: Scheme) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        **compressed_tensors_config(scheme),
        "dequantize": True,  # transformers 5.23 runs asymmetric weights only decoded
    }
    (directory / "config.json").write_text(json.dumps(config))


# bf16 scales, because the engine casts scales to the dtype of the model.
@pytest.mark.parametrize(
    "scheme",
    [
        "W4A16_G32_BF16",
        "W3A16_G32_BF16",
        "W2A16_G32_BF16",
        "W8A16_CHANNEL_BF16",
        "W4A16_ASYM_G32_BF16",
        "W3A16_ASYM_G32_BF16",
    ],
)
def test_config_edit_serves_the_same_logits(scheme: str, tmp_path: Path) -> None:
    # Widths that a group divides: compressed-tensors knows no short last group.
    model = make_tiny("llama", torch.bfloat16, intermediate_size=160)
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    lowbit.quantize(tmp_path / "model", out, scheme=scheme, algorithm="rtn", progress=False)
    ours = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        torch.save(ours(torch.arange(1, 33)[None]).logits, tmp_path / "logits.pt")
    edit_config(out, Scheme.parse(scheme))
    done = subprocess.run(
        [sys.executable, "-c", LOAD_AND_COMPARE, str(out), str(tmp_path / "logits.pt")],
        env={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "HF_HUB_OFFLINE": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# What the real package computes from an exported checkpoint, beside the weights that it decodes.
RUN_EXPORTED = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.no_grad():
    logits = model(torch.arange(1, 33)[None]).logits
layer = model.model.layers[0].self_attn.q_proj
inputs = layer.quantization_scheme.input_activations
assert "lowbit" not in sys.modules
weights = {n: p.detach() for n, p in model.named_parameters() if n.endswith("_proj.weight")}
torch.save({"logits": logits, "weights": weights, "dynamic": inputs.dynamic}, sys.argv[2])
"""


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_STATIC", "W8A8_STATIC_FP32"])
def test_exported_int8_activations_are_those_of_the_package(scheme: str, tmp_path: Path) -> None:
    model = build_tiny("llama", tmp_path / "model")
    out, exported, result = tmp_path / "out", tmp_path / "exported", tmp_path / "result.pt"
    ids = torch.randint(1, 255, (8, 48), generator=torch.Generator().manual_seed(3))
    save_file({"input_ids": ids.to(torch.int32)}, tmp_path / "tokens.safetensors")
    lowbit.quantize(
        tmp_path / "model",
        out,
        scheme=scheme,
        algorithm="rtn",
        calibration=tmp_path / "tokens.safetensors",
        samples=8,
        seqlen=48,
        progress=False,
    )
    export_int_quantized(out, exported)
    done = subprocess.run(
        [sys.executable, "-c", RUN_EXPORTED, str(exported), str(result)],
        env={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "HF_HUB_OFFLINE": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    theirs = torch.load(result, weights_only=True)
    ours = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert theirs["dynamic"] == (scheme == "W8A8")
    assert len(theirs["weights"]) == 21
    for name, weight in theirs["weights"].items():
        assert torch.equal(weight, ours.get_submodule(name.removesuffix(".weight")).weight)
    with torch.no_grad():
        logits, plain = ours(torch.arange(1, 33)[None]).logits, model(torch.arange(1, 33)[None])
    cost = (logits - plain.logits).square().mean()
    apart = (logits - theirs["logits"]).square().mean()
    # Their static scale is ours: only what is next to a tie, or saturates to -128, may differ.
    # Their scale per token is max / 127.5: other roundings, of the same size.
    assert apart < (2 if scheme == "W8A8" else 0.3) * cost
    assert 0.5 * cost < (theirs["logits"] - plain.logits).square().mean() < 2 * cost


def test_export_refuses_what_the_format_does_not_hold(tmp_path: Path) -> None:
    build_tiny("llama", tmp_path / "model")
    lowbit.quantize(
        tmp_path / "model", tmp_path / "out", scheme="W4A16", algorithm="rtn", progress=False
    )
    with pytest.raises(LowbitError, match="holds W4A16; weight-only schemes are served as"):
        export_int_quantized(tmp_path / "out", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
    with pytest.raises(LowbitError, match="holds nothing quantized by lowbit"):
        export_int_quantized(tmp_path / "model", tmp_path / "exported")
    with pytest.raises(LowbitError, match="scheme NF4: compressed-tensors has integers"):
        compressed_tensors_config(Scheme.parse("NF4"))
