"""Which layers have to share a scheme because engines multiply them as one.

Engines join q, k and v of a block into one weight, and gate and up into another, when they load a
model; joined weights have one scheme. The experts of a layer are one weight as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from lowbit.nn.siblings import SIBLING_NAMES

_EXPERT = re.compile(r"^(.*\.experts)\.\d+\.")


def fusion_groups(names: Iterable[str], fused: bool = True) -> list[list[str]]:
    """Returns `names` of modules grouped by what shares a scheme, in the order of first members.

    Args:
        names: dotted module names.
        fused: False puts every module into a group of its own.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        groups.setdefault(_fusion_key(name) if fused else (name,), []).append(name)
    return list(groups.values())


def _fusion_key(name: str) -> tuple[str, ...]:
    expert = _EXPERT.match(name)
    if expert:
        return (expert[1],)
    parent, _, leaf = name.rpartition(".")
    siblings = next((names for names in SIBLING_NAMES if leaf in names), None)
    # Tables overlap in their first name only ("q_proj"), which leads to the first of them.
    return (name,) if siblings is None else (parent, siblings[0])
