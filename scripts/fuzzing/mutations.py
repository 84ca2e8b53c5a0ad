"""Damage: bytes of a file, its header, its tensors, its JSON, and the folder itself.

Half of all damage to tensors leaves the header sound, so that it gets past the first check.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

from scripts.fuzzing.files import (
    Files,
    Part,
    join_header,
    put_together,
    split_header,
    take_apart,
)
from scripts.fuzzing.gguf_samples import mutated_gguf
from scripts.fuzzing.junk import INTEGERS, PATHS, junk, mutated_json

DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U16", "BOOL", "F8_E4M3")
SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
# What is put in the place of some elements, by dtype.
_ODD = (0.0, -0.0, -1.0, float("nan"), float("inf"))
VALUES: dict[str, tuple[bytes, ...]] = {
    "F32": tuple(struct.pack("<f", x) for x in (*_ODD, 1e38, 1e-45)),
    "F16": tuple(struct.pack("<e", x) for x in (*_ODD, 65504, 6e-8)),
    "BF16": tuple(struct.pack("<H", x) for x in (0, 0x8000, 0x7F80, 0x7FC0, 0x0001, 0xBF80)),
    "I64": tuple(struct.pack("<q", x) for x in (0, -1, 2**62, -(2**63), 1, 2**40, 97)),
    "I32": tuple(struct.pack("<i", x) for x in (0, -1, 2**31 - 1, -(2**31), 1, 3, 97)),
}


def mutated(files: Files, chance: random.Random) -> Files:
    """Returns `files` with one to three kinds of damage."""
    result = dict(files)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        names = sorted(name for name, content in result.items() if content)
        if not names:
            break
        name = chance.choice(names)
        content = result[name]
        assert content is not None
        kind = chance.random()
        if kind < 0.03:
            _mutate_folder(result, name, chance)
        elif name.endswith(".json"):
            result[name] = _mutated_text(content, chance)
        elif name.endswith(".safetensors"):
            result[name] = _mutated_safetensors(content, chance)
        elif name.endswith(".gguf") and chance.random() < 0.7:
            result[name] = mutated_gguf(content, chance)
        else:
            result[name] = _mutated_bytes(content, chance)
    return result


def _mutate_folder(files: Files, name: str, chance: random.Random) -> None:
    """Takes a file away, exchanges it for a folder or another file, or adds one."""
    kind = chance.randrange(6)
    if kind == 0:
        del files[name]
    elif kind == 1:
        files[name] = None
    elif kind == 2:
        files[name] = b""
    elif kind == 3:
        files[name] = files[chance.choice(sorted(files))]
    elif kind == 4:
        files["pytorch_model.bin"] = b"cos\nsystem\n(S'true'\ntR."  # a pickle that runs a command
    else:
        files["model.safetensors.index.json"] = b'{"weight_map": {"a": "b.safetensors"}}'


def _mutated_bytes(content: bytes, chance: random.Random) -> bytes:
    """Returns bytes flipped, cut off, put in, overwritten or exchanged for integers."""
    kind, place = chance.randrange(7), chance.randrange(len(content) + 1)
    if kind == 0:
        damaged = bytearray(content)
        # Where there is a header, that is where most of the meaning is.
        reach = chance.choice((len(content), min(len(content), 256)))
        for _ in range(chance.choice((1, 1, 8))):
            damaged[chance.randrange(reach)] ^= 1 << chance.randrange(8)
        return bytes(damaged)
    if kind == 1:
        return content[:place]
    if kind == 2:
        return content[:place] + chance.randbytes(chance.randrange(1, 17)) + content[place:]
    if kind == 3:
        return (
            content[:place]
            + chance.randbytes(min(64, len(content) - place))
            + content[place + 64 :]
        )
    if kind == 4:
        return content + content[place:]
    if kind == 5:
        return content[:place] + content[place + chance.randrange(1, 64) :]
    width = chance.choice((1, 2, 4, 8))
    value = (chance.choice(INTEGERS) % (1 << 8 * width)).to_bytes(width, "little")
    place = chance.randrange(
        0, max(1, min(len(content), chance.choice((64, len(content)))) - width)
    )
    return content[:place] + value + content[place + width :]


def _mutated_text(content: bytes, chance: random.Random) -> bytes:
    """Returns JSON with a place in it changed; now and then bytes of the text."""
    if chance.random() < 0.08:
        return _mutated_bytes(content, chance)
    if chance.random() < 0.02:
        return chance.choice(
            (b"[" * 100_000, b"{}", b"null", b"\xff\xfe", b"9" * 5000, b'{"a":1e999}')
        )
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return _mutated_bytes(content, chance)
    return json.dumps(mutated_json(value, chance)).encode()


def _mutated_safetensors(content: bytes, chance: random.Random) -> bytes:
    kind = chance.random()
    if kind < 0.1:
        return _mutated_bytes(content, chance)
    if kind < 0.15:
        length = chance.choice((*INTEGERS, len(content) - 8, len(content)))
        return (length % 2**64).to_bytes(8, "little") + content[8:]
    if kind < 0.45:
        return _with_mutated_header(content, chance)
    parts = take_apart(content)
    if not parts:
        return _mutated_bytes(content, chance)
    _mutate_parts(parts, chance)
    return put_together(parts)


def _with_mutated_header(content: bytes, chance: random.Random) -> bytes:
    """Returns the file with a header that does not fit."""
    found = split_header(content)
    if found is None or not found[0]:
        return _mutated_bytes(content, chance)
    header, payload = found
    entries = [name for name, fields in header.items() if isinstance(fields, dict)]
    kind = chance.randrange(4)
    if kind == 0 and len(entries) > 1:
        one, other = chance.sample(entries, 2)
        key = chance.choice(("data_offsets", "shape", "dtype"))
        if key in header[one] and key in header[other]:
            header[one][key], header[other][key] = header[other][key], header[one][key]
    elif kind == 1 and entries:
        fields = header[chance.choice(entries)]
        huge = chance.choice(INTEGERS)
        key = chance.choice(("data_offsets", "shape"))
        places = fields.get(key)
        if isinstance(places, list) and places:
            fields[key] = [huge if chance.random() < 0.5 else place for place in places]
    else:
        header = mutated_json(header, chance)
    return join_header(header, payload)


def _mutate_parts(parts: dict[str, Part], chance: random.Random) -> None:
    """Changes tensors so that the header still fits."""
    name = chance.choice(sorted(parts))
    part = parts[name]
    changes: tuple[Callable[[Part, random.Random], None], ...] = (
        _exchange_values, _exchange_values, _randomize, _reshape, _cut_rows, _reinterpret,
        _mutate_embedded_json,
    )  # fmt: skip
    kind = chance.random()
    if kind < 0.06:
        del parts[name]
    elif kind < 0.12:
        other = _other_name(name, parts, chance)
        parts[other] = parts.pop(name)
    elif kind < 0.16:
        parts[_other_name(name, parts, chance)] = Part(part.dtype, part.shape, part.content)
    elif kind < 0.22:
        other = chance.choice(sorted(parts))
        parts[name], parts[other] = parts[other], parts[name]
    else:
        chance.choice(changes)(part, chance)


def _other_name(name: str, parts: dict[str, Part], chance: random.Random) -> str:
    """Returns a name that is free: another module's or another suffix, or none at all."""
    stem, _, suffix = name.rpartition(".")
    other_stem, _, other_suffix = chance.choice(sorted(parts)).rpartition(".")
    return chance.choice(
        (
            f"{stem}.{other_suffix}", f"{other_stem}.{suffix}", f"{stem}.g_idx",
            f"{stem}.weight_g_idx", suffix, f".{suffix}", "", f"{stem}.0.{suffix}",
            name + "x" * chance.choice((1, 5000)), name.replace("0", "1"), f"a\n\x1b[2J.{suffix}",
            f"{chance.choice(PATHS)}.{suffix}", name.upper(), f"base_model.model.{name}",
        )
    )  # fmt: skip


def _width(part: Part) -> int:
    return SIZES.get(part.dtype, 1)


def _exchange_values(part: Part, chance: random.Random) -> None:
    """Puts one special value into some elements, or all."""
    width, count = _width(part), len(part.content) // _width(part)
    if not count:
        return
    fallback = tuple(value.to_bytes(width, "little") for value in (0, 1, (1 << 8 * width) - 1))
    value = chance.choice(VALUES.get(part.dtype, fallback))
    if chance.random() < 0.2:
        part.content = value * count
        return
    content = bytearray(part.content)
    for _ in range(chance.choice((1, 1, 5))):
        place = width * chance.randrange(count)
        content[place : place + width] = value
    part.content = bytes(content)


def _randomize(part: Part, chance: random.Random) -> None:
    part.content = chance.randbytes(len(part.content))


def _reshape(part: Part, chance: random.Random) -> None:
    """Gives the same elements other dimensions."""
    count = len(part.content) // _width(part)
    part.shape = chance.choice(
        (
            part.shape[::-1],
            [count],
            [1, *part.shape],
            [*part.shape, 1],
            [count, 1],
            [1] * 70 + [count],
        )
    )


def _cut_rows(part: Part, chance: random.Random) -> None:
    """Takes rows away, all of them perhaps, or repeats them."""
    if not part.shape or not part.shape[0]:
        return
    row = len(part.content) // part.shape[0]
    rows = chance.choice((0, 1, part.shape[0] - 1, part.shape[0] + 1, 2 * part.shape[0]))
    part.content = (part.content * 2)[: rows * row] if rows else b""
    part.shape = [rows, *part.shape[1:]]


def _reinterpret(part: Part, chance: random.Random) -> None:
    """Says that the bytes are of another dtype, and makes last dimension and length fit."""
    dtype = chance.choice(DTYPES)
    old, new = _width(part), SIZES.get(dtype, 1)
    if not part.shape:
        return
    if chance.random() < 0.5:
        part.content = part.content * (new // old) if new > old else part.content[:: old // new]
    elif part.shape[-1] * old % new == 0:
        part.shape = [*part.shape[:-1], part.shape[-1] * old // new]
    part.dtype = dtype


def _mutate_embedded_json(part: Part, chance: random.Random) -> None:
    """Changes the JSON that some formats keep in a tensor; other tensors get JSON."""
    try:
        value: Any = json.loads(part.content)
    except (ValueError, RecursionError):
        value = junk(chance)
    part.content = json.dumps(mutated_json(value, chance)).encode()
    part.dtype, part.shape = "U8", [len(part.content)]
