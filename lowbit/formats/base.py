"""What a layout of quantized checkpoints is: its tensors there, a `QuantizedWeight` here.

Every layout stores the same thing, codes and a scale (perhaps a zero point) for each group of input
features, in another order. `QuantizedWeight` is the hub, so N layouts need N readers and N writers.

A layout never touches files: it is given headers and config, and says which tensors make up which
module; then it is given those tensors. What reads files and what checks a conversion are the same
for all of them, and a conversion is checked in memory by the very reader that would load it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lowbit.checkpoint import Checkpoint
from lowbit.errors import LowbitError
from lowbit.quant import QuantizedWeight
from lowbit.scheme import MAX_GROUP_SIZE, MIN_GROUP_SIZE, SCALE_DTYPES, Scheme

# Patterns come from files: nobody needs one of more characters.
MAX_PATTERN = 1000


@dataclass(frozen=True)
class StoredAs:
    """How one module is stored.

    Args:
        scheme: what its reader returns.
        shape: (out_features, in_features).
        tensors: full names of all tensors that belong to it, in the order of the layout.
        input_order: int64 `[in_features]` where the reader returns columns in another order than
            that of the activations: column i of the codes is input feature `input_order[i]`.
        details: what else the reader needs, JSON values from config and headers.
    """

    scheme: Scheme
    shape: tuple[int, int]
    tensors: tuple[str, ...]
    input_order: Tensor | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """What a config is written for.

    Args:
        schemes: module name -> scheme as the layout holds it, in the order of the files.
        plain: names of the linear layers that stay in 16 bits, the head that no tensor tells of
            (it is tied) among them.
        head: name of the output head, None if the model has none.
        embedding: name of the input embedding.
        ordered: a module has an `input_order`.
        experts: names of what holds the experts of a layer that stay in 16 bits, all of them.
    """

    schemes: Mapping[str, Scheme]
    plain: tuple[str, ...] = ()
    head: str | None = "lm_head"
    embedding: str | None = None
    ordered: bool = False
    experts: tuple[str, ...] = ()

    @property
    def common(self) -> Scheme:
        """The scheme of most modules."""
        found = list(self.schemes.values())
        return max(dict.fromkeys(found), key=found.count)

    @property
    def inner_plain(self) -> list[str]:
        """The unquantized linear layers inside of numbered blocks."""
        return [name for name in self.plain if any(part.isdigit() for part in name.split("."))]


class Layout(Protocol):
    """One layout.

    Attributes:
        name: of the command line.
        holds_order: whether columns may be stored in an order of their own.
    """

    name: str
    holds_order: bool

    def matches(self, quantization: Mapping[str, Any]) -> bool:
        """Returns whether a `quantization_config` (empty: none) is one of this layout."""

    def modules(self, checkpoint: Checkpoint) -> dict[str, StoredAs]:
        """Returns module name -> how it is stored, from headers, config and group indices only.

        Raises:
            LowbitError: naming the tensor or the field of the config that does not fit.
        """

    def read(self, module: str, stored: StoredAs, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """Returns the weight that `tensors` (those of `stored`, by full name) hold.

        Raises:
            LowbitError: naming the tensor whose content is impossible.
        """

    def refusal(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Returns why a weight cannot be stored, None if it can (as `held_as` says)."""

    def nearest(self, scheme: Scheme, shape: tuple[int, int]) -> Scheme | None:
        """Returns the scheme that comes nearest to a refused one, None if there is none."""

    def held_as(self, scheme: Scheme) -> Scheme:
        """Returns the scheme whose tensors a weight of `scheme` is stored by."""

    def tensors(
        self, module: str, qweight: QuantizedWeight, input_order: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Returns full name -> tensor for a weight of a scheme that `held_as` returned.

        Raises:
            LowbitError: for a value that the layout has no way to store.
        """

    def stored_as(
        self, module: str, scheme: Scheme, shape: tuple[int, int], tensors: Iterable[str]
    ) -> StoredAs:
        """Returns how `tensors` are to be read back, without a config at hand."""

    def config(self, written: Written) -> dict[str, Any]:
        """Returns the `quantization_config`; empty for none."""

    def markers(self, written: Written) -> dict[str, Tensor]:
        """Returns tensors that a checkpoint needs besides those of its modules."""


def quantization_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the `quantization_config` of a checkpoint, empty if there is none.

    Raises:
        LowbitError: if it is something else than an object.
    """
    config = checkpoint.config
    found = config.get("quantization_config") or config.get("compression_config") or {}
    if not isinstance(found, dict):
        raise LowbitError(
            f"{checkpoint.path / 'config.json'}: quantization_config is a "
            f"{type(found).__name__}, needed an object; fetch it again"
        )
    return found


def setting(
    quantization: Mapping[str, Any], key: str, kinds: type | tuple[type, ...], default: Any
) -> Any:
    """Returns a field of a config after checking its type; `default` where it is absent or null.

    Raises:
        LowbitError: naming the field.
    """
    value = quantization.get(key)
    if value is None:
        return default
    wanted = kinds if isinstance(kinds, tuple) else (kinds,)
    # A bool is an int for Python, and never meant as one.
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        names = " or ".join(kind.__name__ for kind in wanted)
        raise LowbitError(f"config.json: {key} is {_short(value)}, needed {names}; fetch it again")
    return value


def bits_setting(quantization: Mapping[str, Any], key: str, allowed: tuple[int, ...]) -> int:
    """Returns the width of a code from a config.

    Raises:
        LowbitError: for a width that is not `allowed`.
    """
    bits: int = setting(quantization, key, int, 0)
    if bits not in allowed:
        widths = ", ".join(map(str, allowed))
        raise LowbitError(f"config.json: {key} is {bits}, this format is read with {widths} bits")
    return bits


def module_names(checkpoint: Checkpoint, suffix: str) -> list[str]:
    """Returns the modules that have a tensor `<module>.<suffix>`, in the order of the files."""
    end = f".{suffix}"
    return [name.removesuffix(end) for name in checkpoint.entries if name.endswith(end)]


def require_entry(
    checkpoint: Checkpoint,
    name: str,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
) -> None:
    """Raises unless a tensor is there with one of `dtypes` and the `shape`.

    Raises:
        LowbitError: naming file and tensor.
    """
    entry = checkpoint.entries.get(name)
    if entry is None:
        raise LowbitError(
            f"{checkpoint.path}: tensor {name!r} is missing; config.json and the weights do not "
            "belong together"
        )
    if entry.dtype not in dtypes or entry.shape != shape:
        wanted = " or ".join(_dtype_name(dtype) for dtype in dtypes)
        raise LowbitError(
            f"{entry.file}: tensor {name!r} is {_dtype_name(entry.dtype)} {list(entry.shape)}, "
            f"needed {wanted} {list(shape)}; config.json and the weights do not belong together"
        )


FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def scale_dtype_name(dtype: torch.dtype) -> str:
    """Returns the name that schemes have for a dtype of scales."""
    return next(name for name, known in SCALE_DTYPES.items() if known == dtype)


def readable_group(group_size: int | None, in_features: int) -> tuple[int | None, int]:
    """Returns the group size that a scheme here gets, and how often each scale is repeated for it.

    Groups of more than 256 features become several with the same scale. None is one group a row.

    Raises:
        LowbitError: for groups that no scheme has.
    """
    if group_size is None:
        return None, 1
    if group_size <= MAX_GROUP_SIZE:
        return Scheme(group_size=group_size).group_size, 1
    if group_size >= in_features:
        return None, 1
    for repeats in range(2, group_size // MIN_GROUP_SIZE + 1):
        width = group_size // repeats
        if width * repeats == group_size and width <= MAX_GROUP_SIZE and width % 8 == 0:
            return width, repeats
    raise LowbitError(
        f"groups of {group_size} input features are not supported; use groups of up to "
        f"{MAX_GROUP_SIZE}, or one per channel"
    )


def dividing_group(scheme: Scheme, in_features: int) -> int | None:
    """Returns the group size nearest to that of `scheme` that divides `in_features`.

    Of two as near, one that divides the old one, so that no value changes; None, one group per
    channel, if there is none.
    """
    wanted = scheme.group_width(in_features)
    if scheme.group_size is not None and in_features % scheme.group_size == 0:
        return scheme.group_size
    sizes = [
        size
        for size in range(MIN_GROUP_SIZE, MAX_GROUP_SIZE + 1, 8)
        if in_features % size == 0 and size <= wanted
    ]
    if not sizes or wanted == in_features:
        return None
    return max(sizes, key=lambda size: (wanted % size == 0, size))


def require_sound(name: str, scales: Tensor) -> None:
    """Raises for NaN and Inf among scales.

    Raises:
        LowbitError: naming the tensor.
    """
    if not bool(torch.isfinite(scales).all()):
        raise LowbitError(f"tensor {name!r} holds NaN or Inf; the weights are broken, fetch them")


def revived(codes: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme) -> Tensor:
    """Returns `scales` with those that are zero set to one, after making their `codes` decode to 0.

    A group of zeros has no scale; some tools store 0 for it, and no kernel here divides by that.

    Args:
        codes: int8 `[N, K]`, changed in place.
        scales: float `[N, groups]`.
        zeros: integer `[N, groups]`, or None.
        scheme: of the weight.
    """
    dead = scales == 0
    if not bool(dead.any()):
        return scales
    width = scheme.group_width(codes.shape[1])
    if scheme.levels is not None:
        still = torch.full_like(scales, scheme.levels.index(0.0) + scheme.code_min)
    else:
        still = torch.zeros_like(scales) if zeros is None else zeros.to(scales.dtype)

    def spread(values: Tensor) -> Tensor:
        return values.repeat_interleave(width, dim=1)[:, : codes.shape[1]]

    codes[spread(dead)] = spread(still)[spread(dead)].to(torch.int8)
    return torch.where(dead, torch.ones_like(scales), scales)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
