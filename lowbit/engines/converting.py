"""The format that `lowbit convert --for ENGINE` writes."""

from __future__ import annotations

from pathlib import Path

from lowbit.checkpoint import Checkpoint
from lowbit.engines.choice import Served, Target
from lowbit.engines.linter import Checkpoint as Given
from lowbit.engines.linter import Verdict, examine
from lowbit.engines.weights import model_of
from lowbit.errors import LowbitError
from lowbit.formats.base import StoredAs
from lowbit.formats.model_view import ModelView
from lowbit.formats.own import Bf16
from lowbit.formats.plan import plan_conversion
from lowbit.formats.reading import open_checkpoint
from lowbit.formats.table import layout_of
from lowbit.scheme import Scheme


def format_for(
    source: str | Path, target: Target, to: str | None = None, requantize: bool = False
) -> Served:
    """Returns the format in which an engine serves a checkpoint best.

    Args:
        source: a checkpoint in any format here.
        target: the engine.
        to: the format that the user wants; None for the best that holds the weights.
        requantize: weights may be rounded to what the format holds.

    Raises:
        LowbitError: if there is none, or `to` is none, with the reason; and if the engine serves
            the source as it is.
    """
    checkpoint = open_checkpoint(source)
    own = layout_of(checkpoint).name
    reasons: list[str] = []
    for name in _wanted(target, to):
        if name == own:
            verdict = _verdict(target, checkpoint, own, *_stored(checkpoint))
            if not verdict.findings:
                command = target.engine.command(source, target.tensor_parallel)
                raise LowbitError(
                    f"{source}: is {own} already, which {target.engine} serves as it is: {command}"
                )
        else:
            try:
                plan = plan_conversion(checkpoint, name, requantize)
            except LowbitError as error:
                reasons.append(str(error))
                continue
            schemes = {t.view.name: t.scheme for t in plan.targets.values() if t.scheme is not None}
            order = any(stored.input_order is not None for stored in plan.modules.values())
            verdict = _verdict(target, checkpoint, name, schemes, order and plan.target.holds_order)
            if not verdict.findings:
                return Served(name, verdict.unknown)
        reasons.append(target.shown(verdict.findings))
    raise LowbitError(f"{target}: {reasons[0]}{_others(target, to, checkpoint)}")


def _wanted(target: Target, to: str | None) -> tuple[str, ...]:
    if to is not None:
        return (to.lower(),)
    # 16 bits only where nothing else is served: it is no quantized checkpoint any more.
    return tuple(n for n in target.engine.writes if n != Bf16.name) or target.engine.writes


def _others(target: Target, to: str | None, checkpoint: Checkpoint) -> str:
    """Returns what may be asked for instead."""
    served = [
        name for name in target.engine.formats if name not in (to, layout_of(checkpoint).name)
    ]
    return f"; {target.engine.name} reads {', '.join(served)}" if to is not None and served else ""


def _verdict(
    target: Target, checkpoint: Checkpoint, layout: str, schemes: dict[str, Scheme], ordered: bool
) -> Verdict:
    given = Given.of_model(layout, schemes, model_of(checkpoint.config), ordered)
    return examine(target.engine, given, target.tensor_parallel)


def _stored(checkpoint: Checkpoint) -> tuple[dict[str, Scheme], bool]:
    """Returns the schemes by names of the model, and whether columns have orders of their own."""
    modules: dict[str, StoredAs] = layout_of(checkpoint).modules(checkpoint)
    view = ModelView(checkpoint)
    schemes = {view.module(name).name: stored.scheme for name, stored in modules.items()}
    return schemes, any(stored.input_order is not None for stored in modules.values())
