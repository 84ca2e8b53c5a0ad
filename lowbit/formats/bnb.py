"""bitsandbytes' 4-bit checkpoints: NF4, and FP4 with the levels that bitsandbytes has.

    weight                        uint8 [N K / 2, 1], two table indices a byte, the first one high
    weight.absmax                 one scale for each block of `blocksize` weights: fp32, or uint8
    weight.quant_map              fp32 [16], the table
    weight.nested_absmax          fp32, one for each 256 scales; with nested statistics only
    weight.nested_quant_map       fp32 [256], the table of nested scales
    weight.quant_state.bitsandbytes__nf4 (or __fp4)
                                  JSON as uint8: quant_type, blocksize, dtype, shape, nested_*

Blocks are cut from the whole matrix, read row by row. Where they divide the rows they are our
groups; where they do not, a block spans two rows, which no kernel here reads.

Nested scales are nested_quant_map[absmax] * nested_absmax + nested_offset, which is no grid of our
double quantization: there, offset and steps are bf16 and nothing is looked up. Read, they become
plain fp32 scales of the same values; and no scheme of ours is written nested. Ours decode to
numbers that fp32 holds, so a double-quantized one is written exactly, as plain scales, on request.

Their FP4 is not E2M1: where that has 0.5 (of 6), it has a sixteenth of a twelfth. It is the
codebook `fp4bnb` here.

Source: bitsandbytes 0.50 `functional.py` (`QuantState`, `get_4bit_type`, `dequantize_4bit`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint import Checkpoint
from lowbit.errors import LowbitError
from lowbit.formats.base import (
    StoredAs,
    Written,
    quantization_of,
    readable_group,
    require_entry,
    require_sound,
    revived,
    setting,
)
from lowbit.quant import Grid, QuantizedWeight
from lowbit.scheme import Scheme

STATE = "weight.quant_state.bitsandbytes__"
# Their names of the tables -> ours.
TABLES = {"nf4": "nf4", "fp4": "fp4bnb"}
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
MAX_STATE_BYTES = 1 << 16
NESTED_LEVELS = 256


class Bnb:
    """bitsandbytes in 4 bits.

    Args:
        dtype: dtype of the model, in which bitsandbytes decodes what is written.
    """

    name = "bnb"
    holds_order = False

    def __init__(self, dtype: str = "bfloat16") -> None:
        self.dtype = dtype

    def matches(self, quantization: Mapping[str, Any]) -> bool:
        """Returns whether the config is bitsandbytes'."""
        return quantization.get("quant_method") == "bitsandbytes" or (
            "quant_method" not in quantization and "load_in_4bit" in quantization
        )

    def modules(self, checkpoint: Checkpoint) -> dict[str, StoredAs]:
        """Returns how every module is stored; the JSON of each is read."""
        quantization = quantization_of(checkpoint)
        if not quantization.get("load_in_4bit", quantization.get("_load_in_4bit")):
            raise LowbitError(
                "config.json: of bitsandbytes only load_in_4bit is read; LLM.int8 splits outliers "
                "off while running, quantize the 16-bit model to W8A8 instead"
            )
        found = {}
        for key in checkpoint.entries:
            name, separator, kind = key.partition(f".{STATE}")
            if separator:
                found[name] = _stored(checkpoint, name, kind)
        return found

    def read(self, module: str, stored: StoredAs, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """Returns the weight of a module, its scales in fp32."""
        scheme, (out_features, in_features) = stored.scheme, stored.shape
        assert scheme.levels is not None
        table = tensors[f"{module}.weight.quant_map"]
        if not torch.equal(table, torch.tensor(scheme.levels)):
            raise LowbitError(
                f"tensor '{module}.weight.quant_map' is not the table of "
                f"{stored.details['quant_type']}; other tables are not supported"
            )
        pairs = tensors[f"{module}.weight"].contiguous().view(torch.uint8).flatten()
        codes = torch.stack([pairs >> 4, pairs & 0xF], dim=1).to(torch.int8) + scheme.code_min
        codes = codes.flatten().view(out_features, in_features)
        scales = _absmax(module, stored, tensors).view(out_features, -1)
        require_sound(f"{module}.weight.absmax", scales)
        scales = scales.repeat_interleave(stored.details["repeats"], dim=1)
        scales = revived(codes, scales, None, scheme)
        return QuantizedWeight.from_codes(codes, Grid(scheme, in_features, scales, None))

    def refusal(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Returns why the format cannot hold a weight."""
        if scheme.codebook not in TABLES.values():
            kind = "has the levels of E2M1" if scheme.codebook else "has integers"
            return f"{scheme} {kind}, the format has the tables of NF4 and of its own FP4"
        if scheme.double_quant:
            return f"{scheme} double-quantizes its scales in another way than the format does"
        width = scheme.group_width(shape[1])
        if shape[1] % width:
            return (
                f"the last group of {scheme} is short ({shape[1]} input features), the blocks of "
                "the format would span rows"
            )
        if width not in BLOCKSIZES:
            return f"{scheme} has groups of {width}, the format has blocks of 32, 64, 128, ..."
        return None

    def nearest(self, scheme: Scheme, shape: tuple[int, int]) -> Scheme | None:
        """Returns NF4, or their FP4, in blocks that divide the row."""
        wanted = scheme.group_width(shape[1])
        sizes = [size for size in (32, 64, 128, 256) if shape[1] % size == 0]
        if not sizes:
            return None
        fitting = [size for size in sizes if size <= wanted] or sizes[:1]
        codebook = {"fp4": "fp4bnb"}.get(scheme.codebook or "", scheme.codebook or "nf4")
        return Scheme(codebook=codebook, group_size=max(fitting), scale_dtype="FP32")

    def held_as(self, scheme: Scheme) -> Scheme:
        """Returns `scheme` with fp32 scales."""
        return Scheme(codebook=scheme.codebook, group_size=scheme.group_size, scale_dtype="FP32")

    def tensors(
        self, module: str, qweight: QuantizedWeight, input_order: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Returns the tensors of a module."""
        scheme = qweight.scheme
        indices = (qweight.codes() - scheme.code_min).to(torch.uint8).flatten()
        kind = next(theirs for theirs, ours in TABLES.items() if ours == scheme.codebook)
        state = {
            "quant_type": kind,
            "blocksize": scheme.group_width(qweight.in_features),
            "dtype": self.dtype,
            "shape": list(qweight.shape),
        }
        return {
            f"{module}.weight": (indices[0::2] << 4 | indices[1::2]).unsqueeze(1),
            f"{module}.weight.absmax": qweight.scale.flatten(),
            f"{module}.weight.quant_map": torch.tensor(scheme.levels),
            f"{module}.{STATE}{kind}": torch.frombuffer(
                bytearray(json.dumps(state).encode()), dtype=torch.uint8
            ),
        }

    def stored_as(
        self, module: str, scheme: Scheme, shape: tuple[int, int], tensors: Iterable[str]
    ) -> StoredAs:
        """Returns how `tensors` are to be read back."""
        kind = next(theirs for theirs, ours in TABLES.items() if ours == scheme.codebook)
        return StoredAs(
            scheme, shape, tuple(tensors), details={"quant_type": kind, "repeats": 1, "nested": {}}
        )

    def config(self, written: Written) -> dict[str, Any]:
        """Returns the config."""
        codebook = written.common.codebook
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": next(t for t, ours in TABLES.items() if ours == codebook),
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": self.dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": sorted({*written.plain, *written.experts}),
        }

    def markers(self, written: Written) -> dict[str, Tensor]:
        """Returns nothing: there are none."""
        return {}


def _state(checkpoint: Checkpoint, name: str, kind: str) -> dict[str, Any]:
    """Returns the JSON of a module."""
    entry = checkpoint.entries[f"{name}.{STATE}{kind}"]
    where = f"{entry.file}: tensor {entry.name!r}"
    if entry.dtype != torch.uint8 or entry.end - entry.begin > MAX_STATE_BYTES:
        raise LowbitError(f"{where} is no JSON of bitsandbytes; fetch the checkpoint again")
    try:
        state = json.loads(bytes(entry.read().flatten().tolist()))
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict) or state.get("quant_type") != kind or kind not in TABLES:
        raise LowbitError(
            f"{where} is no JSON of {' or '.join(TABLES)}; fetch the checkpoint again"
        )
    return state


def _stored(checkpoint: Checkpoint, name: str, kind: str) -> StoredAs:
    """Returns how a module is stored, after holding its headers against its JSON."""
    state = _state(checkpoint, name, kind)
    shape, block = state.get("shape"), state.get("blocksize")
    entry = checkpoint.entries.get(f"{name}.weight")
    shape = shape if isinstance(shape, list) else []
    plain = len(shape) == 2 and all(type(n) is int and n > 0 for n in (*shape, block))
    if not plain or entry is None or math.prod(shape) != 2 * (entry.end - entry.begin):
        raise LowbitError(
            f"{checkpoint.path}: '{name}.weight' is not the {str(shape)[:40]} weight in blocks of "
            f"{str(block)[:20]} that its quant_state says; fetch the checkpoint again"
        )
    rows, columns = shape
    if columns % block:
        raise LowbitError(
            f"{name}: a block of {block} weights spans rows of {columns}, which no kernel here "
            "reads; quantize the 16-bit model"
        )
    group_size, repeats = readable_group(block, columns)
    scheme = Scheme(codebook=TABLES[kind], group_size=group_size, scale_dtype="FP32")
    suffixes = ["absmax", "quant_map"]
    blocks = rows * columns // block
    nested = {}
    if "nested_blocksize" in state:
        nested = _nested(checkpoint, name, state)
        size = -(-blocks // nested["blocksize"])
        require_entry(checkpoint, f"{name}.weight.absmax", (torch.uint8,), (blocks,))
        require_entry(checkpoint, f"{name}.weight.nested_absmax", (torch.float32,), (size,))
        levels = (NESTED_LEVELS,)
        require_entry(checkpoint, f"{name}.weight.nested_quant_map", (torch.float32,), levels)
        suffixes += ["nested_absmax", "nested_quant_map"]
    else:
        require_entry(checkpoint, f"{name}.weight.absmax", (torch.float32,), (blocks,))
    require_entry(checkpoint, f"{name}.weight.quant_map", (torch.float32,), (16,))
    names = [f"{name}.weight", *(f"{name}.weight.{suffix}" for suffix in suffixes)]
    return StoredAs(
        scheme,
        (rows, columns),
        (*names, f"{name}.{STATE}{kind}"),
        details={"quant_type": kind, "repeats": repeats, "nested": nested},
    )


def _nested(checkpoint: Checkpoint, name: str, state: Mapping[str, Any]) -> dict[str, Any]:
    size = setting(state, "nested_blocksize", int, 0)
    offset = setting(state, "nested_offset", (float, int), math.nan)
    if size < 1 or not math.isfinite(offset):
        raise LowbitError(
            f"{checkpoint.path}: the quant_state of '{name}.weight' has nested_blocksize {size} "
            f"and nested_offset {offset}; fetch the checkpoint again"
        )
    return {"blocksize": size, "offset": float(offset)}


def _absmax(module: str, stored: StoredAs, tensors: Mapping[str, Tensor]) -> Tensor:
    """Returns the fp32 scales of all blocks, decoded in the order in which bitsandbytes does it."""
    absmax, nested = tensors[f"{module}.weight.absmax"], stored.details["nested"]
    if not nested:
        return absmax
    table = tensors[f"{module}.weight.nested_quant_map"]
    outer = tensors[f"{module}.weight.nested_absmax"]
    block = torch.arange(absmax.numel()) // nested["blocksize"]
    # One rounding for the product, one for the sum, in fp32.
    return table[absmax.long()] * outer[block] + torch.tensor(nested["offset"])
