"""Writes tests/golden/{gptq,awq,bitsandbytes}.safetensors: bytes that other tools make of codes.

Each part runs in an environment that has the tool, and needs nothing of lowbit:

    python scripts/make_golden_formats.py gptqmodel       GPTQModel 7: gptq and awq
    python scripts/make_golden_formats.py bitsandbytes    bitsandbytes 0.50

Run it after upgrading one of them; the files must not change. They let the tests of the formats run
without those tools. Names are <case>.<tensor>; what is not of the format itself is called codes,
zeros, order (of columns by group) and decoded, the weight as the tool decodes it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
OUT, IN, GROUP = 32, 96, 32


def grid(bits: int, symmetric: bool, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Returns unsigned codes [OUT, IN], zero points and scales [OUT, groups]."""
    codes = torch.randint(0, 1 << bits, (OUT, IN), generator=generator)
    groups = IN // GROUP
    zeros = torch.randint(1, 1 << bits, (OUT, groups), generator=generator)
    if symmetric:
        zeros = torch.full_like(zeros, 1 << (bits - 1))
    scales = torch.rand(OUT, groups, generator=generator) * 0.01 + 0.001
    return codes, zeros, scales.half().float()


def linear_of(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, group: torch.Tensor):
    """Returns a layer whose weights are those values, for packers that round again."""
    layer = torch.nn.Linear(IN, OUT, bias=False)
    layer.weight.data = (codes - zeros[:, group]).float() * scales[:, group]
    return layer


def gptq_cases() -> dict[str, torch.Tensor]:
    """Returns what GPTQModel packs, in both versions, with and without an order of columns."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    found: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for bits in (2, 3, 4, 8):
        for kind in ("sym", "asym", "ordered"):
            codes, zeros, scales = grid(bits, kind == "sym", generator)
            group = torch.arange(IN) // GROUP
            if kind == "ordered":
                group = group[torch.randperm(IN, generator=generator)]
            layer = linear_of(codes, zeros, scales, group)
            packed = TorchLinear(
                bits=bits,
                group_size=GROUP,
                sym=kind == "sym",
                desc_act=kind == "ordered",
                in_features=IN,
                out_features=OUT,
            )
            packed.pack_original(layer, scales, zeros.float(), group.to(torch.int32))
            packed.qzero_format(2)
            case = f"w{bits}_{kind}"
            decoded = packed.dequantize_weight().T
            tensors = {"codes": codes.to(torch.uint8), "zeros": zeros.to(torch.uint8)}
            tensors |= {"decoded": decoded, "gptq_v2.qzeros": packed.qzeros.clone()}
            tensors |= {name: getattr(packed, name) for name in ("qweight", "scales", "g_idx")}
            convert_gptq_v2_to_v1_format_module(packed, QuantizeConfig(bits=bits))
            tensors["gptq.qzeros"] = packed.qzeros.clone()
            found |= {f"{case}.{name}": t.contiguous() for name, t in tensors.items()}
    return found


def awq_cases() -> dict[str, torch.Tensor]:
    """Returns what GPTQModel packs as AWQ."""
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    generator = torch.Generator().manual_seed(1)
    codes, zeros, scales = grid(4, False, generator)
    layer = linear_of(codes, zeros, scales, torch.arange(IN) // GROUP)
    packed = AwqTorchLinear(
        bits=4, group_size=GROUP, sym=False, desc_act=False, in_features=IN, out_features=OUT
    )
    packed.pack(layer, scales.half(), zeros)
    tensors = {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales")}
    decoded = dequantize_gemm(**tensors, bits=4, group_size=GROUP).T
    tensors |= {"codes": codes.to(torch.uint8), "zeros": zeros.to(torch.uint8), "decoded": decoded}
    return {f"w4_asym.{name}": tensor.contiguous() for name, tensor in tensors.items()}


def bitsandbytes_cases() -> dict[str, torch.Tensor]:
    """Returns what bitsandbytes makes of random weights, with and without nested statistics."""
    from bitsandbytes import functional

    found: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(2)
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            weight = torch.randn(16, 128, generator=generator) * 0.05
            packed, state = functional.quantize_4bit(
                weight, blocksize=64, compress_statistics=nested, quant_type=kind
            )
            tensors = {f"weight.{name}": t for name, t in state.as_dict(packed=True).items()}
            tensors |= {"weight": packed, "decoded": functional.dequantize_4bit(packed, state)}
            case = f"{kind}{'_nested' if nested else ''}"
            found |= {f"{case}.{name}": t.clone().contiguous() for name, t in tensors.items()}
    return found


def main(tool: str) -> None:
    """Writes the files of one tool."""
    made: dict[str, Any] = (
        {"gptq": gptq_cases(), "awq": awq_cases()}
        if tool == "gptqmodel"
        else {"bitsandbytes": bitsandbytes_cases()}
    )
    sizes = {}
    for name, tensors in made.items():
        file = GOLDEN / f"{name}.safetensors"
        save_file(tensors, file)
        sizes[file.name] = file.stat().st_size
    print(json.dumps(sizes))


if __name__ == "__main__":
    main(sys.argv[1])
