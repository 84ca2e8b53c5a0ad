"""Siblings: layers that multiply the same activations, as one launch while a model generates.

For one token a small layer costs little more than its launch. q, k and v of a block see the same
activations, so the first of them that is called multiplies by the rows of all and keeps the result;
the others take their slices. Modules, names and state dicts stay what they are. (Replacing the
modules by one would need the code of every model family.)

A slice is taken only for the very tensor, unchanged, that the result was computed from. Whoever
comes with anything else computes its own rows, which are views of the joined weight.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import ops
from lowbit.backends import PreparedWeight
from lowbit.nn.linear import QuantLinear

# Names of children of one module that are called with the same tensor, by model family.
SIBLING_NAMES: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),  # gate and up of Mixtral's and LLaMA's original code
    ("q_a_proj", "kv_a_proj_with_mqa"),  # DeepSeek-V2 and V3
    ("q_proj", "kv_a_proj_with_mqa"),  # the same without a low-rank query
    ("in_proj_qkvz", "in_proj_ba"),  # Qwen3-Next
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),  # Qwen3.5
    ("wi_0", "wi_1"),  # T5's gated feed-forward
)
# Above this many rows of activations the launch does not matter, and slices would be copied later.
MAX_ROWS = 64
# So many results in a row that nobody asked for show that these layers are no siblings.
STRIKES = 3


@dataclass
class _Kept:
    """The product of all siblings, until the last has taken its slice.

    Args:
        x: weak reference to the activations.
        state: see `_state`.
        out: `[..., all rows]`.
        waiting: who has not taken its slice.
    """

    x: weakref.ref[Tensor]
    state: tuple[int, int]
    out: Tensor
    waiting: set[int]


class Siblings:
    """Several layers, and their joined weight while all of them are prepared for inference.

    Args:
        members: the layers, in the order of their rows. They own this object, not it them.
    """

    def __init__(self, members: Sequence[QuantLinear]) -> None:
        self._members = tuple(weakref.ref(member) for member in members)
        self._biases = tuple(member.bias for member in members)
        self._joined_bias: tuple[Any, Tensor] | None = None
        self._kept: _Kept | None = None
        # While tracing: x, its version, the product, who waits. Never outlives a whole graph.
        self._traced: tuple[Tensor, int, Tensor, tuple[int, ...]] | None = None
        self._strikes = 0
        self.weight: PreparedWeight | None = None
        self.spans: tuple[tuple[int, int], ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Siblings:
        """Returns no siblings: the copies of the layers are others, `fuse_siblings` finds them."""
        return Siblings(())

    def __reduce__(self) -> Any:
        return Siblings, ((),)

    def holds(self, layer: nn.Module) -> bool:
        """Returns True if `layer` is one of them."""
        return any(member() is layer for member in self._members)

    def join(self) -> None:
        """Joins the weights of the layers if all are prepared, on one device, for inference."""
        if self.weight is not None or len(self._members) < 2:
            return
        members = [member() for member in self._members]
        weights: list[PreparedWeight] = []
        for member in members:
            held = None if member is None or member.training else member.operand
            if isinstance(held, PreparedWeight):
                weights.append(held)
        if len(weights) < len(members):
            return
        places = {tensor.device for weight in weights for tensor in weight.tensors().values()}
        with torch.inference_mode(False), torch.no_grad():
            joined = weights[0].join(weights[1:]) if len(places) == 1 else None
        if joined is None:
            return
        del weights
        for member, part in zip(members, joined.parts, strict=True):
            assert member is not None
            member._replace_prepared(part)
        self._biases = tuple(member.bias for member in members if member is not None)
        self.spans = tuple(
            (start, start + part.shape[0])
            for start, part in zip(joined.starts, joined.parts, strict=True)
        )
        self.weight = joined.weight
        for tensor in joined.weight.tensors().values():
            # No parameter or buffer: CUDA graphs would copy it at every replay.
            torch._dynamo.mark_static_address(tensor)

    def part(self) -> None:
        """Lets everyone compute its own rows; the layers keep their views of the joined weight."""
        self.weight = self._kept = self._traced = self._joined_bias = None

    def linear(self, index: int, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """Returns the product of layer `index`, or None if it must compute it itself.

        Args:
            index: its place among the siblings.
            x: its activations `[..., in_features]`.
            bias: its bias.
        """
        weight = self.weight
        if weight is None or torch.is_grad_enabled() or bias is not self._biases[index]:
            return None
        if x.shape[-1] != weight.shape[1] or x.numel() > MAX_ROWS * x.shape[-1]:
            return None
        if torch.is_autocast_enabled(x.device.type):
            return None
        if torch.compiler.is_compiling():
            return self._linear_traced(index, x, bias, weight)
        state = _state(x)
        if state is None:
            return None
        kept = self._kept
        if kept is None or kept.x() is not x:
            if kept is not None and self._strike():
                return None
            kept = self._compute(x, state, weight)
        elif kept.state != state:
            self._strike()
            return None
        if index not in kept.waiting:  # asked twice
            return None
        kept.waiting.discard(index)
        if not kept.waiting:
            self._kept, self._strikes = None, 0
        start, stop = self.spans[index]
        return kept.out[..., start:stop]

    def _compute(self, x: Tensor, state: tuple[int, int], weight: PreparedWeight) -> _Kept:
        group = weakref.ref(self)

        def forget(reference: weakref.ref[Tensor]) -> None:
            siblings = group()
            kept = None if siblings is None else siblings._kept
            if siblings is not None and kept is not None and kept.x is reference:
                siblings._strike()

        out = ops.linear(x, weight, self._bias(weight))
        kept = _Kept(weakref.ref(x, forget), state, out, set(range(len(self.spans))))
        self._kept = kept
        return kept

    def _strike(self) -> bool:
        """Forgets a result that was not taken; returns True if it was one too many."""
        self._kept = None
        self._strikes += 1
        if self._strikes < STRIKES:
            return False
        self.part()
        self._members = ()  # for good
        return True

    def _bias(self, weight: PreparedWeight) -> Tensor | None:
        """Returns the joined biases, made anew when one of them changed."""
        biases = [bias for bias in self._biases if bias is not None]
        if not biases:
            return None
        # Optimizers count up the version; casts replace the data behind the same parameter.
        state = [(b.data_ptr(), 0 if b.is_inference() else b._version) for b in biases]
        if self._joined_bias is None or self._joined_bias[0] != state:
            joined = biases[0].new_zeros(weight.shape[0])
            for bias, (start, stop) in zip(biases, self.spans, strict=True):
                joined[start:stop] = bias
            self._joined_bias = state, joined
        return self._joined_bias[1]

    def _linear_traced(
        self, index: int, x: Tensor, bias: Tensor | None, weight: PreparedWeight
    ) -> Tensor | None:
        """Is `linear` for `torch.compile`: state lives while tracing, and none is left in a graph.

        Biases are added to the slices, where the compiler fuses them with what follows: joined
        ones would have to be watched for changes.
        """
        probe = ops.version_probe(x)
        if probe.dim() != 1:
            return None
        version, kept = probe.shape[0], self._traced
        if kept is None:
            kept = (x, version, ops.linear(x, weight), tuple(range(len(self.spans))))
        elif kept[0] is not x or kept[1] != version:
            # Left over: these layers are no siblings, or are compiled one by one.
            self.part()
            return None
        if index not in kept[3]:
            return None
        waiting = tuple(other for other in kept[3] if other != index)
        self._traced = (*kept[:3], waiting) if waiting else None
        start, stop = self.spans[index]
        out = kept[2][..., start:stop]
        return out if bias is None else out + bias.to(out.dtype)


def _state(x: Tensor) -> tuple[int, int] | None:
    """Returns what a write to x changes, and the stream; None where nobody counts writes."""
    if x.is_inference():
        return None
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    return x._version, stream


def fuse_siblings(model: nn.Module) -> int:
    """Finds layers of `model` that are siblings, and lets those prepared alike run as one launch.

    Only inference is affected: no gradients, at most `MAX_ROWS` rows of activations. Layers whose
    weights move or change come apart and together again by themselves.

    Args:
        model: changed in place.

    Returns:
        How many groups of siblings run as one.
    """
    groups: list[Siblings] = []
    for parent in model.modules():
        children = {name: _base_layer(child) for name, child in parent.named_children()}
        for names in SIBLING_NAMES:
            alike: dict[Any, list[QuantLinear]] = {}
            for name in names:
                layer = children.get(name)
                if type(layer) is QuantLinear and not _has_siblings(layer):
                    kind = (layer.scheme, layer.in_features, layer.bias is None)
                    alike.setdefault(kind, []).append(layer)
            for layers in alike.values():
                if len(layers) > 1:
                    group = Siblings(layers)
                    for index, layer in enumerate(layers):
                        layer._siblings = (group, index)
        for layer in children.values():
            if isinstance(layer, QuantLinear) and layer._siblings is not None:
                group = layer._siblings[0]
                group.join()
                if group.weight is not None and group not in groups:
                    groups.append(group)
    return len(groups)


def _base_layer(module: nn.Module) -> nn.Module:
    """Returns the layer under PEFT's wrappers."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def _has_siblings(layer: QuantLinear) -> bool:
    return layer._siblings is not None and layer._siblings[0].holds(layer)
