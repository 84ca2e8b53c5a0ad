"""A quantization scheme: what is stored for one weight matrix, and nothing about how it was chosen.

A scheme is a frozen value with a canonical string. The grammar, parts after the first in any order:

    W<bits>A16 [_ASYM] [_G<group size> | _CHANNEL] [_FP16 | _BF16 | _FP32] [_DQ]
    NF4 | FP4 | FP4BNB [_G<group size> | _CHANNEL] [_FP16 | _BF16 | _FP32] [_DQ]
    W8A8 [_STATIC]     [_CHANNEL] [_FP16 | _BF16 | _FP32]

`W4A16` means groups of 128 input features, `NF4` and `FP4` groups of 64 (the QLoRA block), scales
in fp16. `FP4` is E2M1; `FP4BNB` has the levels of bitsandbytes, for checkpoints of its own. `_DQ`
stores the scales themselves in 8 bits (see `quant/double_quant.py`). `W8A8` rounds activations to
int8 as well, with a scale per token, `W8A8_STATIC` with one calibrated scale per layer (see
`quant/activations.py`); its weights have one scale per output channel.

Integer codes are signed, `-2^(bits-1) ... 2^(bits-1) - 1`. A symmetric scheme uses that whole
range: the scale carries a sign, so that the larger extreme of a group always lands on the one
extra code. Beside int8 activations scales are positive, as engines for them expect: of 256 codes
one is no loss. A codebook's codes are table indices shifted by -8, so that packing treats all
schemes alike.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from typing import Any

import torch

from lowbit.errors import LowbitError, unknown_name

INTEGER_BITS = (2, 3, 4, 8)
MIN_GROUP_SIZE = 16
MAX_GROUP_SIZE = 256
DOUBLE_QUANT_BLOCK = 256

SCALE_DTYPES: dict[str, torch.dtype] = {
    "FP16": torch.float16,
    "BF16": torch.bfloat16,
    "FP32": torch.float32,
}

# NF4: normalised quantiles of the standard normal (QLoRA, Dettmers et al. 2023, appendix E).
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# FP4 E2M1 (OCP Microscaling Formats v1.0, table 5): index = sign, exponent, mantissa bits.
FP4_LEVELS = (
    0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0,
    -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
)  # fmt: skip

# The FP4 of bitsandbytes: signed, its levels twelfths; a sixteenth where E2M1 has its 0.5 (of 6).
FP4BNB_LEVELS = tuple(
    sign * twelfths / 12 for sign in (1, -1) for twelfths in (0.0, 0.0625, 8, 12, 4, 6, 2, 3)
)

CODEBOOKS: dict[str, tuple[float, ...]] = {
    "nf4": NF4_LEVELS,
    "fp4": FP4_LEVELS,
    "fp4bnb": FP4BNB_LEVELS,
}

# One scale per token, computed while multiplying; or one per layer, calibrated and stored.
INT8, INT8_STATIC = "int8", "int8_static"
ACTIVATIONS = (INT8, INT8_STATIC)


@dataclass(frozen=True)
class Scheme:
    """The storage of a weight matrix `[out_features, in_features]`.

    Args:
        bits: width of one code; 2, 3, 4 or 8 for integers, 4 for a codebook.
        group_size: input features that share a scale, 16 to 256, or None for one group per output
            channel. The last group of a row is short where the size does not divide in_features.
        symmetric: no zero points; False stores one integer zero point per group.
        codebook: None for integers, "nf4", "fp4" or "fp4bnb" for a table of 16 values.
        scale_dtype: the dtype every scale is exactly representable in: "FP16", "BF16", "FP32".
        double_quant: store scales as 8-bit codes.
        activations: None for float activations; "int8" for a scale per token, "int8_static" for
            one calibrated scale: with 8-bit symmetric integers per output channel only.

    Raises:
        LowbitError: for a combination that does not exist.
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = True
    codebook: str | None = None
    scale_dtype: str = "FP16"
    double_quant: bool = False
    activations: str | None = None

    def __post_init__(self) -> None:
        if type(self.bits) is not int:
            raise LowbitError(f"scheme: bits is an integer, got {self.bits!r}")
        if self.codebook is None and self.bits not in INTEGER_BITS:
            nearest = min(INTEGER_BITS, key=lambda bits: abs(bits - self.bits))
            raise LowbitError(
                f"scheme: {self.bits} bits are not supported; use 2, 3, 4 or 8, the nearest is "
                f"W{nearest}A16"
            )
        if self.codebook is not None:
            if self.codebook not in CODEBOOKS:
                raise unknown_name("codebook", self.codebook, CODEBOOKS)
            if self.bits != 4 or not self.symmetric:
                raise LowbitError(f"scheme: codebook {self.codebook} is 4 bits without zero points")
        size = self.group_size
        if size is not None and not (
            isinstance(size, int) and MIN_GROUP_SIZE <= size <= MAX_GROUP_SIZE and size % 8 == 0
        ):
            raise LowbitError(
                f"scheme: group size {size} is not supported; use a multiple of 8 from "
                f"{MIN_GROUP_SIZE} to {MAX_GROUP_SIZE}, for example 32, 64 or 128, or one group "
                "per channel"
            )
        if self.scale_dtype not in SCALE_DTYPES:
            raise unknown_name("scale dtype", self.scale_dtype, SCALE_DTYPES)
        if self.activations is not None:
            self._require_activations_fit()

    def _require_activations_fit(self) -> None:
        """Raises unless integer sums over whole rows can be scaled afterwards."""
        if self.activations not in ACTIVATIONS:
            raise unknown_name("activations", str(self.activations), ACTIVATIONS)
        wrong = [
            what
            for what, found in (
                (f"codebook {self.codebook}", self.codebook is not None),
                (f"{self.bits}-bit weights", self.bits != 8),
                (f"group size {self.group_size}", self.group_size is not None),
                ("zero points (ASYM)", not self.symmetric),
                ("double quantization (DQ)", self.double_quant),
            )
            if found
        ]
        if wrong:
            raise LowbitError(
                f"scheme: int8 activations go with symmetric int8 weights per output channel, not "
                f"with {wrong[0]}; use W8A8 or W8A8_STATIC, or a weight-only scheme (A16)"
            )

    @staticmethod
    def parse(text: str | Scheme) -> Scheme:
        """Returns the scheme that `text` names, for example `W4A16_G64` (case does not matter).

        Raises:
            LowbitError: naming the nearest valid scheme.
        """
        if isinstance(text, Scheme):
            return text
        if not isinstance(text, str):
            raise LowbitError(f"a scheme is a string such as W4A16_G64, got {text!r}")
        return _parse(text)

    def __str__(self) -> str:
        width = 16 if self.activations is None else 8
        parts = [self.codebook.upper() if self.codebook else f"W{self.bits}A{width}"]
        if self.activations == INT8_STATIC:
            parts.append("STATIC")
        if not self.symmetric:
            parts.append("ASYM")
        if self.activations is not None:
            pass  # per channel, nothing else exists
        elif self.group_size is None:
            parts.append("CHANNEL")
        elif self.group_size != _default_group_size(self.codebook):
            parts.append(f"G{self.group_size}")
        if self.scale_dtype != "FP16":
            parts.append(self.scale_dtype)
        if self.double_quant:
            parts.append("DQ")
        return "_".join(parts)

    @property
    def code_min(self) -> int:
        """The smallest code, -2^(bits-1)."""
        return -(1 << (self.bits - 1))

    @property
    def code_max(self) -> int:
        """The largest code, 2^(bits-1) - 1."""
        return (1 << (self.bits - 1)) - 1

    @property
    def levels(self) -> tuple[float, ...] | None:
        """The codebook's values by table index, or None for integers."""
        return CODEBOOKS[self.codebook] if self.codebook else None

    @property
    def signed_scales(self) -> bool:
        """True where a scale may be negative: symmetric integers, whose range is lopsided."""
        return self.codebook is None and self.symmetric and self.activations is None

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        """The dtype in which every scale is exact."""
        return SCALE_DTYPES[self.scale_dtype]

    def group_width(self, in_features: int) -> int:
        """Returns the input features of a full group."""
        return in_features if self.group_size is None else min(self.group_size, in_features)

    def groups(self, in_features: int) -> int:
        """Returns the number of groups in a row, the short last one included."""
        return math.ceil(in_features / self.group_width(in_features))

    def tensor_specs(
        self, shape: tuple[int, int]
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Returns name -> (shape, dtype) of every tensor stored for a weight `[out, in]`.

        Names and layout are compressed-tensors' `pack-quantized`; `weight_scale_offset` and
        `weight_scale_step` are ours (double quantization). `input_scale` is theirs as well: float32
        whatever the scale dtype of the weight, the scale of all activations.
        """
        out_features, in_features = shape
        groups = self.groups(in_features)
        specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight_packed": ((out_features, math.ceil(in_features * self.bits / 32)), torch.int32),
            "weight_scale": ((out_features, groups), self.torch_scale_dtype),
            "weight_shape": ((2,), torch.int64),
        }
        if not self.symmetric:
            words = math.ceil(out_features * self.bits / 32)
            specs["weight_zero_point"] = ((words, groups), torch.int32)
        if self.double_quant:
            blocks = math.ceil(out_features * groups / DOUBLE_QUANT_BLOCK)
            specs["weight_scale"] = ((out_features, groups), torch.uint8)
            specs["weight_scale_offset"] = ((blocks,), torch.bfloat16)
            specs["weight_scale_step"] = ((blocks,), torch.bfloat16)
        if self.activations == INT8_STATIC:
            specs["input_scale"] = ((1,), torch.float32)
        return specs

    def stored_bytes(self, shape: tuple[int, int]) -> int:
        """Returns the bytes of every tensor stored for a weight `[out, in]`."""
        return sum(
            math.prod(size) * dtype.itemsize for size, dtype in self.tensor_specs(shape).values()
        )

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Returns stored bits divided by weights: codes, padding, scales, zero points, shape."""
        return 8 * self.stored_bytes(shape) / math.prod(shape)


def _default_group_size(codebook: str | None) -> int:
    return 128 if codebook is None else 64


_EXAMPLES = (
    "W8A16", "W8A16_CHANNEL", "W4A16", "W4A16_G64", "W4A16_ASYM_G64", "W4A16_G64_DQ",
    "W3A16_G64", "W2A16_G64", "NF4", "NF4_DQ", "FP4", "W8A8", "W8A8_STATIC",
)  # fmt: skip


@functools.lru_cache(maxsize=256)
def _parse(text: str) -> Scheme:
    head, *rest = text.strip().upper().split("_")
    widths = re.fullmatch(r"W(\d{1,3})A(\d{1,3})", head)
    fields: dict[str, Any] = {}
    if head.lower() in CODEBOOKS:
        fields["codebook"] = head.lower()
    elif widths and widths[2] == "16":
        fields["bits"] = int(widths[1])
    elif head == "W8A8":
        fields.update(bits=8, activations=INT8)
    elif widths:
        raise LowbitError(
            f"scheme {text!r}: {widths[1]}-bit weights with {widths[2]}-bit activations are not "
            f"supported; weight-only schemes end in A16, for example W{widths[1]}A16, and the only "
            "one with int8 activations is W8A8"
        )
    else:
        raise unknown_name("scheme", text, _EXAMPLES)
    if "activations" in fields:
        fields["group_size"] = None
    else:
        fields["group_size"] = _default_group_size(fields.get("codebook"))
    seen: set[str] = set()
    kind: str
    value: int | str | bool | None
    for part in rest:
        group = re.fullmatch(r"G(\d{1,6})", part)
        if group:
            kind, value = "group_size", int(group[1])
        elif part == "CHANNEL":
            kind, value = "group_size", None
        elif part == "ASYM":
            kind, value = "symmetric", False
        elif part in SCALE_DTYPES:
            kind, value = "scale_dtype", part
        elif part == "DQ":
            kind, value = "double_quant", True
        elif part == "STATIC" and "activations" in fields:
            kind, value = "activations", INT8_STATIC
        else:
            raise unknown_name("scheme", text, _EXAMPLES)
        if kind in seen:
            raise LowbitError(f"scheme {text!r} gives its {kind} twice; keep one")
        seen.add(kind)
        fields[kind] = value
    return Scheme(**fields)
