"""The operators: what torch's machinery demands of them, gradients, and what backward keeps."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fragment_weights import DEVICE, fragment, needs_gpu, random_fragment, random_qweight
from functorch.compile import make_boxed_func
from lowbit_kernels.gpu import matmul
from lowbit_kernels.gpu.configs import Tile
from lowbit_kernels.gpu.matmul import dequantize, grad_input, linear, shape, stored
from lowbit_kernels.gpu.weight import FragmentWeight
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

pytestmark = pytest.mark.usefixtures("exact_bf16")

SCHEMES = ("W3A16_ASYM_G32", "W4A16_G32", "W4A16_ASYM_G64_DQ", "NF4")
few_schemes = pytest.mark.parametrize("scheme", SCHEMES)
BY_NAME = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
every_dtype = pytest.mark.parametrize("dtype", BY_NAME.values(), ids=BY_NAME)


def activations(size: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator).to(dtype).to(DEVICE)


def use_small_tiles(monkeypatch: pytest.MonkeyPatch, up_to: int = 64) -> list[Tile | None]:
    """Chooses tiles that the interpreter runs quickly; returns the choices as they are made."""
    chosen: list[Tile | None] = []

    def choose(index: int, kind: str, block_m_holds: int, rows: int, columns: int) -> Tile | None:
        tile = Tile(min(block_m_holds, 64), 64, 4, 2, 2 if block_m_holds <= 64 else 1)
        chosen.append(tile if block_m_holds <= up_to else None)
        return chosen[-1]

    monkeypatch.setattr(matmul.configs, "choose", choose)
    return chosen


@few_schemes
@every_dtype
def test_operators_pass_opcheck(
    scheme: str, dtype: torch.dtype, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_small_tiles(monkeypatch)
    weight = random_fragment(scheme, (33, 75), seed)
    tensors, numbers = stored(weight), shape(weight)
    operators = torch.ops.lowbit_kernels
    x = activations((2, 3, 75), dtype, seed).requires_grad_()
    bias = activations((33,), dtype, seed + 1).requires_grad_()
    torch.library.opcheck(operators.linear.default, (x, *tensors, bias, *numbers))
    torch.library.opcheck(operators.linear.default, (x, *tensors, None, *numbers))
    grad = activations((2, 33), dtype, seed)
    torch.library.opcheck(operators.linear_grad_input.default, (grad, *tensors, *numbers))
    torch.library.opcheck(operators.dequantize.default, (*tensors, *numbers, dtype))


@pytest.mark.parametrize("size", [(75,), (4, 75), (2, 3, 75), (0, 75), (2, 0, 75)])
@pytest.mark.parametrize("up_to", [64, 0], ids=["fused", "decoded"])
def test_fakes_have_the_shapes_dtypes_and_strides_of_results(
    size: tuple[int, ...], up_to: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_small_tiles(monkeypatch, up_to)
    weight = random_fragment("W4A16_ASYM_G32", (33, 75), seed)
    x, grad = (
        activations(size, torch.float16, seed),
        activations((*size[:-1], 33), torch.float16, 1),
    )

    def calls(x: Tensor, grad: Tensor, weight: FragmentWeight) -> list[Tensor]:
        return [linear(x, weight), grad_input(grad, weight), dequantize(weight, torch.bfloat16)]

    real = calls(x, grad, weight)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = calls(mode.from_tensor(x), mode.from_tensor(grad), weight)
    for ours, theirs in zip(real, fake, strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (
            theirs.shape, theirs.dtype, theirs.stride()
        )  # fmt: skip


@pytest.mark.parametrize("scheme", ["W4A16_G32", "NF4_CHANNEL"])
@pytest.mark.parametrize("up_to", [64, 0], ids=["fused", "decoded"])
def test_any_shape_and_stride_of_activations(
    scheme: str, up_to: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = use_small_tiles(monkeypatch, up_to)
    weight = random_fragment(scheme, (33, 64), seed)
    flat = activations((12, 64), torch.float16, seed)
    expected = linear(flat, weight)
    assert torch.equal(linear(flat.view(3, 4, 64), weight), expected.view(3, 4, 33))
    assert torch.equal(linear(flat[5], weight), linear(flat[5:6], weight)[0])
    assert torch.equal(linear(flat.T.contiguous().T, weight), expected)
    spread = torch.stack([flat, flat + 1], dim=2)[..., 0]
    assert not spread.is_contiguous()
    assert torch.equal(linear(spread, weight), expected)
    swapped = flat.view(3, 4, 64).transpose(0, 1)
    assert torch.equal(linear(swapped, weight), expected.view(3, 4, 33).transpose(0, 1))
    assert [tile is not None for tile in chosen] == [up_to == 64] * len(chosen)


def test_no_activations_give_no_rows_and_zero_gradients(seed: int) -> None:
    weight = random_fragment("W4A16_G32", (33, 64), seed)
    x = torch.empty(2, 0, 64, dtype=torch.float16, device=DEVICE, requires_grad=True)
    bias = torch.ones(33, dtype=torch.float16, device=DEVICE, requires_grad=True)
    result = linear(x, weight, bias)
    assert result.shape == (2, 0, 33)
    result.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert bias.grad is not None
    assert not bias.grad.any()


def test_wrong_width_of_activations_is_named(seed: int) -> None:
    weight = random_fragment("W4A16_G32", (33, 64), seed)
    with pytest.raises(ValueError, match=r"\[2, 63\].*64 input features"):
        linear(torch.zeros(2, 63, dtype=torch.float16, device=DEVICE), weight)


@pytest.mark.parametrize("up_to", [64, 0], ids=["fused", "decoded"])
def test_bias_of_any_stride_and_of_the_right_size(
    up_to: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_small_tiles(monkeypatch, up_to)
    weight = random_fragment("W4A16_G32", (33, 64), seed)
    x, bias = (activations(size, torch.float16, seed) for size in ((4, 64), (33, 2)))
    assert torch.equal(linear(x, weight, bias[:, 1]), linear(x, weight, bias[:, 1].clone()))
    with pytest.raises(ValueError, match=r"bias is \[32\].*33 output features"):
        linear(x, weight, bias[:32, 0])


@few_schemes
@every_dtype
@pytest.mark.parametrize("up_to", [64, 0], ids=["fused", "decoded"])
def test_gradients_are_those_of_the_dense_product(
    scheme: str, dtype: torch.dtype, up_to: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_small_tiles(monkeypatch, up_to)
    qweight = random_qweight(scheme, (33, 75), seed)
    weight, dense = fragment(qweight), qweight.dequantize(dtype).to(DEVICE)
    x = activations((2, 3, 75), dtype, seed).requires_grad_()
    bias = activations((33,), torch.float32, seed + 1).requires_grad_()
    grad = activations((2, 3, 33), dtype, seed + 2)
    ours = torch.autograd.grad(linear(x, weight, bias), (x, bias), grad)
    plain = F.linear(x, dense) + bias.to(dtype)
    expected = torch.autograd.grad(plain, (x, bias), grad)
    if DEVICE == "cpu":
        assert torch.equal(ours[0], expected[0])
    torch.testing.assert_close(ours[0], expected[0])  # cuBLAS may choose two kernels
    assert ours[1].dtype == bias.dtype
    torch.testing.assert_close(ours[1], expected[1], rtol=1e-2, atol=1e-2)
    exact = grad.double().flatten(0, 1).sum(0)
    torch.testing.assert_close(ours[1].double(), exact, rtol=2**-7, atol=2**-7)


def test_only_what_needs_a_gradient_gets_one(seed: int) -> None:
    weight = random_fragment("W4A16_G32", (33, 64), seed)
    x, bias = activations((4, 64), torch.float32, seed), activations((33,), torch.float32, 1)
    assert not linear(x, weight, bias).requires_grad
    result = linear(x, weight, bias.requires_grad_())
    result.sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((33,), 4.0, device=DEVICE))
    assert x.grad is None


@few_schemes
def test_backward_keeps_only_stored_tensors(scheme: str, seed: int) -> None:
    weight = random_fragment(scheme, (64, 64), seed)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = activations((4, 64), torch.float32, seed).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        linear(x, weight).sum().backward()
    allowed = {tensor.data_ptr() for tensor in stored(weight) if tensor is not None}
    assert weight.words.data_ptr() in {tensor.data_ptr() for tensor in kept}
    assert {tensor.data_ptr() for tensor in kept} <= allowed


class Layers(torch.nn.Module):
    """Two layers over prepared weights, as a model calls them."""

    def __init__(self, first: FragmentWeight, second: FragmentWeight) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.bias = torch.nn.Parameter(torch.ones(second.out_features, device=DEVICE))

    def forward(self, x: Tensor) -> Tensor:
        return linear(F.silu(linear(x, self.first)), self.second, self.bias.to(x.dtype))


def run_with_gradients(module: Any, layers: Layers, x: Tensor) -> list[Tensor]:
    """Returns the result and the gradients of activations and bias."""
    x = x.clone().requires_grad_()
    layers.zero_grad()
    result = module(x)
    result.float().square().sum().backward()
    assert x.grad is not None
    assert layers.bias.grad is not None
    return [result.detach(), x.grad, layers.bias.grad.clone()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_layers_compile_as_one_graph_forward_and_backward(
    dtype: torch.dtype, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_small_tiles(monkeypatch)
    layers = Layers(
        random_fragment("W4A16_ASYM_G32", (96, 64), seed), random_fragment("NF4_DQ", (40, 96), seed)
    )
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    compiled = torch.compile(layers, fullgraph=True, backend=backend)
    for rows in (3, 5, 7):  # the second makes the number of rows symbolic
        x = activations((rows, 64), dtype, seed + rows)
        found, expected = (run_with_gradients(m, layers, x) for m in (compiled, layers))
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert len(graphs) in (2, 4)  # forward and backward; again for any number of rows
    for graph in graphs[::2]:
        (output,) = graph.graph.find_nodes(op="output")
        for node in output.args[0]:
            value = getattr(node, "meta", {}).get("val")
            if not isinstance(value, Tensor) or node.op == "placeholder":
                continue
            # A decoded weight would have one of these shapes; activations have few rows.
            assert tuple(value.shape) not in itertools.chain(
                *(((n, k), (k, n)) for n, k in ((96, 64), (40, 96)))
            )


def test_compiling_with_aot_eager_gives_the_same_bits(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_small_tiles(monkeypatch)
    weight = random_fragment("W4A16_G64_DQ", (70, 200), seed)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x: Tensor) -> tuple[Tensor, Tensor]:
        return linear(x, weight), dequantize(weight, torch.float16)

    x = activations((5, 200), torch.float16, seed)
    product, decoded = compiled(x)
    assert torch.equal(product, linear(x, weight))
    assert torch.equal(decoded, dequantize(weight, torch.float16))


def test_autocast_casts_activations_and_not_scales(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is registered for CUDA, called by hand: float32 scales must not become float16."""
    use_small_tiles(monkeypatch)
    qweight = random_qweight("W4A16_G64_FP32", (40, 128), seed)
    weight = fragment(qweight)
    eye = torch.eye(128, device=DEVICE)
    lowered = torch.get_autocast_dtype("cuda")
    assert lowered in (torch.float16, torch.bfloat16)
    result = matmul._autocast_linear(eye, *stored(weight), None, *shape(weight))
    assert result.dtype == lowered
    assert torch.equal(result.T.cpu(), qweight.dequantize(lowered))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_autocast_is_followed_forward_and_backward(dtype: torch.dtype, seed: int) -> None:
    weight = random_fragment("W4A16_G64_FP32", (70, 200), seed)
    x = activations((5, 200), torch.float32, seed).requires_grad_()
    with torch.autocast("cuda", dtype=dtype):
        result = linear(x, weight, torch.ones(70, device=DEVICE))
        plain = F.linear(x, dequantize(weight, torch.float32), torch.ones(70, device=DEVICE))
    assert result.dtype == plain.dtype == dtype
    torch.testing.assert_close(result, plain)
    (grad,) = torch.autograd.grad(result.sum(), x)
    assert grad.dtype == torch.float32
    (expected,) = torch.autograd.grad(plain.sum(), x)
    torch.testing.assert_close(grad, expected, rtol=2e-2, atol=2e-2)
