"""Damaged and hostile checkpoints of other formats: one sentence, never another exception."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from format_files import checkpoint_of
from test_formats import random_weight

import lowbit
from lowbit.checkpoint import Checkpoint
from lowbit.errors import LowbitError
from lowbit.formats.base import Written
from lowbit.formats.reading import read_module
from lowbit.formats.regrid import regrid
from lowbit.formats.table import LAYOUTS, layout_of
from lowbit.scheme import Scheme

M = "model.layers.0.mlp.up_proj"
SCHEMES = {
    "compressed-tensors": "W4A16_ASYM_G32",
    "gptq": "W4A16_G32",
    "gptq_v2": "W3A16_ASYM_G32",
    "awq": "W4A16_ASYM_G32",
    "bnb": "NF4_G32_FP32",
    "lowbit": "W4A16_G32",
}
Tensors = dict[str, torch.Tensor]
Mutation = Callable[[Tensors, dict[str, Any]], None]


def sound(name: str, scheme: str | None = None) -> tuple[Tensors, dict[str, Any]]:
    """Returns tensors and config of a checkpoint with one module."""
    layout = LAYOUTS[name]
    weight = random_weight(Scheme.parse(scheme or SCHEMES[name]), (32, 96))
    held = regrid(weight, layout.held_as(weight.scheme))
    assert held is not None
    config = layout.config(Written({M: held.scheme}))
    return layout.tensors(M, held), json.loads(json.dumps(config))


def read_all(path: Path) -> None:
    """Reads every module of a checkpoint, as a conversion does before it decides anything."""
    checkpoint = Checkpoint.open(path)
    layout = layout_of(checkpoint)
    for name, stored in layout.modules(checkpoint).items():
        read_module(checkpoint, layout, name, stored).dequantize()


@pytest.mark.parametrize("name", SCHEMES)
def test_a_sound_checkpoint_is_read(name: str, tmp_path: Path) -> None:
    checkpoint_of(tmp_path, *sound(name))
    read_all(tmp_path)


def put(suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Mutation:
    def mutate(tensors: Tensors, _: dict[str, Any]) -> None:
        tensors[f"{M}.{suffix}"] = change(tensors[f"{M}.{suffix}"].clone())

    return mutate


def drop(suffix: str) -> Mutation:
    return lambda tensors, _: [tensors.pop(f"{M}.{suffix}")].clear()


def say(**fields: Any) -> Mutation:
    return lambda _, config: config.update(fields)


def say_weights(**fields: Any) -> Mutation:
    return lambda _, config: config["config_groups"]["group_0"]["weights"].update(fields)


def set_to(index: tuple[int, ...], value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[index] = value
        return tensor

    return change


def state(**fields: Any) -> Mutation:
    key = "weight.quant_state.bitsandbytes__nf4"

    def change(tensor: torch.Tensor) -> torch.Tensor:
        content = {**json.loads(bytes(tensor.tolist())), **fields}
        return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)

    return put(key, change)


BROKEN: list[tuple[str, Mutation, str]] = [
    ("gptq", put("scales", set_to((0, 3), float("nan"))), rf"model.safetensors: .*'{M}.scales'.*N"),
    ("gptq", put("g_idx", set_to((5,), 3)), r"g_idx holds the group 3, but there are 3"),
    ("gptq", put("g_idx", set_to((5,), -1)), r"g_idx holds the group -1"),
    ("gptq", put("g_idx", set_to((5,), 2)), r"g_idx makes groups of unequal size"),
    ("gptq", put("g_idx", lambda t: t[:-8]), rf"'{M}.qweight' is \[12, 32\].*88 input features"),
    ("gptq", put("scales", lambda t: t[:-1]), rf"'{M}.scales' is float16 \[2, 32\], needed"),
    ("gptq", put("qzeros", lambda t: t.long()), rf"'{M}.qzeros' is int64"),
    ("gptq", put("qzeros", lambda t: t * 0), r"holds other zero points than 8, but .*sym: true"),
    ("gptq", put("qweight", lambda t: t.to(torch.int16)), r"needed an int32 matrix"),
    ("gptq", drop("scales"), rf"tensor '{M}.scales' is missing"),
    ("gptq", say(bits=5), r"bits is 5, this format is read with 2, 3, 4, 8"),
    ("gptq", say(bits="4"), r"bits is '4', needed int"),
    ("gptq", say(bits=True), r"bits is True, needed int"),
    ("gptq", say(group_size=521), rf"'{M}.scales' is float16 \[3, 32\], needed .*\[1, 32\]"),
    ("gptq", say(checkpoint_format="gptq_v3"), r"checkpoint_format 'gptq_v3' of GPTQ is not"),
    ("gptq", say(checkpoint_format="gptq_v2"), r"other zero points.*version of the format right"),
    ("gptq", say(is_marlin_format=True), r"is_marlin_format"),
    ("gptq", say(dynamic={"+:(": {}}), r"is not a regular expression"),
    ("gptq", say(dynamic={"-:(": {}}), r"is not a regular expression"),
    ("gptq", say(dynamic={"a" * 2000: {}}), r"no rule of GPTQModel"),
    ("gptq_v2", say(bits=8), r"do not belong together"),
    ("awq", say(version="gemv"), r"version 'gemv' of AWQ is not supported; needed gemm"),
    ("awq", say(bits=3), r"bits is 3, this format is read with 4 bits"),
    ("awq", put("qzeros", lambda t: t[:, :-1]), rf"'{M}.qzeros' is int32 \[3, 3\], needed"),
    ("awq", put("scales", set_to((0, 0), float("inf"))), rf"'{M}.scales' holds NaN or Inf"),
    ("compressed-tensors", say_weights(num_bits=3), r"weight_shape says \[32, 96\] of 3 bits"),
    ("compressed-tensors", say_weights(type="float"), r"its weights are floats"),
    ("compressed-tensors", say_weights(strategy="block"), r"strategy 'block'"),
    ("compressed-tensors", say_weights(symmetric=1), r"symmetric is 1, needed bool"),
    ("compressed-tensors", say(config_groups=None), r"config_groups is missing"),
    ("compressed-tensors", say(ignore=["re:("]), r"ignore: '\(' is not a regular expression"),
    ("compressed-tensors", say(kv_cache_scheme={}), r"kv_cache_scheme"),
    ("compressed-tensors", put("weight_shape", set_to((1,), 2**60)), r"says \[32, 1152921504606"),
    ("compressed-tensors", put("weight_shape", set_to((0,), -32)), r"says \[-32, 96\]"),
    ("compressed-tensors", drop("weight_zero_point"), r"weight_zero_point' is missing"),
    ("compressed-tensors", drop("weight_packed"), rf"the codes of {M} are missing"),
    ("bnb", state(shape=[32, 97]), r"\[32, 97\] weight.*that its quant_state says"),
    ("bnb", state(shape=[10**12, 10**12]), r"that its quant_state says"),
    ("bnb", state(shape="x"), r"that its quant_state says"),
    ("bnb", state(blocksize=-64), r"in blocks of -64"),
    ("bnb", state(blocksize=64), r"a block of 64 weights spans rows of 96"),
    ("bnb", state(quant_type="fp4"), r"is no JSON of nf4 or fp4"),
    ("bnb", state(nested_blocksize=0, nested_offset=1.0), r"nested_blocksize 0"),
    ("bnb", state(nested_blocksize=256, nested_offset="x"), r"nested_offset is 'x', needed float"),
    ("bnb", put("weight.quant_map", set_to((3,), 0.5)), r"quant_map' is not the table of nf4"),
    ("bnb", put("weight.absmax", set_to((3,), float("nan"))), r"absmax' holds NaN or Inf"),
    ("bnb", put("weight.absmax", lambda t: t[:-1]), r"'.*absmax' is float32 \[95\], needed"),
    ("bnb", say(load_in_4bit=False), r"of bitsandbytes only load_in_4bit is read"),
    ("lowbit", say(format_version=99), r"format version 99"),
    ("lowbit", say(quant_method="quip#"), r"the quantization 'quip#' is not read"),
]


@pytest.mark.parametrize(("name", "mutate", "message"), BROKEN)
def test_damage_is_named(name: str, mutate: Mutation, message: str, tmp_path: Path) -> None:
    tensors, config = sound(name)
    mutate(tensors, config)
    checkpoint_of(tmp_path, tensors, config)
    with pytest.raises(LowbitError, match=message) as caught:
        read_all(tmp_path)
    assert "\n" not in str(caught.value)


def test_files_that_lie_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    checkpoint_of(tmp_path / "m", *sound("gptq"))
    file = tmp_path / "m" / "model.safetensors"
    whole = file.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])

    def broken(change: Callable[[dict[str, Any]], None]) -> bytes:
        changed = copy.deepcopy(header)
        change(changed)
        text = json.dumps(changed).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + size :]

    scales = f"{M}.scales"
    cases = {
        "is truncated": whole[:-1],
        "too few for its header": (1 << 60).to_bytes(8, "little") + whole[8:],
        "does not fit its": broken(lambda h: h[scales].update(shape=[1 << 40, 1 << 40])),
        "is corrupt": broken(lambda h: h[scales].update(shape=[1] * 70 + h[scales]["shape"])),
        "overlaps or leaves a hole": broken(lambda h: h[scales].update(data_offsets=[0, 192])),
    }
    for message, content in cases.items():
        file.write_bytes(content)
        with pytest.raises(LowbitError, match=f"model.safetensors: .*{message}"):
            lowbit.convert(tmp_path / "m", tmp_path / "out", "bf16", progress=False)
    index = {"weight_map": {scales: "../secret.safetensors"}}
    file.unlink()
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LowbitError, match=r"points to '../secret.safetensors', outside"):
        lowbit.load(tmp_path / "m")
    assert not (tmp_path / "out").exists()


JUNK = (None, True, -1, 0, 3, 10**30, 0.5, float("nan"), "", "x", "re:(", [], [1], {}, {"a": 1})


def mutated_config(content: Any, chance: random.Random) -> Any:
    """Returns a JSON value with one leaf of it exchanged."""
    if isinstance(content, dict) and content and chance.random() < 0.85:
        key = chance.choice(sorted(content))
        return {**content, key: mutated_config(content[key], chance)}
    return chance.choice(JUNK)


def mutated_tensor(tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    """Returns a tensor with other content, dtype or shape."""
    kind = chance.randrange(5)
    if kind == 0 and tensor.numel():
        noise = bytearray(chance.randbytes(tensor.numel() * tensor.element_size()))
        return torch.frombuffer(noise, dtype=tensor.dtype).view(tensor.shape)
    if kind == 1:
        return tensor.to(chance.choice([torch.uint8, torch.int64, torch.float32, torch.bfloat16]))
    if kind == 2:
        return tensor.flatten()
    if kind == 3:
        return tensor[: chance.randrange(tensor.shape[0] + 1)]
    return tensor.unsqueeze(0)


@pytest.mark.parametrize("name", SCHEMES)
def test_no_mutation_raises_anything_but_a_sentence(name: str, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    chance = random.Random(seed)
    for _ in range(40):
        tensors, config = sound(name)
        for _ in range(chance.randint(1, 2)):
            key = chance.choice(sorted(tensors))
            if chance.random() < 0.5:
                tensors[key] = mutated_tensor(tensors[key], chance)
            elif chance.random() < 0.2:
                del tensors[key]
            else:
                mutated = mutated_config(config, chance)
                config = mutated if isinstance(mutated, dict) else config
        if not tensors:
            continue
        checkpoint_of(tmp_path, tensors, config)
        try:
            read_all(tmp_path)
        except LowbitError as error:
            assert "\n" not in str(error), seed  # noqa: PT017
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
