"""Quantized modules: what they hold, what casts do to them, what others read of them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from test_ops import SCHEMES, random_qweight
from tiny_models import make_tiny
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowbit.errors import LowbitError
from lowbit.nn import QuantEmbedding, QuantLinear, TiedQuantLinear
from lowbit.nn.replace import replace_modules, restore_modules, tied_head_name
from lowbit.scheme import Scheme


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_dict_has_exactly_the_tensors_of_the_scheme(scheme: str) -> None:
    qweight = random_qweight(scheme, (33, 75))
    layer = QuantLinear.from_quantized(qweight, torch.ones(33))
    specs = qweight.scheme.tensor_specs((33, 75))
    state = layer.state_dict()
    assert state.keys() == {*specs, "bias"}
    for name, (size, dtype) in specs.items():
        assert (tuple(state[name].shape), state[name].dtype) == (size, dtype)
    assert state["weight_shape"].tolist() == [33, 75]
    empty = QuantLinear(75, 33, True, qweight.scheme, device="meta")
    assert {k: (v.shape, v.dtype) for k, v in empty.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in state.items()
    }


def test_linear_equals_linear_with_the_decoded_weight() -> None:
    qweight = random_qweight("W4A16_G32", (33, 75))
    bias = torch.randn(33, dtype=torch.bfloat16)
    layer = QuantLinear.from_quantized(qweight, bias)
    x = torch.randn(2, 5, 75, dtype=torch.bfloat16)
    assert torch.equal(layer(x), F.linear(x, qweight.dequantize(torch.bfloat16), bias))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("cast", ["half", "double", "to"])
def test_casting_a_module_leaves_stored_tensors_alone(scheme: str, cast: str) -> None:
    layer = QuantLinear.from_quantized(random_qweight(scheme, (33, 75)), torch.ones(33))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    parent = nn.Sequential(layer, nn.LayerNorm(33))
    dtype = {"half": torch.float16, "double": torch.float64, "to": torch.float32}[cast]
    parent.to(dtype) if cast == "to" else getattr(parent, cast)()
    for name in layer.scheme.tensor_specs((33, 75)):
        after = layer.state_dict()[name]
        assert after.dtype == before[name].dtype
        assert torch.equal(after, before[name])
    assert layer.compute_dtype == layer.bias.dtype == layer.weight.dtype == dtype
    assert parent(torch.randn(2, 75, dtype=dtype)).dtype == dtype


def test_what_peft_reads_is_there() -> None:
    qweight = random_qweight("W4A16_G32", (33, 75))
    layer = QuantLinear.from_quantized(qweight)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (75, 33)
    assert layer.W_q.data_ptr() == layer.qweight.data_ptr() == qweight.packed.data_ptr()
    assert torch.equal(layer.dequantize(), qweight.dequantize(torch.bfloat16))
    assert torch.equal(layer.dequantize(torch.float32), qweight.dequantize())
    assert torch.equal(layer.weight, qweight.dequantize(torch.bfloat16))
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert "W4A16_G32" in repr(layer)


def test_scales_are_no_parameters_so_the_model_keeps_its_dtype() -> None:
    for scheme in ("W4A16_G32", "W4A16_G32_FP32", "W4A16_G32_DQ"):
        model = make_tiny("llama", torch.bfloat16)
        names = ["model.embed_tokens", "model.layers.0.self_attn.q_proj"]
        replace_modules(model, dict.fromkeys(names, Scheme.parse(scheme)), False, model.dtype)
        assert model.dtype == torch.bfloat16


def test_embedding_decodes_the_asked_rows() -> None:
    qweight = random_qweight("W4A16_G32", (33, 64))
    module = QuantEmbedding.from_quantized(qweight, padding_idx=3)
    ids = torch.tensor([[0, 3], [32, 1]])
    assert torch.equal(module(ids), qweight.dequantize(torch.bfloat16)[ids])
    assert isinstance(module, nn.Embedding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_embedding_multiplies_as_gemma_does(dtype: torch.dtype) -> None:
    # sqrt(hidden) must not be exact, else every way to round it is right.
    model = make_tiny("gemma3_text", dtype, hidden_size=80, head_dim=20)
    gemma = model.get_input_embeddings()
    assert gemma.scalar_embed_scale**2 == pytest.approx(80)
    qweight = random_qweight("W4A16_G32", (256, 80))
    gemma.weight = nn.Parameter(qweight.dequantize(dtype))
    ours = QuantEmbedding.from_quantized(qweight, dtype, embed_scale=gemma.scalar_embed_scale)
    ids = torch.arange(256)[None]
    assert torch.equal(ours(ids), gemma(ids))


def test_tied_head_follows_the_embedding() -> None:
    qweight = random_qweight("W4A16_G32", (33, 64))
    embedding = QuantEmbedding.from_quantized(qweight, torch.float32)
    pair = nn.ModuleDict({"embedding": embedding, "head": TiedQuantLinear(embedding, None)})
    x = torch.randn(2, 64)
    expected = F.linear(x, qweight.dequantize())
    assert torch.equal(pair["head"](x), expected)
    assert not [name for name in pair.state_dict() if name.startswith("head")]
    twin = copy.deepcopy(pair)
    twin["embedding"].weight_scale.zero_()
    assert torch.equal(twin["head"](x), torch.zeros(2, 33))
    assert torch.equal(pair["head"](x), expected)
    with pytest.raises(LowbitError, match="offloaded"):
        pair.to("meta")["head"](x)


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "gemma3_text"])
def test_restoring_goes_back_to_the_original_classes(family: str) -> None:
    model = make_tiny(family)
    classes = {name: type(module) for name, module in model.named_modules()}
    head = tied_head_name(model)
    embedding = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    linears = [n for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D) and n != head]
    replace_modules(
        model, dict.fromkeys([embedding, *linears], Scheme.parse("W4A16_G32")), False, model.dtype
    )
    assert isinstance(model.get_submodule(head), TiedQuantLinear)
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, (QuantLinear, QuantEmbedding)):
            for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                tensor.data.zero_()
    restore_modules(model, torch.float32)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert model.get_submodule(head).weight is model.get_input_embeddings().weight
    assert tied_head_name(model) == head
