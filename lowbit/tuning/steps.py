"""The steps of a recipe that work on whole blocks or on the whole model; see `lowbit.recipe`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor

from lowbit.algorithms.base import Quantized
from lowbit.scheme import Scheme
from lowbit.tuning.view import BlockView

if TYPE_CHECKING:
    from lowbit.models.streaming import StreamedDecoder
    from lowbit.progress import RunProgress


class Fold(Protocol):
    """Makes a block easier to quantize. Implementations are frozen dataclasses of options."""

    name: ClassVar[str]

    def fold(self, view: BlockView) -> dict[str, Any]:
        """Changes float parameters of `view.module` in place; its outputs stay what they are.

        Returns:
            What the manifest records, JSON values. `"changed"` lists the full names of all
            parameters that were changed: these are quantized, or stored, as they are now, and
            everything else as the checkpoint has it.
        """
        ...


@dataclass(frozen=True)
class Tuned:
    """What tuning makes of a block.

    Args:
        modules: full module name -> codes and grid, for every module that was given.
        changed: full names of other parameters of the block that were changed in place.
        report: what the manifest records, JSON values.
    """

    modules: dict[str, Quantized]
    changed: tuple[str, ...]
    report: dict[str, Any]


class Tuning(Protocol):
    """Improves a quantized block as a whole. Implementations are frozen dataclasses of options."""

    name: ClassVar[str]

    @property
    def batch_tokens(self) -> int:
        """Tokens of a batch: calibration runs with batches of this size."""
        ...

    def tune(
        self, view: BlockView, weights: dict[str, Tensor], modules: dict[str, Quantized]
    ) -> Tuned:
        """Returns other codes and grids, under which the block's output is no worse.

        Args:
            view: the block; weights of quantized modules are the decoded ones. They may be changed
                at will: the run puts in what is returned.
            weights: full module name -> the float weight `[out_features, in_features]` that was
                quantized.
            modules: full module name -> what the algorithm made of it.
        """
        ...


class TunedTensors(Protocol):
    """What end-to-end tuning found.

    Attributes:
        tensors: stored name -> tensor that replaces it, of its shape and dtype; may be empty.
        report: what the manifest records, JSON values.
    """

    @property
    def tensors(self) -> dict[str, Tensor]: ...

    @property
    def report(self) -> dict[str, Any]: ...


class EndToEnd(Protocol):
    """Improves a finished model as a whole. Implementations are frozen dataclasses of options."""

    name: ClassVar[str]

    def tune(
        self,
        shards: list[Path],
        decoder: StreamedDecoder,
        selected: Mapping[str, Scheme],
        tokens: Tensor,
        progress: RunProgress,
        mask: Tensor | None = None,
    ) -> TunedTensors:
        """Returns what is to be exchanged in `shards`; changes nothing itself.

        Args:
            shards: the files of the quantized model.
            decoder: the original.
            selected: module name -> scheme of what is quantized.
            tokens: int64 `[windows, seqlen]`.
            progress: told about steps.
            mask: bool `[windows, seqlen]`, the tokens that count; None for all.
        """
        ...
