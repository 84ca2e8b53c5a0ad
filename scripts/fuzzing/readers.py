"""Every reader, called as its users call it, and what it is fed with.

A reader takes the folder of a case and either returns or raises `LowbitError`.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import lowbit
from lowbit.adapters.adapter_file import AdapterFile
from lowbit.calibration.token_files import read_token_rows
from lowbit.checkpoint.mark import MARK
from lowbit.checkpoint.reader import read_json
from lowbit.errors import LowbitError
from lowbit.formats.reading import open_checkpoint, read_module
from lowbit.formats.table import LAYOUTS, layout_of
from lowbit.inventory import inventory
from lowbit.pipeline.stored_statistics import StoredStatistics
from lowbit.verification import verify
from scripts.fuzzing import gguf_samples, samples
from scripts.fuzzing.files import Files

# Of a case's folder; where a conversion writes. It may not look like a checkpoint after an error.
OUTPUT = "output"
Sample = Callable[[], Files]
Reader = Callable[[Path, random.Random], None]


@dataclass(frozen=True)
class Target:
    """A reader and what is damaged before it reads.

    Args:
        name: of the target.
        samples: makers of sound files.
        read: told the folder and a source of choices.
        repaired: makes digests fit damaged files, in half of all cases.
    """

    name: str
    samples: tuple[Sample, ...]
    read: Reader
    repaired: Callable[[Files], Files] | None = None


def read_checkpoint(folder: Path, _: random.Random) -> None:
    """Opens a checkpoint, reads and decodes every module, and lists what there is."""
    checkpoint = open_checkpoint(folder)
    layout = layout_of(checkpoint)
    for name, stored in layout.modules(checkpoint).items():
        read_module(checkpoint, layout, name, stored).dequantize()
    checkpoint.verify()
    if checkpoint.path.is_dir():
        inventory(folder)


def convert_checkpoint(folder: Path, chance: random.Random) -> None:
    """Converts a checkpoint to some format."""
    to = chance.choice([name for name in LAYOUTS if name != "gguf"])
    requantize = chance.random() < 0.7
    output = folder / OUTPUT
    try:
        lowbit.convert(folder, output, to, requantize=requantize, progress=False)
    except LowbitError:
        config = output / "config.json"
        # What failed its checks is kept, but marked.
        if config.exists() and MARK not in read_json(config, ""):
            raise AssertionError(f"a refused conversion to {to} left a config.json") from None
        raise


def load_checkpoint(folder: Path, _: random.Random) -> None:
    """Loads a checkpoint as a model."""
    lowbit.load(folder)


def verify_checkpoint(folder: Path, _: random.Random) -> None:
    """Verifies a checkpoint, as is done after every save; what fails is told, not raised."""
    verify(folder).to_dict()


def read_adapter(folder: Path, _: random.Random) -> None:
    """Opens an adapter and merges each part of it into a weight of the model's shape."""
    adapter = AdapterFile.open(folder)
    adapter.digest()
    shapes = {**samples.LINEARS, "model.embed_tokens": (samples.VOCABULARY, samples.WIDTH)}
    for module in adapter.modules:
        shape = shapes.get(module, (samples.WIDTH, samples.WIDTH))
        if adapter.config.use_qalora:
            adapter.merged_zero_points(module, _base(shape))
        else:
            adapter.merged(module, torch.zeros(shape))
        if adapter.has_bias(module):
            adapter.bias_of_b(module)
    for parameter in adapter.replaced:
        adapter.replacement(parameter)


@functools.cache
def _base(shape: tuple[int, int]) -> lowbit.QuantizedWeight:
    scheme = lowbit.Scheme.parse("W4A16_ASYM_G32")
    return samples.random_weight(scheme, shape, torch.Generator().manual_seed(2))


def read_tokens(folder: Path, _: random.Random) -> None:
    """Reads the file of token ids."""
    names = ("tokens.npy", "tokens.safetensors")
    path = next((folder / name for name in names if (folder / name).exists()), folder / names[0])
    read_token_rows(path)


def read_statistics(folder: Path, _: random.Random) -> None:
    """Opens a folder of statistics and reads each part."""
    stored = StoredStatistics.open(folder)
    stored.description()
    stored.summary()
    stored.require_model("x", {samples.SINGLE_NAME: "x"})
    stored.require_layers({name: columns for name, (_, columns) in samples.LINEARS.items()})
    for part in stored.manifest["parts"]:
        for _ in stored.groups(part, [*samples.LINEARS], torch.device("cpu")):
            pass


def _checkpoints(*arguments: tuple[object, ...]) -> tuple[Sample, ...]:
    return tuple(functools.partial(samples.checkpoint, *each) for each in arguments)  # type: ignore[arg-type]


CHECKPOINTS: dict[str, tuple[Sample, ...]] = {
    "lowbit": _checkpoints(
        ("lowbit", "W4A16_G32"),
        ("lowbit", "W3A16_ASYM_G32_DQ", None, 2),
        ("lowbit", "NF4_G32_DQ"),
        ("lowbit", "W8A8_STATIC"),
    ),
    "compressed-tensors": _checkpoints(
        ("compressed-tensors", "W4A16_G32_BF16"),
        ("compressed-tensors", "W3A16_ASYM_G32", None, 2),
        ("compressed-tensors", "W8A8_STATIC"),
        ("compressed-tensors", "W8A8"),
    ),
    "gptq": _checkpoints(
        ("gptq", "W4A16_G32"),
        ("gptq", "W4A16_ASYM_G32", samples.in_act_order),
        ("gptq", "W3A16_G32", None, 2),
    ),
    "gptq_v2": _checkpoints(
        ("gptq_v2", "W8A16_ASYM_G32"), ("gptq_v2", "W2A16_ASYM_G32", samples.in_act_order)
    ),
    "awq": _checkpoints(("awq", "W4A16_ASYM_G32"), ("awq", "W4A16_ASYM_G32", None, 2)),
    "bnb": _checkpoints(
        ("bnb", "NF4_G32_FP32"),
        ("bnb", "FP4BNB_G32_FP32", None, 2),
        ("bnb", "NF4_G32_FP32", samples.nested),
    ),
    "bf16": (samples.unquantized,),
    "gguf": (
        functools.partial(gguf_samples.model, 256, ("Q4_K", "Q6_K", "Q5_K", "Q2_K", "Q3_K")),
        functools.partial(gguf_samples.model, 32, ("Q4_0", "Q8_0", "Q4_1", "Q5_0", "IQ4_NL")),
        functools.partial(gguf_samples.model, 32, ("F16", "Q8_0", "BF16", "F32")),
    ),
}
_ALL = tuple(sample for group in CHECKPOINTS.values() for sample in group)
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        *(Target(name, made, read_checkpoint) for name, made in CHECKPOINTS.items()),
        Target(
            "adapter",
            (
                samples.adapter,
                functools.partial(samples.adapter, use_dora=True),
                functools.partial(samples.adapter, use_qalora=True, qalora_group_size=32),
            ),
            read_adapter,
        ),
        Target(
            "tokens",
            tuple(functools.partial(samples.tokens, kind) for kind in ("npy", "safetensors")),
            read_tokens,
        ),
        Target("statistics", (samples.statistics,), read_statistics, samples.with_true_digests),
        Target("convert", _ALL, convert_checkpoint),
        Target("load", _ALL, load_checkpoint),
        Target("verify", _ALL, verify_checkpoint),
    )
}
