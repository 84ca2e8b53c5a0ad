"""Stored weights in fragment order: the way there and back, and modules that hold them.

On the GPU where there is one, else in Triton's interpreter with a backend that takes the CPU.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fragment_weights import DEVICE, random_qweight
from lowbit_kernels.gpu import matmul, support
from schemes import every_scheme
from torch import Tensor, nn

from lowbit import backends
from lowbit.backends import PreparedWeight, Request
from lowbit.backends.fragment import FragmentPrepared
from lowbit.backends.triton import TritonBackend
from lowbit.nn import QuantEmbedding, QuantLinear, TiedQuantLinear, prepare_model
from lowbit.quant import QuantizedWeight
from lowbit.scheme import Scheme

SHAPES = [(40, 64), (33, 75), (130, 168)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
# Every kind of code, scale and zero point.
few_schemes = pytest.mark.parametrize(
    "scheme", ["W2A16_ASYM_CHANNEL", "W3A16_ASYM_G16_DQ", "W4A16_G32", "NF4_DQ", "W8A16_G64_BF16"]
)


class AnywhereTriton(TritonBackend):
    """Also takes CPU tensors, for the interpreter."""

    def refusal(self, request: Request) -> str | None:
        return None if request.prepared else "not prepared"


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backends, "BACKENDS", [AnywhereTriton(), *backends.BACKENDS])
    backends.select.cache_clear()
    yield
    backends.select.cache_clear()


def on_device(qweight: QuantizedWeight) -> QuantizedWeight:
    tensors = {name: tensor.to(DEVICE) for name, tensor in qweight.tensors().items()}
    return QuantizedWeight.from_tensors(qweight.scheme, qweight.shape, tensors)


def prepared(scheme: Scheme | str, shape: tuple[int, int], seed: int) -> FragmentPrepared:
    return FragmentPrepared.of(on_device(random_qweight(scheme, shape, seed)))


def assert_is(weight: PreparedWeight, qweight: QuantizedWeight) -> None:
    """Fails unless the canonical tensors of `weight` are those of `qweight` bit for bit."""
    back = weight.canonical()
    assert (back.scheme, back.shape) == (qweight.scheme, qweight.shape)
    expected = qweight.tensors()
    assert back.tensors().keys() == expected.keys()
    for name, tensor in back.tensors().items():
        assert tensor.dtype == expected[name].dtype
        assert tensor.is_contiguous()
        assert torch.equal(tensor.cpu(), expected[name])


@every_scheme
@every_shape
def test_there_and_back_bit_for_bit(scheme: Scheme, shape: tuple[int, int], seed: int) -> None:
    qweight = random_qweight(scheme, shape, seed)
    weight: PreparedWeight = FragmentPrepared.of(on_device(qweight))
    # Twice: going back overwrites nothing.
    for _ in range(2):
        assert_is(weight, qweight)
        assert_is(weight.for_mode(training=False), qweight)
        assert_is(weight.for_mode(training=False).for_mode(training=True), qweight)
    assert_is(weight.with_tensors(copy.deepcopy(weight.tensors())), qweight)


@every_scheme
@every_shape
@pytest.mark.parametrize("training", [False, True])
def test_decoding_is_that_of_the_reference(
    scheme: Scheme, shape: tuple[int, int], training: bool, seed: int
) -> None:
    qweight = random_qweight(scheme, shape, seed)
    weight = FragmentPrepared.of(on_device(qweight)).for_mode(training)
    exact = qweight.dequantize(torch.float32)
    assert torch.equal(weight.dequantize(torch.float32).cpu(), exact)
    assert torch.equal(weight.dequantize(torch.float64).cpu(), exact.double())
    rows = torch.tensor([shape[0] - 1, 0, 7, 7, 32])
    decoded = weight.dequantize_rows(rows.to(DEVICE), torch.float16)
    assert torch.equal(decoded.cpu(), exact[rows].half())


@few_schemes
@pytest.mark.parametrize("training", [False, True])
def test_products_are_those_of_the_decoded_weight(scheme: str, training: bool, seed: int) -> None:
    qweight = random_qweight(scheme, (130, 168), seed)
    weight = FragmentPrepared.of(on_device(qweight)).for_mode(training)
    generator = torch.Generator().manual_seed(seed)
    decoded = qweight.dequantize(torch.float32).to(DEVICE)
    for dtype, tolerance in ((torch.float16, 2e-2), (torch.float32, 1e-5)):
        x = torch.randn(2, 3, 168, generator=generator).to(DEVICE, dtype)
        bias = torch.randn(130, generator=generator).to(DEVICE, dtype)
        expected = F.linear(x.float(), decoded, bias.float())
        torch.testing.assert_close(
            weight.linear(x, bias).float(), expected, rtol=tolerance, atol=tolerance
        )
        grad = torch.randn(3, 130, generator=generator).to(DEVICE, dtype)
        torch.testing.assert_close(
            weight.grad_input(grad).float(), grad.float() @ decoded, rtol=tolerance, atol=tolerance
        )


@few_schemes
def test_joined_weights_share_memory_and_results(scheme: str, seed: int) -> None:
    qweights = [random_qweight(scheme, (rows, 75), seed + rows) for rows in (130, 33, 64)]
    coded = [FragmentPrepared.of(on_device(qweight)) for qweight in qweights]
    if qweights[0].scheme.double_quant:
        assert coded[0].join(coded[1:]) is None
    weights = [weight.for_mode(training=False) for weight in coded]
    joined = weights[0].join(weights[1:])
    assert joined is not None
    assert joined.starts == (0, 192, 256)
    x = torch.randn(2, 75, generator=torch.Generator().manual_seed(seed)).to(DEVICE).half()
    whole = joined.weight.linear(x, None)
    for part, start, weight, qweight in zip(
        joined.parts, joined.starts, weights, qweights, strict=True
    ):
        assert torch.equal(whole[:, start : start + part.shape[0]], weight.linear(x, None))
        assert torch.equal(part.linear(x, None), weight.linear(x, None))
        assert torch.equal(part.dequantize(torch.float32).cpu(), qweight.dequantize())
        assert_is(part, qweight)
        assert_is(part.for_mode(training=True), qweight)
        assert torch.equal(part.for_mode(training=True).linear(x, None), weight.linear(x, None))
        ours = part.tensors()["words"].untyped_storage().data_ptr()
        assert ours == joined.weight.tensors()["words"].untyped_storage().data_ptr()


def test_what_differs_is_not_joined(seed: int) -> None:
    first = prepared("W4A16_G32", (40, 75), seed)
    for other in (("W4A16_G16", (40, 75)), ("W4A16_G32", (40, 64)), ("W4A16_G32_BF16", (40, 75))):
        assert first.join([prepared(*other, seed)]) is None


@pytest.mark.usefixtures("triton")
@few_schemes
def test_layers_hold_it_through_copies_modes_and_files(scheme: str, seed: int) -> None:
    qweight = random_qweight(scheme, (130, 168), seed)
    layer = QuantLinear.from_quantized(on_device(qweight), torch.randn(130), torch.float16)
    layer.to(DEVICE).prepare()
    x = torch.randn(3, 168, generator=torch.Generator().manual_seed(seed)).to(DEVICE).half()
    expected, file = layer(x), io.BytesIO()
    assert isinstance(layer.operand, FragmentPrepared)
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False), layer.eval()):
        assert isinstance(twin.operand, FragmentPrepared)
        assert torch.equal(twin(x), expected)
    state = {name: t.cpu() for name, t in layer.state_dict().items() if name != "bias"}
    layer.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), expected)
    layer.restore()
    for name, tensor in qweight.tensors().items():
        assert torch.equal(state[name], tensor)
        assert torch.equal(layer.state_dict()[name].cpu(), tensor)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("scheme", ["W3A16_ASYM_G32", "NF4_DQ"])
def test_a_head_and_its_embedding_compile_as_one_graph(scheme: str, seed: int) -> None:
    table = on_device(random_qweight(scheme, (130, 64), seed))
    embedding = QuantEmbedding.from_quantized(table, torch.float16)
    head = TiedQuantLinear(embedding, None)
    assert head.prepare()

    def model(ids: Tensor) -> Tensor:
        return head(embedding(ids))

    ids = torch.tensor([[3, 129], [0, 64]], device=DEVICE)
    decoded = table.dequantize(torch.float16)
    expected = F.linear(decoded[ids].float(), decoded.float())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        eager = model(ids)
        compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(ids), eager)
    torch.testing.assert_close(eager.float(), expected, rtol=5e-3, atol=5e-3)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.usefixtures("triton")
@few_schemes
@pytest.mark.parametrize("bias", [False, True])
def test_siblings_run_as_one_launch(
    scheme: str, bias: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = nn.Module()
    for i, (name, rows) in enumerate((("q_proj", 130), ("k_proj", 33), ("v_proj", 64))):
        qweight = on_device(random_qweight(scheme, (rows, 75), seed + i))
        values = torch.linspace(-1, 1, rows, device=DEVICE) if bias else None
        block.add_module(name, QuantLinear.from_quantized(qweight, values, torch.float16))
    block.to(DEVICE).eval()
    x = torch.randn(2, 75, generator=torch.Generator().manual_seed(seed)).to(DEVICE).half()

    def run(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return block.q_proj(x), block.k_proj(x), block.v_proj(x)

    run(x)  # not prepared: by the reference
    for layer in block.children():
        layer.prepare()
    with torch.no_grad():
        expected = run(x)
        assert prepare_model(block) == 3
        launches: list[int] = []
        run_fused = matmul.run_fused
        monkeypatch.setattr(
            matmul, "run_fused", lambda *args: launches.append(1) or run_fused(*args)
        )
        for together, ours in zip(run(x), expected, strict=True):
            assert torch.equal(together, ours)
        assert len(launches) == 1
        torch._dynamo.reset()
        compiled: Any = torch.compile(run, fullgraph=True, backend="aot_eager")
        for together, ours in zip(compiled(x), expected, strict=True):
            # The compiler adds biases to slices that are rounded already.
            torch.testing.assert_close(together, ours, rtol=2e-3, atol=2e-3)
        assert len(launches) == 2


def test_refusals_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "_device_refusal", lambda index: None)
    backend, scheme = TritonBackend(), Scheme.parse("NF4_DQ")

    def refusal(device: str, dtype: torch.dtype, is_prepared: bool) -> str | None:
        return backend.refusal(Request(scheme, torch.device(device), dtype, 64, 64, is_prepared))

    assert refusal("cuda", torch.bfloat16, True) is None
    assert "prepare_model" in (refusal("cuda", torch.bfloat16, False) or "")
    assert "float64" in (refusal("cuda", torch.float64, True) or "")
    assert "CUDA" in (refusal("cpu", torch.bfloat16, True) or "")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_moving_to_the_gpu_is_enough(seed: int) -> None:
    qweight = random_qweight("W4A16_G64_DQ", (130, 168), seed)
    layer = QuantLinear.from_quantized(qweight, None, torch.bfloat16).eval()
    layer.to("cuda")
    assert isinstance(layer.operand, FragmentPrepared)
    x = torch.randn(3, 168, dtype=torch.bfloat16)
    expected = F.linear(x.float(), qweight.dequantize())
    torch.testing.assert_close(layer(x.cuda()).float().cpu(), expected, rtol=2e-2, atol=2e-2)
    layer.to("cpu")
    assert isinstance(layer.operand, QuantizedWeight)
    assert torch.equal(layer.weight_packed, qweight.packed)
