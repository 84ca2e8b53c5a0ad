"""Blocks of ggml as a layout: one tensor for each weight, `<module>.weight`, rows of bytes.

A file is read through `GgufCheckpoint` and written by `writing.py`; here is what a single weight
becomes. Only types of which a scheme has every value take part; the others have no place in a
`QuantizedWeight` and are decoded, or searched (`search.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lowbit.checkpoint import Checkpoint
from lowbit.errors import LowbitError
from lowbit.formats.base import StoredAs, Written, require_sound, revived
from lowbit.formats.gguf.blocks import unpack_blocks, zero_points
from lowbit.formats.gguf.checkpoint import QUANT_METHOD, GgufEntry
from lowbit.formats.gguf.packing import pack_q4_0, pack_q4_1, pack_q8_0
from lowbit.formats.gguf.types import GGML_TYPES
from lowbit.quant import Grid, QuantizedWeight
from lowbit.scheme import Scheme

BLOCK = 32
_WRITTEN = {GGML_TYPES[name].scheme: name for name in ("Q4_0", "Q4_1", "Q8_0")}


def written_type(scheme: Scheme) -> str:
    """Returns the name of the type that holds weights of a scheme that `held_as` returned."""
    return _WRITTEN[scheme]


class Gguf:
    """Q4_0, Q4_1 and Q8_0 both ways; Q5_0, IQ4_NL, Q3_K and Q6_K read."""

    name = "gguf"
    holds_order = False

    def matches(self, quantization: Mapping[str, Any]) -> bool:
        """Returns whether the config is that of a GGUF file."""
        return quantization.get("quant_method") == QUANT_METHOD

    def modules(self, checkpoint: Checkpoint) -> dict[str, StoredAs]:
        """Returns how every module is stored that stays in blocks."""
        found = {}
        for name, entry in checkpoint.entries.items():
            if not isinstance(entry, GgufEntry):
                raise LowbitError(
                    f"{checkpoint.path}: config.json says gguf, but these are safetensors; give "
                    "the .gguf file"
                )
            if entry.in_blocks and entry.kind.scheme is not None:
                columns = entry.shape[1] // entry.kind.block_bytes * entry.kind.block
                found[name.removesuffix(".weight")] = StoredAs(
                    entry.kind.scheme,
                    (entry.shape[0], columns),
                    (name,),
                    details={"type": entry.kind.name},
                )
        return found

    def read(self, module: str, stored: StoredAs, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """Returns the weight of a module."""
        name, scheme = f"{module}.weight", stored.scheme
        blocks = unpack_blocks(tensors[name], GGML_TYPES[stored.details["type"]])
        require_sound(name, blocks.scales)
        codes, zeros = blocks.codes, None
        if not scheme.symmetric:
            zeros = zero_points(blocks)
            if zeros is None:
                raise LowbitError(f"tensor {name!r} changed while it was read; try again")
            # Ours are signed.
            codes, zeros = codes - 8, zeros - 8
        scales = revived(codes, blocks.scales, zeros, scheme)
        return QuantizedWeight.from_codes(codes, Grid(scheme, stored.shape[1], scales, zeros))

    def refusal(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Returns why no type has the values of a weight."""
        if shape[1] % BLOCK:
            return f"blocks of {BLOCK} weights do not fill rows of {shape[1]}"
        if scheme.codebook is not None:
            return f"{scheme} looks codes up in a table that no type has"
        if scheme.bits not in (4, 8):
            return f"{scheme} has {scheme.bits} bits, the types have 4 or 8"
        if scheme.bits == 8 and not scheme.symmetric:
            return f"{scheme} has zero points, the type of 8 bits has none"
        if scheme.double_quant:
            return f"{scheme} double-quantizes its scales, the types have plain scales only"
        if scheme.group_size is not None and scheme.group_size % BLOCK:
            return f"blocks of {BLOCK} weights have one scale, groups of {scheme} end within them"
        return None

    def nearest(self, scheme: Scheme, shape: tuple[int, int]) -> Scheme | None:
        """Returns the scheme of Q4_0, Q4_1 or Q8_0."""
        if shape[1] % BLOCK:
            return None
        if scheme.bits == 8:
            return GGML_TYPES["Q8_0"].scheme
        return GGML_TYPES["Q4_0" if scheme.symmetric else "Q4_1"].scheme

    def held_as(self, scheme: Scheme) -> Scheme:
        """Returns `scheme` with groups of 32 and fp16 scales, without int8 activations."""
        return Scheme(bits=scheme.bits, group_size=BLOCK, symmetric=scheme.symmetric)

    def tensors(
        self, module: str, qweight: QuantizedWeight, input_order: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Returns the blocks of a weight, uint8 `[rows, bytes]`.

        Raises:
            LowbitError: for a minimum that fp16 does not hold.
        """
        grid, codes = qweight.grid(), qweight.codes().short()
        if grid.zeros is not None:
            minima = grid.scales * (grid.zeros + 8)
            if not minima.half().float().equal(minima):
                raise LowbitError(
                    f"{module}: scale times zero point is not exact in fp16, which Q4_1 has for it"
                )
            raw = pack_q4_1(codes + 8, grid.scales, minima)
        else:
            pack = pack_q4_0 if qweight.scheme.bits == 4 else pack_q8_0
            raw = pack(codes, grid.scales)
        return {f"{module}.weight": raw}

    def stored_as(
        self, module: str, scheme: Scheme, shape: tuple[int, int], tensors: Iterable[str]
    ) -> StoredAs:
        """Returns how `tensors` are to be read back."""
        return StoredAs(scheme, shape, tuple(tensors), details={"type": written_type(scheme)})

    def config(self, written: Written) -> dict[str, Any]:
        """Returns nothing: a GGUF file has no config.json, and its tensors say what they are."""
        return {}

    def markers(self, written: Written) -> dict[str, Tensor]:
        """Returns nothing: there are none."""
        return {}
