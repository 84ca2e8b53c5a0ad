"""Multiplying by a weight in fragment order: the operators, and which kernel runs them.

    torch.ops.lowbit_kernels.linear              x W^T + bias
    torch.ops.lowbit_kernels.linear_grad_input   grad W
    torch.ops.lowbit_kernels.dequantize          W

All three are opaque to `torch.compile`, allocate from torch's allocator only (which keeps them
right under CUDA graphs and streams), and read no tensor on the host. Backward keeps the stored
tensors alone; a decoded weight lives for one product.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.format import Format
from lowbit_kernels.gpu import configs
from lowbit_kernels.gpu.configs import Tile
from lowbit_kernels.gpu.dequantize import TRITON_DTYPES, dequantize_into, tile_group
from lowbit_kernels.gpu.linear import linear_kernel
from lowbit_kernels.gpu.ptx import decode_asm
from lowbit_kernels.gpu.support import on_device_of_first
from lowbit_kernels.gpu.weight import CHUNK, FragmentWeight

_STORED = (
    "Tensor words, Tensor? plane, Tensor scale, Tensor? zero, Tensor counters, Tensor? table, "
    "Tensor? scale_offset, Tensor? scale_step"
)
_SHAPE = "str format, int out_features, int in_features"
_library = torch.library.Library("lowbit_kernels", "FRAGMENT")
_library.define(f"linear(Tensor x, {_STORED}, Tensor? bias, {_SHAPE}) -> Tensor")
_library.define(f"linear_grad_input(Tensor grad, {_STORED}, {_SHAPE}) -> Tensor")
_library.define(f"dequantize({_STORED}, {_SHAPE}, ScalarType dtype) -> Tensor")

# The dtypes that the fused kernel multiplies; others are decoded whole.
_FUSED_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def linear(x: Tensor, weight: FragmentWeight, bias: Tensor | None = None) -> Tensor:
    """Returns `x W^T + bias`, `[..., N]` in x's dtype; differentiable in x and bias."""
    result: Tensor = torch.ops.lowbit_kernels.linear(x, *stored(weight), bias, *shape(weight))
    return result


def grad_input(grad: Tensor, weight: FragmentWeight) -> Tensor:
    """Returns `grad W`, `[..., K]` in grad's dtype."""
    result: Tensor = torch.ops.lowbit_kernels.linear_grad_input(
        grad, *stored(weight), *shape(weight)
    )
    return result


def dequantize(weight: FragmentWeight, dtype: torch.dtype) -> Tensor:
    """Returns the weight `[N, K]` in `dtype` (float16, bfloat16 or float32), rounded once."""
    result: Tensor = torch.ops.lowbit_kernels.dequantize(*stored(weight), *shape(weight), dtype)
    return result


def stored(weight: FragmentWeight) -> tuple[Tensor | None, ...]:
    """Returns the tensors of `weight` in the order of the operators' schemas."""
    return (
        weight.words,
        weight.plane,
        weight.scale,
        weight.zero,
        weight.counters,
        weight.table,
        weight.scale_offset,
        weight.scale_step,
    )


def shape(weight: FragmentWeight) -> tuple[str, int, int]:
    """Returns the arguments of the operators that are no tensors."""
    return weight.format.text, weight.out_features, weight.in_features


def _weight(arguments: tuple[Any, ...], numbers: tuple[Any, ...]) -> FragmentWeight:
    form, out_features, in_features = numbers
    words, plane, scale, zero, counters, table, offset, step = arguments
    return FragmentWeight(
        Format.parse(form),
        out_features,
        in_features,
        words,
        plane,
        scale,
        zero,
        counters,
        table,
        offset,
        step,
    )


@functools.cache
def _kind(form: Format) -> str:
    return "codebook" if form.codebook is not None else f"int{form.bits}"


@functools.cache
def _plain_triton() -> bool:
    """Returns True where inline PTX cannot run: on AMD, and in Triton's interpreter."""
    return torch.version.hip is not None or not torch.cuda.is_available()


@functools.cache
def _multiplies_with_mma_sync(device_index: int) -> bool:
    """Returns True for NVIDIA chips without wgmma or tcgen05; see `decode.tile_columns`."""
    if _plain_triton():
        return False
    return torch.cuda.get_device_capability(device_index)[0] not in (9, 10)


@functools.cache
def _multiplies_with_tcgen05(device_index: int) -> bool:
    """Returns True for sm_100; see `constants`."""
    return not _plain_triton() and torch.cuda.get_device_capability(device_index)[0] == 10


@functools.lru_cache(maxsize=1024)
def constants(
    form: Format, groups: int, dtype: str, block_m: int, wide: bool, tcgen05: bool = False
) -> dict[str, Any]:
    """Returns the compile-time arguments of the fused kernel that depend on the format.

    Args:
        form: format of the weight.
        groups: scales in a row.
        dtype: "fp16", "bf16" or "fp32" of the activations.
        block_m: activations per program.
        wide: see `decode.tile_columns`.
        tcgen05: whether the target multiplies with it (sm_100).
    """
    mode, group, columns = "row", 128, 128
    if groups > 1:
        group = form.group_size
        columns = tile_group(group, 128)
        # Above 64 rows, scaling every product costs more than scaling every weight.
        mode = "post" if columns >= 64 and block_m <= 64 else "pre"
        # Triton 3.6 to 3.9 abort while placing a tile of 64 columns decoded from one word per lane
        # in the shared memory that tcgen05 reads; with zero points 3.9 spills there.
        if tcgen05 and columns == 64 and (form.bits < 4 or not form.symmetric):
            mode = "pre"
    asymmetric = not form.symmetric and mode != "pre"
    asm = None
    if not _plain_triton() and dtype != "fp32":
        asm = decode_asm(form.bits, dtype, asymmetric, form.codebook is not None)
    return {
        "ASM": asm,
        "BITS": form.bits,
        "DTYPE": getattr(tl, {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[dtype]),
        "GROUP": group,
        "TILE_GROUP": columns,
        "SCALE_DTYPE": TRITON_DTYPES[form.torch_scale_dtype],
        "SIGNED": form.signed_scales,
        "MODE": mode,
        # Columns of a lane stay within groups of 16.
        "WIDE": wide and columns >= 16,
    }


def tile_constants(x: Tensor, weight: FragmentWeight, tile: Tile) -> dict[str, Any]:
    """Returns all compile-time arguments of a fused product of `x` and `weight`, and num_warps."""
    groups, device = weight.scale.shape[0], x.device.index or 0
    return {
        **constants(
            weight.format,
            groups,
            _FUSED_DTYPES.get(x.dtype, "fp32"),
            tile.block_m,
            _multiplies_with_mma_sync(device),
            _multiplies_with_tcgen05(device),
        ),
        "EVEN_K": weight.words.shape[1] * CHUNK == weight.in_features,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "SPLIT": tile.split,
        "STAGES": tile.stages,
        "num_warps": tile.warps,
    }


def run_fused(x_MK: Tensor, weight: FragmentWeight, bias: Tensor | None, tile: Tile) -> Tensor:
    """Returns `x W^T + bias` by the fused kernel, `[M, N]` in x's dtype.

    Args:
        x_MK: fp16 or bf16 (fp32 where Triton interprets), last dimension contiguous, M > 0.
        weight: the weight.
        bias: `[N]`, contiguous, or None.
        tile: see `configs.Tile`; without split for M above its block_m.
    """
    M, K = x_MK.shape
    N, rows = weight.out_features, weight.padded_rows
    if rows % tile.block_n or (tile.split > 1 and tile.block_m < M):
        raise ValueError(
            f"{tile} does not fit {M} activations and {rows} stored rows: block_n must divide the "
            "rows, and a product that is split along K has one tile of activations"
        )
    out = x_MK.new_empty((M, N))
    partial = None
    if tile.split > 1:
        partial = x_MK.new_empty((tile.split, tile.block_m, rows), dtype=torch.float32)
    coded = weight.scale.dtype == torch.uint8
    linear_kernel[(rows // tile.block_n, tile.split, triton.cdiv(M, tile.block_m))](
        x_MK,
        weight.words,
        weight.plane,
        weight.scale,
        weight.zero,
        weight.scale_offset if coded else None,
        weight.scale_step if coded else None,
        weight.table,
        bias,
        out,
        partial,
        weight.counters,
        M,
        N,
        K,
        rows,
        weight.words.shape[1],
        weight.scale.shape[0],
        x_MK.stride(0),
        weight.scale.stride(0),
        **tile_constants(x_MK, weight, tile),
    )
    return out


def _linear(x: Tensor, *arguments: Any) -> Tensor:
    *tensors, bias, form, out_features, in_features = arguments
    if x.shape[-1] != in_features:
        raise ValueError(
            f"linear: x is {list(x.shape)}, but the weight has {in_features} input features"
        )
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(
            f"linear: bias is {list(bias.shape)}, but the weight has {out_features} output features"
        )
    weight = _weight(tuple(tensors), (form, out_features, in_features))
    if x.numel() == 0:
        return x.new_zeros((*x.shape[:-1], out_features))
    x_MK = x.reshape(-1, in_features)
    tile = None
    if x.dtype in _FUSED_DTYPES:
        tile = configs.choose(
            x.device.index or 0,
            _kind(weight.format),
            max(16, triton.next_power_of_2(x_MK.shape[0])),
            weight.padded_rows,
            weight.words.shape[1] * CHUNK,
        )
    if tile is None:
        w_NK = dequantize_into(weight, x.new_empty((out_features, in_features)))
        out = F.linear(x_MK, w_NK, None if bias is None else bias.to(x.dtype))
    else:
        if x_MK.stride(-1) != 1:
            x_MK = x_MK.contiguous()
        out = run_fused(x_MK, weight, None if bias is None else bias.contiguous(), tile)
    # Models write to products in place, which autograd forbids for a view made in here.
    result: Tensor = torch.ops.aten._unsafe_view(out, (*x.shape[:-1], out_features))
    return result


def _linear_grad_input(grad: Tensor, *arguments: Any) -> Tensor:
    *tensors, form, out_features, in_features = arguments
    weight = _weight(tuple(tensors), (form, out_features, in_features))
    return grad @ dequantize_into(weight, grad.new_empty((out_features, in_features)))


def _dequantize(*arguments: Any) -> Tensor:
    *tensors, form, out_features, in_features, dtype = arguments
    weight = _weight(tuple(tensors), (form, out_features, in_features))
    out = weight.words.new_empty((out_features, in_features), dtype=dtype)
    return dequantize_into(weight, out)


def _linear_fake(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], arguments[-2]))


def _linear_grad_input_fake(grad: Tensor, *arguments: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], arguments[-1]))


def _dequantize_fake(words: Tensor, *arguments: Any) -> Tensor:
    return words.new_empty(arguments[-3:-1], dtype=arguments[-1])


_TENSORS = len(_STORED.split(","))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors, bias, form, out_features, in_features = inputs
    ctx.save_for_backward(*tensors)
    ctx.numbers = form, out_features, in_features
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.lowbit_kernels.linear_grad_input(grad, *ctx.saved_tensors, *ctx.numbers)
    if ctx.needs_input_grad[1 + _TENSORS]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return (grad_x, *(None,) * _TENSORS, grad_bias, None, None, None)


def _autocast_linear(x: Tensor, *arguments: Any) -> Tensor:
    """Casts x alone: `torch.library.register_autocast` would round the scales too."""
    with torch.autocast("cuda", enabled=False):
        lowered = x.to(torch.get_autocast_dtype("cuda"))
        result: Tensor = torch.ops.lowbit_kernels.linear(lowered, *arguments)
        return result


for _name, _kernel, _fake in (
    ("linear", _linear, _linear_fake),
    ("linear_grad_input", _linear_grad_input, _linear_grad_input_fake),
    ("dequantize", _dequantize, _dequantize_fake),
):
    _library.impl(_name, on_device_of_first(_kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"lowbit_kernels::{_name}", _fake, lib=_library)
torch.library.register_autograd(
    "lowbit_kernels::linear", _linear_backward, setup_context=_save_for_backward, lib=_library
)
_library.impl("linear", _autocast_linear, "AutocastCUDA")
