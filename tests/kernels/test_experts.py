"""Routed rows through stacked experts, against one dense product in float64 per row.

Few rows are found by the programs themselves and many by tables; most tests go both ways with the
same rows, by moving the limit.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from expert_cases import SCHEMES, SMALL, assert_as_exact_as_torch, dense_rows, either_way, make_case
from fragment_weights import DEVICE, needs_gpu, needs_interpreter
from lowbit_kernels.gpu import matmul, routed
from lowbit_kernels.gpu.experts import experts_linear
from lowbit_kernels.gpu.matmul import run_fused
from lowbit_kernels.gpu.routed import run_experts
from lowbit_kernels.gpu.stacked import SPLIT_ROWS

__all__ = ["either_way"]  # a fixture

pytestmark = pytest.mark.usefixtures("exact_bf16", "poisoned")

few_schemes = pytest.mark.parametrize("scheme", SCHEMES)
half_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"]
)


@few_schemes
@half_dtypes
def test_error_is_at_most_twice_that_of_torch(
    scheme: str, dtype: torch.dtype, either_way: str, seed: int
) -> None:
    case = make_case(scheme, (3, 70, 200), 24, seed, dtype)
    assert_as_exact_as_torch(experts_linear(case.x, case.weight, *case.rows), case)


@few_schemes
def test_float32_loses_nothing_but_what_sums_round(scheme: str, either_way: str, seed: int) -> None:
    case = make_case(scheme, (2, 70, 200), 9, seed, torch.float32)
    result = experts_linear(case.x, case.weight, *case.rows)
    exact = dense_rows(case, case.x.double(), case.scale.double())
    size = dataclasses.replace(case, dense=case.dense.abs())
    bound = 200**0.5 * 2.0**-23 * dense_rows(size, case.x.double().abs(), case.scale.double())
    assert bool(((result - exact).abs() <= bound).all())


@pytest.mark.parametrize("count", [1, 7, 60])
@pytest.mark.parametrize("rows", [1, 17, 65])
def test_any_number_of_experts_and_rows(count: int, rows: int, either_way: str, seed: int) -> None:
    """Rows on both sides of whole tiles, and of the sizes that the programs are compiled for."""
    case = make_case("W4A16_ASYM_G32", (count, 33, 75), rows, seed, torch.float16)
    assert_as_exact_as_torch(experts_linear(case.x, case.weight, *case.rows), case)


@pytest.mark.parametrize("rows", [256, 257])
def test_the_limit_between_few_rows_and_tables(rows: int, seed: int) -> None:
    case = make_case("W4A16_G64", (5, 33, 75), rows, seed, torch.float16)
    assert_as_exact_as_torch(experts_linear(case.x, case.weight, *case.rows), case)


@pytest.mark.parametrize("expert", [0, 3])
@pytest.mark.parametrize("block_m", [16, 32, 64])
def test_all_rows_on_one_expert(expert: int, block_m: int, either_way: str, seed: int) -> None:
    case = make_case("W4A16_G64", (4, 70, 200), 50, seed, torch.float16)
    case.expert.fill_(expert)
    tile = dataclasses.replace(SMALL, block_m=block_m)
    assert_as_exact_as_torch(run_experts(case.x, case.weight, *case.rows, tile), case)


@pytest.mark.parametrize("size", [(2, 1, 1), (2, 64, 16), (2, 65, 128), (2, 128, 129)], ids=str)
@pytest.mark.parametrize("scheme", ["W4A16_ASYM_G32", "W3A16_G64", "NF4_CHANNEL"])
def test_sizes_at_the_edges_of_tiles(
    size: tuple[int, int, int], scheme: str, either_way: str, seed: int
) -> None:
    case = make_case(scheme, size, 6, seed, torch.float16)
    result = experts_linear(case.x, case.weight, *case.rows)
    exact = dense_rows(case, case.x.double(), case.scale.double())
    bound = 2.0**-10 * case.dense.abs().max() * case.x.double().abs().sum(1).max() * 1.1
    assert (result - exact).abs().max() <= bound


@pytest.mark.parametrize("scheme", ["W4A16_G64", "NF4_G32_BF16", "W8A16_CHANNEL"])
@pytest.mark.parametrize("split", [1, 2])
def test_a_row_has_the_bits_that_its_expert_alone_gives(
    scheme: str, split: int, either_way: str, seed: int
) -> None:
    """So results depend neither on the order of rows nor on the other rows."""
    case = make_case(scheme, (3, 70, 300), 12, seed, torch.float16)
    tile = dataclasses.replace(SMALL, split=split)
    result = run_experts(case.x, case.weight, case.expert, case.token, None, tile)
    assert not case.weight.weight.counters.any()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    shuffled = run_experts(case.x, case.weight, case.expert[order], case.token[order], None, tile)
    assert torch.equal(shuffled, result[order])
    rows = case.weight.rows
    for e in range(3):
        mine = case.expert == e
        part = case.weight.weight.rows(e * rows, (e + 1) * rows, 70)
        alone = [run_fused(case.x[i : i + 1], part, None, tile) for i in case.token[mine].tolist()]
        if alone:
            torch.testing.assert_close(result[mine], torch.cat(alone))
            if DEVICE == "cpu":
                assert torch.equal(result[mine], torch.cat(alone))


@pytest.mark.parametrize(
    ("split", "count", "rows"),
    [(1, 2, 5), (2, 2, 20), (3, 1, 33), (4, 2, 5), (2, 1, SPLIT_ROWS), (2, 64, SPLIT_ROWS)],
)
def test_split_sums_are_right_repeatable_and_leave_the_counters_at_zero(
    split: int, count: int, rows: int, either_way: str, seed: int
) -> None:
    """In 3 steps of 128 columns; with several tiles of one expert, and with a tile of each."""
    case = make_case("W4A16_ASYM_G64", (count, 40, 300), rows, seed, torch.float16)
    tile = dataclasses.replace(SMALL, split=split)
    first = run_experts(case.x, case.weight, *case.rows, tile)
    assert_as_exact_as_torch(first, case)
    assert torch.equal(run_experts(case.x, case.weight, *case.rows, tile), first)
    assert not case.weight.weight.counters.any()


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("split", [1, 2])
def test_rows_of_no_expert_and_of_no_token_are_zeros(
    ids: torch.dtype, split: int, either_way: str, seed: int
) -> None:
    """Whatever their scale is, and whatever lies in the experts beside which they are read."""
    case = make_case("W8A16_CHANNEL", (3, 70, 300), 20, seed, torch.float16)
    expert, token, scale = case.expert.to(ids), case.token.to(ids), case.scale.clone()
    tile = dataclasses.replace(SMALL, split=split)
    expected = run_experts(case.x, case.weight, *case.rows, tile)
    gone = torch.zeros(20, dtype=torch.bool, device=DEVICE)
    gone[:7] = True
    expert[:5] = torch.tensor([-1, 3, 4, 2**31 - 1, -(2**31)], dtype=ids)
    token[5:7] = torch.tensor([-1, case.x.shape[0]], dtype=ids)
    scale[:7] = float("nan")
    result = run_experts(case.x, case.weight, expert, token, scale, tile)
    assert not result[gone].any()
    assert torch.equal(result[~gone], expected[~gone])
    assert not case.weight.weight.counters.any()


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("scaled", [False, True])
def test_rows_of_nobody_are_zeros_beside_a_weight_of_nan(
    block_m: int, scaled: bool, either_way: str, seed: int
) -> None:
    case = make_case("W8A16_CHANNEL", (3, 33, 75), 6, seed, torch.float16)
    case.weight.weight.scale.fill_(float("nan"))
    scale = torch.full_like(case.scale, float("nan")) if scaled else None
    nobody, nothing = torch.full_like(case.expert, 3), torch.full_like(case.token, -1)
    tile = dataclasses.replace(SMALL, block_m=block_m)
    for expert, token in ((nobody, case.token), (case.expert, nothing)):
        assert not run_experts(case.x, case.weight, expert, token, scale, tile).any()


def test_without_tokens_and_scales_row_r_is_activation_r(either_way: str, seed: int) -> None:
    case = make_case("NF4_DQ", (3, 70, 200), 20, seed, torch.float16)
    gathered = case.x[case.token.long()]
    ones = torch.ones_like(case.scale)
    expected = experts_linear(case.x, case.weight, case.expert, case.token, ones)
    assert torch.equal(experts_linear(gathered, case.weight, case.expert), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_strides_and_dtypes_of_arguments(dtype: torch.dtype, seed: int) -> None:
    """What lies beside the activations is not read, and scales are not rounded on the way."""
    case = make_case("W4A16_G32", (3, 70, 200), 12, seed, torch.float16)
    scale = case.scale.to(dtype)
    expected = experts_linear(case.x, case.weight, case.expert, case.token, scale)
    buffer = torch.full((20, 333), float("nan"), dtype=torch.float16, device=DEVICE)
    x = buffer[3 : 3 + case.x.shape[0], 9:209]
    x.copy_(case.x)
    rows = [torch.stack([t, t.flip(0)], 1)[:, 0] for t in (case.expert, case.token, scale)]
    assert not any(tensor.is_contiguous() for tensor in rows)
    assert torch.equal(experts_linear(x, case.weight, *rows), expected)
    columns = case.x.T.contiguous().T
    assert torch.equal(experts_linear(columns, case.weight, *rows), expected)
    wide = dataclasses.replace(case, scale=scale.float())
    assert_as_exact_as_torch(expected, wide)


@needs_interpreter
def test_shipped_tiles_split_few_rows_and_leave_many_whole(seed: int) -> None:
    weight = make_case("W4A16_G64", (2, 70, 2100), 4, seed, torch.float16).weight
    x = torch.zeros(1, 2100, dtype=torch.float16)
    assert routed.tile_for(x, weight, 2).split > 1
    assert routed.tile_for(x, weight, SPLIT_ROWS + 1).split == 1
    shares = {rows: routed.tile_for(x, weight, rows).block_m for rows in (2, 34, 100, 10000)}
    assert shares == {2: 16, 34: 32, 100: 64, 10000: 64}
    assert routed.tile_for(x.float(), weight, 2) == routed.FLOAT32_TILE
    assert routed.tile_for(x, weight, 2).block_n == 128


@needs_gpu
@half_dtypes
@pytest.mark.parametrize("rows", [8, 64, 200, 4096])
def test_a_captured_graph_replays_on_new_routes(dtype: torch.dtype, rows: int, seed: int) -> None:
    case = make_case("W4A16_ASYM_G64", (16, 256, 1024), rows, seed, dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        experts_linear(case.x, case.weight, *case.rows)  # compiles, before the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = experts_linear(case.x, case.weight, *case.rows)
    generator = torch.Generator(device="cuda").manual_seed(seed)
    for _ in range(5):
        case.expert.random_(-1, 17, generator=generator)
        case.token.random_(0, case.x.shape[0], generator=generator)
        case.x.normal_(generator=generator)
        graph.replay()
        assert torch.equal(captured, experts_linear(case.x, case.weight, *case.rows))
    assert not case.weight.weight.counters.any()


@needs_gpu
@pytest.mark.parametrize("rows", [8, 300])
def test_nothing_waits_for_the_gpu(rows: int, seed: int) -> None:
    case = make_case("NF4_DQ", (16, 256, 1024), rows, seed, torch.bfloat16)
    x, scale = case.x.requires_grad_(), case.scale.requires_grad_()

    def calls() -> None:
        experts_linear(x, case.weight, case.expert, case.token, scale).sum().backward()

    calls()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        calls()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@few_schemes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("rows", [8, 64, 250, 3000])
def test_shipped_tiles_at_real_sizes(scheme: str, dtype: torch.dtype, rows: int, seed: int) -> None:
    case = make_case(scheme, (32, 768, 2048), rows, seed, dtype)
    first = experts_linear(case.x, case.weight, *case.rows)
    assert_as_exact_as_torch(first, case)
    for _ in range(10):
        assert torch.equal(experts_linear(case.x, case.weight, *case.rows), first)
    decoded = matmul.dequantize(case.weight.weight, torch.float32).view(32, -1, 2048)
    torch.testing.assert_close(decoded[:, :768].double(), case.dense)
