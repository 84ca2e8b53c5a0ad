"""A base with an adapter on it, for the commands that only run a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.errors import LowbitError

Adapter = Annotated[
    Path | None, typer.Option(metavar="DIR", help="An adapter in PEFT's format, on top.")
]


def with_adapter(model: Any, path: str, adapter: Path | None) -> Any:
    """Returns `model` with the adapter in folder `adapter` on it, in evaluation mode.

    PEFT leaves out tensors that the model has no place for, and only warns of those that it misses;
    here the names must agree.

    Args:
        model: a base, changed in place.
        path: where it came from.
        adapter: a folder, or None for the base as it is.

    Raises:
        LowbitError: there is no adapter in the folder, or it belongs to another base.
    """
    if adapter is None:
        return model
    from peft import PeftModel, get_peft_model_state_dict

    from lowbit.checkpoint.reader import read_header
    from lowbit.models.foreign import one_sentence

    weights = adapter / "adapter_model.safetensors"
    if not weights.is_file() or not (adapter / "adapter_config.json").is_file():
        raise LowbitError(
            f"--adapter {adapter}: needs adapter_config.json and adapter_model.safetensors in it"
        )
    with one_sentence(str(adapter), f"adapter for {path}"):
        adapted = PeftModel.from_pretrained(model, str(adapter))
    stored = {entry.name for entry in read_header(weights)}
    needed = set(get_peft_model_state_dict(adapted))
    for names, what in ((stored - needed, "the model has no"), (needed - stored, "it lacks")):
        if names:
            raise LowbitError(
                f"--adapter {adapter}: belongs to another base than {path}, {what} {min(names)}"
            )
    return adapted.eval()
