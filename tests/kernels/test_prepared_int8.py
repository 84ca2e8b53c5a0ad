"""Weights of W8A8 for Triton's int8 kernels: the way there and back, products, siblings.

On the GPU where there is one, else in Triton's interpreter with a backend that takes the CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fragment_weights import DEVICE
from lowbit_kernels.gpu import support, w8a8
from torch import Tensor, nn

from lowbit import backends
from lowbit.backends import Request
from lowbit.backends.dequantize import DequantizeBackend
from lowbit.backends.int8 import Int8Prepared
from lowbit.backends.triton import TritonBackend
from lowbit.nn import QuantLinear, prepare_model
from lowbit.quant import Grid, QuantizedWeight
from lowbit.scheme import Scheme

every_scheme = pytest.mark.parametrize("scheme", ["W8A8", "W8A8_BF16", "W8A8_STATIC_FP32"])


class AnywhereTriton(TritonBackend):
    """Also takes CPU tensors, for the interpreter."""

    def refusal(self, request: Request) -> str | None:
        return None if request.prepared else "not prepared"


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    others = [backend for backend in backends.BACKENDS if backend.name != "cpu"]
    monkeypatch.setattr(backends, "BACKENDS", [AnywhereTriton(), *others])
    backends.select.cache_clear()
    yield
    backends.select.cache_clear()


def random_int8(
    scheme: str, shape: tuple[int, int], seed: int, input_scale: float = 0.0173
) -> QuantizedWeight:
    """Returns a weight with every code on the device under test."""
    parsed = Scheme.parse(scheme)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    scales = torch.exp(torch.randn(shape[0], 1, generator=generator) / 2 - 4)
    grid = Grid.storable(parsed, shape[1], scales.to(DEVICE), None)
    static = parsed.activations == "int8_static"
    given = torch.tensor([input_scale], device=DEVICE) if static else None
    return QuantizedWeight.from_codes(codes.to(DEVICE), grid, given)


def random_x(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(DEVICE, dtype)


def assert_is(weight: Any, qweight: QuantizedWeight) -> None:
    """Fails unless the canonical tensors of `weight` are those of `qweight` bit for bit."""
    back = weight.canonical()
    assert (back.scheme, back.shape) == (qweight.scheme, qweight.shape)
    expected = qweight.tensors()
    assert back.tensors().keys() == expected.keys()
    for name, tensor in back.tensors().items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])


@every_scheme
@pytest.mark.parametrize("shape", [(40, 64), (33, 75), (1, 1)], ids=str)
def test_there_and_back_bit_for_bit(scheme: str, shape: tuple[int, int], seed: int) -> None:
    qweight = random_int8(scheme, shape, seed)
    weight = Int8Prepared.of(qweight)
    assert_is(weight, qweight)
    assert_is(weight.with_tensors(copy.deepcopy(weight.tensors())), qweight)
    assert torch.equal(weight.dequantize(torch.float32), qweight.dequantize())
    rows = torch.tensor([shape[0] - 1, 0, 0], device=DEVICE)
    assert torch.equal(weight.dequantize_rows(rows, torch.half), qweight.dequantize()[rows].half())


@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy, of the codes of NaN
@every_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_are_those_of_the_reference(scheme: str, dtype: torch.dtype, seed: int) -> None:
    qweight = random_int8(scheme, (130, 168), seed)
    weight = Int8Prepared.of(qweight)
    x = random_x(5, 168, seed, dtype)
    x[1], x[2, 3], x[3, 5] = 0, torch.nan, torch.inf
    bias = torch.linspace(-1, 1, 130, device=DEVICE).to(dtype)
    step = torch.finfo(dtype).eps  # one rounding, of sums that agree to float32
    torch.testing.assert_close(
        weight.linear(x, bias),
        DequantizeBackend().linear(x, qweight, bias),
        rtol=step,
        atol=1e-5,
        equal_nan=True,
    )


@every_scheme
def test_gradients_go_straight_through(scheme: str, seed: int) -> None:
    qweight = random_int8(scheme, (33, 75), seed)
    weight = Int8Prepared.of(qweight)
    x = random_x(4, 75, seed).requires_grad_()
    grad = random_x(4, 33, seed + 1)
    weight.linear(x, None).backward(grad)
    expected = grad @ qweight.dequantize()
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad_input(grad), expected, rtol=1e-5, atol=1e-5)


@every_scheme
def test_joined_weights_share_memory_and_results(scheme: str, seed: int) -> None:
    qweights = [random_int8(scheme, (rows, 75), seed + rows) for rows in (130, 33, 64)]
    weights = [Int8Prepared.of(qweight) for qweight in qweights]
    joined = weights[0].join(weights[1:])
    assert joined is not None
    assert joined.starts == (0, 130, 163)
    x = random_x(2, 75, seed)
    whole = joined.weight.linear(x, None)
    for part, start, weight, qweight in zip(
        joined.parts, joined.starts, weights, qweights, strict=True
    ):
        assert torch.equal(whole[:, start : start + part.shape[0]], weight.linear(x, None))
        assert torch.equal(part.linear(x, None), weight.linear(x, None))
        assert_is(part, qweight)
        ours = part.tensors()["codes"].untyped_storage().data_ptr()
        assert ours == joined.weight.tensors()["codes"].untyped_storage().data_ptr()


def test_what_differs_is_not_joined(seed: int) -> None:
    first = Int8Prepared.of(random_int8("W8A8_STATIC", (40, 75), seed))
    for scheme, columns, scale in (
        ("W8A8", 75, 0.0173),
        ("W8A8_STATIC", 64, 0.0173),
        ("W8A8_STATIC", 75, 0.02),
    ):
        other = Int8Prepared.of(random_int8(scheme, (40, columns), seed, scale))
        assert first.join([other]) is None


@pytest.mark.usefixtures("triton")
@every_scheme
def test_layers_hold_it_and_run_as_siblings(
    scheme: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, qweights = nn.Module(), []
    for i, (name, rows) in enumerate((("q_proj", 130), ("k_proj", 33), ("v_proj", 64))):
        qweights.append(random_int8(scheme, (rows, 80), seed + i))
        block.add_module(name, QuantLinear.from_quantized(qweights[-1], None, torch.float16))
    block.to(DEVICE).eval()
    assert prepare_model(block) == 3
    assert all(isinstance(layer.operand, Int8Prepared) for layer in block.children())
    x = random_x(2, 80, seed, torch.float16)
    launches: list[int] = []
    run = w8a8.run
    monkeypatch.setattr(w8a8, "run", lambda *given: launches.append(1) or run(*given))

    def products(x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in block.children()]

    expected = [Int8Prepared.of(qweight).linear(x, None) for qweight in qweights]
    launches.clear()
    with torch.no_grad():
        for found, wanted in zip(products(x), expected, strict=True):
            assert torch.equal(found, wanted)
        assert len(launches) == 1
        torch._dynamo.reset()
        compiled: Any = torch.compile(products, fullgraph=True, backend="aot_eager")
        for found, wanted in zip(compiled(x), expected, strict=True):
            assert torch.equal(found, wanted)
    for layer, qweight in zip(block.children(), qweights, strict=True):
        state = layer.state_dict()
        for name, tensor in qweight.tensors().items():
            assert torch.equal(state[name].cpu(), tensor.cpu())


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "_device_refusal", lambda index: None)
    device = torch.device("cuda")

    def refusal(columns: int, is_prepared: bool = True) -> str | None:
        scheme = Scheme.parse("W8A8")
        request = Request(scheme, device, torch.bfloat16, 64, columns, is_prepared)
        return TritonBackend().refusal(request)

    assert refusal(4096) is None
    assert "prepare_model" in (refusal(4096, is_prepared=False) or "")
    assert "131072 input features" in (refusal(2**17) or "")
