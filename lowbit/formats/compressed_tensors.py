"""compressed-tensors: `pack-quantized`, whose packing is our own, and `int-quantized` for W8A8.

    pack-quantized   weight_packed [N, ceil(K bits / 32)] int32, weight_scale [N, groups],
                     weight_shape [2], weight_zero_point [ceil(N bits / 32), groups] int32
    int-quantized    weight [N, K] int8, weight_scale [N, groups], weight_zero_point int8 likewise

Codes and zero points are signed in both. What a tensor means is said by groups in the config, each
with targets: names of modules, regular expressions (`re:...`, found at the start of a name) or
classes. A layer with int8 activations has `input_scale [1]` if their scale is a constant.

Source: compressed-tensors 0.20, `compressors/pack_quantized`, `compressors/naive_quantized` and
`quantization/quant_args.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit import patterns
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
from lowbit.quant import Grid, QuantizedWeight
from lowbit.quant.packing import unpack, words_per_row
from lowbit.scheme import INT8, INT8_STATIC, INTEGER_BITS, Scheme

PACKED, PLAIN = "pack-quantized", "int-quantized"
# Engines name an output head so; where it is tied to the embedding, no tensor tells of it.
HEAD = "lm_head"


class CompressedTensors:
    """Both formats; which one a module has is said by its group."""

    name = "compressed-tensors"
    holds_order = False

    def matches(self, quantization: Mapping[str, Any]) -> bool:
        """Returns whether the config is compressed-tensors'."""
        return quantization.get("quant_method") in ("compressed-tensors", "compressed_tensors")

    def modules(self, checkpoint: Checkpoint) -> dict[str, StoredAs]:
        """Returns how every module is stored."""
        quantization = quantization_of(checkpoint)
        groups = _groups(quantization)
        if setting(quantization, "kv_cache_scheme", dict, None) is not None:
            raise LowbitError(
                "config.json: kv_cache_scheme quantizes the key-value cache, which lowbit does not "
                "do; serve it with the engine that it was made for"
            )
        packed = dict.fromkeys(module_names(checkpoint, "weight_packed"), PACKED)
        scaled = module_names(checkpoint, "weight_scale")
        plain = {name: PLAIN for name in scaled if name not in packed}
        return {
            name: _stored(checkpoint, name, _group_of(name, groups), layout)
            for name, layout in {**packed, **plain}.items()
        }

    def read(self, module: str, stored: StoredAs, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """Returns the weight of a module."""
        scheme, shape = stored.scheme, stored.shape
        named = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
        if stored.details["layout"] == PACKED:
            if tuple(named["weight_shape"].tolist()) != shape:
                raise LowbitError(
                    f"tensor '{module}.weight_shape' says {named['weight_shape'].tolist()}, but "
                    f"the other tensors are those of a {list(shape)} weight"
                )
            codes = unpack(named["weight_packed"], scheme.bits, shape[1])
        else:
            codes = named["weight"].clone()
            low, high = codes.aminmax()
            if int(low) < scheme.code_min or int(high) > scheme.code_max:
                raise LowbitError(f"tensor '{module}.weight' holds codes beyond {scheme.bits} bits")
        require_sound(f"{module}.weight_scale", named["weight_scale"])
        repeats = stored.details["repeats"]
        scales = _widened(named["weight_scale"], shape, scheme, repeats).float()
        zeros = None
        if not scheme.symmetric:
            zeros = named["weight_zero_point"]
            if zeros.dtype == torch.int32:
                zeros = unpack(zeros.T, scheme.bits, shape[0]).T
            zeros = _widened(zeros, shape, scheme, repeats).float()
        scales = revived(codes, scales, zeros, scheme)
        input_scale = named.get("input_scale")
        if input_scale is not None:
            require_sound(f"{module}.input_scale", input_scale)
            input_scale = input_scale.float().reshape(1)
        return QuantizedWeight.from_codes(codes, Grid(scheme, shape[1], scales, zeros), input_scale)

    def refusal(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Returns why the format cannot hold a weight."""
        if scheme.codebook is not None:
            return f"{scheme} looks codes up in a table, the format has integers only"
        if scheme.double_quant:
            return f"{scheme} double-quantizes its scales, the format has plain scales only"
        if scheme.group_size is not None and shape[1] % scheme.group_size:
            return (
                f"the last group of {scheme} is short ({shape[1]} input features), the format "
                "knows no short groups"
            )
        return None

    def nearest(self, scheme: Scheme, shape: tuple[int, int]) -> Scheme | None:
        """Returns integers with plain scales and groups that divide the row."""
        return Scheme(
            bits=scheme.bits,
            group_size=dividing_group(scheme, shape[1]),
            symmetric=scheme.symmetric,
            scale_dtype=scheme.scale_dtype,
            activations=scheme.activations,
        )

    def held_as(self, scheme: Scheme) -> Scheme:
        """Returns `scheme`: the format has it as it is."""
        return scheme

    def tensors(
        self, module: str, qweight: QuantizedWeight, input_order: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Returns the tensors of `pack-quantized`, or of `int-quantized` with int8 activations."""
        named = qweight.tensors()
        if qweight.scheme.activations is not None:
            del named["weight_packed"], named["weight_shape"]
            named = {"weight": qweight.codes(), **named}
        return {f"{module}.{suffix}": tensor for suffix, tensor in named.items()}

    def stored_as(
        self, module: str, scheme: Scheme, shape: tuple[int, int], tensors: Iterable[str]
    ) -> StoredAs:
        """Returns how `tensors` are to be read back."""
        details = {"layout": _layout(scheme), "repeats": 1}
        return StoredAs(scheme, shape, tuple(tensors), details=details)

    def config(self, written: Written) -> dict[str, Any]:
        """Returns one group for each scheme; with a single one, of all linear layers."""
        schemes = list(dict.fromkeys(written.schemes.values()))
        groups, layouts = {}, sorted({_layout(scheme) for scheme in schemes})
        for index, scheme in enumerate(schemes):
            named = [name for name, own in written.schemes.items() if own == scheme]
            group = _group(scheme, ["Linear"] if len(schemes) == 1 else named)
            groups[f"group_{index}"] = {**group, "format": _layout(scheme)}
        config: dict[str, Any] = {
            "quant_method": "compressed-tensors",
            "format": layouts[0] if len(layouts) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "ignore": [
                *sorted(set(written.plain)),
                *(rf"re:^{re.escape(name)}\..*" for name in written.experts),
            ],
            "config_groups": groups,
        }
        if len(schemes) == 1 and not schemes[0].symmetric:
            # transformers 5.23 runs asymmetric weights only decoded, and decodes all layers by one
            # group: with several it would go wrong. Engines do not read this key.
            config["dequantize"] = True
        return config

    def markers(self, written: Written) -> dict[str, Tensor]:
        """Returns nothing: there are none."""
        return {}


def _layout(scheme: Scheme) -> str:
    return PACKED if scheme.activations is None else PLAIN


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    """Returns the entry of `config_groups` for linear layers of `scheme`."""
    group: dict[str, Any] = {
        "targets": targets,
        "weights": {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": "channel" if scheme.group_size is None else "group",
            "group_size": scheme.group_size,
            "dynamic": False,
        },
    }
    if scheme.activations is not None:
        per_token = scheme.activations == INT8
        group["input_activations"] = {
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "strategy": "token" if per_token else "tensor",
            "dynamic": per_token,
        }
    return group


def _groups(quantization: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the groups of a config, each with targets, weights and activations."""
    groups = list(setting(quantization, "config_groups", dict, {}).values())
    if not groups or not all(isinstance(group, dict) for group in groups):
        raise LowbitError(
            "config.json: config_groups is missing or names presets; lowbit reads groups that "
            "spell out their weights"
        )
    for group in groups:
        targets = setting(group, "targets", list, [])
        if not all(isinstance(t, str) and len(t) <= MAX_PATTERN for t in targets):
            raise LowbitError("config.json: a target of config_groups is not a short text")
        _require_patterns(targets, "targets")
    _require_patterns(setting(quantization, "ignore", list, []), "ignore")
    return groups


def _require_patterns(names: list[Any], field: str) -> None:
    for name in names:
        if isinstance(name, str) and name.startswith("re:"):
            patterns.require_pattern(name.removeprefix("re:"), f"config.json: {field}")


def _group_of(name: str, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the group of a module: by name before by pattern before by class."""
    for fits in (_is_name, _fits_pattern, _is_class):
        for group in groups:
            if any(fits(target, name) for target in group.get("targets") or ()):
                return group
    raise LowbitError(
        f"{name}: is quantized, but no group of config.json has it as a target; they do not belong "
        "together"
    )


def _is_name(target: str, name: str) -> bool:
    return target == name


def _fits_pattern(target: str, name: str) -> bool:
    if not target.startswith("re:"):
        return False
    return patterns.starts_with(target.removeprefix("re:"), name, "config.json: targets")


def _is_class(target: str, name: str) -> bool:
    """Returns True for the name of a class: they are capitalised, parts of names here are not."""
    return target.isidentifier() and target[:1].isupper()


def _stored(checkpoint: Checkpoint, name: str, group: Mapping[str, Any], layout: str) -> StoredAs:
    """Returns how a module is stored, after holding its headers against its group."""
    weights = setting(group, "weights", dict, {})
    if setting(weights, "type", str, "int") != "int":
        raise LowbitError(
            f"{name}: its weights are {weights['type']}s in compressed-tensors, lowbit reads "
            "integers; load it with the engine that it was made for"
        )
    bits = bits_setting(weights, "num_bits", INTEGER_BITS)
    symmetric = setting(weights, "symmetric", bool, True)
    shape = _shape(checkpoint, name, layout, bits)
    strategy = setting(weights, "strategy", str, "group" if weights.get("group_size") else "tensor")
    size = _group_size(name, strategy, setting(weights, "group_size", int, None))
    size, repeats = readable_group(size, shape[1])
    scale = checkpoint.entries.get(f"{name}.weight_scale")
    if scale is None or scale.dtype not in FLOATS:
        raise LowbitError(
            f"{checkpoint.path}: tensor '{name}.weight_scale' is missing or not of floats; "
            "config.json and the weights do not belong together"
        )
    scheme = Scheme(
        bits=bits,
        group_size=size,
        symmetric=symmetric,
        scale_dtype=scale_dtype_name(scale.dtype),
        activations=_activations(name, group),
    )
    stored_groups = -(-scheme.groups(shape[1]) // repeats)
    if strategy == "tensor":
        require_entry(checkpoint, scale.name, FLOATS, (1,) if len(scale.shape) else ())
    else:
        require_entry(checkpoint, scale.name, FLOATS, (shape[0], stored_groups))
    suffixes = ["weight_scale"]
    if not symmetric:
        _require_zero_points(checkpoint, name, bits, (shape[0], stored_groups), strategy)
        suffixes.append("weight_zero_point")
    if scheme.activations == INT8_STATIC:
        entry = checkpoint.entries.get(f"{name}.input_scale")
        require_entry(
            checkpoint, f"{name}.input_scale", FLOATS, () if entry and not entry.shape else (1,)
        )
        suffixes.append("input_scale")
    if f"{name}.weight_g_idx" in checkpoint.entries:
        raise LowbitError(
            f"{name}: weight_g_idx orders columns by group while running, a format that "
            "compressed-tensors has given up; quantize with actorder 'weight'"
        )
    suffixes = [*(["weight_packed", "weight_shape"] if layout == PACKED else ["weight"]), *suffixes]
    return StoredAs(
        scheme,
        shape,
        tuple(f"{name}.{suffix}" for suffix in suffixes),
        details={"layout": layout, "repeats": repeats},
    )


def _require_zero_points(
    checkpoint: Checkpoint, name: str, bits: int, shape: tuple[int, int], strategy: str
) -> None:
    """Raises unless the zero points fit `shape` (rows, groups), packed along rows or as int8."""
    full = f"{name}.weight_zero_point"
    entry = checkpoint.entries.get(full)
    if strategy == "tensor":
        require_entry(checkpoint, full, (torch.int8,), (1,))
    elif entry is not None and entry.dtype == torch.int8:
        require_entry(checkpoint, full, (torch.int8,), shape)
    else:
        packed = (words_per_row(shape[0], bits), shape[1])
        require_entry(checkpoint, full, (torch.int32,), packed)


def _shape(checkpoint: Checkpoint, name: str, layout: str, bits: int) -> tuple[int, int]:
    """Returns (out_features, in_features), as far as headers allow it."""
    codes = checkpoint.entries.get(f"{name}.{'weight_packed' if layout == PACKED else 'weight'}")
    dtype = torch.int32 if layout == PACKED else torch.int8
    if codes is None or codes.dtype != dtype or len(codes.shape) != 2 or 0 in codes.shape:
        raise LowbitError(
            f"{checkpoint.path}: the codes of {name} are missing or no matrix of {dtype}; lowbit "
            f"reads {PACKED} and {PLAIN} of compressed-tensors"
        )
    if layout == PLAIN:
        return codes.shape[0], codes.shape[1]
    require_entry(checkpoint, f"{name}.weight_shape", (torch.int64, torch.int32), (2,))
    # Rows are padded to whole words, so the header of the codes alone does not tell in_features.
    rows, columns = (int(n) for n in checkpoint.entries[f"{name}.weight_shape"].read())
    if columns < 1 or (rows, words_per_row(columns, bits)) != codes.shape:
        raise LowbitError(
            f"{codes.file}: tensor {codes.name!r} is {list(codes.shape)}, but weight_shape says "
            f"[{rows}, {columns}] of {bits} bits; fetch the checkpoint again"
        )
    return rows, columns


def _group_size(name: str, strategy: str, size: int | None) -> int | None:
    if strategy in ("channel", "tensor"):
        return None
    if strategy != "group":
        raise LowbitError(
            f"{name}: the strategy {strategy!r} of compressed-tensors is not supported; needed "
            "group, channel or tensor"
        )
    if size is None or size < 1:
        raise LowbitError(f"{name}: config.json gives the strategy group, but no group_size")
    return size


def _activations(name: str, group: Mapping[str, Any]) -> str | None:
    """Returns what activations are rounded to."""
    inputs = setting(group, "input_activations", dict, None)
    if inputs is None and setting(group, "output_activations", dict, None) is None:
        return None
    if inputs is not None and group.get("output_activations") is None:
        plain = inputs.get("num_bits") == 8 and inputs.get("type", "int") == "int"
        plain = plain and inputs.get("symmetric", True) is True
        kind = (inputs.get("strategy", "tensor"), bool(inputs.get("dynamic", False)))
        if plain and kind in (("token", True), ("tensor", False)):
            return INT8 if kind[1] else INT8_STATIC
    raise LowbitError(
        f"{name}: of rounded activations lowbit has symmetric int8 with a scale per token or one "
        "constant scale; load it with the engine that it was made for"
    )


def _widened(values: Tensor, shape: tuple[int, int], scheme: Scheme, repeats: int) -> Tensor:
    """Returns `values` as `[N, groups]`, from one for all or from wider groups."""
    if values.numel() == 1:
        values = values.reshape(1, 1).expand(shape[0], 1)
    return values.repeat_interleave(repeats, dim=1)[:, : scheme.groups(shape[1])].contiguous()
