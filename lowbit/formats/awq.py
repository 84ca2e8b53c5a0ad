"""AWQ checkpoints in the packing of its GEMM kernels: 4 bits, asymmetric.

    qweight [K, N / 8] int32      unsigned codes, packed along the output features
    qzeros  [groups, N / 8] int32 unsigned zero points, packed alike
    scales  [groups, N] fp16      value = scale (code - zero)

Eight codes in a word are interleaved, as the kernel takes them apart two at a time:

    bits     0-3  4-7  8-11  12-15  16-19  20-23  24-27  28-31
    column    0    2    4     6      1      3      5      7

Source: AutoAWQ `packing_utils.py`, GPTQModel 7 `quantization/awq/utils/packing_utils.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint import Checkpoint
from lowbit.errors import LowbitError
from lowbit.formats.base import (
    FLOATS,
    StoredAs,
    Written,
    bits_setting,
    dividing_group,
    module_names,
    quantization_of,
    readable_group,
    require_entry,
    require_sound,
    revived,
    scale_dtype_name,
    setting,
)
from lowbit.quant import Grid, QuantizedWeight, pack
from lowbit.quant.packing import unpack
from lowbit.scheme import Scheme

SUFFIXES = ("qweight", "qzeros", "scales")
CODES_PER_WORD = 8
# Column of each nibble of a word, lowest first.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PLACE = tuple(ORDER.index(column) for column in range(CODES_PER_WORD))


class Awq:
    """AWQ, version `gemm`."""

    name = "awq"
    holds_order = False

    def matches(self, quantization: Mapping[str, Any]) -> bool:
        """Returns whether the config is AWQ's."""
        return (quantization.get("quant_method") or quantization.get("method")) == "awq"

    def modules(self, checkpoint: Checkpoint) -> dict[str, StoredAs]:
        """Returns how every module is stored."""
        quantization = quantization_of(checkpoint)
        version = str(
            quantization.get("version")
            or quantization.get("checkpoint_format")
            or quantization.get("format")
            or "gemm"
        )
        if version.lower() != "gemm":
            raise LowbitError(
                f"config.json: version {version!r} of AWQ is not supported; needed gemm, the "
                "packing that nearly all checkpoints have"
            )
        bits_setting({"bits": quantization.get("bits", quantization.get("w_bit"))}, "bits", (4,))
        declared = quantization.get("group_size", quantization.get("q_group_size"))
        size = setting({"group_size": declared}, "group_size", int, 128)
        return {
            name: _stored(checkpoint, name, None if size < 1 else size)
            for name in module_names(checkpoint, "qweight")
        }

    def read(self, module: str, stored: StoredAs, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """Returns the weight of a module."""
        scheme, (out_features, in_features) = stored.scheme, stored.shape
        codes = _deinterleaved(tensors[f"{module}.qweight"], out_features).T.contiguous()
        scales, repeats = tensors[f"{module}.scales"], stored.details["repeats"]
        require_sound(f"{module}.scales", scales)
        groups = scheme.groups(in_features)
        scales = scales.T.float().repeat_interleave(repeats, dim=1)[:, :groups].contiguous()
        zeros = None
        if not scheme.symmetric:
            zeros = _deinterleaved(tensors[f"{module}.qzeros"], out_features).T.float()
            zeros = zeros.repeat_interleave(repeats, dim=1)[:, :groups].contiguous()
        scales = revived(codes, scales, zeros, scheme)
        return QuantizedWeight.from_codes(codes, Grid(scheme, in_features, scales, zeros))

    def refusal(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Returns why the format cannot hold a weight."""
        if scheme.codebook is not None:
            return f"{scheme} looks codes up in a table, the format has integers only"
        if scheme.bits != 4:
            return f"{scheme} has {scheme.bits} bits, the format has 4"
        if scheme.double_quant:
            return f"{scheme} double-quantizes its scales, the format has plain scales only"
        if scheme.group_size is not None and shape[1] % scheme.group_size:
            return (
                f"the last group of {scheme} is short ({shape[1]} input features), the format "
                "knows no short groups"
            )
        if shape[0] % CODES_PER_WORD:
            return f"{shape[0]} output features do not fill words of {CODES_PER_WORD} codes"
        return None

    def nearest(self, scheme: Scheme, shape: tuple[int, int]) -> Scheme | None:
        """Returns 4 bits with zero points in groups that divide the row."""
        if shape[0] % CODES_PER_WORD:
            return None
        return Scheme(bits=4, group_size=dividing_group(scheme, shape[1]), symmetric=False)

    def held_as(self, scheme: Scheme) -> Scheme:
        """Returns `scheme` with zero points, which engines expect, and fp16 scales."""
        return Scheme(bits=4, group_size=scheme.group_size, symmetric=False)

    def tensors(
        self, module: str, qweight: QuantizedWeight, input_order: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Returns the tensors of a module."""
        out_features = qweight.shape[0]
        assert qweight.zero_point is not None
        zeros = unpack(qweight.zero_point.T, 4, out_features)
        return {
            f"{module}.qweight": _interleaved(qweight.codes().T),
            f"{module}.qzeros": _interleaved(zeros),
            f"{module}.scales": qweight.scale.T.contiguous(),
        }

    def stored_as(
        self, module: str, scheme: Scheme, shape: tuple[int, int], tensors: Iterable[str]
    ) -> StoredAs:
        """Returns how `tensors` are to be read back."""
        return StoredAs(scheme, shape, tuple(tensors), details={"repeats": 1})

    def config(self, written: Written) -> dict[str, Any]:
        """Returns the config.

        Raises:
            LowbitError: for modules with groups of different sizes, of which it has one.
        """
        sizes: dict[int | None, str] = {}
        for name, scheme in written.schemes.items():
            sizes.setdefault(scheme.group_size, name)
        if len(sizes) > 1:
            (size, name), (other_size, other) = list(sizes.items())[:2]
            raise LowbitError(
                f"awq has one group size for all modules, but {name} has {size or 'one a row'} and "
                f"{other} {other_size or 'one a row'}; use --to gptq_v2 or compressed-tensors"
            )
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": written.common.group_size or -1,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": sorted({*written.plain, *written.experts}),
        }

    def markers(self, written: Written) -> dict[str, Tensor]:
        """Returns nothing: there are none."""
        return {}


def _stored(checkpoint: Checkpoint, name: str, size: int | None) -> StoredAs:
    entry = checkpoint.entries[f"{name}.qweight"]
    if entry.dtype != torch.int32 or len(entry.shape) != 2 or 0 in entry.shape:
        raise LowbitError(
            f"{entry.file}: tensor {entry.name!r} is {entry.dtype} {list(entry.shape)}, needed an "
            "int32 matrix"
        )
    in_features, words = entry.shape
    out_features = words * CODES_PER_WORD
    group_size, repeats = readable_group(size, in_features)
    scales = checkpoint.entries.get(f"{name}.scales")
    known = scales is not None and scales.dtype in FLOATS
    # Without zero points (zero_point: false) codes are relative to the middle, 8.
    symmetric = f"{name}.qzeros" not in checkpoint.entries
    scheme = Scheme(
        bits=4,
        group_size=group_size,
        symmetric=symmetric,
        scale_dtype=scale_dtype_name(scales.dtype) if scales is not None and known else "FP16",
    )
    groups = -(-scheme.groups(in_features) // repeats)
    require_entry(checkpoint, f"{name}.scales", FLOATS, (groups, out_features))
    if not symmetric:
        require_entry(checkpoint, f"{name}.qzeros", (torch.int32,), (groups, words))
    return StoredAs(
        scheme,
        (out_features, in_features),
        tuple(f"{name}.{s}" for s in SUFFIXES if not (symmetric and s == "qzeros")),
        details={"repeats": repeats},
    )


def _interleaved(codes: Tensor) -> Tensor:
    """Returns int8 `codes` `[rows, N]` packed along N as int32 `[rows, N / 8]`."""
    return pack(codes.unflatten(-1, (-1, CODES_PER_WORD))[..., list(ORDER)].flatten(-2), 4)


def _deinterleaved(words: Tensor, columns: int) -> Tensor:
    """Returns the int8 codes `[rows, columns]` of `words`, the inverse of `_interleaved`."""
    codes: Tensor = unpack(words, 4, columns).unflatten(-1, (-1, CODES_PER_WORD))
    return codes[..., list(PLACE)].flatten(-2)
