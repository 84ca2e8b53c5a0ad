"""The operators: decoding, accuracy, gradients, and what torch's machinery demands of them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import build_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowbit import ops
from lowbit.errors import LowbitError
from lowbit.hf.config import LowbitConfig
from lowbit.quant import Grid, QuantizedWeight
from lowbit.quant import qweight as qweight_module
from lowbit.scheme import Scheme

SCHEMES = [
    *(f"W{bits}A16_G32" for bits in (2, 3, 4, 8)),
    *(f"W{bits}A16_ASYM_G32" for bits in (2, 3, 4, 8)),
    "W4A16_CHANNEL",
    "W4A16_G32_BF16",
    "W4A16_G32_FP32",
    "W4A16_G32_DQ",
    "W3A16_ASYM_G16_DQ",
    "NF4",
    "NF4_DQ",
    "FP4_G32",
]
# Neither size is a multiple of a group, a packed word, or a unit of 3-bit codes.
SHAPES = [(40, 64), (33, 75), (16, 168)]


def random_qweight(scheme: str, shape: tuple[int, int], seed: int = 0) -> QuantizedWeight:
    """Returns a weight with random codes, scales of both signs where allowed, and zero points."""
    parsed = Scheme.parse(scheme)
    generator = torch.Generator().manual_seed(seed)
    groups = parsed.groups(shape[1])
    scales = torch.rand(shape[0], groups, generator=generator) * 0.02 + 0.001
    if parsed.signed_scales:
        scales *= torch.randint(0, 2, scales.shape, generator=generator) * 2 - 1
    low, high = parsed.code_min, parsed.code_max + 1
    zeros = None
    if not parsed.symmetric:
        zeros = torch.randint(low, high, scales.shape, generator=generator).float()
    codes = torch.randint(low, high, shape, generator=generator, dtype=torch.int8)
    return QuantizedWeight.from_codes(codes, Grid.storable(parsed, shape[1], scales, zeros))


def arguments(x: Tensor, qweight: QuantizedWeight, bias: Tensor | None) -> tuple[object, ...]:
    """Returns the arguments of `torch.ops.lowbit.linear`."""
    return (
        x,
        qweight.packed,
        qweight.scale,
        qweight.zero_point,
        qweight.scale_offset,
        qweight.scale_step,
        qweight.input_scale,
        bias,
        str(qweight.scheme),
        qweight.in_features,
    )


@pytest.mark.parametrize(("scheme", "shape"), list(itertools.product(SCHEMES, SHAPES)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_activations_print_the_decoded_weight(
    scheme: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    qweight = random_qweight(scheme, shape)
    decoded = qweight.dequantize(dtype)
    printed = ops.linear(torch.eye(shape[1], dtype=dtype), qweight).T
    assert torch.equal(printed, decoded)
    assert torch.equal(ops.dequantize(qweight, dtype), decoded)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_torch(scheme: str, dtype: torch.dtype) -> None:
    qweight = random_qweight(scheme, (33, 75))
    x = torch.randn(5, 75, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact_weight = qweight.dequantize().double()
    exact = x.double() @ exact_weight.T
    ours = (ops.linear(x, qweight).double() - exact).abs().max()
    torchs = (F.linear(x, exact_weight.to(dtype)).double() - exact).abs().max()
    assert ours <= 2 * torchs + torch.finfo(dtype).tiny


@pytest.mark.parametrize("scheme", SCHEMES)
def test_decoding_in_row_blocks_is_bit_identical(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    qweight = random_qweight(scheme, (33, 75))
    whole = ops.dequantize(qweight, torch.bfloat16)
    monkeypatch.setitem(qweight_module.BLOCK_WEIGHTS, "cpu", 5 * 75)
    assert torch.equal(ops.dequantize(qweight, torch.bfloat16), whole)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_embedding_returns_rows_of_the_decoded_weight(scheme: str) -> None:
    qweight = random_qweight(scheme, (33, 75))
    ids = torch.tensor([[0, 32, 5], [5, 31, 1]])
    rows = ops.embedding(ids, qweight, torch.bfloat16)
    assert torch.equal(rows, qweight.dequantize(torch.bfloat16)[ids])


@pytest.mark.parametrize("scheme", ["W3A16_ASYM_G32", "W4A16_G32", "W4A16_G32_DQ", "NF4"])
def test_operators_pass_opcheck(scheme: str) -> None:
    qweight = random_qweight(scheme, (33, 75))
    call = arguments(torch.randn(2, 3, 75, requires_grad=True), qweight, torch.randn(33))
    stored, rest = call[1:6], call[7:]
    namespace = torch.ops.lowbit
    torch.library.opcheck(namespace.linear.default, call)
    torch.library.opcheck(namespace.linear_grad_input.default, (torch.randn(2, 33), *stored, *rest))
    torch.library.opcheck(namespace.dequantize.default, (*stored, *rest, torch.bfloat16))
    ids = torch.tensor([[1, 2], [3, 4]])
    torch.library.opcheck(namespace.embedding.default, (ids, *stored, *rest, torch.float32))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_agree_with_finite_differences(scheme: str) -> None:
    qweight = random_qweight(scheme, (17, 35))
    x = torch.randn(2, 3, 35, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(17, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bias: ops.linear(x, qweight, bias), (x, bias))


def test_backward_keeps_only_stored_tensors() -> None:
    qweight = random_qweight("W4A16_G32", (64, 64))
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ops.linear(torch.randn(4, 64, requires_grad=True), qweight).sum().backward()
    assert {tensor.data_ptr() for tensor in kept} == {
        qweight.packed.data_ptr(),
        qweight.scale.data_ptr(),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_activations_and_not_scales(dtype: torch.dtype) -> None:
    qweight = random_qweight("W4A16_G32", (40, 64))
    x = torch.randn(3, 64)
    with torch.autocast("cpu", dtype=dtype):
        result = ops.linear(x, qweight, torch.ones(40))
    expected = F.linear(x.to(dtype), qweight.dequantize(dtype), torch.ones(40, dtype=dtype))
    assert result.dtype == dtype
    assert torch.equal(result, expected)


def test_wrong_width_of_activations_is_named() -> None:
    with pytest.raises(LowbitError, match="64 input features"):
        ops.linear(torch.randn(2, 63), random_qweight("W4A16_G32", (40, 64)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_models_compile_as_one_graph(family: str, tmp_path: Path) -> None:
    build_tiny(family, tmp_path)
    choice = LowbitConfig("W4A16_G32", quantize_embeddings=True, quantize_lm_head=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=choice)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        eager = model(ids, use_cache=False).logits
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        # "aot_eager" runs the whole tracing stack and skips only code generation.
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        # Decompositions of other operators round differently by an ulp or two.
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, eager)
    assert not torch._dynamo.utils.counters["graph_break"]
