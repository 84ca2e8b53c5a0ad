"""Int8 activations: the grammar, what a product means, gradients, and stored scales."""

from __future__ import annotations

import dataclasses

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor

from lowbit import ops
from lowbit.algorithms import make_algorithm
from lowbit.errors import LowbitError
from lowbit.nn.linear import QuantLinear
from lowbit.quant import Grid, QuantizedWeight, integer_product, quantize_activations
from lowbit.scheme import Scheme

BOTH = ("W8A8", "W8A8_STATIC")
SHAPE = (24, 75)  # no multiple of a packed word


def random_int8(scheme: str, shape: tuple[int, int] = SHAPE, seed: int = 0) -> QuantizedWeight:
    """Returns a weight with every code, and an input scale where the scheme stores one."""
    parsed = Scheme.parse(scheme)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    scales = torch.rand(shape[0], 1, generator=generator) * 0.02 + 0.001
    static = parsed.activations == "int8_static"
    input_scale = torch.tensor([0.0173]) if static else None
    grid = Grid.storable(parsed, shape[1], scales, None)
    return QuantizedWeight.from_codes(codes, grid, input_scale)


def expected(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """Returns the oracle's product, float64."""
    codes, scales = weight.codes().numpy(), weight.scale.double().squeeze(-1).numpy()
    scale = None if weight.input_scale is None else float(weight.input_scale)
    rows = [oracles.int8_linear(row, codes, scales, scale) for row in x.double().numpy()]
    return torch.from_numpy(np.stack(rows))


def off_ties(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """Returns x with what is next to a tie moved off it: there, float32 may round either way."""
    double = x.double()
    largest = double.abs().amax(-1, keepdim=True)
    scale = largest / 127 if weight.input_scale is None else weight.input_scale.double()
    codes = double / scale
    tie = ((codes - codes.floor()) - 0.5).abs() < 1e-3
    return torch.where(tie, (codes.floor() * scale).to(x.dtype), x)


@pytest.mark.parametrize(
    ("text", "canonical", "activations"),
    [
        ("w8a8", "W8A8", "int8"),
        ("W8A8_CHANNEL_FP16", "W8A8", "int8"),
        ("W8A8_BF16", "W8A8_BF16", "int8"),
        ("W8A8_FP32_STATIC", "W8A8_STATIC_FP32", "int8_static"),
        ("W8A8_STATIC", "W8A8_STATIC", "int8_static"),
        ("W8A16_CHANNEL", "W8A16_CHANNEL", None),
    ],
)
def test_grammar(text: str, canonical: str, activations: str | None) -> None:
    scheme = Scheme.parse(text)
    assert (str(scheme), scheme.activations) == (canonical, activations)
    assert (scheme.bits, scheme.group_size, scheme.symmetric) == (8, None, True)
    assert Scheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("W4A8", "4-bit weights with 8-bit activations .* W4A16"),
        ("W8A4", "8-bit weights with 4-bit activations"),
        ("W8A8_G128", "not with group size 128; use W8A8"),
        ("W8A8_ASYM", "zero points"),
        ("W8A8_STATIC_DQ", "double quantization"),
        ("W8A16_STATIC", "unknown scheme"),
        ("NF4_STATIC", "unknown scheme"),
        ("W8A8_STATIC_STATIC", "activations twice"),
    ],
)
def test_what_does_not_exist_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(LowbitError, match=sentence):
        Scheme.parse(text)


def test_fields_that_do_not_fit_are_refused() -> None:
    with pytest.raises(LowbitError, match="codebook nf4"):
        Scheme(codebook="nf4", group_size=None, activations="int8")
    with pytest.raises(LowbitError, match="unknown activations 'fp8'"):
        Scheme(bits=8, group_size=None, activations="fp8")


def test_static_stores_one_scale_more() -> None:
    dynamic, static = (Scheme.parse(name).tensor_specs(SHAPE) for name in BOTH)
    assert dynamic == Scheme.parse("W8A16_CHANNEL").tensor_specs(SHAPE)
    assert static == {**dynamic, "input_scale": ((1,), torch.float32)}


@pytest.mark.parametrize("scheme", BOTH)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_product_is_that_of_the_oracle(scheme: str, dtype: torch.dtype) -> None:
    weight = random_int8(scheme)
    x = torch.randn(7, SHAPE[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    x[2] = 0
    x[3] *= 1e-3
    x[4, 0] = 50.0  # an outlier: the rest of its token, or of a static range, is coarse
    x = off_ties(x, weight)
    bias = torch.linspace(-1, 1, SHAPE[0], dtype=dtype)
    wanted = expected(x, weight) + bias.double()
    found = ops.linear(x, weight, bias)
    assert found.dtype == dtype
    precision = max(torch.finfo(dtype).eps, 2**-40)
    computed = 2**-40 if dtype == torch.float64 else 2**-20  # float32 before the last rounding
    bound = precision * wanted.abs() + computed * wanted.abs().max()
    assert bool(((found.double() - wanted).abs() <= bound).all())
    assert torch.equal(ops.linear(x, weight)[2], torch.zeros(SHAPE[0], dtype=dtype))


@pytest.mark.parametrize("scheme", BOTH)
def test_what_is_not_finite_stays_in_its_token(scheme: str) -> None:
    weight = random_int8(scheme)
    x = torch.randn(4, SHAPE[1], generator=torch.Generator().manual_seed(2))
    clean = ops.linear(x, weight)
    x[1, 5], x[2, 5] = torch.nan, torch.inf
    found = ops.linear(x, weight)
    assert torch.equal(found[[0, 3]], clean[[0, 3]])
    assert bool(found[1].isnan().all())
    if scheme == "W8A8":
        assert bool(found[2].isnan().all())
    else:
        x[2, 5] = 1e30
        assert torch.equal(found[2], ops.linear(x, weight)[2])
        assert bool(found[2].isfinite().all())


def test_scales_of_tokens() -> None:
    x = torch.tensor([[0.0, 0.0], [127.0, -63.5], [2.5, -127.0], [1e-40, 0.0]])
    codes, scales = quantize_activations(x, None)
    assert codes[:3].tolist() == [[0, 0], [127, -64], [2, -127]]  # halves to even
    assert scales[1:3].flatten().tolist() == [1, 1]
    assert bool((scales > 0).all())
    codes, scales = quantize_activations(x[1:2], torch.tensor([0.25]))
    assert codes.tolist() == [[127, -127]]
    assert scales.tolist() == [[0.25]]


@pytest.mark.parametrize("columns", [1, 1024, 1025, 3000])
def test_integer_sums_are_exact(columns: int) -> None:
    codes = torch.full((2, columns), -128, dtype=torch.int8)
    codes[1, ::2] = 127
    x_codes = torch.full((1, columns), 127.0)
    wanted = (codes.long().sum(1) * 127).tolist()
    assert integer_product(x_codes, codes).tolist() == [wanted]


def test_sums_that_could_overflow_are_refused() -> None:
    codes = torch.zeros(1, 2**17 + 1, dtype=torch.int8)
    with pytest.raises(LowbitError, match=r"131073 input features .* W8A16_CHANNEL"):
        integer_product(torch.zeros(1, 2**17 + 1), codes)


@pytest.mark.parametrize("scheme", BOTH)
def test_gradients_go_straight_through_the_rounding(scheme: str) -> None:
    weight = random_int8(scheme)
    x = torch.randn(2, 3, SHAPE[1], requires_grad=True)
    bias = torch.randn(SHAPE[0], requires_grad=True)
    grad = torch.randn(2, 3, SHAPE[0])
    ops.linear(x, weight, bias).backward(grad)
    assert x.grad is not None
    assert bias.grad is not None
    torch.testing.assert_close(x.grad, grad @ weight.dequantize())
    torch.testing.assert_close(bias.grad, grad.sum((0, 1)))


@pytest.mark.parametrize("scheme", BOTH)
def test_operator_passes_opcheck(scheme: str) -> None:
    weight = random_int8(scheme)
    arguments = (
        torch.randn(3, SHAPE[1], requires_grad=True),
        weight.packed,
        weight.scale,
        None,
        None,
        None,
        weight.input_scale,
        torch.randn(SHAPE[0]),
        scheme,
        SHAPE[1],
    )
    torch.library.opcheck(torch.ops.lowbit.linear.default, arguments)


@pytest.mark.parametrize("search", [True, False])
def test_weight_scales_are_positive(search: bool) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(3))
    weight[3] = -weight[3].abs()
    weight[5] = 0
    result = make_algorithm("rtn", search=search).quantize(weight, Scheme.parse("W8A8"), None)
    assert bool((result.grid.scales > 0).all())
    error = (result.grid.dequantize(result.codes) - weight).abs()
    # Half a step of absmax, a little more where the search clips.
    assert bool((error <= 0.75 * weight.abs().amax(1, keepdim=True) / 127 + 1e-6).all())


def test_input_scale_belongs_to_static_schemes_only() -> None:
    weight = random_int8("W8A8_STATIC")
    tensors = weight.tensors()
    assert torch.equal(tensors["input_scale"], torch.tensor([0.0173]))
    again = QuantizedWeight.from_tensors(weight.scheme, SHAPE, tensors)
    assert again.input_scale is tensors["input_scale"]
    grid = weight.grid()
    with pytest.raises(LowbitError, match="needs a calibrated input_scale"):
        QuantizedWeight.from_codes(weight.codes(), grid)
    dynamic = dataclasses.replace(grid, scheme=Scheme.parse("W8A8"))
    with pytest.raises(LowbitError, match="stores no input_scale"):
        QuantizedWeight.from_codes(weight.codes(), dynamic, weight.input_scale)
    del tensors["input_scale"]
    with pytest.raises(LowbitError, match="needs the tensor input_scale"):
        QuantizedWeight.from_tensors(weight.scheme, SHAPE, tensors)


@pytest.mark.parametrize("scheme", BOTH)
def test_modules_hold_the_input_scale(scheme: str) -> None:
    weight = random_int8(scheme)
    layer = QuantLinear.from_quantized(weight, compute_dtype=torch.float32)
    x = torch.randn(5, SHAPE[1])
    y = layer(x)
    assert torch.equal(y, ops.linear(x, weight))
    layer.prepare()
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert set(state) == set(weight.scheme.tensor_specs(SHAPE))
    empty = QuantLinear(SHAPE[1], SHAPE[0], False, weight.scheme, torch.float32)
    empty.load_state_dict(state)
    # Casts keep stored scales. Native kernels may run this one, in another order of roundings.
    torch.testing.assert_close(empty.half()(x), y, rtol=1e-5, atol=1e-5)
    assert torch.equal(empty.state_dict()["weight_scale"], state["weight_scale"])
