"""The types of tensors in a GGUF file: how many bytes a block has, and which scheme has its values.

Source: ggml `ggml-common.h` (blocks) and `ggml.h` (numbers).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowbit.scheme import Scheme


@dataclass(frozen=True)
class GgmlType:
    """One type.

    Args:
        number: in the file.
        name: in ggml.
        block: weights in a block.
        block_bytes: of one block.
        sub_block: weights that share a scale; 0 for plain floats.
        dtype: of plain floats, None for blocks.
        scheme: of ours that has every value of such a block, None if there is none.
    """

    number: int
    name: str
    block: int
    block_bytes: int
    sub_block: int = 0
    dtype: torch.dtype | None = None
    scheme: Scheme | None = None

    def row_bytes(self, columns: int) -> int:
        """Returns the bytes of a row; `columns` is a multiple of `block`."""
        return columns // self.block * self.block_bytes


_W8_G32 = Scheme(bits=8, group_size=32)
_W8_G16 = Scheme(bits=8, group_size=16, scale_dtype="FP32")

GGML_TYPES: dict[str, GgmlType] = {
    known.name: known
    for known in (
        GgmlType(0, "F32", 1, 4, dtype=torch.float32),
        GgmlType(1, "F16", 1, 2, dtype=torch.float16),
        GgmlType(30, "BF16", 1, 2, dtype=torch.bfloat16),
        GgmlType(2, "Q4_0", 32, 18, 32, scheme=Scheme(bits=4, group_size=32)),
        # Where its minima are whole steps of the scale; see `blocks.zero_points`.
        GgmlType(3, "Q4_1", 32, 20, 32, scheme=Scheme(bits=4, group_size=32, symmetric=False)),
        GgmlType(6, "Q5_0", 32, 22, 32, scheme=_W8_G32),
        GgmlType(8, "Q8_0", 32, 34, 32, scheme=_W8_G32),
        GgmlType(20, "IQ4_NL", 32, 18, 32, scheme=_W8_G32),
        GgmlType(10, "Q2_K", 256, 84, 16),
        GgmlType(
            11, "Q3_K", 256, 110, 16, scheme=Scheme(bits=3, group_size=16, scale_dtype="FP32")
        ),
        GgmlType(12, "Q4_K", 256, 144, 32),
        GgmlType(13, "Q5_K", 256, 176, 32),
        GgmlType(14, "Q6_K", 256, 210, 16, scheme=_W8_G16),
    )
}
BY_NUMBER = {known.number: known for known in GGML_TYPES.values()}
FLOAT_TYPES = {known.dtype: known for known in GGML_TYPES.values() if known.dtype is not None}

# Types that ggml has and this does not decode, for the message that says so.
OTHER_TYPES = {
    7: "Q5_1", 9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
