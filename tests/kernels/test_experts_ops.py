"""The operators of stacked experts: gradients, what torch demands of them, and bad arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expert_cases import SMALL, dense_rows, either_way, make_case
from fragment_weights import DEVICE, fragment, random_qweight
from lowbit_kernels.gpu import experts
from lowbit_kernels.gpu.configs import Tile
from lowbit_kernels.gpu.experts import experts_linear, shape, stored
from lowbit_kernels.gpu.routed import run_experts
from lowbit_kernels.gpu.stacked import SPLIT_ROWS, StackedWeight, stack
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

__all__ = ["either_way"]  # a fixture

pytestmark = pytest.mark.usefixtures("exact_bf16")

every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"]
)


@pytest.mark.parametrize("scheme", ["W3A16_ASYM_G64", "NF4_DQ", "W8A16_CHANNEL"])
@every_dtype
@pytest.mark.usefixtures("poisoned")
def test_gradients_are_those_of_the_dense_formula(
    scheme: str, dtype: torch.dtype, either_way: str, seed: int
) -> None:
    case = make_case(scheme, (3, 70, 200), 24, seed, dtype)
    case.expert[3], case.token[5] = 3, case.x.shape[0]  # in no product
    grad = torch.randn(24, 70, generator=torch.Generator().manual_seed(seed)).to(case.x)
    x, scale = case.x.clone().requires_grad_(), case.scale.clone().requires_grad_()
    result = experts_linear(x, case.weight, case.expert, case.token, scale)
    ours = torch.autograd.grad(result, (x, scale), grad)
    again = torch.autograd.grad(
        experts_linear(x, case.weight, case.expert, case.token, scale), (x, scale), grad
    )
    # The formula with the weight that is multiplied with: rounded to the dtype of the activations.
    rounded = dataclasses.replace(case, dense=case.dense.to(dtype).double())
    x_exact, scale_exact = x.detach().double(), scale.detach().double()
    x_exact, scale_exact = x_exact.requires_grad_(), scale_exact.requires_grad_()
    formula = dense_rows(rounded, x_exact, scale_exact)
    exact = torch.autograd.grad(formula, (x_exact, scale_exact), grad.double())
    assert (ours[0].dtype, ours[1].dtype) == (dtype, torch.float32)
    # Sums in float32, and one rounding.
    loss = 200**0.5 * 2.0**-22
    assert (ours[0] - exact[0]).abs().max() <= (torch.finfo(dtype).eps + loss) * exact[
        0
    ].abs().max()
    assert (ours[1] - exact[1]).abs().max() <= 4 * loss * exact[1].abs().max()
    for mine, repeated in zip(ours, again, strict=True):
        assert torch.equal(mine, repeated)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("with_tokens", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_of_the_activations_alone(
    with_tokens: bool, scaled: bool, either_way: str, seed: int
) -> None:
    case = make_case("W3A16_ASYM_G64", (3, 40, 75), 24, seed, torch.float32)
    x = (case.x if with_tokens else case.x[case.token.long()]).requires_grad_()
    token, scale = case.token if with_tokens else None, case.scale if scaled else None
    case.expert[7] = -1
    if not with_tokens:
        case = dataclasses.replace(case, token=torch.arange(24, device=DEVICE))
    result = experts_linear(x, case.weight, case.expert, token, scale)
    grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    (ours,) = torch.autograd.grad(result, x, grad)
    x_exact = x.detach().double().requires_grad_()
    factors = torch.ones_like(case.scale) if scale is None else scale
    formula = dense_rows(case, x_exact, factors.double())
    (exact,) = torch.autograd.grad(formula, x_exact, grad.double())
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)


def test_a_scale_of_no_expert_spoils_no_gradient(either_way: str, seed: int) -> None:
    case = make_case("W4A16_G64", (3, 40, 75), 24, seed, torch.float16)
    case.expert[7], case.scale[7] = -1, float("nan")
    x, scale = case.x.clone().requires_grad_(), case.scale.clone().requires_grad_()
    experts_linear(x, case.weight, case.expert, case.token, scale).sum().backward()
    assert x.grad is not None
    assert scale.grad is not None
    assert x.grad.isfinite().all()
    assert scale.grad[7] == 0
    constant = case.x.clone().requires_grad_()
    experts_linear(constant, case.weight, *case.rows).sum().backward()
    assert constant.grad is not None
    torch.testing.assert_close(constant.grad, x.grad)


@pytest.mark.parametrize("scaled", [False, True])
def test_backward_keeps_stored_tensors_and_activations_only_for_scales(
    scaled: bool, seed: int
) -> None:
    case = make_case("W4A16_ASYM_G64", (3, 64, 64), 12, seed, torch.float32)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x, scale = case.x.requires_grad_(), case.scale.requires_grad_(scaled)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        experts_linear(x, case.weight, case.expert, case.token, scale).sum().backward()
    stored_tensors = [
        *stored(case.weight),
        case.expert,
        case.token,
        scale,
        *([x] if scaled else []),
    ]
    allowed = {tensor.data_ptr() for tensor in stored_tensors if tensor is not None}
    assert {tensor.data_ptr() for tensor in kept} <= allowed
    assert (x.data_ptr() in {tensor.data_ptr() for tensor in kept}) == scaled


@pytest.mark.parametrize(("rows", "tokens"), [(0, 4), (0, 0), (3, 0)])
def test_no_rows_and_no_activations(rows: int, tokens: int, seed: int) -> None:
    weight = make_case("W4A16_G32", (2, 33, 75), 4, seed, torch.float16).weight
    x = torch.empty(tokens, 75, dtype=torch.float16, device=DEVICE, requires_grad=True)
    ids = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    scale = torch.ones(rows, device=DEVICE, requires_grad=True)
    result = experts_linear(x, weight, ids, ids, scale)
    assert result.shape == (rows, 33)
    assert not result.any()
    result.sum().backward()
    assert x.grad is not None
    assert scale.grad is not None
    assert x.grad.shape == x.shape
    assert not x.grad.any()
    assert not scale.grad.any()


def test_operators_pass_opcheck(seed: int) -> None:
    case = make_case("W3A16_ASYM_G64", (3, 33, 75), 6, seed, torch.float16)
    arguments = (*stored(case.weight), case.expert, case.token)
    operators, numbers = torch.ops.lowbit_kernels, shape(case.weight)
    x, scale = case.x.requires_grad_(), case.scale.requires_grad_()
    torch.library.opcheck(operators.experts_linear.default, (x, *arguments, scale, *numbers))
    torch.library.opcheck(operators.experts_linear.default, (x, *arguments, None, *numbers))
    grad = torch.ones(6, 33, dtype=torch.float16, device=DEVICE)
    for kept, factors in ((None, None), (case.x.detach(), case.scale.detach())):
        torch.library.opcheck(
            operators.experts_grad.default,
            (grad, kept, *arguments, factors, *numbers, case.x.shape[0]),
        )


def test_fakes_have_the_shapes_dtypes_and_strides_of_results(seed: int) -> None:
    case = make_case("NF4_DQ", (3, 33, 75), 6, seed, torch.float16)

    def calls(convert: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x, expert, token, scale = (convert(t) for t in (case.x, *case.rows))
        result = experts_linear(x, case.weight, expert, token, scale)
        tensors = (*stored(case.weight), expert, token, scale, *shape(case.weight), x.shape[0])
        grads = [torch.ops.lowbit_kernels.experts_grad(result, k, *tensors) for k in (x, None)]
        return [result, *grads[0], *grads[1]]

    real = calls(lambda tensor: tensor)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = calls(mode.from_tensor)
    for ours, theirs in zip(real, fake, strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (
            theirs.shape, theirs.dtype, theirs.stride()
        )  # fmt: skip


def test_two_layers_of_experts_compile_as_one_graph(seed: int) -> None:
    up = make_case("W4A16_ASYM_G32", (4, 96, 64), 8, seed, torch.float32).weight
    down = make_case("NF4_DQ", (4, 64, 96), 8, seed + 9, torch.float32).weight

    def layers(x: Tensor, logits: Tensor) -> Tensor:
        chosen, expert = logits.softmax(1).topk(2)
        token = torch.arange(x.shape[0], device=x.device).repeat_interleave(2)
        hidden = experts_linear(x, up, expert.flatten(), token).relu()
        rows = experts_linear(hidden, down, expert.flatten(), None, chosen.flatten())
        return rows.view(x.shape[0], 2, -1).sum(1)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled: Any = torch.compile(layers, fullgraph=True, backend="aot_eager")
    generator = torch.Generator().manual_seed(seed)
    for rows in (3, 5, 7):  # the second makes the number of rows symbolic
        x = torch.randn(rows, 64, generator=generator).to(DEVICE).requires_grad_()
        logits = torch.randn(rows, 4, generator=generator).to(DEVICE).requires_grad_()
        found, expected = compiled(x, logits), layers(x, logits)
        assert torch.equal(found, expected)
        ours = torch.autograd.grad(found.square().sum(), (x, logits))
        theirs = torch.autograd.grad(expected.square().sum(), (x, logits))
        torch.testing.assert_close(ours, theirs)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_autocast_casts_activations_alone(seed: int) -> None:
    """What is registered for CUDA, called by hand."""
    case = make_case("W4A16_G64_FP32", (2, 40, 128), 6, seed, torch.float32)
    lowered = torch.get_autocast_dtype("cuda")
    result = experts._autocast(case.x, *stored(case.weight), *case.rows, *shape(case.weight))
    assert torch.equal(result, experts_linear(case.x.to(lowered), case.weight, *case.rows))
    assert result.dtype == lowered


def test_wrong_arguments_are_named(seed: int) -> None:
    case = make_case("W4A16_G64", (2, 40, 128), 6, seed, torch.float16)
    x, weight, expert, token, scale = case.x, case.weight, *case.rows
    wrong: list[tuple[tuple[Any, ...], str]] = [
        ((x[:, :-1], expert, token, scale), r"float16 \[6, 127\], needed.*\[T, 128\]"),
        ((x.double(), expert, token, scale), r"float64 \[6, 128\], needed: fp16"),
        ((x[None], expert, token, scale), r"x is.*\[1, 6, 128\]"),
        ((x, expert[None], token, scale), r"expert_of_row is.*int32 \[1, 6\].*\[R\]"),
        (
            (x, expert.float(), token, scale),
            r"expert_of_row is torch.float32.*int32 or int64 \[6\]",
        ),
        ((x, expert, token[:5], scale), r"token_of_row is.*\[5\].*\[6\]"),
        ((x, expert, token, scale[:5]), r"row_scale is.*\[5\].*floats \[6\]"),
        ((x, expert, token, token), r"row_scale is torch.int32"),
        ((x[:4], expert, None, scale), r"6 rows of 4 activations"),
    ]
    for (first, *rest), sentence in wrong:
        with pytest.raises(ValueError, match=sentence):
            experts_linear(first, weight, *rest)
    for tile in (Tile(16, 128, 4, 2, 1), Tile(16, 96, 4, 2, 1)):
        with pytest.raises(ValueError, match="block_n must divide"):
            run_experts(x, weight, *case.rows, tile)
    many = make_case("W4A16_G64", (1, 8, 128), SPLIT_ROWS + 1, seed, torch.float16)
    with pytest.raises(ValueError, match="64 rows at most"):
        run_experts(many.x, many.weight, *many.rows, dataclasses.replace(SMALL, split=2))


def test_stacks_that_cannot_be_are_refused(seed: int) -> None:
    parts = [fragment(random_qweight("W4A16_G64_DQ", (n, 128), seed)) for n in (40, 40, 70)]
    with pytest.raises(ValueError, match=r"\[40, 70\] output features"):
        stack(parts)
    with pytest.raises(ValueError, match="at least, got none"):
        stack([])
    whole = stack(parts[:2])
    assert (whole.experts, whole.out_features, whole.in_features, whole.rows) == (2, 40, 128, 64)
    with pytest.raises(ValueError, match=r"128 stored rows; 2 experts of 65.*need 256"):
        StackedWeight(whole.weight, 2, 65)
    with pytest.raises(ValueError, match="0 experts"):
        StackedWeight(whole.weight, 0, 40)
    with pytest.raises(ValueError, match="double-quantized"):
        StackedWeight(parts[0], 1, 40)
    few = dataclasses.replace(whole.weight, counters=whole.weight.counters[:2])
    with pytest.raises(ValueError, match=r"2 counters.*need 64"):
        StackedWeight(few, 2, 40)
