"""What only a GPU can show: the compiled kernels with their inline PTX, races, graphs, real sizes.

The other files of this folder run there too, on CUDA tensors; nothing of them is repeated here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fragment_weights import fragment, random_fragment, random_qweight
from lowbit_kernels.format import Format
from lowbit_kernels.gpu import matmul
from lowbit_kernels.gpu.configs import Tile
from lowbit_kernels.gpu.matmul import dequantize, grad_input, linear, run_fused
from lowbit_kernels.gpu.weight import FragmentWeight, lane_words
from torch import Tensor
from triton.runtime.errors import OutOfResources

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]

half_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"]
)
# Every fragment of ptx.py, and every MODE.
SCHEMES = (
    "W2A16_G64", "W2A16_ASYM_G32", "W3A16_G64", "W3A16_ASYM_G64", "W3A16_G16", "W4A16",
    "W4A16_ASYM_G64", "W4A16_CHANNEL", "W4A16_ASYM_CHANNEL", "W4A16_G64_DQ", "W8A16_CHANNEL",
    "W8A16_ASYM_G64", "W8A16_G32", "NF4", "NF4_DQ", "FP4_G32_FP32", "NF4_CHANNEL",
)  # fmt: skip
every_fragment = pytest.mark.parametrize("scheme", SCHEMES)
SPLIT = Tile(16, 128, 4, 4, 4)


def activations(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, device="cuda").to(dtype)


def random_words(form: Format, rows: int, columns: int, seed: int) -> FragmentWeight:
    """Returns a large weight of random codes, made on the GPU; integers of 4 or 8 bits."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    size = (rows // 16, columns // 64, 16, 4, lane_words(form))
    words = torch.empty(size, dtype=torch.int32, device="cuda").random_(generator=generator)
    shape = (form.groups(columns), rows)
    scale = torch.rand(shape, generator=generator, device="cuda").half() * 0.01
    counters = torch.zeros(rows // 64, dtype=torch.int32, device="cuda")
    return FragmentWeight(form, rows, columns, words, None, scale, None, counters)


@pytest.fixture
def busy_gpu() -> Iterator[None]:
    """Keeps some multiprocessors busy from another stream, so that programs arrive in any order."""
    stream, stop = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    with torch.cuda.stream(stream):
        for _ in range(200):
            stop = torch.mm(stop, stop).tanh_()
    yield
    torch.cuda.synchronize()


@every_fragment
@half_dtypes
@pytest.mark.parametrize(
    ("block_m", "wide"), [(16, False), (64, True), (128, False)], ids=["16", "64-wide", "128"]
)
def test_inline_ptx_decodes_like_plain_triton(
    scheme: str,
    dtype: torch.dtype,
    block_m: int,
    wide: bool,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(matmul, "_multiplies_with_mma_sync", lambda index: wide)
    weight = random_fragment(scheme, (192, 456), seed)
    eye = torch.eye(456, dtype=dtype, device="cuda")
    x = torch.cat([eye, activations(16, 456, dtype, seed)])
    tile = Tile(block_m, 64, 4, 3, 1)
    with_ptx = run_fused(x, weight, None, tile)
    compiled_with = matmul.constants
    if compiled_with(weight.format, weight.scale.shape[0], "bf16", block_m, wide)["ASM"] is None:
        pytest.skip("there is no PTX on this device")
    monkeypatch.setattr(matmul, "constants", lambda *rest: {**compiled_with(*rest), "ASM": None})
    without = run_fused(x, weight, None, tile)
    assert torch.equal(with_ptx[:456], without[:456])  # one product each: no order of sums
    assert with_ptx.isfinite().all()
    torch.testing.assert_close(with_ptx[456:], without[456:], rtol=2**-7, atol=2**-7)


@every_fragment
@half_dtypes
@pytest.mark.parametrize("rows", [1, 8, 16, 17, 33, 64, 65, 128, 300])
def test_shipped_tiles_are_as_exact_as_torch(
    scheme: str, dtype: torch.dtype, rows: int, seed: int
) -> None:
    weight = random_fragment(scheme, (1000, 4160), seed)
    x, bias = activations(rows, 4160, dtype, seed), activations(1, 1000, dtype, seed + 1)[0]
    result = linear(x, weight, bias)
    decoded = dequantize(weight, torch.float32)
    exact = F.linear(x.double(), decoded.double(), bias.double())
    plain = F.linear(x, decoded.to(dtype), bias)
    assert (result - exact).abs().max() <= 2 * (plain - exact).abs().max()
    assert not weight.counters.any()


@pytest.mark.parametrize("scheme", ["W4A16", "W3A16_ASYM_G32", "NF4_CHANNEL", "W8A16_ASYM_G64"])
@pytest.mark.parametrize(
    "tile",
    [
        Tile(block_m, block_n, warps, stages, 3 if block_m >= 64 else 1)
        for block_m in (16, 32, 64, 128, 256)
        for block_n, warps, stages in ((64, 4, 2), (128, 4, 4), (128, 8, 3), (256, 8, 3))
        if block_m * block_n < 256 * 256
    ],
    ids=lambda tile: f"{tile.block_m}x{tile.block_n}-{tile.warps}-{tile.stages}",
)
def test_any_tile_that_fits_the_chip_gives_the_same_product(
    scheme: str, tile: Tile, seed: int
) -> None:
    weight = random_fragment(scheme, (512, 1200), seed)
    x = activations(40, 1200, torch.bfloat16, seed)
    exact = x.double() @ dequantize(weight, torch.float32).double().T
    plain = F.linear(x, dequantize(weight, torch.bfloat16))
    try:
        result = run_fused(x, weight, None, tile)
    except OutOfResources as error:
        pytest.skip(str(error))
    assert (result - exact).abs().max() <= 2 * (plain - exact).abs().max()


@pytest.mark.usefixtures("busy_gpu")
@pytest.mark.parametrize("scheme", ["W4A16", "W3A16_ASYM_G64", "NF4_DQ", "W8A16_CHANNEL"])
@half_dtypes
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_twenty_runs_give_the_same_bits(
    scheme: str, dtype: torch.dtype, rows: int, seed: int
) -> None:
    weight = random_fragment(scheme, (640, 4096), seed)
    x = activations(rows, 4096, dtype, seed)
    tile = Tile(max(16, rows), 64, 4, 3, 7)
    results = [run_fused(x, weight, None, tile) for _ in range(20)]
    assert all(torch.equal(result, results[0]) for result in results)
    assert not weight.counters.any()


@pytest.mark.usefixtures("busy_gpu")
def test_launches_that_follow_each_other_do_not_share_counts(seed: int) -> None:
    """Launches of one weight with different splits, without a pause, as layers of a model do."""
    weight = random_fragment("W4A16_ASYM_G64", (256, 8192), seed)
    xs = [activations(rows, 8192, torch.bfloat16, seed + rows) for rows in (1, 5, 16)]
    tiles = [Tile(16, 64, 4, 3, split) for split in (16, 3, 1, 9)]
    alone = []
    for x in xs:
        for tile in tiles:
            alone.append(run_fused(x, weight, None, tile))
            torch.cuda.synchronize()
    together = [run_fused(x, weight, None, tile) for _ in range(10) for x in xs for tile in tiles]
    for i, result in enumerate(together):
        assert torch.equal(result, alone[i % len(alone)])


@half_dtypes
@pytest.mark.parametrize("rows", [1, 16, 200, 1024])
def test_a_captured_graph_replays_on_new_activations(
    dtype: torch.dtype, rows: int, seed: int
) -> None:
    """Fused with and without split, and decoded whole: memory comes from the graph's pool."""
    first = random_fragment("W4A16_ASYM_G64", (1024, 2048), seed)
    second = random_fragment("NF4_DQ", (2048, 1024), seed)

    def layers(x: Tensor) -> Tensor:
        return linear(F.silu(linear(x, first)), second) + x

    x = activations(rows, 2048, dtype, seed)
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
        fresh = activations(rows, 2048, dtype, seed + step)
        x.copy_(fresh)
        graph.replay()
        noise = [torch.full_like(captured, float("nan")) for _ in range(4)]  # other users of memory
        expected = layers(fresh)
        if rows <= 200:
            assert torch.equal(captured, expected)
        torch.testing.assert_close(captured, expected)  # cuBLAS may choose another kernel
        del noise
    assert not first.counters.any()
    assert not second.counters.any()


def test_two_weights_on_two_streams_do_not_disturb_each_other(seed: int) -> None:
    weights = [random_fragment("W4A16", (1024, 4096), seed + i) for i in range(2)]
    x = activations(4, 4096, torch.bfloat16, seed)
    expected = [run_fused(x, weight, None, SPLIT) for weight in weights]
    streams = [torch.cuda.Stream() for _ in weights]
    torch.cuda.synchronize()
    found: list[list[Tensor]] = [[], []]
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i].append(run_fused(x, weights[i], None, SPLIT))
    torch.cuda.synchronize()
    for i in range(2):
        assert all(torch.equal(result, expected[i]) for result in found[i])


@pytest.mark.parametrize("rows", [1, 64, 300, 2048])
def test_nothing_waits_for_the_gpu(rows: int, seed: int) -> None:
    weight = random_fragment("W4A16_ASYM_G64_DQ", (512, 1024), seed)
    x = activations(rows, 1024, torch.bfloat16, seed)

    def calls() -> None:
        linear(x, weight)
        grad_input(x[:, :512], weight)
        dequantize(weight, torch.bfloat16)

    calls()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        calls()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_decoded_weight_does_not_outlive_its_product(seed: int) -> None:
    form = Format(4, 128)
    weight = random_words(form, 8192, 8192, seed)
    x = activations(2048, 8192, torch.bfloat16, seed).requires_grad_()
    linear(x, weight).sum().backward()
    x.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    result = linear(x, weight)
    kept = torch.cuda.memory_allocated() - before
    assert kept <= result.numel() * 2 + 2**20
    torch.cuda.reset_peak_memory_stats()
    result.sum().backward()
    # The decoded weight, the gradients of result and x, and cuBLAS' workspace.
    room = 2 * (8192 * 8192 + 2 * 2048 * 8192) + 2**26
    assert torch.cuda.max_memory_allocated() - before - kept <= room


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor_compiles_layers_as_one_graph(mode: str, seed: int) -> None:
    first = random_fragment("W4A16_ASYM_G64", (1024, 2048), seed)
    second = random_fragment("NF4_DQ", (2048, 1024), seed)

    def layers(x: Tensor) -> Tensor:
        return linear(F.silu(linear(x, first)), second) + x

    torch._dynamo.reset()
    compiled: Any = torch.compile(layers, fullgraph=True, mode=mode)
    for step in range(4):
        x = activations(8, 2048, torch.bfloat16, seed + step)
        with torch.no_grad():
            found = compiled(x).clone()
            # silu is computed in float32 there and rounded once.
            torch.testing.assert_close(found, layers(x), rtol=2e-2, atol=2e-2)
    assert not first.counters.any()


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_of_more_than_two_billion_words(bits: int, seed: int) -> None:
    """Addresses beyond 2^31 elements of the words (8 bits) and of the decoded weight."""
    rows, columns = 1064960, 8192
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free memory")
    weight = random_words(Format(bits, 128), rows, columns, seed)
    x = activations(5, columns, torch.bfloat16, seed)
    product = linear(x, weight)
    decoded = dequantize(weight, torch.bfloat16)
    for start in (0, rows // 2, rows - 128):
        part = weight.rows(start, start + 128, 128)
        assert torch.equal(decoded[start : start + 128], dequantize(part, torch.bfloat16))
        exact = x.double() @ dequantize(part, torch.float32).double().T
        plain = F.linear(x, decoded[start : start + 128])
        error = (product[:, start : start + 128] - exact).abs().max()
        assert error <= 2 * (plain - exact).abs().max()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("rows", [4, 1024])
def test_a_weight_on_another_gpu_than_the_current_one(rows: int, seed: int) -> None:
    qweight = random_qweight("W4A16_ASYM_G64", (256, 512), seed)
    x = activations(rows, 512, torch.bfloat16, seed)
    here, there = (fragment(qweight, device) for device in ("cuda:0", "cuda:1"))
    assert torch.cuda.current_device() == 0
    found = linear(x.to("cuda:1"), there)
    assert found.device.index == 1
    assert torch.equal(found.to("cuda:0"), linear(x, here))
    decoded = dequantize(there, torch.bfloat16)
    assert torch.equal(decoded.to("cuda:0"), dequantize(here, torch.bfloat16))
