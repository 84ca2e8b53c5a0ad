"""Names that files on the hub have, of tensors that our own checkpoints name as the model does.

transformers fuses the experts of a layer into one tensor and renames modules when it loads. Our
checkpoints hold what it made; engines want what the hub has: a tensor for each expert, and the old
names. transformers' own table is used backwards, as `save_pretrained` does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lowbit.errors import LowbitError
from lowbit.models.foreign import FOREIGN_ERRORS, one_line

_EXPERT = re.compile(r"^(.*\.experts)\.\d+\.")


class HubNames:
    """The table of one model.

    Args:
        model: may be on the meta device.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._state = model.state_dict()
        self._found: dict[str, list[str]] = {}

    def split(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Returns hub name -> tensor for one parameter of the model; any other as it is.

        Raises:
            LowbitError: if transformers cannot undo what it does when it loads this one.
        """
        if name not in self._state:
            return {name: tensor}
        try:
            made = revert_weight_conversion(self._model, {name: tensor})
        except FOREIGN_ERRORS as error:
            raise LowbitError(
                f"{name}: its name on the hub is not known, for transformers cannot undo how it "
                f"loads it ({one_line(error)}); convert with --to lowbit, or keep it as it is"
            ) from error
        if sum(part.numel() for part in made.values()) != tensor.numel():
            raise LowbitError(f"{name}: what transformers makes of it has another size")
        return {key: part.contiguous() for key, part in made.items()}

    def names(self, name: str) -> list[str]:
        """Returns the names on the hub of one parameter of the model; of any other its own."""
        if name not in self._found:
            known = self._state.get(name)
            empty = None if known is None else torch.empty_like(known, device="meta")
            self._found[name] = [name] if empty is None else list(self.split(name, empty))
        return self._found[name]

    def module(self, name: str) -> str:
        """Returns the name of a module on the hub."""
        names = self.names(f"{name}.weight")
        return names[0].removesuffix(".weight") if len(names) == 1 else name


def expert_groups(modules: Iterable[str]) -> tuple[list[str], list[str]]:
    """Returns the modules that are experts' as the names of what holds them, and all others."""
    groups: dict[str, None] = {}
    others: list[str] = []
    for name in modules:
        found = _EXPERT.match(name)
        if found:
            groups[found[1]] = None
        else:
            others.append(name)
    return list(groups), others
