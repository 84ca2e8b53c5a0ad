"""Rows: examples laid end to end, as many as fit, and batches of rows.

Best-fit decreasing: the longest example first, each into the row that has the least room left for
it. (The order of rows is shuffled anyway, so that a row has examples of like length costs nothing;
first-fit leaves more room unused.)

In a packed row positions start again at 0 with every example, and transformers makes a mask from
them by which no example sees another. Not every architecture asks for that mask, and one with a
recurrent state would ignore it, so `require_isolation` tries it on the model itself.

Rows are padded on the right. Attention is causal, padding has no labels, and in a packed row it has
positions of its own: nothing depends on it, so no attention mask is needed. (One would even switch
off what keeps examples apart.)
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError
from lowbit.train.examples import IGNORED, Example

# The key by which a batch says which rows it was made of; taken out before the model sees it.
ROWS = "rows"


@dataclass(frozen=True)
class Row:
    """One row: examples one after the other.

    Args:
        examples: at least one.
    """

    examples: tuple[Example, ...]

    def __len__(self) -> int:
        return sum(map(len, self.examples))

    @property
    def counted(self) -> int:
        """Tokens that the loss counts."""
        return sum(example.counted for example in self.examples)

    @property
    def name(self) -> str:
        """Where its examples came from."""
        return ", ".join(example.name for example in self.examples)


def one_each(examples: Sequence[Example]) -> list[Row]:
    """Returns a row for each example."""
    return [Row((example,)) for example in examples]


def pack(examples: Sequence[Example], seqlen: int) -> list[Row]:
    """Returns rows of at most `seqlen` tokens that hold every example once, whole.

    Args:
        examples: none longer than `seqlen`.
        seqlen: tokens in a row.
    """
    rows: list[list[int]] = []
    # (room left, row), by room; `bisect` finds the tightest that still takes an example.
    room: list[tuple[int, int]] = []
    for index in sorted(range(len(examples)), key=lambda index: -len(examples[index])):
        length = len(examples[index])
        at = bisect.bisect_left(room, (length, 0))
        if at == len(room):
            rows.append([index])
            left, row = seqlen - length, len(rows) - 1
        else:
            found, row = room.pop(at)
            rows[row].append(index)
            left = found - length
        if left:
            bisect.insort(room, (left, row))
    return [Row(tuple(examples[index] for index in sorted(row))) for row in rows]


@dataclass(frozen=True)
class RowDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """The rows as Trainer reads them.

    Args:
        rows: at least one.
        packed: give positions, so that examples are kept apart.
    """

    rows: Sequence[Row]
    packed: bool

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        examples = self.rows[index].examples
        item: dict[str, Any] = {
            "input_ids": np.concatenate([example.ids for example in examples]),
            "labels": np.concatenate([example.labels for example in examples]),
            ROWS: index,
        }
        if self.packed:
            item["position_ids"] = np.concatenate([np.arange(len(part)) for part in examples])
        return item


@dataclass(frozen=True)
class Collator:
    """Rows of several lengths become a batch of int64 tensors `[rows, longest]`.

    Args:
        padding_id: any id of the vocabulary; nothing depends on it.
    """

    padding_id: int

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Returns `input_ids`, `labels`, `position_ids` of packed rows, and the rows' numbers."""
        longest = max(len(item["input_ids"]) for item in items)
        batch = {ROWS: torch.tensor([item[ROWS] for item in items])}
        for key in ("input_ids", "labels", "position_ids"):
            if key not in items[0]:
                continue
            fill = {"input_ids": self.padding_id, "labels": IGNORED, "position_ids": 0}[key]
            tensor = torch.full((len(items), longest), fill, dtype=torch.int64)
            for row, item in enumerate(items):
                values = torch.from_numpy(np.asarray(item[key], dtype=np.int64))
                tensor[row, : len(values)] = values
                if key == "position_ids":
                    # An example of its own, for attention as for everything else.
                    tensor[row, len(values) :] = torch.arange(longest - len(values))
            batch[key] = tensor
        return batch


def require_isolation(model: nn.Module, vocab_size: int) -> None:
    """Refuses packing where examples of a row could see each other.

    Two short sequences in one row, then the second one alone, and the first one exchanged: what the
    model says of the second must not change.

    Args:
        model: in evaluation mode, on any device.
        vocab_size: of the model.

    Raises:
        LowbitError: they do see each other.
    """
    device = next(model.parameters()).device
    length = 6
    ids = (torch.arange(3 * length, device=device) * 7 + 1) % vocab_size
    first, other, second = ids.view(3, 1, length)
    positions = torch.arange(length, device=device)[None]
    both = torch.cat([positions, positions], dim=1)
    with torch.no_grad():
        # With a cache, as when generating, positions mean something else.
        try:
            packed = [
                model(
                    input_ids=torch.cat([before, second], dim=1), position_ids=both, use_cache=False
                ).logits
                for before in (first, other)
            ]
        except TypeError as error:
            raise _not_isolated(model, "takes no position_ids") from error
        alone = model(input_ids=second, use_cache=False).logits
    # Kernels may round otherwise for another length; what is seen changes far more than that.
    scale = float(alone.float().abs().max())
    for logits in packed:
        difference = float((logits[:, length:].float() - alone.float()).abs().max())
        if not difference <= 0.02 * scale:
            raise _not_isolated(model, "lets the examples of a packed row see each other")


def _not_isolated(model: nn.Module, what: str) -> LowbitError:
    attention = getattr(getattr(model, "config", None), "_attn_implementation", "its own")
    return LowbitError(
        f"{type(model).__name__} with {attention} attention {what}; train without packing"
    )
