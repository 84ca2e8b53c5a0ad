"""Values that files of hostile authors hold where others belong."""

from __future__ import annotations

import random
from typing import Any

INTEGERS = (0, 1, -1, 2, 3, 5, 7, 31, 33, 255, 256, 2**16, 2**31 - 1, 2**31, 2**40, 2**63, 10**30)
PATHS = (
    "../outside/model.safetensors", "../../etc/passwd", "/etc/passwd", "/dev/zero",
    "/dev/zero.safetensors", "a/b.safetensors", "..", ".", "", ".safetensors", "\x00.safetensors",
    "config.json", "x" * 300 + ".safetensors", "C:\\model.safetensors", "\ud800.safetensors",
    "model.safetensors/../model.safetensors", "outside.safetensors",
)  # fmt: skip
# Each of them takes time exponential, or a high power, in the length of a name.
_ENDLESS = ("(?:\\w+\\.?)+[A-Z]", "(?:\\w|\\w\\w|\\w\\.|\\.)*(?=[A-Z])", "(.*.*)*!", "(a|a)*$")
PATTERNS = (
    *_ENDLESS, *(f"re:{p}" for p in _ENDLESS), *(f"+:{p}" for p in _ENDLESS),
    ".*.*.*.*.*.*.*.*.*.*!", "re:.*", "re:(", "+:(", "[", "(?P<x>", "\\", "re:" + "(" * 200,
    "a{1,4294967296}", "re:(?:a{1,1000}){1,1000}", "-:.*", "x" * 5000,
)  # fmt: skip
TEXTS = (
    "", "x", "model", "int", "float", "pack-quantized", "group", "gptq", "gptq_v2", "awq", "bnb",
    "nf4", "fp4", "lowbit", "bitsandbytes", "compressed-tensors", "W4A16_G32", "NF4_DQ",
    "W8A8_STATIC", "W2A16_ASYM_G32", "W4A16_G99999999999", "llama", "gpt2", "bfloat16", "uint4",
    "LORA", "a\nb", "\x1b[31m", "\ud800", "é" * 50, "9" * 5000, "nan", "__class__",
)  # fmt: skip


def junk(chance: random.Random) -> Any:
    """Returns a JSON value of any kind."""
    kind = chance.randrange(9)
    if kind == 0:
        return chance.choice((None, True, False))
    if kind == 1:
        return chance.choice(INTEGERS)
    if kind == 2:
        return chance.choice((0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf")))
    if kind == 3:
        return chance.choice(TEXTS)
    if kind == 4:
        return chance.choice(PATTERNS)
    if kind == 5:
        return chance.choice(PATHS)
    if kind == 6:
        return [junk(chance) for _ in range(chance.randrange(3))]
    if kind == 7:
        return {str(junk(chance))[:60]: junk(chance) for _ in range(chance.randrange(3))}
    nested: Any = chance.choice(([], {}))
    for _ in range(chance.choice((3, 80))):
        nested = [nested] if chance.random() < 0.5 else {"a": nested}
    return nested


def of_the_same_kind(value: Any, chance: random.Random) -> Any:
    """Returns another value of the type of `value`, which is damage that types do not show."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return chance.choice((value + 1, value - 1, -value, value * 2, chance.choice(INTEGERS)))
    if isinstance(value, float):
        return chance.choice((-value, value * 1e30, 0.0, float("nan"), float("-inf")))
    if isinstance(value, str):
        pool = chance.choice((TEXTS, PATTERNS, PATHS))
        return chance.choice((chance.choice(pool), value[:-1], value + "x", value.upper()))
    if isinstance(value, list):
        shuffled = chance.sample(value, len(value))
        return chance.choice((shuffled, value[:-1], value + value[:1], []))
    return junk(chance)


def mutated_json(value: Any, chance: random.Random) -> Any:
    """Returns a JSON value with one place in it changed: exchanged, missing, twice or renamed."""
    descend = 0.9 if isinstance(value, dict) else 0.6
    if isinstance(value, dict) and value and chance.random() < descend:
        key = chance.choice(sorted(value))
        kind = chance.random()
        if kind < 0.1:
            return {name: kept for name, kept in value.items() if name != key}
        if kind < 0.15:
            return {(str(junk(chance))[:80] if n == key else n): kept for n, kept in value.items()}
        if kind < 0.2:
            return {**value, key: value[chance.choice(sorted(value))]}
        if kind < 0.25:
            return {**value, str(junk(chance))[:80]: junk(chance)}
        return {**value, key: mutated_json(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < descend:
        index = chance.randrange(len(value))
        return [*value[:index], mutated_json(value[index], chance), *value[index + 1 :]]
    return of_the_same_kind(value, chance) if chance.random() < 0.6 else junk(chance)
