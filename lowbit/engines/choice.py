"""What `--for ENGINE` makes of a command: the format to write, and the schemes that would do."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lowbit.engines.limits import Engine, engine_named
from lowbit.engines.linter import Checkpoint, Verdict, examine, listed
from lowbit.engines.weights import EMBEDDING, HEAD, LINEAR
from lowbit.errors import LowbitError
from lowbit.formats import model_view as view_kinds
from lowbit.formats.gguf.architectures import architecture_of
from lowbit.formats.gguf.layout import Gguf
from lowbit.formats.own import Bf16, Lowbit
from lowbit.formats.plan import wrong_kind
from lowbit.formats.table import LAYOUTS, layout_named
from lowbit.scheme import INTEGER_BITS, SCALE_DTYPES, Scheme

# Of many reasons, so many are given.
SHOWN = 2
GROUP_SIZES = (16, 32, 64, 128, 256, None)
GPUS = 64
_KINDS = {
    LINEAR: view_kinds.LINEAR,
    HEAD: view_kinds.LINEAR,
    EMBEDDING: view_kinds.EMBEDDING,
}


@dataclass(frozen=True)
class Served:
    """A format that an engine serves a checkpoint in.

    Args:
        layout: its name.
        unknown: what was not found out, a sentence each.
    """

    layout: str
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """What a checkpoint is made for.

    Args:
        engine: that will serve it.
        tensor_parallel: GPUs among which every layer is divided.
    """

    engine: Engine
    tensor_parallel: int = 1

    @staticmethod
    def named(engine: str, tensor_parallel: int = 1) -> Target:
        """Returns the target of `--for engine --tp tensor_parallel`.

        Raises:
            LowbitError: for an unknown engine, or fewer GPUs than one.
        """
        if tensor_parallel < 1:
            raise LowbitError(f"--tp is a number of GPUs, 1 or more, got {tensor_parallel}")
        return Target(engine_named(engine), tensor_parallel)

    def __str__(self) -> str:
        gpus = f" --tp {self.tensor_parallel}" if self.tensor_parallel > 1 else ""
        return f"--for {self.engine.name}{gpus}"

    @property
    def layouts(self) -> tuple[str, ...]:
        """The formats of quantized weights that are written for it, best first.

        Raises:
            LowbitError: if there are none.
        """
        found = tuple(name for name in self.engine.writes if name != Bf16.name)
        if not found:
            refused = self.engine.refused[Lowbit.name].because
            raise LowbitError(
                f"{self}: {self.engine} reads no format of quantized weights that lowbit writes "
                f"({refused}); it serves --to {Bf16.name}"
            )
        return found

    def serve(self, given: Checkpoint) -> Served:
        """Returns the best format for weights that are still to be quantized.

        Args:
            given: the weights with their schemes; its layout does not count.

        Raises:
            LowbitError: if no format will do, with the nearest scheme that would.
        """
        for layout in self.layouts:
            verdict = self.verdict(given, layout)
            if not verdict.findings:
                return Served(layout, verdict.unknown)
        best = self.layouts[0]
        reasons = self.verdict(given, best).findings
        raise LowbitError(f"{self}: {self.shown(reasons)}; {self._fix(given, best)}")

    def verdict(self, given: Checkpoint, layout: str) -> Verdict:
        """Returns what keeps `layout` from holding the weights, or the engine from serving it."""
        target = layout_named(layout)
        unheld = tuple(_unheld(given, layout))
        if unheld:
            return Verdict(unheld)
        weights = tuple(
            w if w.scheme is None else dataclasses.replace(w, scheme=target.held_as(w.scheme))
            for w in given.weights
        )
        held = dataclasses.replace(given, layout=layout, weights=weights)
        return examine(self.engine, held, self.tensor_parallel)

    def scheme(self, wanted: Scheme, given: Checkpoint) -> Scheme:
        """Returns `wanted`, its scales in the dtype of the model where the engine casts them."""
        names = {str(dtype).removeprefix("torch."): name for name, dtype in SCALE_DTYPES.items()}
        cast = any(limit.kind == "scales" for limit in self.engine.formats[self.layouts[0]])
        name = names.get(given.model.dtype or "")
        return dataclasses.replace(wanted, scale_dtype=name) if cast and name else wanted

    def shown(self, reasons: Sequence[str]) -> str:
        """Returns reasons for a sentence, only the first of many."""
        more = len(reasons) - SHOWN
        return "; ".join(reasons[:SHOWN]) + (f"; and {more} more" if more > 0 else "")

    def nearest(self, given: Checkpoint, layout: str) -> Scheme | None:
        """Returns the scheme nearest to that of most weights that all could have."""
        schemes = [w.scheme for w in given.quantized if w.scheme is not None]
        common = max(dict.fromkeys(schemes), key=schemes.count)
        for scheme in sorted(_candidates(common), key=lambda other: _distance(common, other)):
            verdict = self.verdict(with_scheme(given, scheme), layout)
            if not verdict.findings and not verdict.unknown:
                return scheme
        return None

    def _fix(self, given: Checkpoint, layout: str) -> str:
        """Returns what would do."""
        nearest = self.nearest(given, layout)
        if nearest is not None:
            return f"the nearest that would do for all layers is --scheme {nearest}"
        for gpus in range(min(self.tensor_parallel, GPUS) - 1, 0, -1):
            fewer = dataclasses.replace(self, tensor_parallel=gpus)
            if not fewer.verdict(given, layout).findings:
                return f"it would be served with --tp {gpus}"
        names = sorted(self.verdict(given, layout).modules)
        return f"leave {listed(names) or 'these layers'} in 16 bits (--keep)"


def with_scheme(given: Checkpoint, scheme: Scheme) -> Checkpoint:
    """Returns the same weights, all that are quantized in `scheme`."""
    weights = tuple(
        w if w.scheme is None else dataclasses.replace(w, scheme=scheme) for w in given.weights
    )
    return dataclasses.replace(given, weights=weights)


def _unheld(given: Checkpoint, layout: str) -> Iterator[str]:
    """Yields why a format cannot hold weights, modules that are refused alike together."""
    if layout == Lowbit.name:
        return
    if layout == Gguf.name and given.model.model_type is not None:
        try:
            architecture_of(given.model.model_type, layout)
        except LowbitError as error:
            yield str(error)
            return
    found: dict[str, list[str]] = {}
    for weight in given.quantized:
        assert weight.scheme is not None
        transposed = weight.name in given.model.conv1d
        kind = view_kinds.CONV1D if transposed else _KINDS[weight.kind]
        view = view_kinds.ModuleView(weight.name, kind, weight.shape)
        reason = wrong_kind(view, LAYOUTS[layout])
        if reason is None and weight.shape is not None:
            reason = LAYOUTS[layout].refusal(weight.scheme, weight.shape)
        if reason is not None:
            found.setdefault(reason, []).append(weight.name)
    for reason, names in found.items():
        yield f"{layout} cannot hold {listed(names)}: {reason}"


def _candidates(scheme: Scheme) -> Iterator[Scheme]:
    for bits in INTEGER_BITS:
        for group_size in GROUP_SIZES:
            for symmetric in (True, False):
                yield Scheme(bits, group_size, symmetric, scale_dtype=scheme.scale_dtype)


def _distance(wanted: Scheme, other: Scheme) -> tuple[float, ...]:
    """Returns how far `other` is: bits first, of two as far more bits; then zero points; groups."""
    groups = [math.log2(size or 4096) for size in (wanted.group_size, other.group_size)]
    return (
        abs(wanted.bits - other.bits),
        -other.bits,
        float(wanted.symmetric != other.symmetric),
        abs(groups[0] - groups[1]),
        groups[1],
    )
