"""GPTQModel: GPTQ in both versions, and AWQ.

Its plain kernel decodes in fp16, one rounding of the product that we take in fp32.
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
from transformers import AutoModelForCausalLM

import lowbit

CLIENT = "gptqmodel"
LAYERS = 14
# Logits of a model of fp16 weights and activations, against ours in fp32: the root mean square of
# the difference as a share of their deviation. fp16 has 11 bits, and errors of two blocks add up.
HALF = 5e-3


def check(loaded: torch.nn.Module, answer: dict[str, torch.Tensor]) -> None:
    require_equal_weights(our_weights(loaded), their_weights(answer), torch.float16, LAYERS)
    with torch.no_grad():
        assert relative(answer["logits"], loaded(IDS).logits) < HALF


def write(scheme: str, to: str, tmp_path: Path, backend: str) -> None:
    require(CLIENT)
    source = model(tmp_path / "model", torch.float16)
    out = exported(source, tmp_path, scheme, to)
    answer = ask(CLIENT, tmp_path / "client", do="load_gptqmodel", model=out, backend=backend)
    check(lowbit.load(out, dtype=torch.float32), answer)


@pytest.mark.pair("gptq", "write", CLIENT, "equal weights, logits within fp16")
@pytest.mark.parametrize("scheme", ["W4A16_G32", "W8A16_G64", "W3A16_G32", "W2A16_G32", "W4A16"])
def test_gptq_of_ours_is_loaded(scheme: str, tmp_path: Path) -> None:
    write(scheme, "gptq", tmp_path, "gptq_torch")


@pytest.mark.pair("gptq_v2", "write", CLIENT, "equal weights, logits within fp16")
@pytest.mark.parametrize(
    "scheme", ["W4A16_G32", "W4A16_ASYM_G32", "W8A16_ASYM_G64", "W3A16_ASYM_G32"]
)
def test_gptq_v2_of_ours_is_loaded(scheme: str, tmp_path: Path) -> None:
    write(scheme, "gptq_v2", tmp_path, "gptq_torch")


@pytest.mark.pair("awq", "write", CLIENT, "equal weights, logits within fp16")
@pytest.mark.parametrize("scheme", ["W4A16_ASYM_G32", "W4A16_G64"])
def test_awq_of_ours_is_loaded(scheme: str, tmp_path: Path) -> None:
    write(scheme, "awq", tmp_path, "awq_torch")


@pytest.mark.pair("awq", "write", "transformers with GPTQModel", "equal weights")
@pytest.mark.parametrize("scheme", ["W4A16_ASYM_G32"])
def test_transformers_loads_awq_of_ours_by_it(scheme: str, tmp_path: Path) -> None:
    require(CLIENT)
    out = exported(model(tmp_path / "model", torch.float16), tmp_path, scheme, "awq")
    answer = ask(CLIENT, tmp_path / "client", do="stock", model=out, dtype="float16")
    check(lowbit.load(out, dtype=torch.float32), answer)


@pytest.mark.pair("gptq", "write", "transformers with GPTQModel", "equal weights")
@pytest.mark.parametrize("scheme", ["W4A16_G32"])
def test_transformers_loads_gptq_of_ours_by_it(scheme: str, tmp_path: Path) -> None:
    require(CLIENT)
    out = exported(model(tmp_path / "model", torch.float16), tmp_path, scheme, "gptq")
    answer = ask(CLIENT, tmp_path / "client", do="stock", model=out, dtype="float16")
    check(lowbit.load(out, dtype=torch.float32), answer)


def read(config: dict[str, Any], tmp_path: Path, backend: str) -> tuple[Path, dict[str, Any]]:
    require(CLIENT)
    source, out = model(tmp_path / "model", torch.float16), tmp_path / "client"
    answer = ask(CLIENT, out, do="write_gptqmodel", model=source, config=config, backend=backend)
    return out / "written", answer


@pytest.mark.pair("gptq", "read", CLIENT, "equal weights, logits within fp16")
@pytest.mark.parametrize(("bits", "sym"), [(4, True), (8, True), (3, True), (2, True), (4, False)])
def test_gptq_of_theirs_is_read(bits: int, sym: bool, tmp_path: Path) -> None:
    config = {"bits": bits, "group_size": 32, "sym": sym, "desc_act": False}
    path, answer = read(config, tmp_path, "gptq_torch")
    check(lowbit.load(path, dtype=torch.float32), answer)


@pytest.mark.pair("gptq_v2", "read", CLIENT, "equal weights, logits within fp16")
@pytest.mark.parametrize("sym", [True, False])
def test_gptq_v2_of_theirs_is_read(sym: bool, tmp_path: Path) -> None:
    config = {"bits": 4, "group_size": 32, "sym": sym, "desc_act": False, "format": "gptq_v2"}
    path, answer = read(config, tmp_path, "gptq_torch")
    check(lowbit.load(path, dtype=torch.float32), answer)


@pytest.mark.pair("gptq (desc_act)", "read", CLIENT, "equal weights, converted")
@pytest.mark.parametrize("to", ["bf16", "gptq_v2"])
def test_columns_in_the_order_of_theirs_are_kept(to: str, tmp_path: Path) -> None:
    config = {"bits": 4, "group_size": 32, "sym": True, "desc_act": True, "act_group_aware": False}
    path, answer = read(config, tmp_path, "gptq_torch")
    theirs = their_weights(answer)
    out = lowbit.convert(path, tmp_path / "out", to, progress=False).path
    if to == "bf16":
        plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        found = {name: plain.get_submodule(name).weight.detach() for name in theirs}
        assert all(relative(found[name], weight) < 3e-3 for name, weight in theirs.items())
        return
    again = ask(CLIENT, tmp_path / "again", do="load_gptqmodel", model=out, backend="gptq_torch")
    require_equal_weights(their_weights(again), theirs, torch.float16, LAYERS)


@pytest.mark.pair("awq", "read", CLIENT, "equal weights, logits within fp16")
@pytest.mark.parametrize("size", [32, 64])
def test_awq_of_theirs_is_read(size: int, tmp_path: Path) -> None:
    config = {"bits": 4, "group_size": size, "sym": False, "method": "awq", "format": "gemm"}
    path, answer = read(config, tmp_path, "awq_torch")
    check(lowbit.load(path, dtype=torch.float32), answer)
