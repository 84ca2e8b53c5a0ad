"""A plain scheme is served by compressed-tensors after nothing but an edit of config.json."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import make_tiny
from transformers import AutoModelForCausalLM

import lowbit
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
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
    }
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "dequantize": True,  # transformers 5.23 runs asymmetric weights only decoded
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
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
