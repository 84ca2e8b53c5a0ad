"""llm-compressor, which writes compressed-tensors as most published checkpoints have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from clients import (
    IDS,
    ask,
    model,
    our_weights,
    relative,
    require,
    require_equal_weights,
    their_weights,
)

import lowbit

CLIENT = "llmcompressor"
LAYERS = 14
GROUP = {"type": "int", "strategy": "group", "group_size": 32}


def written(tmp_path: Path, **request: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    require(CLIENT)
    source, out = model(tmp_path / "model", torch.bfloat16), tmp_path / "client"
    return out / "written", ask(CLIENT, out, do="write_compressed", model=source, **request)


@pytest.mark.usefixtures("reference_backend")
@pytest.mark.pair("compressed-tensors", "read", CLIENT, "equal weights and logits")
@pytest.mark.parametrize(
    ("method", "weights"),
    [
        ("rtn", {"num_bits": 4, "symmetric": True, **GROUP}),
        ("rtn", {"num_bits": 8, "symmetric": True, "type": "int", "strategy": "channel"}),
        ("gptq", {"num_bits": 4, "symmetric": True, "actorder": "static", **GROUP}),
        ("rtn", {"num_bits": 4, "symmetric": False, **GROUP}),
        ("rtn", {"num_bits": 3, "symmetric": True, **GROUP}),
    ],
)
def test_packed_weights_of_theirs_are_read(
    method: str, weights: dict[str, Any], tmp_path: Path
) -> None:
    path, answer = written(tmp_path, method=method, weights=weights)
    loaded = lowbit.load(path)
    require_equal_weights(our_weights(loaded), their_weights(answer), torch.bfloat16, LAYERS)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, answer["logits"])


@pytest.mark.pair(
    "compressed-tensors (W8A8)", "read", CLIENT, "equal weights, logits within rounding"
)
@pytest.mark.parametrize("dynamic", [True, False])
def test_int8_activations_of_theirs_are_read(dynamic: bool, tmp_path: Path) -> None:
    activations = {"num_bits": 8, "symmetric": True, "type": "int", "dynamic": dynamic}
    activations["strategy"] = "token" if dynamic else "tensor"
    weights = {"num_bits": 8, "symmetric": True, "type": "int", "strategy": "channel"}
    path, answer = written(tmp_path, method="rtn", weights=weights, activations=activations)
    loaded = lowbit.load(path)
    require_equal_weights(our_weights(loaded), their_weights(answer), torch.bfloat16, LAYERS)
    plain = lowbit.convert(path, tmp_path / "plain", "bf16", progress=False).path
    with torch.no_grad():
        ours = loaded(IDS).logits
        cost = relative(ours, lowbit.load(plain)(IDS).logits)
    # Both round activations, in bf16 and at other ties (and per token to another width): two
    # independent errors of the size that rounding costs differ by the root of two.
    assert relative(ours, answer["logits"]) < 1.6 * cost
