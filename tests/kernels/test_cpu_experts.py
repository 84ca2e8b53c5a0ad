"""Experts on the native CPU kernels: any routing, beside one float64 product per row."""

from __future__ import annotations

import pytest
import torch
from fragment_weights import random_qweight
from lowbit_kernels.cpu import dispatch
from lowbit_kernels.cpu.experts import StackedWeight, experts_linear, stack
from lowbit_kernels.cpu.library import unavailable_reason
from torch import Tensor

from lowbit.backends.strips import StripPrepared

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason="no native kernels")

SCHEMES = ("W2A16_ASYM_G32", "W3A16_ASYM_G64", "W4A16_G64_DQ", "NF4_DQ", "W8A16_CHANNEL")
E, N, K, T = 5, 40, 160, 7


def make(scheme: str, seed: int) -> tuple[StackedWeight, Tensor]:
    qweights = [random_qweight(scheme, (N, K), seed + i) for i in range(E)]
    dense = torch.stack([qweight.dequantize(torch.float64) for qweight in qweights])
    return stack([StripPrepared.of(qweight).weight for qweight in qweights]), dense


def route(rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of experts 1 to 4 and all tokens; a few of neither."""
    generator = torch.Generator().manual_seed(seed)
    expert = torch.randint(1, E, (rows,), generator=generator)
    token = torch.randint(0, T, (rows,), generator=generator)
    expert[::7], token[3::11] = torch.tensor(-1), torch.tensor(T)
    return expert, token, torch.rand(rows, generator=generator) + 0.1


def exact(dense: Tensor, x: Tensor, expert: Tensor, token: Tensor, scale: Tensor) -> Tensor:
    rows = [
        factor * (dense[e] @ x[t]) if 0 <= e < E and 0 <= t < T else torch.zeros(N).double()
        for e, t, factor in zip(expert.tolist(), token.tolist(), scale, strict=True)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_of_few_and_many(scheme: str, dtype: torch.dtype, ids: torch.dtype) -> None:
    weight, dense = make(scheme, 1)
    x = torch.randn(T, K, generator=torch.Generator().manual_seed(2)).to(dtype)
    limit = {torch.float32: 2e-4, torch.bfloat16: 8e-3, torch.float16: 2e-3}[dtype]
    for rows in (1, 9, 400):
        expert, token, scale = route(rows, rows)
        expected = exact(dense, x.double(), expert, token, scale.double())
        found = experts_linear(x, weight, expert.to(ids), token.to(ids), scale)
        assert found.dtype == dtype
        assert (found - expected).norm() <= limit * expected.norm()
        ones = experts_linear(x, weight, expert.to(ids), token.to(ids))
        plain = exact(dense, x.double(), expert, token, torch.ones(rows).double())
        assert (ones - plain).norm() <= limit * plain.norm()


def test_each_way_a_product_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, dense = make("W4A16_G32", 3)
    x = torch.randn(T, K, generator=torch.Generator().manual_seed(2))
    expert, token, scale = route(60, 4)
    expected = exact(dense, x.double(), expert, token, scale.double())
    ways = {1: dispatch.DECODE, 2: dispatch.FLOATS}
    for way in (dispatch.TWO_PLANES, dispatch.DECODE, dispatch.FLOATS, None):

        def choose(*arguments: object, way: int | None = way) -> int:
            return ways.get(int(str(arguments[2])) % 3, dispatch.TWO_PLANES) if way is None else way

        monkeypatch.setattr(dispatch, "choose", choose)
        found = experts_linear(x, weight, expert, token, scale)
        assert (found - expected).norm() <= 2e-4 * expected.norm()


def test_without_tokens_and_without_rows() -> None:
    weight, dense = make("W4A16_G32", 5)
    x = torch.randn(T, K, generator=torch.Generator().manual_seed(2))
    expert = torch.tensor([4, 0, 0, 1, 3, 2, 4])
    found = experts_linear(x, weight, expert)
    expected = torch.einsum("rnk,rk->rn", dense[expert], x.double())
    assert (found - expected).norm() <= 2e-4 * expected.norm()
    none = torch.zeros(0, dtype=torch.int64)
    assert experts_linear(x, weight, none, none).shape == (0, N)
    wide = torch.randn(T, 2 * K)[:, ::2]
    assert torch.equal(
        experts_linear(wide, weight, expert), experts_linear(wide.contiguous(), weight, expert)
    )


def test_neither_threads_nor_other_rows_change_a_row() -> None:
    weight, _ = make("NF4", 6)
    x = torch.randn(T, K, generator=torch.Generator().manual_seed(2)).bfloat16()
    expert, token, _scale = route(30, 7)
    whole = experts_linear(x, weight, expert, token)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(experts_linear(x, weight, expert, token), whole)
    finally:
        torch.set_num_threads(threads)
    for row in range(30):
        one = experts_linear(x, weight, expert[row : row + 1], token[row : row + 1])
        assert torch.equal(one[0], whole[row])


def test_gradients() -> None:
    weight, dense = make("W4A16_ASYM_G64", 8)
    expert, token, scale = route(40, 9)
    x = torch.randn(T, K, generator=torch.Generator().manual_seed(2)).requires_grad_()
    scale.requires_grad_()
    experts_linear(x, weight, expert, token, scale).square().sum().backward()
    found = x.grad, scale.grad
    x.grad = scale.grad = None
    exact(dense, x.double(), expert, token, scale.double()).square().sum().backward()
    for mine, theirs in zip(found, (x.grad, scale.grad), strict=True):
        assert mine is not None
        assert theirs is not None
        assert (mine - theirs).norm() <= 1e-3 * theirs.norm()


def test_operators_pass_torchs_own_checks() -> None:
    weight, _ = make("W3A16_G32", 8)
    expert, token, scale = route(12, 9)
    held = weight.weight
    shape = (held.format.text, E, N, K)
    stored = (held.codes, held.high, held.scale, held.zero)
    x = torch.randn(T, K, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    rows = (expert, token, scale.requires_grad_())
    ops = torch.ops.lowbit_cpu
    torch.library.opcheck(ops.experts_linear, (x, *stored, *rows, *shape), test_utils=checks)
    grad = (torch.randn(12, N), x.detach(), *stored, expert, token, scale.detach(), *shape, T)
    torch.library.opcheck(ops.experts_grad, grad, test_utils=checks)


def test_bad_input_is_refused() -> None:
    weight, _ = make("W4A16_G32", 8)
    x, expert = torch.randn(T, K), torch.zeros(T, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"T, {K}"):
        experts_linear(x[:, :-1], weight, expert)
    with pytest.raises(ValueError, match="expert_of_row"):
        experts_linear(x, weight, expert.float())
    with pytest.raises(ValueError, match="without token_of_row"):
        experts_linear(x, weight, expert[:3])
    with pytest.raises(ValueError, match="row_scale"):
        experts_linear(x, weight, expert, None, torch.ones(2))
    with pytest.raises(ValueError, match="at least"):
        stack([])
