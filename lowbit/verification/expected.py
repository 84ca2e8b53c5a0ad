"""Which linear layers a config of another layout leaves in 16 bits, as loaders read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lowbit import patterns
from lowbit.formats.base import setting

# Field of the config -> what it lists.
_LISTS = {
    "compressed-tensors": "ignore",
    "awq": "modules_to_not_convert",
    "bnb": "llm_int8_skip_modules",
}


def left_out(layout: str, quantization: Mapping[str, Any]) -> Callable[[str], bool]:
    """Returns what says of a module whether the config leaves it in 16 bits.

    Loaders differ in how they match names; here a name in the list counts where it is the module's
    or some consecutive dotted parts of it, and a pattern (`re:` of compressed-tensors, `-:` of
    GPTQ) where it matches.

    Args:
        layout: name of the format.
        quantization: its `quantization_config`.

    Raises:
        LowbitError: a field is of the wrong type.
    """
    if layout in ("gptq", "gptq_v2"):
        return _left_out_by_gptq(quantization)
    listed = setting(quantization, _LISTS[layout], (list, str), []) if layout in _LISTS else []
    # bitsandbytes leaves the head out where nothing is listed; the head is in no block.
    names = [listed] if isinstance(listed, str) else [n for n in listed if isinstance(n, str)]
    prefix = "re:" if layout == "compressed-tensors" else None  # the others know names alone
    patterned = [name for name in names if prefix and name.startswith(prefix)]
    plain = [name for name in names if name not in patterned]
    rules = [name.removeprefix("re:") for name in patterned]

    def answer(module: str) -> bool:
        dotted = any(f".{name}." in f".{module}." for name in plain if name)
        return dotted or _matches(rules, module)

    return answer


def _left_out_by_gptq(quantization: Mapping[str, Any]) -> Callable[[str], bool]:
    rules = setting(quantization, "dynamic", dict, {})
    without = [rule.removeprefix("-:") for rule in rules if rule.startswith("-:")]
    inside = setting(quantization, "modules_in_block_to_quantize", list, [])
    flat = [name for group in inside for name in (group if isinstance(group, list) else [group])]
    wanted = {name for name in flat if isinstance(name, str)}

    def answer(module: str) -> bool:
        chosen = not wanted or any(module.endswith(f".{name}") for name in wanted)
        return not chosen or _matches(without, module)

    return answer


def _matches(rules: list[str], module: str) -> bool:
    return any(patterns.starts_with(rule, module, "config.json") for rule in rules)
