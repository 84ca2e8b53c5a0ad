"""Adapters on low-bit layers: PEFT's LoRA with a base weight that is packed and stays so.

Importing this package imports neither torch nor PEFT: names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowbit.adapters.adapter_file import AdapterFile
    from lowbit.adapters.experts import expert_parameters
    from lowbit.adapters.registration import register
    from lowbit.adapters.residual import init_residual
    from lowbit.adapters.zero_point import merged_zero_points

_HOME = {
    "AdapterFile": "lowbit.adapters.adapter_file",
    "expert_parameters": "lowbit.adapters.experts",
    "init_residual": "lowbit.adapters.residual",
    "merged_zero_points": "lowbit.adapters.zero_point",
    "register": "lowbit.adapters.registration",
}

__all__ = ["AdapterFile", "expert_parameters", "init_residual", "merged_zero_points", "register"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lowbit.adapters' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
