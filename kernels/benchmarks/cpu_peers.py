"""Other people's CPU kernels for low-bit weights, each behind a small adapter.

A peer gets our decoded weight and stores it in its own way, or our very codes where its format has
them. It gets activations in the dtype it is fastest with. What a peer refuses is recorded with its
own words; nothing is replaced silently.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from cpu_candidates import FLOAT, INT8, Candidate, Inputs, single
from cpu_timing import Call
from cpu_units import FP32, Settings
from torch import Tensor, nn

from lowbit.errors import LowbitError

Make = Callable[[Inputs, Settings], Candidate]


@dataclass(frozen=True)
class Peer:
    """A library that multiplies by low-bit weights.

    Args:
        make: makes the candidate, or raises what the peer raises.
        bundled: whether torch brings it; others are there only if they were installed.
    """

    make: Make
    bundled: bool = False


def _int4pack(inputs: Inputs, settings: Settings) -> Candidate:
    """`_weight_int4pack_mm_for_cpu` over our codes: W = (q - 8) s + z, pairs (s, z) in bf16."""
    rows, columns = inputs.shape
    scheme, group = inputs.scheme, inputs.scheme.group_size or columns
    if scheme.bits != 4 or group not in (32, 64, 128, 256) or columns % group or rows % 16:
        raise LowbitError(
            f"{scheme} [{rows}, {columns}]: 4 bits, groups of 32, 64, 128 or 256, rows of whole "
            "groups and a multiple of 16 rows are needed"
        )
    grid, codes = inputs.qweight.grid(), inputs.qweight.codes()
    scale = grid.scales.bfloat16()
    zero = torch.zeros_like(scale)
    if grid.zeros is not None:
        zero = (-grid.zeros * grid.scales).bfloat16()
    pairs = torch.stack((scale.T, zero.T), dim=-1).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int() + 8, 1)
    decoded = codes.view(rows, -1, group).float() * scale.float()[..., None]
    decoded = (decoded + zero.float()[..., None]).view(rows, columns)
    size = packed.nbytes + pairs.nbytes
    held = [(packed.clone(), pairs.clone()) for _ in range(inputs.copies(size))]

    def bind(x: Tensor, threads: int) -> Sequence[Call]:
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        return [functools.partial(multiply, x, weight, group, two) for weight, two in held]

    return Candidate("torch int4pack", "peer", FLOAT, size, bind, inputs.expected(decoded))


def _int8pack(inputs: Inputs, settings: Settings) -> Candidate:
    """`_weight_int8pack_mm`: a scale per row. Widths it crashes at are kept from it."""
    codes, scale = _per_channel(inputs.weight)
    if codes.shape[1] % 32:
        raise LowbitError(f"{codes.shape[1]} columns: it crashes unless they are a multiple of 32")
    half = scale.bfloat16()
    expected = inputs.expected(codes.float() * half.float()[:, None])
    held = [(codes.clone(), half.clone()) for _ in range(inputs.copies(codes.nbytes))]

    def bind(x: Tensor, threads: int) -> Sequence[Call]:
        multiply = torch.ops.aten._weight_int8pack_mm
        return [functools.partial(multiply, x, weight, one) for weight, one in held]

    return Candidate("torch int8pack", "peer", FLOAT, codes.nbytes + half.nbytes, bind, expected)


def _onednn_int8(inputs: Inputs, settings: Settings) -> Candidate:
    """`quantized.linear_dynamic` with oneDNN: 8-bit activations with one scale for all tokens."""
    codes, scale = _per_channel(inputs.weight)
    zeros = torch.zeros(len(scale), dtype=torch.int64)
    decoded = codes.float() * scale[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the only way to such a weight is to go away one day
        quantized = torch.quantize_per_channel(decoded, scale.double(), zeros, 0, torch.qint8)
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "onednn"  # a packed weight remembers it
    try:
        prepack = torch.ops.quantized.linear_prepack
        held = [prepack(quantized, None) for _ in range(inputs.copies(codes.nbytes))]
    finally:
        torch.backends.quantized.engine = before

    def bind(x: Tensor, threads: int) -> Sequence[Call]:
        multiply, wide = torch.ops.quantized.linear_dynamic, x.float()
        return [functools.partial(multiply, wide, weight) for weight in held]

    expected = inputs.expected(decoded)
    return Candidate("torch onednn int8", "peer", INT8, codes.nbytes, bind, expected)


def _torchao(name: str, inputs: Inputs, settings: Settings) -> Candidate:
    """A linear layer that torchao's `quantize_` was applied to."""
    from torchao import quantization  # type: ignore[import-not-found]
    from torchao.prototype.quantization import int4  # type: ignore[import-not-found]

    wanted = {
        "torchao int4": lambda: int4.PrototypeInt4WeightOnlyConfig(group_size=128),
        "torchao int4 A8": lambda: int4.Int8DynamicActivationInt4WeightConfig(group_size=128),
        "torchao int8": quantization.Int8DynamicActivationInt8WeightConfig,
    }[name]
    rows, columns = inputs.shape
    first = nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16).requires_grad_(False).eval()
    first.weight.copy_(inputs.weight)
    quantization.quantize_(first, wanted())
    bits = 8 if "int8" in name else 4
    size = rows * columns * bits // 8
    layers = [first, *(copy.deepcopy(first) for _ in range(inputs.copies(size) - 1))]
    # Its 4-bit format decodes nothing; its own rounding is then part of the error.
    decode = getattr(first.weight, "dequantize", None)
    expected = inputs.expected(decode().float() if decode and bits == 8 else None)

    def bind(x: Tensor, threads: int) -> Sequence[Call]:
        return [_no_grad(layer, x) for layer in layers]

    activations = FLOAT if name == "torchao int4" else INT8
    return Candidate(name, "peer", activations, size, bind, expected, package="torchao")


def _bitsandbytes(kind: str, inputs: Inputs, settings: Settings) -> Candidate:
    """`Linear4bit`, blocks of 64, in evaluation mode, where it packs its weight for CPUs."""
    import bitsandbytes  # type: ignore[import-not-found]

    rows, columns = inputs.shape
    first = bitsandbytes.nn.Linear4bit(
        columns,
        rows,
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=inputs.scheme.double_quant,
        quant_type=kind,
    )
    weight = bitsandbytes.nn.Params4bit(
        inputs.weight.bfloat16(),
        requires_grad=False,
        compress_statistics=inputs.scheme.double_quant,
        quant_type=kind,
        blocksize=64,
    )
    first.weight = weight.to("cpu")
    first.eval()
    state = first.weight.quant_state
    decoded = bitsandbytes.functional.dequantize_4bit(first.weight.data, state).float()
    size = first.weight.nbytes + rows * columns // 64 * 2
    layers = [first, *(copy.deepcopy(first) for _ in range(inputs.copies(size) - 1))]

    def bind(x: Tensor, threads: int) -> Sequence[Call]:
        return [_no_grad(layer, x) for layer in layers]

    expected = inputs.expected(decoded)
    name = f"bitsandbytes {kind}"
    return Candidate(name, "peer", FLOAT, size, bind, expected, package="bitsandbytes")


def _openvino(
    name: str, precision: str, groups: str, inputs: Inputs, settings: Settings
) -> Candidate:
    """A compiled MatMul over our codes as u4 with zero point 8, in OpenVINO's CPU plug-in.

    Args:
        name: in results.
        precision: INFERENCE_PRECISION_HINT.
        groups: DYNAMIC_QUANTIZATION_GROUP_SIZE; "0" leaves activations as they are.
    """
    from openvino import Core, Tensor as Array  # type: ignore[import-not-found] # noqa: I001

    (_, columns), group = inputs.shape, inputs.scheme.group_size or 0
    if inputs.scheme.bits != 4 or not group or columns % group:
        raise LowbitError(f"{inputs.scheme}: its u4 graph needs 4 bits and rows of whole groups")
    # Constants are read where they are, so their arrays have to stay.
    core, (model, arrays) = Core(), _openvino_model(inputs, group)
    size = inputs.weight.numel() // 2 + 2 * inputs.weight.numel() // group
    compiled = {}
    for threads in inputs.threads:
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": precision,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": groups,
        }
        compiled[threads] = [
            core.compile_model(model, "CPU", options) for _ in range(inputs.copies(size))
        ]

    def bind(x: Tensor, threads: int) -> Sequence[Call]:
        array = Array(x.float().contiguous().numpy())
        assert arrays is not None
        return [_openvino_call(each, array) for each in compiled[threads]]

    return Candidate(
        name,
        "peer",
        FLOAT if groups == "0" else INT8,
        size,
        bind,
        inputs.expected(),
        lambda request: torch.from_numpy(request.get_output_tensor().data.copy()),
        "openvino",
    )


def _openvino_model(inputs: Inputs, group: int) -> tuple[Any, Any]:
    """Returns the graph and the arrays that its constants lie in."""
    from openvino import Model, Shape, Type
    from openvino import Tensor as Array
    from openvino import op as nodes
    from openvino import opset13 as ops

    rows, columns = inputs.shape
    codes = (inputs.qweight.codes() + 8).to(torch.uint8)
    pairs = (codes[:, 0::2] | codes[:, 1::2] << 4).contiguous().flatten().numpy()
    scale = inputs.qweight.grid().scales.half()[..., None].numpy()
    packed = Array(pairs, Shape([rows, columns // group, group]), Type.u4)
    zero = ops.constant(np.full((1, 1, 1), 8, dtype=np.uint8))
    centred = ops.subtract(ops.convert(nodes.Constant(packed), "f16"), ops.convert(zero, "f16"))
    scaled = ops.multiply(centred, ops.constant(scale))
    flat = ops.reshape(scaled, ops.constant(np.array([rows, columns])), False)
    x = ops.parameter([-1, columns], Type.f32)
    model = Model([ops.matmul(x, ops.convert(flat, "f32"), False, True)], [x])
    return model, (pairs, packed, scale)


def _openvino_call(compiled: Any, x: Any) -> Call:
    request = compiled.create_infer_request()
    request.set_input_tensor(x)

    def call() -> Any:
        request.infer()
        return request

    return call


def _llama(kind: str, inputs: Inputs, settings: Settings) -> Candidate:
    """ggml's matrix product, in the buffer that llama.cpp would put the weight in."""
    from cpu_llama import Library, candidate

    return candidate(Library.load(settings.llama), kind, inputs)


def _no_grad(layer: nn.Module, x: Tensor) -> Call:
    def call() -> Any:
        with torch.no_grad():
            return layer(x)

    return call


def _per_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns int8 codes `[N, K]` and float32 scales `[N]`."""
    scale = weight.abs().amax(1) / 127
    codes = torch.round(weight / scale[:, None]).clamp_(-127, 127).to(torch.int8)
    return codes, scale


PEERS: dict[str, Peer] = {
    FP32: Peer(lambda inputs, settings: single(inputs), bundled=True),
    "torch int4pack": Peer(_int4pack, bundled=True),
    "torch int8pack": Peer(_int8pack, bundled=True),
    "torch onednn int8": Peer(_onednn_int8, bundled=True),
    **{
        name: Peer(functools.partial(_torchao, name))
        for name in ("torchao int4", "torchao int4 A8", "torchao int8")
    },
    **{
        f"bitsandbytes {kind}": Peer(functools.partial(_bitsandbytes, kind))
        for kind in ("nf4", "fp4")
    },
    "openvino u4": Peer(functools.partial(_openvino, "openvino u4", "f32", "128")),
    "openvino u4 bf16": Peer(functools.partial(_openvino, "openvino u4 bf16", "bf16", "0")),
    **{
        f"llama.cpp {kind}": Peer(functools.partial(_llama, kind))
        for kind in ("q4_0", "q4_K", "q3_K", "q2_K", "q8_0")
    },
}
