"""Prepared weights: what a module that holds one promises, with a backend made for the test."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_backend import LAUNCHES, FakeBackend, FakePrepared, fake, kernel_names  # noqa: F401
from test_ops import SCHEMES, random_qweight
from torch import Tensor, nn

import lowbit
from lowbit import backends
from lowbit.errors import LowbitError
from lowbit.nn import QuantEmbedding, QuantLinear, TiedQuantLinear, prepare_model

pytestmark = pytest.mark.usefixtures("fake")
SHAPE = (33, 75)


def layer_of(scheme: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> QuantLinear:
    """Returns a prepared layer in inference mode."""
    qweight = random_qweight(scheme, SHAPE, seed)
    layer = QuantLinear.from_quantized(qweight, torch.randn(SHAPE[0]), dtype).eval()
    assert layer.prepare()
    return layer


def same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return list(first) == list(second) and all(
        a.dtype == second[name].dtype and torch.equal(a, second[name]) for name, a in first.items()
    )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_prepared_layer_is_the_same_layer(scheme: str, training: bool) -> None:
    qweight = random_qweight(scheme, SHAPE)
    layer = QuantLinear.from_quantized(qweight, torch.randn(33), torch.float32).train(training)
    x, before = torch.randn(2, 5, 75), layer.state_dict()
    expected = layer(x)
    assert layer.prepare()
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.dequantize(), qweight.dequantize())
    assert torch.equal(layer.weight, qweight.dequantize())
    assert same_tensors(layer.quantized_weight.tensors(), qweight.tensors())
    assert same_tensors(dict(layer.state_dict()), dict(before))
    # Either the one or the other, never both.
    held = {name for name, _ in itertools.chain(layer.named_parameters(), layer.named_buffers())}
    assert held == {"bias", *kernel_names(layer)}
    layer.restore()
    assert not kernel_names(layer)
    assert same_tensors(dict(layer.state_dict()), dict(before))
    assert list(layer.state_dict()) == list(before)
    assert torch.equal(layer(x), expected)


def test_one_launch_forward_and_one_backward() -> None:
    layer = layer_of("W4A16_ASYM_G32")
    x = torch.randn(2, 75, requires_grad=True)
    LAUNCHES.clear()
    layer(x).sum().backward()
    assert LAUNCHES == {"linear": 1, "grad_input": 1}
    expected = torch.ones(2, 33) @ layer.dequantize()
    torch.testing.assert_close(x.grad, expected)
    assert torch.equal(layer.bias.grad, torch.full((33,), 2.0))


def test_compiled_training_is_eager_training() -> None:
    layer, x = layer_of("NF4_DQ").train(), torch.randn(2, 75, requires_grad=True)
    torch._dynamo.reset()
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (layer, compiled):
        x.grad = layer.bias.grad = None
        run(x).square().sum().backward()
        gradients.append((x.grad, layer.bias.grad))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_canonical_tensors_are_freed_as_soon_as_they_are_prepared() -> None:
    model = nn.ModuleList(
        QuantLinear.from_quantized(random_qweight("W4A16_G32", SHAPE, seed)) for seed in range(3)
    )
    canonical = [weakref.ref(layer.weight_packed) for layer in model]
    alive: list[int] = []
    for layer in model:
        layer.prepare()
        gc.collect()
        alive.append(sum(ref() is not None for ref in canonical))
    assert alive == [2, 1, 0]


def test_padding_bits_that_could_not_be_had_back_stay(fake: FakeBackend) -> None:  # noqa: F811
    for name in ("packed", "zero_point"):
        qweight = random_qweight("W4A16_ASYM_G32", SHAPE)
        tensor = getattr(qweight, name)
        last = tensor[5, -1:] if name == "packed" else tensor[-1, 1:2]
        last |= -(1 << 30)
        assert not qweight.padding_is_zero()
        layer = QuantLinear.from_quantized(qweight)
        assert not layer.prepare()
        assert torch.equal(layer.state_dict()[f"weight_{name}"], tensor)
    assert not fake.prepared
    for scheme in SCHEMES:
        assert random_qweight(scheme, SHAPE).padding_is_zero()


@pytest.mark.parametrize("scheme", ["W4A16_G32", "NF4_DQ"])
def test_casts_leave_prepared_tensors_alone(scheme: str) -> None:
    layer = layer_of(scheme)
    before = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    for cast, dtype in (("half", torch.float16), ("bfloat16", torch.bfloat16)):
        getattr(layer, cast)()
        assert layer.compute_dtype == layer.bias.dtype == layer.weight.dtype == dtype
        assert same_tensors(dict(layer.named_buffers()), before)
        assert layer(torch.randn(2, 75, dtype=dtype)).dtype == dtype


def test_a_cast_that_the_backend_refuses_restores(fake: FakeBackend) -> None:  # noqa: F811
    layer = layer_of("W4A16_G32")
    layer.double()
    assert not kernel_names(layer)
    assert layer(torch.randn(2, 75).double()).dtype == torch.float64
    layer.float()
    assert kernel_names(layer)
    assert fake.prepared == [SHAPE, SHAPE]


def test_scales_are_decoded_for_inference_and_coded_for_training() -> None:
    layer = layer_of("NF4_DQ")
    assert layer.kernel_scale.dtype == torch.float16
    x = torch.randn(2, 75)
    expected, state = layer(x), dict(layer.state_dict())
    layer.train()
    assert layer.kernel_scale.dtype == torch.uint8
    assert not hasattr(layer, "kernel_scale_codes")
    assert torch.equal(layer(x), expected)
    assert same_tensors(dict(layer.state_dict()), state)
    assert layer.eval().kernel_scale.dtype == torch.float16
    assert torch.equal(layer(x), expected)
    plain = layer_of("W4A16_G32")
    codes = plain.kernel_codes
    assert plain.train().eval().kernel_codes is codes


@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_state_dict_prepares_again(assign: bool) -> None:
    layer, other = layer_of("W4A16_ASYM_G32"), layer_of("W4A16_ASYM_G32", seed=1)
    x = torch.randn(2, 75)
    assert not torch.equal(layer(x), other(x))
    layer.load_state_dict(other.state_dict(), assign=assign)
    assert kernel_names(layer)
    assert torch.equal(layer(x), other(x))
    # A part of it, as adapters load theirs, changes nothing else.
    codes = layer.kernel_codes
    layer.load_state_dict({"bias": torch.zeros(33)}, strict=False)
    assert layer.kernel_codes is codes
    torch.testing.assert_close(layer(x), other(x) - other.bias)
    with pytest.raises(RuntimeError, match="weight_scale"):
        layer.load_state_dict({"weight_packed": other.state_dict()["weight_packed"]})


@pytest.mark.parametrize("scheme", ["W3A16_ASYM_G16_DQ", "W4A16_G32"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_are_prepared_and_apart(scheme: str, way: str) -> None:
    layer = layer_of(scheme)
    if way == "deepcopy":
        twin = copy.deepcopy(layer)
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    x = torch.randn(2, 75)
    expected = layer(x)
    assert torch.equal(twin(x), expected)
    twin.kernel_scale.zero_()
    assert torch.equal(twin(x), twin.bias.expand(2, 33))
    assert torch.equal(layer(x), expected)


def test_meta_and_back() -> None:
    layer = layer_of("W4A16_ASYM_G32")
    x, state = torch.randn(2, 75), layer.state_dict()
    expected = layer(x)
    layer.to("meta")
    assert not kernel_names(layer)
    specs = layer.scheme.tensor_specs(SHAPE)
    assert {n: (tuple(t.shape), t.dtype) for n, t in layer.state_dict().items() if n in specs} == (
        specs
    )
    layer.to_empty(device="cpu")
    layer.load_state_dict(state)
    assert kernel_names(layer)
    assert torch.equal(layer(x), expected)


def test_to_empty_in_place_waits_for_a_state_dict() -> None:
    layer, x = layer_of("W4A16_G32"), torch.randn(2, 75)
    state, expected = layer.state_dict(), layer(x)
    layer.to_empty(device="cpu")
    layer.load_state_dict(state)
    assert torch.equal(layer(x), expected)


def test_shared_memory_keeps_it_prepared() -> None:
    layer, x = layer_of("W4A16_G32"), torch.randn(2, 75)
    expected = layer(x)
    layer.share_memory()
    assert layer.kernel_codes.is_shared()
    assert torch.equal(layer(x), expected)


def test_moving_to_another_type_of_device_goes_by_the_canonical_form(
    fake: FakeBackend,  # noqa: F811
) -> None:
    layer, x = layer_of("W4A16_ASYM_G32"), torch.randn(2, 75)
    expected, moved = layer(x), []

    def move(tensor: Tensor) -> Any:
        if tensor.dtype == torch.int32 and not tensor.numel():  # asks where tensors go
            return SimpleNamespace(device=torch.device("cuda"))
        moved.append(tensor.dtype)
        return tensor.clone() if tensor.numel() else tensor

    layer._apply(move)
    # Bias, codes, shape, zero points and scales: what is moved is canonical.
    assert moved.count(torch.int32) == 2
    assert torch.int8 not in moved
    assert fake.prepared == [SHAPE, SHAPE]
    assert kernel_names(layer)
    assert torch.equal(layer(x), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_there_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = FakeBackend("ours", "cpu"), FakeBackend("theirs", "cuda")
    monkeypatch.setattr(backends, "BACKENDS", [ours, theirs, backends.BACKENDS[-1]])
    backends.select.cache_clear()
    layer = layer_of("W4A16_ASYM_G32")
    x, state = torch.randn(2, 75), dict(layer.state_dict())
    expected = layer(x)
    for device, counts in (("cuda", (1, 1)), ("cuda", (1, 1)), ("cpu", (2, 1)), ("cuda", (2, 2))):
        layer.to(device)
        assert (len(ours.prepared), len(theirs.prepared)) == counts
        assert {t.device.type for t in [*layer.parameters(), *layer.buffers()]} == {device}
        assert same_tensors({name: t.cpu() for name, t in layer.state_dict().items()}, state)
        torch.testing.assert_close(layer(x.to(device)).cpu(), expected)


def test_buffers_that_others_replaced_are_used() -> None:
    layer, other = layer_of("W4A16_G32"), layer_of("W4A16_G32", seed=1)
    x = torch.randn(2, 75)
    layer.bias = other.bias
    tensors = dict(other.named_buffers())
    assert torch.equal(torch.func.functional_call(layer, tensors, (x,)), other(x))
    assert not torch.equal(layer(x), other(x))
    for name, tensor in tensors.items():  # as accelerate does
        layer._buffers[name] = tensor
    assert torch.equal(layer(x), other(x))
    assert same_tensors(dict(layer.state_dict()), dict(other.state_dict()))


def test_what_peft_reads_is_cheap() -> None:
    layer = layer_of("W4A16_G32")
    LAUNCHES.clear()
    assert layer.qweight is layer.W_q is layer.kernel_codes
    assert not LAUNCHES


def test_errors_are_those_of_canonical_weights() -> None:
    with pytest.raises(LowbitError, match="75 input features"):
        layer_of("W4A16_G32")(torch.randn(2, 74))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_activations(dtype: torch.dtype) -> None:
    layer = layer_of("W4A16_G32")
    x = torch.randn(3, 75)
    with torch.autocast("cpu", dtype=dtype):
        result = layer(x)
    assert result.dtype == dtype
    assert torch.equal(result, layer(x.to(dtype)))


def test_only_an_embedding_with_a_head_is_prepared() -> None:
    alone = QuantEmbedding.from_quantized(random_qweight("W4A16_G32", (40, 64)), torch.float32)
    assert not alone.prepare()
    embedding = QuantEmbedding.from_quantized(random_qweight("W4A16_G32", (40, 64)), torch.float32)
    pair = nn.ModuleDict({"embedding": embedding, "head": TiedQuantLinear(embedding, None)})
    x, ids = torch.randn(2, 64), torch.tensor([[3, 39], [0, 3]])
    expected = pair["head"](x), embedding(ids), dict(pair.state_dict())
    assert prepare_model(pair) == 2
    assert kernel_names(pair) == {"embedding.kernel_codes", "embedding.kernel_scale"}
    assert torch.equal(pair["head"](x), expected[0])
    assert torch.equal(embedding(ids), expected[1])
    assert same_tensors(dict(pair.state_dict()), expected[2])
    assert pair["head"].qweight is embedding.kernel_codes
    with pytest.raises(IndexError, match="-1"):
        embedding(torch.tensor([-1]))
    twin = copy.deepcopy(pair)
    twin["embedding"].kernel_scale.zero_()
    assert torch.equal(twin["head"](x), torch.zeros(2, 40))
    with pytest.raises(LowbitError, match="offloaded"):
        pair.to("meta")["head"](x)


def test_compiled_code_knows_that_weights_stay_where_they_are() -> None:
    """Else CUDA graphs would copy the weight at every replay."""
    layer = layer_of("W4A16_G32")
    sources: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        sources.extend(
            node.meta["grapharg"].source.name
            if isinstance(node.meta["grapharg"].source.name, str)
            else node.meta["grapharg"].source.name()
            for node in graph.graph.find_nodes(op="placeholder")
        )
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(layer, fullgraph=True, backend=backend)(torch.randn(2, 75))
    weights = [name for name in sources if "kernel_" in name]
    assert len(weights) == len(kernel_names(layer))
    assert all("_buffers" in name for name in weights)


def test_an_error_names_no_backend_that_could_run_prepared_weights(
    fake: FakeBackend,  # noqa: F811
) -> None:
    layer = QuantLinear.from_quantized(random_qweight("W4A16_G32", SHAPE), None, torch.float32)
    # Canonical tensors: the fake backend does not run them, the reference does.
    layer(torch.randn(2, 75))
    assert not LAUNCHES
    request = backends.Request(layer.scheme, torch.device("cpu"), torch.float32, *SHAPE)
    assert backends.explain(request)["fake"] == "the weight is not prepared"
    assert lowbit.prepare_model(layer) == 1
    layer(torch.randn(2, 75))
    assert LAUNCHES == {"linear": 1}
