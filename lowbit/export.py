"""W8A8 checkpoints for engines: compressed-tensors' `int-quantized` format.

Schemes of weights alone are served as they are (`pack-quantized`), after an edit of `config.json`.
Engines choose their int8 kernels by another format, in which the codes are int8 `[N, K]` and called
`weight`. The codes are the same, so this is a copy and no second quantization.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.checkpoint import Checkpoint, write_json
from lowbit.checkpoint.journal import refuse_occupied
from lowbit.checkpoint.reader import read_quantized
from lowbit.checkpoint.writer import ShardWriter
from lowbit.errors import LowbitError
from lowbit.inventory import module_schemes
from lowbit.pipeline.output import write_index, write_side_files
from lowbit.scheme import INT8, Scheme

# Engines name an output head so; where it is tied to the embedding, no tensor tells of it.
HEAD = "lm_head"


def compressed_tensors_config(scheme: Scheme, ignore: Iterable[str] = (HEAD,)) -> dict[str, Any]:
    """Returns the `quantization_config` of compressed-tensors for linear layers of `scheme`.

    Args:
        scheme: integers without double quantization.
        ignore: names of linear layers that are not quantized.

    Raises:
        LowbitError: for a scheme that the format does not have.
    """
    if scheme.codebook is not None or scheme.double_quant:
        raise LowbitError(
            f"scheme {scheme}: compressed-tensors has integers with plain scales only; quantize "
            "with W4A16_G64 or W8A8, for example"
        )
    group: dict[str, Any] = {
        "targets": ["Linear"],
        "weights": {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": "channel" if scheme.group_size is None else "group",
            "group_size": scheme.group_size,
            "dynamic": False,
        },
    }
    if scheme.activations is not None:
        per_token = scheme.activations == INT8
        group["input_activations"] = {
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "strategy": "token" if per_token else "tensor",
            "dynamic": per_token,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if scheme.activations is None else "int-quantized",
        "quantization_status": "compressed",
        "ignore": list(ignore),
        "config_groups": {"group_0": group},
    }


def export_int_quantized(path: str | Path, output: str | Path) -> None:
    """Writes the W8A8 or W8A8_STATIC checkpoint at `path` in the `int-quantized` format.

    Scales keep their dtype. The result has no lowbit in it and is not read by lowbit.

    Args:
        path: a checkpoint of ours, all of one scheme.
        output: directory to write, new or empty.

    Raises:
        LowbitError: if it is no such checkpoint, or `output` is in use.
    """
    checkpoint, directory = Checkpoint.open(path), Path(output)
    modules = module_schemes(checkpoint)
    scheme = _only_scheme(checkpoint, [scheme for scheme, _ in modules.values()])
    refuse_occupied(directory, resume=False)
    directory.mkdir(parents=True, exist_ok=True)
    files = checkpoint.files()
    for file in files:
        names = [entry.name for entry in checkpoint.entries.values() if entry.file == file]
        with ShardWriter(directory / file.name, ShardWriter.header_bound(names)) as writer:
            for name, tensor in _exported(checkpoint, modules, names):
                writer.add(name, tensor)
    write_index(directory, [file.name for file in files])
    write_side_files(checkpoint.path, directory)
    plain = {
        name.removesuffix(".weight")
        for name, entry in checkpoint.entries.items()
        if name.endswith(".weight") and len(entry.shape) == 2
    }
    ignore = sorted((plain | {HEAD}) - modules.keys())
    config = {**checkpoint.config, "quantization_config": compressed_tensors_config(scheme, ignore)}
    write_json(directory / "config.json", config)


def _only_scheme(checkpoint: Checkpoint, schemes: list[Scheme]) -> Scheme:
    """Returns the scheme of all modules, one with int8 activations.

    Raises:
        LowbitError: otherwise.
    """
    found = sorted({str(scheme) for scheme in schemes})
    if len(found) != 1 or schemes[0].activations is None:
        raise LowbitError(
            f"{checkpoint.path}: int-quantized is for checkpoints that are W8A8 or W8A8_STATIC "
            f"throughout, this one holds {', '.join(found) or 'nothing quantized by lowbit'}; "
            "weight-only schemes are served as they are, see README"
        )
    return schemes[0]


def _exported(
    checkpoint: Checkpoint, modules: dict[str, tuple[Scheme, tuple[int, int]]], names: list[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of one file under the names of the other format."""
    for name in names:
        module, _, suffix = name.rpartition(".")
        entry = checkpoint.entries[name]
        if suffix == "weight_packed" and module in modules:
            qweight = read_quantized(checkpoint.entries, module, *modules[module])
            yield f"{module}.weight", qweight.codes()
        elif module in modules and (suffix == "weight_shape" or not all(entry.shape)):
            continue  # the shape is that of the codes; a tensor of no elements is our sentinel
        else:
            yield name, entry.read()
