"""Stock clients: transformers with compressed-tensors or bitsandbytes, and no lowbit at all.

They load what we convert and compute the same logits; what they write is loaded here and does too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import build_tiny, make_tiny
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lowbit

# Their decoded weights are multiplied by torch: so must ours be, to be equal bit for bit.
pytestmark = pytest.mark.usefixtures("reference_backend")

IDS = torch.arange(1, 33)[None]
# Run without lowbit registered. With gradients, for bitsandbytes has an approximate kernel without.
LOAD_AND_COMPARE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
expected = torch.load(sys.argv[2], weights_only=True)
logits = model(torch.arange(1, 33)[None]).logits
assert "lowbit" not in sys.modules
assert torch.equal(logits, expected), (logits - expected).abs().max()
"""


def run_stock(code: str, *arguments: Path) -> None:
    """Runs `code` in a process that knows nothing of lowbit."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PATH": "",
            "HOME": os.environ.get("HOME", ""),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# bf16 scales, because the client casts scales to the dtype of the model.
@pytest.mark.parametrize(
    ("scheme", "to", "dynamic"),
    [
        ("W4A16_G32_BF16", "compressed-tensors", {}),
        ("W3A16_G32_BF16", "compressed-tensors", {"layers.1.mlp": None}),
        ("W2A16_G32_BF16", "compressed-tensors", {"down_proj": "W8A16_CHANNEL_BF16"}),
        ("W4A16_ASYM_G32_BF16", "compressed-tensors", {"layers.0.mlp": None}),
        ("W3A16_ASYM_G32_BF16", "compressed-tensors", {}),
        ("NF4_G32", "bnb", {"layers.1.mlp": None}),
        ("FP4BNB_G32_FP32", "bnb", {}),
    ],
)
def test_stock_transformers_computes_the_same_logits(
    scheme: str, to: str, dynamic: dict[str, str | None], tmp_path: Path
) -> None:
    pytest.importorskip({"bnb": "bitsandbytes"}.get(to, "compressed_tensors"))
    dtype = torch.bfloat16 if to == "compressed-tensors" else torch.float32
    model = make_tiny("llama", dtype, intermediate_size=160, num_hidden_layers=2)
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    lowbit.quantize(
        tmp_path / "model", out, scheme=scheme, algorithm="rtn", dynamic=dynamic, progress=False
    )
    lowbit.convert(out, tmp_path / "converted", to, progress=False)
    ours = lowbit.load(out)
    torch.save(ours(IDS).logits.detach(), tmp_path / "logits.pt")
    run_stock(LOAD_AND_COMPARE, tmp_path / "converted", tmp_path / "logits.pt")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_what_bitsandbytes_wrote_runs_here(kind: str, nested: bool, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = make_tiny("llama", torch.float32, intermediate_size=128, num_hidden_layers=2)
    model.save_pretrained(tmp_path / "model")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lowbit.load(tmp_path / "theirs")
    assert sum(isinstance(module, lowbit.QuantLinear) for module in ours.modules()) == 14
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


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
    pytest.importorskip("compressed_tensors")
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
    lowbit.convert(out, exported, "compressed-tensors", progress=False)
    run_stock(RUN_EXPORTED, exported, result)
    theirs = torch.load(result, weights_only=True)
    ours = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert theirs["dynamic"] == (scheme == "W8A8")
    assert len(theirs["weights"]) == 21
    for name, weight in theirs["weights"].items():
        assert torch.equal(weight, ours.get_submodule(name.removesuffix(".weight")).weight)
    with torch.no_grad():
        logits, plain = ours(IDS).logits, model(IDS)
        again = lowbit.load(exported, dtype=torch.float32)(IDS).logits
    assert torch.equal(again, logits)
    cost = (logits - plain.logits).square().mean()
    apart = (logits - theirs["logits"]).square().mean()
    # Their static scale is ours: only what is next to a tie, or saturates to -128, may differ.
    # Their scale per token is max / 127.5: other roundings, of the same size.
    assert apart < (2 if scheme == "W8A8" else 0.3) * cost
    assert 0.5 * cost < (theirs["logits"] - plain.logits).square().mean() < 2 * cost
