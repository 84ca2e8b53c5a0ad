"""int8 times int8 on a GPU: real sizes, races, graphs, streams; see test_w8a8.py for the rest.

The files beside this one run there too, on CUDA tensors; nothing of them is repeated here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from int8_cases import assert_exact, case
from lowbit_kernels.gpu.w8a8 import Tile, quantize_rows, run, w8a8_linear
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]

SPLIT = Tile(16, 64, 256, 4, 3, 1)
half_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"]
)


@half_dtypes
@pytest.mark.parametrize("activation_scale", [None, 0.02])
@pytest.mark.parametrize("rows", [1, 8, 16, 17, 33, 64, 65, 128, 300, 2048])
@pytest.mark.parametrize("shape", [(1000, 4160), (4096, 4096), (6144, 14336), (257, 4100)])
def test_shipped_tiles_are_exact_but_for_rounding(
    shape: tuple[int, int],
    rows: int,
    activation_scale: float | None,
    dtype: torch.dtype,
    seed: int,
) -> None:
    given = case(rows, *shape, seed, dtype, dtype)
    result = w8a8_linear(given.x, given.codes, given.scales, given.bias, activation_scale)
    assert_exact(result, given, given.bias, activation_scale)


@pytest.mark.parametrize("split", [2, 7, 16])
def test_twenty_runs_give_the_same_bits_on_a_busy_gpu(split: int, seed: int) -> None:
    """Another stream keeps multiprocessors busy, so that programs arrive in any order."""
    given = case(16, 640, 8192, seed, torch.bfloat16)
    arguments = given.x, given.codes, given.scales, given.bias, None
    expected = run(*arguments, SPLIT, 1)
    stream, other = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(200):
            other = torch.mm(other, other).tanh_()
    results = [run(*arguments, SPLIT, split) for _ in range(20)]
    assert all(torch.equal(result, expected) for result in results)
    torch.cuda.synchronize()


def test_one_weight_on_two_streams(seed: int) -> None:
    """Counters belong to the call, so that even one weight may be used twice at a time."""
    given = case(4, 1024, 8192, seed, torch.bfloat16)
    xs = [given.x, given.x.flip(1).contiguous()]
    weight = given.codes, given.scales, None, None
    expected = [run(x, *weight, SPLIT, 1) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    found: list[list[Tensor]] = [[], []]
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i].append(run(xs[i], *weight, SPLIT, 8))
    torch.cuda.synchronize()
    for i in range(2):
        assert all(torch.equal(result, expected[i]) for result in found[i])


@half_dtypes
@pytest.mark.parametrize("rows", [1, 16, 200, 1024])
def test_a_captured_graph_replays_on_new_activations(
    dtype: torch.dtype, rows: int, seed: int
) -> None:
    first, second = case(rows, 1024, 2048, seed, dtype), case(rows, 2048, 1024, seed + 1, dtype)

    def layers(x: Tensor) -> Tensor:
        hidden = F.silu(w8a8_linear(x, first.codes, first.scales, first.bias))
        return w8a8_linear(hidden, second.codes, second.scales)

    x = first.x.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, before the capture
            layers(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layers(x)
    for step in range(5):
        fresh = case(rows, 1, 2048, seed + 2 + step, dtype).x
        x.copy_(fresh)
        graph.replay()
        noise = [torch.full_like(captured, float("nan")) for _ in range(4)]  # other users of memory
        assert torch.equal(captured, layers(fresh))
        del noise


@pytest.mark.parametrize("rows", [1, 64, 300, 2048])
def test_nothing_waits_for_the_gpu(rows: int, seed: int) -> None:
    given = case(rows, 512, 1024, seed, torch.bfloat16)
    x = given.x.requires_grad_()

    def calls() -> None:
        result = w8a8_linear(x, given.codes, given.scales, given.bias)
        result.backward(torch.ones_like(result))
        quantize_rows(x, 0.1)

    calls()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        calls()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_autocast_lowers_activations_and_leaves_scales(seed: int) -> None:
    given = case(5, 64, 256, seed)
    with torch.autocast("cuda", torch.bfloat16):
        result = w8a8_linear(given.x, given.codes, given.scales, given.bias)
    expected = w8a8_linear(given.x.bfloat16(), given.codes, given.scales, given.bias)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, expected)


def test_a_decoded_weight_is_never_in_float32(seed: int) -> None:
    """Backward needs the weight in the dtype of x, for one product, and nothing larger."""
    given = case(16, 8192, 8192, seed, torch.bfloat16)
    x = given.x.requires_grad_()
    result = w8a8_linear(x, given.codes, given.scales)
    grad = torch.ones_like(result)
    result.backward(grad, retain_graph=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result.backward(grad)
    assert torch.cuda.max_memory_allocated() - before <= 2 * 8192 * 8192 + 2**26


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor_compiles_layers_as_one_graph(mode: str, seed: int) -> None:
    first = case(8, 1024, 2048, seed, torch.bfloat16)
    second = case(8, 2048, 1024, seed + 1, torch.bfloat16)

    def layers(x: Tensor) -> Tensor:
        hidden = w8a8_linear(x, first.codes, first.scales, first.bias)
        return w8a8_linear(hidden, second.codes, second.scales)

    torch._dynamo.reset()
    compiled: Any = torch.compile(layers, fullgraph=True, mode=mode)
    for step in range(4):
        x = case(8, 1, 2048, seed + step, torch.bfloat16).x
        with torch.no_grad():
            assert torch.equal(compiled(x).clone(), layers(x))


def test_a_weight_of_more_than_two_billion_codes(seed: int) -> None:
    rows, columns = 300000, 8192
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free memory")
    generator = torch.Generator(device="cuda").manual_seed(seed)
    codes = torch.empty(rows, columns, dtype=torch.int8, device="cuda")
    codes.random_(-128, 128, generator=generator)
    scales = torch.rand(rows, generator=generator, device="cuda") * 0.01
    for tokens in (1, 300):
        x = case(tokens, 1, columns, seed, torch.bfloat16).x
        result = w8a8_linear(x, codes, scales)
        for start in (0, 2**31 // columns - 64, rows - 128):
            part = slice(start, start + 128)
            expected = w8a8_linear(x, codes[part], scales[part])
            assert torch.equal(result[:, part], expected)
