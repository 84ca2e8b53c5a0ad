"""The decoder of the CPU benchmark, and the GGUF file with the very same weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lowbit_kernels.cpu import library as native
from torch import Tensor

BENCHMARKS = Path(__file__).parents[2] / "kernels/benchmarks"
sys.path.append(str(BENCHMARKS))

import cpu_decoder  # noqa: E402 - after the path
import cpu_gguf  # noqa: E402
from cpu_candidates import Inputs, make_inputs  # noqa: E402
from cpu_linear import Journal  # noqa: E402
from cpu_units import Settings  # noqa: E402

from lowbit.errors import LowbitError  # noqa: E402
from lowbit.scheme import Scheme  # noqa: E402


def tiny_inputs(scheme: str) -> Inputs:
    """Returns inputs with a small weight."""
    return make_inputs(scheme, (32, 256), lambda size: 1, (1,), tokens=1)


def decoded(blocks: Tensor, bits: int) -> Tensor:
    """Returns float32 weights of Q4_0 or Q8_0 blocks, by their definition in ggml."""
    size = 2 + 32 * bits // 8
    parts = blocks.view(blocks.shape[0], -1, size)
    scale = parts[..., :2].contiguous().view(torch.float16).float()
    body = parts[..., 2:]
    if bits == 8:
        return (body.contiguous().view(torch.int8).float() * scale).flatten(1)
    codes = torch.cat((body & 15, body >> 4), dim=2).float() - 8
    return (codes * scale).flatten(1)


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_G32", "W8A16"])
def test_gguf_blocks_hold_the_very_weights(scheme: str) -> None:
    inputs = tiny_inputs(scheme)
    bits = Scheme.parse(scheme).bits
    blocks = cpu_gguf.blocks_of(inputs.qweight.codes(), inputs.qweight.scale, bits)
    assert torch.equal(decoded(blocks, bits), inputs.weight)


def test_gguf_refuses_other_groups_and_names() -> None:
    inputs = tiny_inputs("W4A16_G16")
    with pytest.raises(LowbitError, match="multiple of 32"):
        cpu_gguf.blocks_of(inputs.qweight.codes(), inputs.qweight.scale, 4)
    with pytest.raises(LowbitError, match=r"layers\.0\.mlp\.gate"):
        cpu_gguf.gguf_name("model.layers.0.mlp.gate")
    assert cpu_gguf.gguf_name("model.layers.11.mlp.down_proj") == "blk.11.ffn_down"
    with pytest.raises(LowbitError, match="llama3"):
        cpu_gguf.rope_theta({"rope_parameters": {"rope_type": "llama3"}})


def test_rows_are_in_the_order_of_llama_cpp_s_rotation() -> None:
    heads, half = 3, 4
    rows = torch.arange(heads * 2 * half)[:, None]
    moved = cpu_gguf.interleaved(rows, heads).view(heads, half, 2)
    for head in range(heads):
        for i in range(half):
            first = head * 2 * half + i
            assert moved[head, i].tolist() == [first, first + half]


@pytest.mark.skipif(native.unavailable_reason() is not None, reason="there are no native kernels")
def test_a_decoder_is_measured_and_its_gguf_is_the_same_model(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "lines", tmp_path / "current")
    settings = Settings(threads=(1,), rounds=1, tiny=True)
    cpu_decoder.run(settings, journal, tmp_path)
    row = json.loads((tmp_path / "lines").read_text())
    assert list(row["candidates"]) == ["bf16", "lowbit A16", "lowbit A8"]
    for entry in row["candidates"].values():
        assert entry["logit_error"] < 0.1
        assert entry["step_low_ms"] <= entry["step_ms"] <= entry["step_high_ms"]
        assert len(entry["prefill_seconds"]) == 1
    assert (
        row["candidates"]["lowbit A8"]["logit_error"]
        > row["candidates"]["lowbit A16"]["logit_error"]
    )
    assert (
        "gguf" in row["refused"]["llama.cpp q4_0"] or "--llama" in row["refused"]["llama.cpp q4_0"]
    )
    tensors = {
        name: (tensor, bits) for name, tensor, bits in cpu_gguf.tensors_of(tmp_path / "W4A16")
    }
    layers = cpu_decoder.TINY_SHAPE["num_hidden_layers"]
    assert len(tensors) == 2 + 9 * layers  # the head is the embedding
    model: Any = cpu_decoder.load_model(str(tmp_path / "W4A16"), "float32", torch.device("cpu"))
    layer = model.model.layers[1]
    assert torch.equal(decoded(*tensors["blk.1.ffn_up.weight"]), layer.mlp.up_proj.dequantize())
    assert torch.equal(tensors["blk.1.ffn_norm.weight"][0], layer.post_attention_layernorm.weight)
    keys = cpu_gguf.interleaved(layer.self_attn.k_proj.dequantize(), 2)
    assert torch.equal(decoded(*tensors["blk.1.attn_k.weight"]), keys)
