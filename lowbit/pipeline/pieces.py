"""The parts into which a decoder is cut for a run, and what is known of one while it is open."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lowbit.algorithms.base import Quantized
from lowbit.models.streaming import StreamedDecoder
from lowbit.scheme import Scheme


@dataclass(frozen=True)
class Piece:
    """A part of the decoder that is loaded, quantized and written as a whole.

    Args:
        name: its name in the journal and the manifest.
        targets: the parameters that belong to it.
        modules: name -> scheme of what is quantized in it, in the model's order.
        block: the index of the block, None outside the blocks.
    """

    name: str
    targets: list[str]
    modules: dict[str, Scheme]
    block: int | None = None


@dataclass
class OpenPiece:
    """What is known of a piece while it is quantized.

    Args:
        results: module name -> codes and grid.
        weights: module name -> the float weight `[out_features, in_features]` that they stand for.
        input_scales: module name -> scale of its inputs, where the scheme stores one.
        reports: module name -> what the manifest records of it.
        changed: parameters that are no longer what the checkpoint holds.
        whole: what the manifest records of the piece as a whole.
    """

    results: dict[str, Quantized] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    input_scales: dict[str, Tensor] = field(default_factory=dict)
    reports: dict[str, Any] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    whole: dict[str, Any] = field(default_factory=dict)


def plan_pieces(decoder: StreamedDecoder, selected: dict[str, Scheme]) -> list[Piece]:
    """Returns the pieces of a decoder in the order in which they are processed."""
    head = decoder.head_name
    blocks = [decoder.block_name(index) for index in range(len(decoder.layers))]
    inside = {target for name in blocks for target in decoder.targets(name)}
    head_targets = decoder.targets(head) if head else []
    outside = [t for t in decoder.sources if t not in inside and t not in head_targets]
    pieces = [Piece("outside", outside, _within(selected, {decoder.embedding_name}))]
    for index, name in enumerate(blocks):
        modules = {m: s for m, s in selected.items() if m.startswith(name + ".")}
        pieces.append(Piece(name, decoder.targets(name), modules, index))
    head_modules = _within(selected, {head} if head else set())
    if head and (head_targets or head_modules):
        pieces.append(Piece(head, head_targets, head_modules))
    return pieces


def _within(selected: dict[str, Scheme], names: set[str]) -> dict[str, Scheme]:
    return {name: scheme for name, scheme in selected.items() if name in names}
