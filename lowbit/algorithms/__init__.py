"""Algorithms by name. An algorithm is a frozen dataclass of options; see `base.Algorithm`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from lowbit.algorithms.base import Algorithm, Quantized, Statistics
from lowbit.algorithms.gptq import GPTQ
from lowbit.algorithms.rtn import RTN
from lowbit.errors import LowbitError, unknown_name

ALGORITHMS: dict[str, type[Algorithm]] = {algorithm.name: algorithm for algorithm in (RTN, GPTQ)}

__all__ = [
    "ALGORITHMS",
    "GPTQ",
    "RTN",
    "Algorithm",
    "Quantized",
    "Statistics",
    "algorithm_options",
    "make_algorithm",
]


def algorithm_options(algorithm: Algorithm) -> dict[str, Any]:
    """Returns the options with which `make_algorithm` makes `algorithm` again."""
    return {field.name: getattr(algorithm, field.name) for field in fields(algorithm)}  # type: ignore[arg-type]


_ARTICLES = {bool: "a bool", int: "an int", float: "a float"}


def make_algorithm(name: str | Algorithm, /, **options: Any) -> Algorithm:
    """Returns the algorithm `name` with `options`; a finished algorithm passes through.

    Raises:
        LowbitError: for an unknown algorithm or option (naming the nearest one), an option of the
            wrong type, or a value out of range.
    """
    if not isinstance(name, str):
        if options:
            raise LowbitError(
                f"options {', '.join(sorted(options))} were given beside a finished algorithm "
                f"{name!r}; give its name instead, {name.name!r}"
            )
        return name
    if name.lower() not in ALGORITHMS:
        raise unknown_name("algorithm", name, ALGORITHMS)
    algorithm = ALGORITHMS[name.lower()]
    defaults = {field.name: field.default for field in fields(algorithm)}  # type: ignore[arg-type]
    for option, value in options.items():
        if option not in defaults:
            raise unknown_name(f"option of {name}", option, defaults)
        expected = type(defaults[option])
        accepted = (int, float) if expected is float else (expected,)
        # bool is a subclass of int: True is no block size.
        if not isinstance(value, accepted) or (isinstance(value, bool) and expected is not bool):
            raise LowbitError(
                f"{name}: option {option} is {_ARTICLES[expected]} such as {defaults[option]!r}, "
                f"got {value!r}"
            )
    return algorithm(**options)
