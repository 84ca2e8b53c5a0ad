"""What engines serve: their limits as data with sources and dates, and what reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lowbit.engines.limits import ENGINES, engine_named

if TYPE_CHECKING:
    from lowbit.scheme import Scheme

__all__ = ["ENGINES", "engine_named", "findings"]


def findings(
    engine: str,
    layout: str,
    schemes: Mapping[str, Scheme],
    config: Mapping[str, Any],
    tensor_parallel: int = 1,
) -> list[str]:
    """Returns why an engine does not serve a checkpoint, one sentence each; empty: it does.

    What is not known of the engine is not in here, see `lowbit.engines.linter.examine`.

    Args:
        engine: one of `ENGINES`.
        layout: format of the checkpoint, a name of `lowbit convert --to`.
        schemes: module name, as in the checkpoint -> scheme; empty for one in 16 bits.
        config: the content of its `config.json`.
        tensor_parallel: GPUs among which every layer is divided.

    Raises:
        LowbitError: for an unknown engine, or fewer GPUs than one.
    """
    from lowbit.engines.linter import Checkpoint, examine

    given = Checkpoint.of_config(layout, schemes, config)
    return list(examine(engine_named(engine), given, tensor_parallel).findings)
