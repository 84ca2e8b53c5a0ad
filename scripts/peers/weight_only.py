"""Peers that look at one weight at a time and need no data: HQQ, bitsandbytes, torchao, quanto.

hqq           axis 1, which is the one that its kernels run, and the default optimiser
hqq_axis0     groups across rows, HQQ's own default and its lower error
bnb_nf4_dq    NF4 in blocks of 64, absmax quantized to 8 bits again
torchao       IntxWeightOnlyConfig; codes are kept in bytes on a CPU
torchao_hqq   the same with torchao's own HQQ
quanto        qint4, qint2 with the default optimiser; group size 128 is fixed
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from scripts.peers.driver import (
    Job,
    Outcome,
    RefusedError,
    Stopwatch,
    parse_job,
    quantized_linears,
    refuse,
    report,
    tensor_bytes,
)

# Weight, stored tensors, bits when codes have their nominal width.
Result = tuple[Tensor, list[Tensor], float]


def hqq(weight: Tensor, job: Job) -> Result:
    """HQQ (Badri and Shaji, 2023), scales and zero points in fp16."""
    from hqq.core.quantize import Quantizer

    axis = 0 if job.method == "hqq_axis0" else 1
    if job.symmetric:
        raise RefusedError("HQQ has asymmetric grids only")
    packed, meta = Quantizer.quantize(
        weight,
        nbits=job.bits,
        group_size=job.group_size,
        axis=axis,
        compute_dtype=torch.float16,
        device="cpu",
    )
    # What is stored is fp16; reading it back in float32 leaves only that rounding.
    meta["scale"], meta["zero"] = meta["scale"].half(), meta["zero"].half()
    stored = [packed, meta["scale"], meta["zero"]]
    wide = {**meta, "scale": meta["scale"].float(), "zero": meta["zero"].float()}
    dequantized = Quantizer.dequantize(packed, {**wide, "compute_dtype": torch.float32})
    dense = weight.numel() * job.bits + 8 * tensor_bytes(stored[1:])
    return dequantized.reshape(weight.shape), stored, dense


def bitsandbytes_nf4(weight: Tensor, job: Job) -> Result:
    """NF4 with double quantization (QLoRA, Dettmers et al., 2023)."""
    from bitsandbytes import functional

    if (job.bits, job.group_size) != (4, 64):
        raise RefusedError("NF4 has 4 bits and blocks of 64")
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    # The tables of the two codebooks are one pair per model, not per weight.
    stored = [packed, state.absmax, state.state2.absmax, state.offset.reshape(1)]
    dequantized = functional.dequantize_4bit(packed, state)
    return dequantized, stored, weight.numel() * 4 + 8 * tensor_bytes(stored[1:])


def torchao(weight: Tensor, job: Job) -> Result:
    """Torchao's integer weights of any width, in groups."""
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

    searched = job.method == "torchao_hqq"
    algorithms = IntxChooseQParamsAlgorithm
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    quantize_(
        layer,
        IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{job.bits}"),
            granularity=PerGroup(job.group_size),
            mapping_type=MappingType.SYMMETRIC if job.symmetric else MappingType.ASYMMETRIC,
            scale_dtype=torch.float16,
            intx_choose_qparams_algorithm=algorithms.HQQ_SCALE_ONLY
            if searched
            else algorithms.AFFINE,
        ),
    )
    quantized: Any = layer.weight
    scale, zero = quantized.scale, quantized.zero_point
    stored = [quantized.qdata, scale, *([] if job.symmetric else [zero])]
    zeros = 0 if job.symmetric else scale.numel() * job.bits
    dense = weight.numel() * job.bits + 8 * tensor_bytes([scale]) + zeros
    return quantized.dequantize().float(), stored, dense


def quanto(weight: Tensor, job: Job) -> Result:
    """optimum-quanto's integer weights; the tool chooses the group size."""
    from optimum.quanto import freeze, qint2, qint4, quantize

    if job.bits not in (2, 4):
        raise RefusedError("optimum-quanto has no 3-bit weights")
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    model[0].weight = nn.Parameter(weight.half().float(), requires_grad=False)
    quantize(model, weights={2: qint2, 4: qint4}[job.bits])
    freeze(model)
    quantized: Any = model[0].weight
    packed = quantized._data._data
    stored = [packed, quantized._scale.half(), quantized._shift.half()]
    dense = weight.numel() * job.bits + 8 * tensor_bytes(stored[1:])
    return quantized.dequantize().float(), stored, dense


METHODS: dict[str, tuple[Callable[[Tensor, Job], Result], str]] = {
    "hqq": (hqq, "hqq"),
    "hqq_axis0": (hqq, "hqq"),
    "bnb_nf4_dq": (bitsandbytes_nf4, "bitsandbytes"),
    "torchao": (torchao, "torchao"),
    "torchao_hqq": (torchao, "torchao"),
    "quanto": (quanto, "optimum-quanto"),
}


def weights(job: Job) -> Iterator[tuple[str, Tensor]]:
    """Yields the name and the float32 weight of every layer."""
    for name, layer in quantized_linears(job.load_model()).items():
        yield f"{name}.weight", layer.weight.detach().clone()


def main() -> None:
    """Runs one job."""
    job = parse_job()
    method, package = METHODS[job.method]
    outcome = Outcome({}, 0, 0.0, {"method": job.method}, Stopwatch())
    try:
        # Imports and extensions that are compiled on first use are not quantization.
        method(torch.randn(256, 256, generator=torch.Generator().manual_seed(0)), job)
        for name, weight in weights(job):
            with outcome.watch:
                dequantized, stored, dense = method(weight, job)
            outcome.weights[name] = dequantized
            outcome.stored_bytes += tensor_bytes(stored)
            outcome.dense_bits += dense
    except RefusedError as refusal:
        refuse(job, str(refusal), [package])
    report(job, outcome, [package])


if __name__ == "__main__":
    main()
