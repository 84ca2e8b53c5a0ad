"""Stacked experts with rows routed to them, and what their products must be."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fragment_weights import DEVICE, fragment, random_qweight
from lowbit_kernels.gpu import routed
from lowbit_kernels.gpu.configs import Tile
from lowbit_kernels.gpu.stacked import StackedWeight, stack
from torch import Tensor

# One of every kind of decoding, of scales, and of MODE.
SCHEMES = ("W2A16_ASYM_G32", "W3A16_ASYM_G64", "W4A16_G64_DQ", "NF4_DQ", "W4A16_ASYM_CHANNEL",
           "W8A16_CHANNEL", "FP4_G32_FP32")  # fmt: skip
SMALL = Tile(block_m=16, block_n=64, warps=4, stages=2, split=1)


@pytest.fixture(params=["few", "tables"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Finds the rows of tiles in the programs, or by tables, however many there are."""
    if request.param == "tables":
        monkeypatch.setattr(routed, "FEW_ROWS", -1)
    return str(request.param)


@dataclasses.dataclass(frozen=True)
class Case:
    """Experts, and rows routed to them at random; `dense` is what the weight decodes to, float64.

    Two tokens are nobody's, and with more than one expert, expert 0 has no rows.
    """

    weight: StackedWeight
    dense: Tensor
    x: Tensor
    expert: Tensor
    token: Tensor
    scale: Tensor

    @property
    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.expert, self.token, self.scale


def make_case(
    scheme: str, size: tuple[int, int, int], rows: int, seed: int, dtype: torch.dtype
) -> Case:
    """Returns `size` = (E, N, K) experts and `rows` rows of rows // 2 + 3 tokens."""
    E, N, K = size
    qweights = [random_qweight(scheme, (N, K), seed + i) for i in range(E)]
    generator = torch.Generator().manual_seed(seed)
    tokens = rows // 2 + 3
    expert = torch.randint(min(1, E - 1), E, (rows,), generator=generator, dtype=torch.int32)
    token = torch.randint(0, tokens - 2, (rows,), generator=generator, dtype=torch.int32)
    x = torch.randn(tokens, K, generator=generator).to(dtype)
    scale = torch.rand(rows, generator=generator) + 0.1
    dense = torch.stack([q.dequantize(torch.float32) for q in qweights]).double()
    moved = [tensor.to(DEVICE) for tensor in (dense, x, expert, token, scale)]
    return Case(stack([fragment(q) for q in qweights]), *moved)


def dense_rows(case: Case, x: Tensor, scale: Tensor) -> Tensor:
    """Returns the exact result, row by row, differentiable; zero for ids out of range."""
    results = []
    for expert, token, factor in zip(case.expert.tolist(), case.token.tolist(), scale, strict=True):
        if 0 <= expert < case.weight.experts and 0 <= token < x.shape[0]:
            results.append(factor * (case.dense[expert] @ x[token]))
        else:
            results.append(torch.zeros(case.weight.out_features, device=x.device).double())
    return torch.stack(results)


def plain_rows(case: Case, dtype: torch.dtype) -> Tensor:
    """Returns what plain PyTorch makes of the weight in `dtype`, scaled in float32."""
    dense = case.dense.to(dtype)
    pairs = zip(case.expert.tolist(), case.token.tolist(), strict=True)
    rows = torch.stack([dense[expert] @ case.x[token] for expert, token in pairs])
    return (rows.float() * case.scale[:, None]).to(dtype)


def assert_as_exact_as_torch(result: Tensor, case: Case) -> None:
    exact = dense_rows(case, case.x.double(), case.scale.double())
    plain = plain_rows(case, case.x.dtype)
    assert result.dtype == case.x.dtype
    assert (result - exact).abs().max() <= 2 * (plain - exact).abs().max()
