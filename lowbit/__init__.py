"""lowbit: weight-only low-bit quantization of Hugging Face decoders.

Importing this package is cheap: public names are loaded when they are first used, and transformers
is only told where to find the quantizer once it is imported itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lowbit.hf.autoload import install as _install_autoload

if TYPE_CHECKING:
    from lowbit.algorithms import make_algorithm
    from lowbit.errors import LowbitError
    from lowbit.formats.conversion import convert
    from lowbit.formats.loading import load
    from lowbit.hf.config import LowbitConfig
    from lowbit.models.selection import Selection
    from lowbit.nn import QuantEmbedding, QuantLinear, prepare_model
    from lowbit.pipeline import quantize
    from lowbit.quant import QuantizedWeight
    from lowbit.scheme import Scheme

__version__ = "0.1.0"

_HOME = {
    "LowbitConfig": "lowbit.hf.config",
    "LowbitError": "lowbit.errors",
    "QuantEmbedding": "lowbit.nn",
    "QuantLinear": "lowbit.nn",
    "QuantizedWeight": "lowbit.quant",
    "Scheme": "lowbit.scheme",
    "Selection": "lowbit.models.selection",
    "convert": "lowbit.formats.conversion",
    "load": "lowbit.formats.loading",
    "make_algorithm": "lowbit.algorithms",
    "prepare_model": "lowbit.nn",
    "quantize": "lowbit.pipeline",
}

__all__ = [
    "LowbitConfig",
    "LowbitError",
    "QuantEmbedding",
    "QuantLinear",
    "QuantizedWeight",
    "Scheme",
    "Selection",
    "__version__",
    "convert",
    "load",
    "make_algorithm",
    "prepare_model",
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lowbit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


_install_autoload()
