"""Linear layers with int8 weights and int8 activations: out = (q_x . q_w^T) s_x s_w + bias.

    torch.ops.lowbit_kernels.quantize_rows        x -> int8 codes and a scale per token
    torch.ops.lowbit_kernels.w8a8_linear          quantize_rows, then the product: two launches
    torch.ops.lowbit_kernels.w8a8_grad_input      grad (s_w q_w): straight through the rounding of x

The weight is the stored one, int8 [N, K]. All are opaque to `torch.compile`, allocate from torch's
allocator only, and read no tensor on the host. A row of x with a NaN becomes a row of NaN; so does
one with an infinity, unless the scale is given.

Per-token int8: Yao et al. 2022, ZeroQuant, section 4.1. Straight-through: Bengio et al. 2013.
Shapes: N rows of the weight, K columns, M rows of activations (tokens).
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lowbit_kernels.gpu.support import FLOAT_DTYPES, on_device_of_first
from lowbit_kernels.gpu.w8a8_kernels import quantize_rows_kernel, w8a8_kernel

# -128 * -128 * K stays below 2^31.
MAX_IN_FEATURES = 2**17 - 1
# A row up to this length is read once and kept in registers.
_ROW_BLOCK = 16384
# Columns for a program of a split K, at the least.
_MIN_PART = 512


class Tile(NamedTuple):
    """How the product is cut up; `per_sm` programs of a split K are to be on a multiprocessor."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    per_sm: int


# The smallest block_m that holds M is taken. Chosen from compiled code (int8 wgmma, no spills) and
# from the bytes in flight that hide the latency of memory; not yet measured.
_TILES = (
    Tile(16, 64, 256, 4, 3, 3),
    Tile(32, 64, 256, 4, 3, 3),
    Tile(64, 128, 128, 8, 4, 2),
    Tile(128, 128, 128, 8, 4, 1),
)
# Where there are enough tiles of it to fill the chip, and shared memory for all its stages: chips
# with less have mma.sync, whose operands do not fit in registers beside its sums.
_WIDE_TILE = Tile(128, 256, 128, 8, 4, 1)

_INTERPRETED = not isinstance(w8a8_kernel, triton.JITFunction)


def quantize_rows(x: Tensor, activation_scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Returns int8 codes `[M, K]` of x `[.., K]` and their scales, float32 `[M]`; one launch.

    `codes = round(x / scale)`, half to even, with `scale = max |row| / 127`, so that codes lie in
    -127 .. 127; a row of zeros has codes of zero and the smallest normal float32 for a scale. With
    a given scale, codes saturate at -127 and 127. The scale of a row with a NaN is NaN, and so is a
    computed one of a row with an infinity. Not differentiable.

    Args:
        x: fp16, bf16 or fp32; any strides.
        activation_scale: one scale for all rows, or None to compute one per row.

    Raises:
        ValueError: x has another dtype, no columns, or is where the kernels do not run.
    """
    codes, scales = torch.ops.lowbit_kernels.quantize_rows(x.detach(), activation_scale)
    return codes, scales


def w8a8_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    activation_scale: float | None = None,
) -> Tensor:
    """Returns `quantized(x) (scales codes)^T + bias`, `[.., N]` in x's dtype.

    The product of the codes is exact; it is scaled in float32 and rounded once. Differentiable in
    x, through the weight as if x were not rounded nor saturated, and in bias. The weight is frozen.

    Args:
        x: fp16, bf16 or fp32 `[.., K]`; any strides.
        codes: int8 `[N, K]`, contiguous; K up to `MAX_IN_FEATURES`. Fast where 16 divides K.
        scales: fp16, bf16 or fp32 `[N]`.
        bias: fp16, bf16 or fp32 `[N]`, or None.
        activation_scale: see `quantize_rows`.

    Raises:
        ValueError: dtypes, shapes or devices are others than these.
    """
    result: Tensor = torch.ops.lowbit_kernels.w8a8_linear(x, codes, scales, bias, activation_scale)
    return result


def _check_x(x: Tensor, activation_scale: float | None) -> None:
    if x.device.type == "cpu" and not _INTERPRETED:
        raise ValueError("w8a8: x is on the CPU; the kernels run on CUDA and ROCm devices")
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"w8a8: x is {x.dtype}; float16, bfloat16 or float32 is needed")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"w8a8: x is {list(x.shape)}; one column or more is needed")
    if activation_scale is not None and not 2.0**-126 <= activation_scale < 2.0**128:
        raise ValueError(
            f"w8a8: activation_scale is {activation_scale}; a positive normal float32 is needed"
        )


def _check_weight(codes: Tensor, **vectors: Tensor | None) -> None:
    if codes.dtype != torch.int8 or codes.dim() != 2 or not codes.is_contiguous():
        raise ValueError(
            f"w8a8: codes are {codes.dtype} {list(codes.shape)} with strides "
            f"{list(codes.stride())}; contiguous int8 [N, K] is needed"
        )
    if codes.shape[1] > MAX_IN_FEATURES:
        raise ValueError(
            f"w8a8: codes have {codes.shape[1]} columns, whose sums could leave int32; up to "
            f"{MAX_IN_FEATURES} are supported"
        )
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.dtype not in FLOAT_DTYPES or vector.shape != codes.shape[:1]:
            raise ValueError(
                f"w8a8: {name} is {vector.dtype} {list(vector.shape)}; float16, bfloat16 or "
                f"float32 [{codes.shape[0]}] is needed"
            )
        if vector.device != codes.device or not vector.is_contiguous():
            raise ValueError(
                f"w8a8: {name} is on {vector.device} with strides {list(vector.stride())}; it must "
                f"be contiguous and beside the codes, on {codes.device}"
            )


def _check_product(x: Tensor, codes: Tensor) -> None:
    if x.shape[-1] != codes.shape[1]:
        raise ValueError(
            f"w8a8: x is {list(x.shape)}, but the weight has {codes.shape[1]} input features"
        )
    if x.device != codes.device:
        raise ValueError(f"w8a8: x is on {x.device}, but the weight on {codes.device}; move one")


@functools.cache
def _device(index: int) -> tuple[int, int]:
    """Returns multiprocessors and bytes of shared memory; made up where Triton interprets."""
    if _INTERPRETED:
        return 4, 2**18
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return int(properties["multiprocessor_count"]), int(properties["max_shared_mem"])


def fitting(tile: Tile, device_index: int) -> Tile:
    """Returns the tile with as many stages as shared memory holds."""
    stage = (tile.block_m + tile.block_n) * tile.block_k
    return tile._replace(stages=max(1, min(tile.stages, _device(device_index)[1] // stage)))


@functools.lru_cache(maxsize=4096)
def choose(device_index: int, m_holds: int, N: int, K: int) -> tuple[Tile, int]:
    """Returns the tile for a product, and how many programs share a tile along K.

    Args:
        device_index: of the CUDA device.
        m_holds: M, rounded up to a power of two, so that few products have to be told apart.
        N: rows of the weight.
        K: columns.
    """
    processors = _device(device_index)[0]

    def tiles(tile: Tile) -> int:
        return -(-m_holds // tile.block_m) * -(-N // tile.block_n)

    tile = next((tile for tile in _TILES if tile.block_m >= m_holds), _TILES[-1])
    if m_holds > tile.block_m and tiles(_WIDE_TILE) >= processors:
        wide = fitting(_WIDE_TILE, device_index)
        tile = wide if wide == _WIDE_TILE else tile
    split = min(round(tile.per_sm * processors / tiles(tile)), K // _MIN_PART)
    return fitting(tile, device_index), max(1, split)


def _quantize(
    x_MK: Tensor, activation_scale: float | None, workspace: Tensor | None, counters: int
) -> tuple[Tensor, Tensor]:
    """Returns codes and scales of x and clears the first `counters` numbers of the workspace."""
    M, K = x_MK.shape
    codes = x_MK.new_empty((M, K), dtype=torch.int8)
    scales = x_MK.new_empty((M,), dtype=torch.float32)
    block = min(max(triton.next_power_of_2(K), 128), _ROW_BLOCK)
    quantize_rows_kernel[(M,)](
        x_MK,
        codes,
        scales,
        workspace,
        K,
        x_MK.stride(0),
        1.0 if activation_scale is None else activation_scale,
        counters,
        STATIC=activation_scale is not None,
        BLOCK_K=block,
        num_warps=min(max(block // 1024, 1), 16),
    )
    return codes, scales


def run(
    x_MK: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    activation_scale: float | None,
    tile: Tile,
    split: int,
) -> Tensor:
    """Returns `w8a8_linear` of x `[M, K]` by this tile; two launches.

    Args:
        x_MK: last dimension contiguous, M > 0.
        codes, scales, bias, activation_scale: see `w8a8_linear`; nothing is checked here.
        tile: see `Tile`.
        split: programs that share a tile of the result along K.
    """
    (M, K), N = x_MK.shape, codes.shape[0]
    out = x_MK.new_empty((M, N))
    tiles = triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n)
    workspace = None
    if split > 1:
        workspace = x_MK.new_empty((tiles + split * M * N,), dtype=torch.int32)
    x_codes, x_scales = _quantize(x_MK, activation_scale, workspace, tiles)
    w8a8_kernel[(tiles, split)](
        x_codes,
        x_scales,
        codes,
        scales,
        bias,
        out,
        workspace,
        tiles,
        M,
        N,
        K,
        EVEN_K=K % tile.block_k == 0,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=8,
        SPLIT=split,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    return out


def _rows(x: Tensor) -> Tensor:
    x_MK = x.reshape(-1, x.shape[-1])
    return x_MK if x_MK.stride(-1) == 1 else x_MK.contiguous()


def _quantize_rows(x: Tensor, activation_scale: float | None) -> tuple[Tensor, Tensor]:
    _check_x(x, activation_scale)
    if x.numel() == 0:
        return x.new_empty((0, x.shape[-1]), dtype=torch.int8), x.new_empty(0, dtype=torch.float32)
    return _quantize(_rows(x), activation_scale, None, 0)


def _linear(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, activation_scale: float | None
) -> Tensor:
    _check_x(x, activation_scale)
    _check_weight(codes, scales=scales, bias=bias)
    _check_product(x, codes)
    N, K = codes.shape
    if x.numel() == 0 or N == 0:
        return x.new_empty((*x.shape[:-1], N))
    x_MK = _rows(x)
    m_holds = max(16, triton.next_power_of_2(x_MK.shape[0]))
    tile, split = choose(x.device.index or 0, m_holds, N, K)
    out = run(x_MK, codes, scales, bias, activation_scale, tile, split)
    # Models write to products in place, which autograd forbids for a view made in here.
    result: Tensor = torch.ops.aten._unsafe_view(out, (*x.shape[:-1], N))
    return result


def _grad_input(grad: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    weight = grad.new_empty(codes.shape)
    # Computed in float32 and rounded once, without a float32 copy of the weight on a GPU.
    torch.mul(codes, scales.float()[:, None], out=weight)
    return grad @ weight


def _quantize_rows_fake(x: Tensor, activation_scale: float | None) -> tuple[Tensor, Tensor]:
    M = math.prod(x.shape[:-1])
    codes = x.new_empty((M, x.shape[-1]), dtype=torch.int8)
    return codes, x.new_empty((M,), dtype=torch.float32)


def _linear_fake(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, activation_scale: float | None
) -> Tensor:
    _check_weight(codes, scales=scales, bias=bias)
    _check_product(x, codes)
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _grad_input_fake(grad: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], codes.shape[1]))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scales, bias, _ = inputs
    ctx.save_for_backward(codes, scales)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.lowbit_kernels.w8a8_grad_input(grad, *ctx.saved_tensors)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None


def _autocast(x: Tensor, *arguments: Any) -> Tensor:
    """Casts x alone: `torch.library.register_autocast` would round the scales too."""
    with torch.autocast("cuda", enabled=False):
        lowered = x.to(torch.get_autocast_dtype("cuda"))
        result: Tensor = torch.ops.lowbit_kernels.w8a8_linear(lowered, *arguments)
        return result


_library = torch.library.Library("lowbit_kernels", "FRAGMENT")
_operators: tuple[tuple[str, Any, Any], ...] = (
    (
        "quantize_rows(Tensor x, float? activation_scale) -> (Tensor, Tensor)",
        _quantize_rows,
        _quantize_rows_fake,
    ),
    (
        "w8a8_linear(Tensor x, Tensor codes, Tensor scales, Tensor? bias, float? activation_scale) "
        "-> Tensor",
        _linear,
        _linear_fake,
    ),
    (
        "w8a8_grad_input(Tensor grad, Tensor codes, Tensor scales) -> Tensor",
        _grad_input,
        _grad_input_fake,
    ),
)
for _schema, _kernel, _fake in _operators:
    _name = _library.define(_schema)
    _library.impl(_name, on_device_of_first(_kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"lowbit_kernels::{_name}", _fake, lib=_library)
torch.library.register_autograd(
    "lowbit_kernels::w8a8_linear", _backward, setup_context=_save_for_backward, lib=_library
)
_library.impl("w8a8_linear", _autocast, "AutocastCUDA")
