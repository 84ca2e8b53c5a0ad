"""The int8 operators: what torch's machinery demands of them, gradients, what backward keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fragment_weights import DEVICE
from int8_cases import HALF_STEP, case
from lowbit_kernels.gpu.w8a8 import quantize_rows, w8a8_linear
from torch import Tensor

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def test_operators_pass_opcheck(seed: int) -> None:
    operators = torch.ops.lowbit_kernels
    given = case(6, 33, 75, seed, torch.float16)
    x = given.x.view(2, 3, 75).requires_grad_()
    for bias, scale in ((None, None), (given.bias.requires_grad_(), 0.1)):
        arguments = x, given.codes, given.scales, bias, scale
        torch.library.opcheck(operators.w8a8_linear.default, arguments)
    grad = torch.randn(2, 3, 33, device=DEVICE).half()
    torch.library.opcheck(operators.w8a8_grad_input.default, (grad, given.codes, given.scales))
    torch.library.opcheck(operators.quantize_rows.default, (x.detach(), None))


@pytest.mark.parametrize("size", [(75,), (4, 75), (2, 3, 75), (0, 75), (2, 0, 75)])
def test_fakes_have_the_shapes_dtypes_and_strides_of_results(size: tuple[int, ...]) -> None:
    given = case(1, 33, 75, 1)
    x = torch.ones(size, dtype=torch.float16, device=DEVICE)
    grad = x.new_ones((*size[:-1], 33))

    def calls(x: Tensor, grad: Tensor, codes: Tensor, scales: Tensor) -> list[Tensor]:
        grad_x = torch.ops.lowbit_kernels.w8a8_grad_input(grad, codes, scales)
        return [w8a8_linear(x, codes, scales), grad_x, *quantize_rows(x, 0.5)]

    arguments = x, grad, given.codes, given.scales
    with torch._subclasses.fake_tensor.FakeTensorMode() as mode:
        fake = calls(*(mode.from_tensor(tensor) for tensor in arguments))
    for ours, theirs in zip(calls(*arguments), fake, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert ours.stride() == theirs.stride()


@every_dtype
@pytest.mark.parametrize("activation_scale", [None, 0.05])
@pytest.mark.usefixtures("exact_bf16")
def test_gradients_pass_straight_through_to_the_dense_product(
    dtype: torch.dtype, activation_scale: float | None, seed: int
) -> None:
    given = case(6, 33, 75, seed, dtype)
    x, bias = given.x.view(2, 3, 75).requires_grad_(), given.bias.requires_grad_()
    result = w8a8_linear(x, given.codes, given.scales, bias, activation_scale)
    grad = torch.randn(2, 3, 33, device=DEVICE).to(dtype)
    grad_x, grad_bias = torch.autograd.grad(result, (x, bias), grad)
    dense = (given.codes.float() * given.scales[:, None]).to(dtype)
    torch.testing.assert_close(grad_x, grad @ dense)
    exact = grad.double() @ (given.codes.double() * given.scales.double()[:, None])
    largest = (grad.double().abs() @ dense.double().abs()).max()
    assert (grad_x.double() - exact).abs().max() <= 4 * HALF_STEP[dtype] * largest
    assert grad_bias.dtype == bias.dtype
    exact = grad.double().flatten(0, 1).sum(0)
    torch.testing.assert_close(grad_bias.double(), exact, rtol=2**-7, atol=2**-7)


def test_only_what_needs_a_gradient_gets_one_and_backward_keeps_the_weight(seed: int) -> None:
    given = case(4, 33, 64, seed)
    assert not w8a8_linear(given.x, given.codes, given.scales, given.bias).requires_grad
    assert not quantize_rows(given.x.clone().requires_grad_())[1].requires_grad
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        x = given.x.clone().requires_grad_()
        w8a8_linear(x, given.codes, given.scales).sum().backward()
    pointers = {tensor.data_ptr() for tensor in kept}
    assert pointers == {given.codes.data_ptr(), given.scales.data_ptr()}


@pytest.mark.parametrize("activation_scale", [None, 0.05])
@pytest.mark.parametrize("dynamic", [False, True])
def test_layers_compile_as_one_graph(
    activation_scale: float | None, dynamic: bool, seed: int
) -> None:
    first, second = case(4, 96, 64, seed), case(4, 40, 96, seed + 1)

    def layers(x: Tensor) -> Tensor:
        hidden = w8a8_linear(x, first.codes, first.scales, first.bias, activation_scale)
        return w8a8_linear(
            torch.nn.functional.silu(hidden), second.codes, second.scales, None, activation_scale
        )

    torch._dynamo.reset()
    compiled: Any = torch.compile(layers, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (4, 7) if dynamic else (4,):
        x = torch.randn(2, rows, 64, device=DEVICE).requires_grad_()
        result, expected = compiled(x), layers(x)
        assert torch.equal(result, expected)
        (ours,) = torch.autograd.grad(result.square().sum(), x)
        (theirs,) = torch.autograd.grad(expected.square().sum(), x)
        assert torch.equal(ours, theirs)
