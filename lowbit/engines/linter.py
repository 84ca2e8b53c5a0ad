"""Whether an engine serves a checkpoint, and if not, why.

Every kind of limit is a function here; which engine has which limits is data (`limits.json`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowbit.allocation.fusion import fusion_groups
from lowbit.engines.limits import ATTRIBUTES, MORE, REFUSED, SAID, UNKNOWN, Engine, Limit
from lowbit.engines.weights import COLUMN, LINEAR, ROW, Model, Weight, model_of
from lowbit.errors import LowbitError
from lowbit.scheme import Scheme

# Of a long list, so many names are shown.
SHOWN = 3
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


@dataclass(frozen=True)
class Verdict:
    """What is known of an engine and a checkpoint.

    Args:
        findings: why it does not serve it, a sentence each; empty: it does.
        unknown: what was not found out, a sentence each.
        said: what is served otherwise than one would think, a sentence each.
        modules: the modules that a finding is about.
    """

    findings: tuple[str, ...]
    unknown: tuple[str, ...] = ()
    said: tuple[str, ...] = ()
    modules: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Checkpoint:
    """What an engine would be given.

    Args:
        layout: its format.
        weights: every linear layer of the blocks, the head and the embedding, quantized or not.
        model: what `config.json` says.
    """

    layout: str
    weights: tuple[Weight, ...]
    model: Model

    @staticmethod
    def of_config(
        layout: str, schemes: Mapping[str, Scheme], config: Mapping[str, Any]
    ) -> Checkpoint:
        """Returns a checkpoint of which only the names of the weights and the config are known."""
        model = model_of(config)
        return Checkpoint.of_model(
            layout, schemes, model, _has_order(config.get("quantization_config"))
        )

    @staticmethod
    def of_model(
        layout: str, schemes: Mapping[str, Scheme], model: Model, ordered: bool = False
    ) -> Checkpoint:
        """Returns a checkpoint of a model; `ordered`: columns have orders of their own."""
        names = dict.fromkeys([*schemes, *model.shapes])
        weights = tuple(
            Weight(
                name,
                schemes.get(name),
                model.shape(name),
                model.kind(name),
                ordered and name in schemes,
            )
            for name in names
        )
        return Checkpoint(layout, weights, model)

    @property
    def quantized(self) -> tuple[Weight, ...]:
        """The weights that have a scheme."""
        return tuple(weight for weight in self.weights if weight.scheme is not None)


@dataclass(frozen=True)
class Breach:
    """Weights beyond a limit.

    Args:
        names: of the modules; empty where it is about the whole model.
        got: what they are, the verb and on.
    """

    names: tuple[str, ...]
    got: str


def examine(engine: Engine, given: Checkpoint, tensor_parallel: int = 1) -> Verdict:
    """Returns what is known of `engine` serving `given` on `tensor_parallel` GPUs.

    Raises:
        LowbitError: for fewer GPUs than one.
    """
    if tensor_parallel < 1:
        raise LowbitError(f"--tp is a number of GPUs, 1 or more, got {tensor_parallel}")
    limits = engine.formats.get(given.layout)
    if limits is None:
        refused = engine.refused.get(given.layout)
        reason = refused.because if refused else "nothing is known of it there"
        return Verdict((f"{engine} does not serve {given.layout}: {reason}",))
    found: dict[str, list[str]] = {REFUSED: [], UNKNOWN: [], SAID: []}
    modules: set[str] = set()
    for limit in limits:
        for breach in _breaches(limit, given, tensor_parallel):
            found[limit.then].append(_sentence(engine, given, limit, breach))
            if limit.then == REFUSED:
                modules.update(breach.names)
    if tensor_parallel > 1:
        found[UNKNOWN] += _unknown_cuts(engine, given)
    return Verdict(
        tuple(found[REFUSED]), tuple(found[UNKNOWN]), tuple(found[SAID]), frozenset(modules)
    )


def _sentence(engine: Engine, given: Checkpoint, limit: Limit, breach: Breach) -> str:
    where = f"{engine} ({given.layout})"
    if limit.kind == "note":
        return f"{where}: {limit.value}"
    got = f"{listed(breach.names)} {breach.got}" if breach.names else breach.got
    if limit.then == UNKNOWN:
        return f"{where}: not known whether it serves this: {got}; {limit.reason.because}"
    joint = "but" if limit.then == REFUSED else "and"
    return f"{where}: {got}, {joint} {limit.reason.because}"


def listed(names: Sequence[str]) -> str:
    """Returns names for a sentence; those of several blocks as one, and only the first of many."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(_NUMBER.sub(".*", name), []).append(name)
    shown = [
        own[0] if len(own) == 1 else f"{pattern} ({len(own)} weights)"
        for pattern, own in list(alike.items())[:SHOWN]
    ]
    return ", ".join(shown) + (", ..." if len(alike) > SHOWN else "")


def _breaches(limit: Limit, given: Checkpoint, tensor_parallel: int) -> Iterator[Breach]:
    """Yields what is beyond a limit, modules that are so in the same way together."""
    more = limit.when.get("tensor_parallel") == MORE
    if more and tensor_parallel == 1:
        return
    asked = {name: values for name, values in limit.when.items() if name != "tensor_parallel"}
    weights = [
        weight
        for weight in given.quantized
        if all(weight.attribute(name) in values for name, values in asked.items())
    ]
    if limit.kind in ATTRIBUTES and limit.kind != "tensor_parallel":
        found = {w.name: _attribute(limit, w) for w in weights}
    elif limit.kind == "note":
        if weights or not asked:
            yield Breach((), "")
        return
    else:
        found = dict(CHECKS[limit.kind](limit, given, weights, tensor_parallel))
    alike: dict[str, list[str]] = {}
    for name, got in found.items():
        if got is not None:
            alike.setdefault(got, []).append(name)
    for got, names in alike.items():
        yield Breach(tuple(name for name in names if name), got)


Found = Iterator[tuple[str, str]]
Check = Callable[[Limit, Checkpoint, list[Weight], int], Found]


def _attribute(limit: Limit, weight: Weight) -> str | None:
    value = weight.attribute(limit.kind)
    return None if value in limit.value else _WORDS[limit.kind](value)


_WORDS: dict[str, Callable[[Any], str]] = {
    "bits": lambda value: f"have {value} bits",
    "symmetric": lambda value: "have no zero points" if value else "have zero points",
    "group_size": lambda v: f"have groups of {v}" if v else "have one group for a row",
    "codebook": lambda v: f"look codes up in the table of {v.upper()}" if v else "are integers",
    "double_quant": lambda value: f"have {'quantized' if value else 'plain'} scales",
    "activations": lambda v: f"round activations ({v})" if v else "leave activations in float",
    "scale_dtype": lambda value: f"have scales in {value}",
    "kind": lambda value: f"are quantized ({value})",
    "expert": lambda value: "are experts" if value else "are no experts",
    "ordered": lambda value: "have columns in an order of their own (desc_act)",
}


def _heads(limit: Limit, given: Checkpoint, weights: list[Weight], tp: int) -> Found:
    """The attention heads have to be divided among GPUs, key-value heads divided or copied."""
    heads, kv_heads = given.model.heads, given.model.kv_heads
    if heads is not None and heads % tp:
        yield "", f"{heads} attention heads do not divide among {tp} GPUs"
    elif kv_heads is not None and kv_heads % tp and tp % kv_heads:
        yield "", f"{kv_heads} key-value heads do not divide among {tp} GPUs"


def _split(limit: Limit, given: Checkpoint, weights: list[Weight], tp: int) -> Found:
    """Layers have to be cut into equal parts, in 16 bits as well."""
    for weight in given.weights:
        if weight.shape is None or weight.kind != LINEAR:
            continue
        parts = weight.parts(tp, given.model.kv_heads)
        for role, size, what in ((COLUMN, 0, "output"), (ROW, 1, "input")):
            if weight.role == role and weight.shape[size] % parts:
                count = weight.shape[size]
                yield weight.name, f"have {count} {what} features, no multiple of {parts} GPUs"


def _whole_groups(limit: Limit, given: Checkpoint, weights: list[Weight], tp: int) -> Found:
    """No group may be short, on no GPU."""
    for weight in weights:
        assert weight.scheme is not None
        size, shape = weight.scheme.group_size, weight.on_rank(tp, given.model.kv_heads)
        if size is not None and shape is not None and shape[1] % size:
            where = f" on each of {tp} GPUs" if tp > 1 and weight.role == ROW else ""
            yield weight.name, f"have {shape[1]} input features{where} in groups of {size}"


def _whole_words(limit: Limit, given: Checkpoint, weights: list[Weight], tp: int) -> Found:
    """Codes, or zero points, fill 32-bit words: in whole layers ("out"), or wherever one is cut."""
    axis, what = (1, "input") if limit.value == "in" else (0, "output")
    fused = {n for names in fusion_groups(w.name for w in weights) for n in names if len(names) > 1}
    for weight in weights:
        assert weight.scheme is not None
        shape, scheme = weight.on_rank(tp, given.model.kv_heads), weight.scheme
        cut = tp > 1 and weight.role == (ROW if axis else COLUMN)
        if shape is None or not (
            cut or limit.value == "out" or (not axis and weight.name in fused)
        ):
            continue
        if axis and scheme.group_size is not None and shape[1] % scheme.group_size:
            continue  # that groups are not whole says it already
        if shape[axis] * scheme.bits % 32:
            where = f" on each of {tp} GPUs" if cut else ""
            yield weight.name, f"have {shape[axis]} {what} features of {scheme.bits} bits{where}"


def _tile(limit: Limit, given: Checkpoint, weights: list[Weight], tp: int) -> Found:
    """(output, input features) of what is multiplied as one are multiples of a tile's."""
    chosen = {weight.name: weight for weight in weights if not weight.expert}
    for names in fusion_groups(chosen):
        shapes = [chosen[name].on_rank(tp, given.model.kv_heads) for name in names]
        known = [shape for shape in shapes if shape is not None]
        if len(known) < len(shapes):
            continue
        rows, columns = sum(shape[0] for shape in known), known[0][1]
        if not any(rows % n == 0 and columns % k == 0 for n, k in limit.value):
            fits = " or ".join(f"({n}, {k})" for n, k in limit.value)
            yield from (
                (name, f"are {rows} x {columns} on a GPU, no multiple of {fits}") for name in names
            )


def _fused(limit: Limit, given: Checkpoint, weights: list[Weight], tp: int) -> Found:
    """Layers that an engine multiplies as one share a scheme."""
    schemes = {w.name: w.scheme for w in given.weights if w.kind == LINEAR and w.role is not None}
    used = [scheme for scheme in schemes.values() if scheme is not None]
    common = max(dict.fromkeys(used), key=used.count, default=None)
    for names in fusion_groups(schemes):
        found = list(dict.fromkeys(schemes[name] for name in names))
        if len(names) == 1 or (found == [None] and limit.value != "common"):
            continue
        told = " and ".join(str(scheme or "16 bits") for scheme in found)
        if len(found) > 1:
            yield from ((name, f"are multiplied as one, in {told}") for name in names)
        elif limit.value != "alike" and found[0] != common and used:
            yield from (
                (n, f"are multiplied as one, in {told}, the rest in {common}") for n in names
            )


def _zero_points(limit: Limit, given: Checkpoint, weights: list[Weight], tp: int) -> Found:
    """Zero points are there in a checkpoint of one scheme only."""
    schemes = list(dict.fromkeys(weight.scheme for weight in weights))
    if len(schemes) > 1:
        for weight in weights:
            assert weight.scheme is not None
            if not weight.scheme.symmetric:
                yield weight.name, "have zero points, other layers another scheme"


def _scales(limit: Limit, given: Checkpoint, weights: list[Weight], tp: int) -> Found:
    """Scales have the dtype of the model."""
    dtype = given.model.dtype
    for weight in weights:
        assert weight.scheme is not None
        own = str(weight.scheme.torch_scale_dtype).removeprefix("torch.")
        if dtype is not None and own != dtype:
            yield weight.name, f"have scales in {own}, the model is {dtype}"


def _plain_experts(limit: Limit, given: Checkpoint, weights: list[Weight], tp: int) -> Found:
    """No layer has its experts in 16 bits beside others that are quantized."""
    held = tuple(f"{name}." for name in given.model.experts or ())
    if held and weights and not any(weight.name.startswith(held) for weight in weights):
        yield from ((name.removesuffix("."), "are experts in 16 bits") for name in held)


def _gpus(limit: Limit, given: Checkpoint, weights: list[Weight], tp: int) -> Found:
    """So many GPUs are possible."""
    if tp not in limit.value:
        yield "", f"layers are to be divided among {tp} GPUs"


CHECKS: dict[str, Check] = {
    "heads": _heads,
    "split": _split,
    "whole_groups": _whole_groups,
    "whole_words": _whole_words,
    "tile": _tile,
    "fused": _fused,
    "zero_points": _zero_points,
    "scales": _scales,
    "plain_experts": _plain_experts,
    "tensor_parallel": _gpus,
}


def _unknown_cuts(engine: Engine, given: Checkpoint) -> Iterator[str]:
    """Yields what is not known of cutting layers among GPUs."""
    names = tuple(w.name for w in given.quantized if w.kind == LINEAR and w.role is None)
    if names:
        yield (
            f"{engine} ({given.layout}): not known how it divides {listed(names)} among GPUs; what "
            "that asks of their shapes is not checked"
        )
    unshaped = tuple(w.name for w in given.quantized if w.shape is None)
    if unshaped:
        yield (
            f"{engine} ({given.layout}): config.json does not tell the shapes of "
            f"{listed(unshaped)}; what depends on them is not checked"
        )


def _has_order(quantization: Any) -> bool:
    """Returns whether a `quantization_config` says that columns have an order of their own."""
    if not isinstance(quantization, Mapping):
        return False
    if quantization.get("desc_act") and quantization.get("group_size") not in (None, -1):
        return True
    groups = quantization.get("config_groups")
    weights = [
        group.get("weights")
        for group in (groups.values() if isinstance(groups, Mapping) else ())
        if isinstance(group, Mapping)
    ]
    return any(
        isinstance(w, Mapping) and w.get("actorder") in ("group", "dynamic") for w in weights
    )
