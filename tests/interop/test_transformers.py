"""Stock transformers, with compressed-tensors and bitsandbytes and without lowbit.

It decodes weights and multiplies with torch, so logits are those of our decoded weights, bit for
bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from clients import (
    IDS,
    ask,
    exported,
    model,
    our_weights,
    relative,
    require,
    require_equal_weights,
    their_weights,
)

import lowbit
from lowbit.formats.gguf.writing import GgufOptions

pytestmark = pytest.mark.usefixtures("reference_backend")
CLIENT = "transformers"
# Layers of the model that are quantized.
LAYERS = 14


def our_logits(path: Path, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return lowbit.load(path, **options)(IDS).logits


# bf16 scales, because the client casts scales to the dtype of the model.
@pytest.mark.pair("compressed-tensors", "write", CLIENT, "equal weights and logits")
@pytest.mark.parametrize(
    ("scheme", "dynamic", "layers"),
    [
        ("W4A16_G32_BF16", {}, 14),
        ("W3A16_G32_BF16", {"layers.1.mlp": None}, 11),
        ("W2A16_G32_BF16", {"down_proj": "W8A16_CHANNEL_BF16"}, 14),
        ("W8A16_CHANNEL_BF16", {}, 14),
        ("W4A16_ASYM_G32_BF16", {"layers.0.mlp": None}, 11),
        ("W3A16_ASYM_G64_BF16", {}, 14),
    ],
)
def test_compressed_tensors_of_ours_are_loaded(
    scheme: str, dynamic: dict[str, str | None], layers: int, tmp_path: Path
) -> None:
    require(CLIENT)
    source = model(tmp_path / "model", torch.bfloat16)
    out = exported(source, tmp_path, scheme, "compressed-tensors", dynamic=dynamic)
    answer = ask(CLIENT, tmp_path / "client", do="stock", model=out, dtype="bfloat16")
    loaded = lowbit.load(out)
    ours, theirs = our_weights(loaded), their_weights(answer)
    plain = {name: theirs.pop(name) for name in theirs.keys() - ours.keys()}
    assert len(plain) == LAYERS - layers
    require_equal_weights(ours, theirs, torch.bfloat16, layers)
    assert torch.equal(our_logits(out), answer["logits"])


@pytest.mark.pair(
    "compressed-tensors (W8A8)", "write", CLIENT, "equal weights, logits within rounding"
)
@pytest.mark.parametrize("scheme", ["W8A8_BF16"])
def test_int8_activations_of_ours_are_loaded(scheme: str, tmp_path: Path) -> None:
    require(CLIENT)
    source = model(tmp_path / "model", torch.bfloat16)
    out = exported(source, tmp_path, scheme, "compressed-tensors")
    answer = ask(CLIENT, tmp_path / "client", do="stock", model=out, dtype="bfloat16")
    ours = our_weights(lowbit.load(out))
    require_equal_weights(ours, their_weights(answer), torch.bfloat16, LAYERS)
    plain = lowbit.convert(out, tmp_path / "plain", "bf16", progress=False).path
    cost = relative(our_logits(out), our_logits(plain))
    # Its scale per token is max / 127.5, ours max / 127: two independent errors of the size that
    # rounding costs differ by the root of two.
    assert relative(answer["logits"], our_logits(out)) < 1.6 * cost


@pytest.mark.pair("bnb", "write", CLIENT, "equal weights and logits")
@pytest.mark.parametrize(
    ("scheme", "dynamic"),
    [
        ("NF4_G32", {"layers.1.mlp": None}),
        ("NF4_G64_FP32", {}),
        ("FP4BNB_G32_FP32", {}),
    ],
)
def test_bitsandbytes_of_ours_is_loaded(
    scheme: str, dynamic: dict[str, str | None], tmp_path: Path
) -> None:
    require(CLIENT)
    source = model(tmp_path / "model")
    out = exported(source, tmp_path, scheme, "bnb", dynamic=dynamic)
    answer = ask(CLIENT, tmp_path / "client", do="stock", model=out)
    ours, theirs = our_weights(lowbit.load(out)), their_weights(answer)
    theirs = {name: theirs[name] for name in ours}
    require_equal_weights(ours, theirs, torch.float32, LAYERS - 3 * len(dynamic))
    assert torch.equal(our_logits(out), answer["logits"])


@pytest.mark.pair("bnb", "read", CLIENT, "equal weights and logits")
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_what_bitsandbytes_wrote_is_read(kind: str, nested: bool, tmp_path: Path) -> None:
    require(CLIENT)
    source, out = model(tmp_path / "model"), tmp_path / "client"
    answer = ask(CLIENT, out, do="write_bnb", model=source, kind=kind, nested=nested)
    loaded = lowbit.load(out / "written")
    require_equal_weights(our_weights(loaded), their_weights(answer), torch.float32, LAYERS)
    assert torch.equal(our_logits(out / "written"), answer["logits"])


@pytest.mark.pair("bf16", "write", CLIENT, "equal weights and logits")
@pytest.mark.parametrize("scheme", ["W4A16_ASYM_G32", "NF4_DQ"])
def test_decoded_models_are_loaded(scheme: str, tmp_path: Path) -> None:
    require(CLIENT)
    source = model(tmp_path / "model", torch.bfloat16)
    out = exported(source, tmp_path, scheme, "bf16")
    answer = ask(CLIENT, tmp_path / "client", do="stock", model=out, dtype="bfloat16")
    ours = our_weights(lowbit.load(tmp_path / "quantized"))
    require_equal_weights(ours, their_weights(answer), torch.bfloat16, LAYERS)
    assert torch.equal(our_logits(out), answer["logits"])


@pytest.mark.pair("gguf", "write", CLIENT, "equal weights")
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"])
def test_gguf_of_ours_is_loaded(kind: str, tmp_path: Path) -> None:
    """transformers decodes GGUF to floats, with the `gguf` package."""
    require(CLIENT)
    source = model(tmp_path / "model", hidden_size=256)
    out = tmp_path / "out"
    lowbit.convert(source, out, "gguf", gguf=GgufOptions(kind), progress=False)
    request = {"do": "stock", "model": out, "gguf_file": "model.gguf"}
    answer = ask(CLIENT, tmp_path / "client", **request)
    loaded = lowbit.load(out / "model.gguf", dtype=torch.float32)
    ours, theirs = our_weights(loaded), their_weights(answer)
    dense = {n: p.detach() for n, p in loaded.named_parameters() if n.endswith("_proj.weight")}
    # Types that no scheme of ours has are decoded to bf16 here.
    for name, weight in theirs.items():
        if name in ours:
            assert torch.equal(ours[name], weight), name
        else:
            assert torch.equal(dense[f"{name}.weight"], weight.bfloat16().float()), name
    assert len(theirs) == LAYERS
