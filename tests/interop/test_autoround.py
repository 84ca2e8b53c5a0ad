"""AutoRound, which writes GPTQ and AWQ files for others."""

from __future__ import annotations

from pathlib import Path

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

CLIENT = "autoround"
LAYERS = 14


def read(kind: str, bits: int, sym: bool, tmp_path: Path) -> None:
    """Reads what AutoRound wrote, and holds it against GPTQModel's reading of the same files."""
    require(CLIENT)
    require("gptqmodel")
    source, out = model(tmp_path / "model", torch.float16), tmp_path / "client"
    config = {"bits": bits, "group_size": 32, "sym": sym}
    ask(CLIENT, out, do="write_autoround", model=source, config=config, format=kind)
    (file,) = (out / "written").rglob("config.json")
    backend = "awq_torch" if kind == "auto_awq" else "gptq_torch"
    request = {"do": "load_gptqmodel", "model": file.parent, "backend": backend}
    answer = ask("gptqmodel", tmp_path / "again", **request)
    loaded = lowbit.load(file.parent, dtype=torch.float32)
    require_equal_weights(our_weights(loaded), their_weights(answer), torch.float16, LAYERS)
    with torch.no_grad():
        assert relative(answer["logits"], loaded(IDS).logits) < 5e-3


@pytest.mark.pair("gptq", "read", CLIENT, "equal weights, logits within fp16")
@pytest.mark.parametrize(("bits", "sym"), [(4, True), (2, True)])
def test_gptq_of_theirs_is_read(bits: int, sym: bool, tmp_path: Path) -> None:
    read("auto_gptq", bits, sym, tmp_path)


@pytest.mark.pair("awq", "read", CLIENT, "equal weights, logits within fp16")
def test_awq_of_theirs_is_read(tmp_path: Path) -> None:
    read("auto_awq", 4, False, tmp_path)
