"""GPTQ checkpoints of AutoGPTQ and GPTQModel, in both meanings of their zero points.

    qweight [ceil(K bits / 32), N] int32    unsigned codes, packed along the input features
    qzeros  [groups, ceil(N bits / 32)]     unsigned zero points, packed along the output features
    scales  [groups, N] fp16                value = scale (code - zero)
    g_idx   [K] int32                       the group of each input feature

A row of codes is the dense little-endian bit stream of `quant/packing.py` for every width, 3 bits
included (their ten codes, a split one, ten, a split one, ten are just that), so qweight is our
packed tensor transposed, and qzeros likewise.

Version 1 stores each zero point minus one. The zero point 0 then is -1: some writers let it borrow
from its neighbours, some wrap it, some spoil the word, and readers differ as well. Such a zero
point is neither written nor read here. Version 2 (`gptq_v2`) stores zero points as they are.

With `desc_act` groups are made of columns in the order of their activations and g_idx is no run of
equal numbers. The reader then returns columns sorted by group, with their order beside them.

Source: GPTQModel 7 `nn_modules/qlinear/__init__.py` (`pack_original`, `dequantize_weight`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit import __version__, patterns
from lowbit.checkpoint import Checkpoint
from lowbit.errors import LowbitError
from lowbit.formats.base import (
    FLOATS,
    MAX_PATTERN,
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
from lowbit.quant.packing import unpack, words_per_row
from lowbit.scheme import INTEGER_BITS, Scheme

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
# What other programs make of the same tensors is not on disk in this order.
_VERSIONS = {"gptq": 1, "gptq_v2": 2}


class Gptq:
    """GPTQ with zero points of one version.

    Args:
        version: 1 or 2.
    """

    holds_order = True

    def __init__(self, version: int) -> None:
        self.version = version
        self.name = next(name for name, number in _VERSIONS.items() if number == version)

    def matches(self, quantization: Mapping[str, Any]) -> bool:
        """Returns whether the config is GPTQ's, of this version."""
        method = quantization.get("quant_method") or quantization.get("method")
        return method == "gptq" and _version(quantization) == self.name

    def modules(self, checkpoint: Checkpoint) -> dict[str, StoredAs]:
        """Returns how every module is stored; group indices are read."""
        quantization = quantization_of(checkpoint)
        if quantization.get("is_marlin_format"):
            raise LowbitError(
                "config.json: is_marlin_format, whose tensors are ordered for one kernel; needed "
                "checkpoint_format gptq or gptq_v2"
            )
        rules = _rules(quantization)
        return {
            name: self._stored(checkpoint, name, {**quantization, **_overrides(name, rules)})
            for name in module_names(checkpoint, "qweight")
        }

    def _stored(
        self, checkpoint: Checkpoint, name: str, quantization: Mapping[str, Any]
    ) -> StoredAs:
        bits = bits_setting(quantization, "bits", INTEGER_BITS)
        entry = checkpoint.entries[f"{name}.qweight"]
        if entry.dtype != torch.int32 or len(entry.shape) != 2 or 0 in entry.shape:
            raise LowbitError(
                f"{entry.file}: tensor {entry.name!r} is {entry.dtype} {list(entry.shape)}, needed "
                "an int32 matrix; other pack_dtypes are not supported"
            )
        words, out_features = entry.shape
        indices = checkpoint.entries.get(f"{name}.g_idx")
        in_features = words * 32 // bits if indices is None else _length(indices)
        if words_per_row(in_features, bits) != words:
            raise LowbitError(
                f"{entry.file}: tensor {entry.name!r} is {list(entry.shape)}, which is no weight "
                f"of {bits} bits with {in_features} input features; config.json and the weights "
                "do not belong together"
            )
        declared = setting(quantization, "group_size", int, -1)
        size = None if declared < 1 else declared
        group_size, repeats = readable_group(size, in_features)
        scales = checkpoint.entries.get(f"{name}.scales")
        scheme = Scheme(
            bits=bits,
            group_size=group_size,
            symmetric=setting(quantization, "sym", bool, True),
            scale_dtype=scale_dtype_name(scales.dtype)
            if scales is not None and scales.dtype in FLOATS
            else "FP16",
        )
        groups = -(-scheme.groups(in_features) // repeats)
        require_entry(checkpoint, f"{name}.scales", FLOATS, (groups, out_features))
        zero_words = words_per_row(out_features, bits)
        require_entry(checkpoint, f"{name}.qzeros", (torch.int32,), (groups, zero_words))
        order = None
        if indices is not None:
            require_entry(checkpoint, indices.name, (torch.int32, torch.int64), (in_features,))
            width = in_features if size is None else min(size, in_features)
            order = _order(indices.read().long(), width, groups, f"{indices.file}: {indices.name}")
        return StoredAs(
            scheme,
            (out_features, in_features),
            tuple(f"{name}.{s}" for s in SUFFIXES if f"{name}.{s}" in checkpoint.entries),
            order,
            {"repeats": repeats},
        )

    def read(self, module: str, stored: StoredAs, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """Returns the weight of a module, its columns sorted by group."""
        scheme, (out_features, in_features) = stored.scheme, stored.shape
        codes = unpack(tensors[f"{module}.qweight"].T, scheme.bits, in_features)
        if stored.input_order is not None:
            codes = codes[:, stored.input_order].contiguous()
        scales = tensors[f"{module}.scales"]
        require_sound(f"{module}.scales", scales)
        zeros = unpack(tensors[f"{module}.qzeros"], scheme.bits, out_features).T
        if self.version == 1:
            if bool((zeros == scheme.code_max).any()):
                raise LowbitError(
                    f"tensor '{module}.qzeros' holds the zero point {(1 << scheme.bits) - 1}, "
                    "which version 1 of the format leaves ambiguous (0 or one too many); make it "
                    "again as gptq_v2"
                )
            zeros = zeros + 1
        repeats = stored.details["repeats"]
        groups = scheme.groups(in_features)
        scales = scales.T.float().repeat_interleave(repeats, dim=1)[:, :groups].contiguous()
        zeros = zeros.repeat_interleave(repeats, dim=1)[:, :groups].contiguous()
        if scheme.symmetric and bool(zeros.any()):
            raise LowbitError(
                f"tensor '{module}.qzeros' holds other zero points than {1 << (scheme.bits - 1)}, "
                "but config.json says sym: true; is the version of the format right? Or set sym to "
                "false"
            )
        kept = None if scheme.symmetric else zeros.float()
        scales = revived(codes, scales, kept, scheme)
        return QuantizedWeight.from_codes(codes, Grid(scheme, in_features, scales, kept))

    def refusal(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Returns why the format cannot hold a weight."""
        if scheme.codebook is not None:
            return f"{scheme} looks codes up in a table, the format has integers only"
        if scheme.double_quant:
            return f"{scheme} double-quantizes its scales, the format has plain scales only"
        if scheme.activations is not None:
            return f"{scheme} rounds activations, the format stores weights only"
        if scheme.group_size is not None and shape[1] % scheme.group_size:
            return (
                f"the last group of {scheme} is short ({shape[1]} input features), which kernels "
                "of the format do not take"
            )
        for count, what in ((shape[1], "input"), (shape[0], "output")):
            if count * scheme.bits % 32:
                return f"{count} {what} features of {scheme.bits} bits do not fill whole words"
        return None

    def nearest(self, scheme: Scheme, shape: tuple[int, int]) -> Scheme | None:
        """Returns integers with plain scales and groups that divide the row."""
        wider = [bits for bits in INTEGER_BITS if bits >= scheme.bits]
        fitting = [b for b in wider if shape[0] * b % 32 == 0 and shape[1] * b % 32 == 0]
        if not fitting:
            return None
        return self.held_as(
            Scheme(
                bits=fitting[0],
                group_size=dividing_group(scheme, shape[1]),
                symmetric=scheme.symmetric,
            )
        )

    def held_as(self, scheme: Scheme) -> Scheme:
        """Returns `scheme` with fp16 scales, the only ones that kernels of the format read."""
        return Scheme(bits=scheme.bits, group_size=scheme.group_size, symmetric=scheme.symmetric)

    def tensors(
        self, module: str, qweight: QuantizedWeight, input_order: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Returns the tensors of a module, g_idx included: some loaders want it always."""
        scheme, (out_features, in_features) = qweight.scheme, qweight.shape
        zeros = torch.zeros_like(qweight.scale, dtype=torch.int8)
        if qweight.zero_point is not None:
            zeros = unpack(qweight.zero_point.T, scheme.bits, out_features).T
        if self.version == 1:
            if bool((zeros == scheme.code_min).any()):
                raise LowbitError(
                    f"{module}: has the zero point 0, which version 1 of the format cannot store; "
                    "use --to gptq_v2"
                )
            zeros = zeros - 1
        packed, g_idx = qweight.packed, torch.arange(in_features) // scheme.group_width(in_features)
        if input_order is not None:
            natural = torch.argsort(input_order)
            packed, g_idx = pack(qweight.codes()[:, natural], scheme.bits), g_idx[natural]
        return {
            f"{module}.qweight": packed.T.contiguous(),
            f"{module}.qzeros": pack(zeros.T.contiguous(), scheme.bits),
            f"{module}.scales": qweight.scale.T.contiguous(),
            f"{module}.g_idx": g_idx.to(torch.int32),
        }

    def stored_as(
        self, module: str, scheme: Scheme, shape: tuple[int, int], tensors: Iterable[str]
    ) -> StoredAs:
        """Returns how `tensors` are to be read back."""
        return StoredAs(scheme, shape, tuple(tensors), details={"repeats": 1})

    def config(self, written: Written) -> dict[str, Any]:
        """Returns the config of the most common scheme; other modules are exceptions to it."""
        common = written.common
        dynamic: dict[str, Any] = {
            f"-:^{re.escape(name)}$": {} for name in sorted(written.inner_plain)
        }
        # Engines ask for what holds the experts, tools for each of them.
        dynamic |= {rf"-:^{re.escape(name)}(\.|$)": {} for name in written.experts}
        for name, scheme in written.schemes.items():
            if scheme != common:
                dynamic[f"+:^{re.escape(name)}$"] = _fields(scheme)
        return {
            "quant_method": "gptq",
            **_fields(common),
            "desc_act": written.ordered,
            "lm_head": written.head in written.schemes,
            "checkpoint_format": self.name,
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"lowbit:{__version__}"]},
            **({"dynamic": dynamic} if dynamic else {}),
        }

    def markers(self, written: Written) -> dict[str, Tensor]:
        """Returns nothing: there are none."""
        return {}


def _fields(scheme: Scheme) -> dict[str, Any]:
    return {
        "bits": scheme.bits,
        "group_size": scheme.group_size or -1,
        "sym": scheme.symmetric,
    }


def _version(quantization: Mapping[str, Any]) -> str:
    """Returns the version of zero points that a config of GPTQ declares; 1 if it says nothing."""
    version = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
    if not isinstance(version, str) or version not in _VERSIONS:
        raise LowbitError(
            f"config.json: checkpoint_format {str(version)[:60]!r} of GPTQ is not supported; "
            f"needed {' or '.join(_VERSIONS)}"
        )
    return version


def _rules(quantization: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns regex -> overriding settings of a config's `dynamic`."""
    rules: dict[str, Any] = setting(quantization, "dynamic", dict, {})
    for pattern, override in rules.items():
        if not isinstance(override, dict) or len(pattern) > MAX_PATTERN:
            raise LowbitError(f"config.json: dynamic {pattern[:60]!r} is no rule of GPTQModel")
        patterns.require_pattern(
            pattern.removeprefix("+:").removeprefix("-:"), "config.json: dynamic"
        )
    return rules


def _overrides(name: str, rules: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns what the first rule that fits a module sets."""
    for pattern, override in rules.items():
        if pattern.startswith("-:"):
            continue
        if patterns.starts_with(pattern.removeprefix("+:"), name, "config.json: dynamic"):
            return override
    return {}


def _length(entry: Any) -> int:
    if len(entry.shape) != 1 or entry.shape[0] < 1:
        raise LowbitError(
            f"{entry.file}: tensor {entry.name!r} is {list(entry.shape)}, needed one index for "
            "each input feature"
        )
    return int(entry.shape[0])


def _order(indices: Tensor, width: int, groups: int, where: str) -> Tensor | None:
    """Returns the order in which columns are sorted by group, None where they are already.

    Raises:
        LowbitError: for an index without a group, or groups of unequal size.
    """
    low, high = (int(n) for n in indices.aminmax())
    if low < 0 or high >= groups:
        raise LowbitError(
            f"{where} holds the group {low if low < 0 else high}, but there are {groups}; fetch "
            "the checkpoint again"
        )
    contiguous = torch.arange(len(indices)) // width
    if torch.equal(indices, contiguous):
        return None
    ordered, order = torch.sort(indices, stable=True)
    if not torch.equal(ordered, contiguous):
        raise LowbitError(
            f"{where} makes groups of unequal size, config.json says {width} input features each"
        )
    return order
