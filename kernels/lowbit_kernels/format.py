"""What the codes of a weight mean, to kernels of every device."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Scales that share an offset and a step under double quantization.
SCALE_BLOCK = 256
_SCALE_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Format:
    """What the codes of a weight mean.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: input features that share a scale; 0 for one scale per row.
        codebook: 16 values, looked up by code; None for integers, code - zero point.
        symmetric: the zero point is 2^(bits-1) everywhere; none is stored.
        scale_dtype: "fp16", "bf16" or "fp32": the dtype in which decoded scales are exact.
        signed_scales: double-quantized scales keep their sign in the code's top bit.
        text: the same as one string.
    """

    bits: int
    group_size: int
    codebook: tuple[float, ...] | None = None
    symmetric: bool = True
    scale_dtype: str = "fp16"
    signed_scales: bool = True
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"format: {self.bits} bits; the kernels read 2, 3, 4 or 8")
        if self.codebook is not None and (self.bits != 4 or len(self.codebook) != 16):
            raise ValueError("format: a codebook has 16 values, for 4-bit codes")
        if self.scale_dtype not in _SCALE_DTYPES:
            raise ValueError(f"format: scale dtype {self.scale_dtype!r}; use fp16, bf16 or fp32")
        book = "" if self.codebook is None else ",".join(value.hex() for value in self.codebook)
        flags = f"{int(self.symmetric)}{int(self.signed_scales)}"
        text = f"{self.bits}:{self.group_size}:{flags}:{self.scale_dtype}:{book}"
        object.__setattr__(self, "text", text)

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        """The dtype of decoded scales."""
        return _SCALE_DTYPES[self.scale_dtype]

    def groups(self, in_features: int) -> int:
        """Returns the number of scales in a row."""
        return math.ceil(in_features / self.group_size) if self.group_size else 1

    @staticmethod
    @functools.cache
    def parse(text: str) -> Format:
        """Returns the format whose `text` this is; operators take formats as text."""
        bits, group_size, flags, scale_dtype, book = text.split(":")
        codebook = tuple(float.fromhex(value) for value in book.split(",")) if book else None
        return Format(
            int(bits), int(group_size), codebook, flags[0] == "1", scale_dtype, flags[1] == "1"
        )


def decode_scales(
    codes: Tensor,
    offset: Tensor,
    step: Tensor,
    format: Format,  # noqa: A002
) -> Tensor:
    """Returns double-quantized scales in the scale dtype; offset and step per code.

    Magnitudes are computed in fp32 and rounded once, like `lowbit.quant.double_quant` does, so that
    a scale has one value whoever decodes it.
    """
    magnitude = codes & 0x7F if format.signed_scales else codes
    scale = offset.float() + step.float() * magnitude.float()
    if format.signed_scales:
        scale = torch.where(codes >= 0x80, -scale, scale)
    largest = torch.finfo(format.torch_scale_dtype).max
    return scale.clamp(-largest, largest).to(format.torch_scale_dtype)
