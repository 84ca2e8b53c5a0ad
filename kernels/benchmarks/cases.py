"""The kernels that are compiled without a GPU, by tests and by `python inspect_kernels.py`.

A new kernel is one more `KernelCase` in `all_cases`. Budgets are in instructions per weight on
sm_90: at the H200's 4.3 TB/s, 4-bit weights arrive at a rate that leaves 3.9 per weight, 3-bit
weights 2.9 and 2-bit ones 1.95, so that codes narrower than 4 bits are bound by instructions.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton.language as tl
from inspect_code import KernelCase
from lowbit_kernels.format import Format
from lowbit_kernels.gpu.dequantize import TRITON_DTYPES, dequantize_kernel, tile_group
from lowbit_kernels.gpu.grouped import grouped_grad_kernel, grouped_linear_kernel
from lowbit_kernels.gpu.ldlq import FUSION, MAX_BLOCK, ROWS, WARPS, ldlq_block_kernel
from lowbit_kernels.gpu.linear import linear_kernel
from lowbit_kernels.gpu.ptx import decode_asm
from lowbit_kernels.gpu.w8a8_kernels import quantize_rows_kernel, w8a8_kernel

NF4 = tuple(i / 15 for i in range(16))  # any sixteen values: a table is an argument
# Where Triton multiplies with mma.sync; see `decode.tile_columns`.
WIDE_TARGETS = ("sm_80", "sm_89", "sm_120")
WEIGHT_TYPES = {
    "words": "*i32",
    "plane": "*i16",
    "scale": "*fp16",
    "zero": "*u8",
    "offset": "*bf16",
    "step": "*bf16",
    "table": "*i32",
}


def all_cases(target: str) -> list[KernelCase]:
    """Returns every case for `target`."""
    return [
        *linear_cases(target),
        *dequantize_cases(),
        *ldlq_cases(),
        *w8a8_cases(target),
        *experts_cases(target),
    ]


def absent(form: Format, coded: bool) -> dict[str, None]:
    """Returns the tensors that a weight of this format does not have."""
    there = {
        "plane": form.bits == 3,
        "zero": not form.symmetric,
        "table": form.codebook is not None,
        "offset": coded,
        "step": coded,
    }
    return {name: None for name, exists in there.items() if not exists}


def amd_stages(form: Format) -> int:
    """Returns the stages of configs/amd.json: 64 KiB of shared memory hold no more."""
    return 1 if form.codebook is not None else 2


def linear_case(
    name: str,
    target: str,
    form: Format,
    mode: str,
    *,
    block_m: int = 16,
    warps: int = 4,
    stages: int = 4,
    split: int = 4,
    dtype: str = "bf16",
    coded: bool = False,
    budget: float = float("inf"),
) -> KernelCase:
    """Returns the fused kernel with tiles of 128 rows."""
    group = form.group_size or 128
    if target == "sm_100" and form.group_size == 64 and (form.bits < 4 or not form.symmetric):
        mode = "pre"  # as `matmul.constants` chooses
    asm = None
    if target != "gfx942":
        asm = decode_asm(
            form.bits,
            dtype,
            not form.symmetric and mode != "pre",
            form.codebook is not None,
        )
    constants: dict[str, Any] = {
        "ASM": asm,
        "BITS": form.bits,
        "DTYPE": {"bf16": tl.bfloat16, "fp16": tl.float16}[dtype],
        "GROUP": group,
        "TILE_GROUP": tile_group(group, 128),
        "SCALE_DTYPE": tl.float16,
        "SIGNED": form.signed_scales,
        "MODE": mode,
        "EVEN_K": True,
        "BLOCK_M": block_m,
        "BLOCK_N": 128,
        "SPLIT": split,
        "STAGES": amd_stages(form) if target == "gfx942" else stages,
        "WIDE": target in WIDE_TARGETS,
        "bias": None,
        **absent(form, coded),
        **({} if split > 1 else {"partial": None}),
    }
    types = {
        **WEIGHT_TYPES,
        **({"scale": "*u8"} if coded else {}),
        "x": f"*{dtype}",
        "out": f"*{dtype}",
        "partial": "*fp32",
        "counters": "*i32",
        **dict.fromkeys(("M", "N", "K", "rows", "chunks", "groups"), "i32"),
        "x_stride": "i32",
        "scale_stride": "i32",
    }
    return KernelCase(
        name=name,
        kernel=linear_kernel,
        types=types,
        constants=constants,
        options={"num_warps": warps, "num_stages": constants["STAGES"]},
        aligned=("N", "K", "rows", "x_stride", "scale_stride"),
        weights_per_step=128 * 128,
        budget=budget,
        register_operand=True,
    )


def linear_cases(target: str) -> list[KernelCase]:
    """Returns the fused kernel for the schemes that are benchmarked, and its other modes."""

    def case(name: str, form: Format, mode: str = "post", **options: Any) -> KernelCase:
        return linear_case(name, target, form, mode, **options)

    int4 = Format(4, 128)
    cases = [
        case("int4 g128", int4, budget=2.7),
        case("int4 asym g64", Format(4, 64, symmetric=False), budget=3.7),
        case("int3 g64", Format(3, 64), budget=3.8),
        case("nf4 g64 dq", Format(4, 64, NF4, signed_scales=False), coded=True, budget=5.3),
        case("int8 channel", Format(8, 0), "row", budget=3.3),
    ]
    if target == "sm_90":
        cases += [
            case("int4 g64", Format(4, 64), budget=3.2),
            case("int2 g64", Format(2, 64), budget=2.8),
            case("int8 g128", Format(8, 128), budget=3.2),
            case("nf4 g64", Format(4, 64, NF4), budget=4.5),
            case("int4 g128 fp16", int4, dtype="fp16", budget=2.5),
            case("int4 g32", Format(4, 32), "pre", budget=6.5),
            case("int4 g128, 32 tokens", int4, block_m=32, budget=3.0),
            case("int4 g128, 64 tokens", int4, block_m=64, warps=8, stages=3, budget=4.0),
        ]
    # The largest tile that each family of devices uses; see the tables in configs/.
    if target in WIDE_TARGETS:
        cases.append(case("int4 g128, 64 tokens", int4, block_m=64, warps=8, stages=3))
    elif target == "gfx942":
        cases.append(case("int4 g128, 32 tokens", int4, block_m=32))
    else:
        large = {"block_m": 128, "warps": 8, "stages": 3, "split": 1}
        cases.append(case("int4 g128, 128 tokens", int4, "pre", **large, budget=8))
    return cases


def dequantize_cases() -> list[KernelCase]:
    """Returns the kernel that decodes whole weights, for the widest and the oddest format."""
    cases = []
    for name, form in (
        ("dequantize int3 asym g64", Format(3, 64, symmetric=False)),
        ("dequantize nf4 g64", Format(4, 64, NF4)),
    ):
        constants = {
            "BITS": form.bits,
            "GROUP": form.group_size,
            "TILE_GROUP": tile_group(form.group_size, 128),
            "SCALE_DTYPE": TRITON_DTYPES[torch.float16],
            "SIGNED": form.signed_scales,
            "BLOCK_N": 32,
            "BLOCK_K": 128,
            **absent(form, coded=False),
        }
        numbers = dict.fromkeys(("N", "K", "chunks", "groups", "scale_stride"), "i32")
        cases.append(
            KernelCase(
                name,
                dequantize_kernel,
                {**WEIGHT_TYPES, "out": "*bf16", **numbers},
                constants,
                {"num_warps": 4, "num_stages": 1},
                ("K", "scale_stride"),
            )
        )
    return cases


def ldlq_cases() -> list[KernelCase]:
    """Returns GPTQ's inner loop on a grid with zero points and on a codebook."""
    floats = ("target", "residual", "errors", "inner", "scale", "zero")
    tables = ("levels", "boundaries", "level_codes")
    types = {
        **dict.fromkeys((*floats, *tables), "*fp32"),
        "codes": "*i8",
        "group": "*i32",
        "B": "i32",
        "R": "i32",
    }
    numbers = {"CODE_MIN": -8, "CODE_MAX": 7, "BLOCK": MAX_BLOCK, "ROWS": ROWS}
    return [
        KernelCase(
            name,
            ldlq_block_kernel,
            types,
            {**numbers, **dict.fromkeys(missing)},
            {"num_warps": WARPS, "num_stages": 1, "enable_fp_fusion": FUSION},
        )
        for name, missing in (("ldlq asym", tables), ("ldlq codebook", ("zero",)))
    ]


def w8a8_cases(target: str) -> list[KernelCase]:
    """Returns the quantization of activations, a small split tile and the largest tile."""
    pointers = {
        "x": "*i8",
        "x_scales": "*fp32",
        "codes": "*i8",
        "scales": "*fp16",
        "out": "*bf16",
        "workspace": "*i32",
    }
    tiles = [("w8a8, 16 tokens", 16, 64, 256, 4, 3, 4)]
    # Where shared memory has no room for as many stages, the launcher lowers them.
    stages = 4 if target in ("sm_80", "sm_90", "sm_100") else 2
    if target == "sm_90":
        tiles.append(("w8a8, 128 tokens, wide", 128, 256, 128, 8, 4, 1))
    else:
        tiles.append(("w8a8, 128 tokens", 128, 128, 128, 8, stages, 1))
    cases = [
        KernelCase(
            name,
            w8a8_kernel,
            {**pointers, **dict.fromkeys(("counters", "M", "N", "K"), "i32")},
            {
                "bias": None,
                "EVEN_K": True,
                "BLOCK_M": block_m,
                "BLOCK_N": block_n,
                "BLOCK_K": block_k,
                "GROUP_M": 8,
                "SPLIT": split,
                "STAGES": 1 if target == "gfx942" else stages,
                **({} if split > 1 else {"workspace": None}),
            },
            {"num_warps": warps, "num_stages": 1 if target == "gfx942" else stages},
            ("N", "K"),
        )
        for name, block_m, block_n, block_k, warps, stages, split in tiles
    ]
    quantize = KernelCase(
        "quantize rows",
        quantize_rows_kernel,
        {
            "x": "*bf16",
            "codes": "*i8",
            "scales": "*fp32",
            "workspace": "*i32",
            **dict.fromkeys(("K", "x_stride", "counters"), "i32"),
            "static_scale": "fp32",
        },
        {"STATIC": False, "BLOCK_K": 4096},
        {"num_warps": 4, "num_stages": 1},
        ("K", "x_stride"),
    )
    return [quantize, *cases]


ROUTE_TYPES = {
    "expert_of_row": "*i32",
    "order": "*i64",
    "starts": "*i32",
    "tile_ends": "*i32",
    "token_of_row": "*i32",
    "row_scale": "*fp32",
    **dict.fromkeys(("R", "T", "experts"), "i32"),
}
# Rows of a step of decoding find their tiles themselves; those of a prompt have tables.
FEW = {"order": None, "starts": None, "tile_ends": None, "BLOCK_R": 64, "BLOCK_E": 1}
MANY = {"expert_of_row": None, "BLOCK_R": 1, "BLOCK_E": 128}


def experts_cases(target: str) -> list[KernelCase]:
    """Returns products with stacked experts, and the gradient of the activations."""

    def case(
        name: str, form: Format, mode: str = "post", route: Any = FEW, **options: Any
    ) -> KernelCase:
        fused = linear_case(f"experts {name}", target, form, mode, **options)
        gone = ("offset", "step", "bias")
        constants = {key: value for key, value in fused.constants.items() if key not in gone}
        return dataclasses.replace(
            fused,
            kernel=grouped_linear_kernel,
            types={**fused.types, **ROUTE_TYPES},
            constants={**constants, **route},
        )

    int4, nf4 = Format(4, 128), Format(4, 64, NF4)
    many: dict[str, Any] = {"route": MANY, "split": 1}
    large = {"block_m": 32} if target == "gfx942" else {"block_m": 64, "warps": 8, "stages": 3}
    cases = [
        case("int4 g128", int4, budget=2.7),
        case("int4 g128, a prompt", int4, **many, **large, budget=4.2),
        experts_grad_case("nf4 g64, a prompt", nf4, 64, MANY),
    ]
    if target != "gfx942":  # with 3.9, scalar registers spill into vector registers there
        cases.append(case("int4 asym g64", Format(4, 64, symmetric=False), budget=3.7))
    if target == "sm_90":
        cases += [
            case("int3 g64", Format(3, 64), budget=3.8),
            case("nf4 g64", nf4, budget=4.5),
            case("int8 channel", Format(8, 0), "row", budget=3.3),
            experts_grad_case("int4 g128", int4, 16, FEW),
        ]
    return cases


def experts_grad_case(name: str, form: Format, block_m: int, route: dict[str, Any]) -> KernelCase:
    """Returns the gradient of the activations for tiles of `block_m` rows."""
    gone = ("offset", "step")
    missing = {key: value for key, value in absent(form, False).items() if key not in gone}
    constants = {
        "BITS": form.bits,
        "DTYPE": tl.bfloat16,
        "GROUP": form.group_size,
        "TILE_GROUP": tile_group(form.group_size, 128),
        "SCALE_DTYPE": tl.float16,
        "SIGNED": form.signed_scales,
        "BLOCK_M": block_m,
        "BLOCK_N": 32,
        "BLOCK_K": 128,
        **missing,
        **route,
    }
    numbers = ("N", "K", "rows", "chunks", "groups", "grad_stride", "scale_stride")
    types = {**WEIGHT_TYPES, **ROUTE_TYPES, "grad": "*bf16", "out": "*fp32"}
    return KernelCase(
        f"experts' gradient {name}",
        grouped_grad_kernel,
        {**types, **dict.fromkeys(numbers, "i32")},
        constants,
        {"num_warps": 4, "num_stages": 1},
        ("N", "K", "rows", "grad_stride", "scale_stride"),
    )
