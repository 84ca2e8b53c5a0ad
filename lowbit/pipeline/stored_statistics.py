"""Statistics of a full-precision model's inputs, kept in a folder for any number of runs.

    stats-00002-of-00034.safetensors    one shard for each block, and one for the output projection
        <group>.hessian         float32 [K (K + 1) / 2], rows of the upper triangle, end to end
        <group>.mean_magnitude  float32 [K], the mean of |x|
        <group>.input_scale     float32 [1], see `lowbit.calibration.ranges`
    lowbit_manifest.json                what was measured on which model and which tokens

A group is named by its first layer. K is its in_features. The mean of x^2 is the diagonal of H and
not stored again. H is symmetric, so half of it is stored: what is left of a 7B model is 11 GB.

Shards are as durable as those of a checkpoint and are listed in a journal until all are there, so
an interrupted run goes on; see `lowbit.checkpoint.journal`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.algorithms.base import Statistics
from lowbit.calibration.measure import InputStatistics
from lowbit.checkpoint.journal import JOURNAL_NAME, MANIFEST_NAME
from lowbit.checkpoint.reader import TensorEntry, file_digest, read_header, read_json
from lowbit.checkpoint.writer import ShardWriter
from lowbit.errors import LowbitError
from lowbit.pipeline.output import digest_json

KIND = "input statistics"
TENSORS = ("hessian", "mean_magnitude", "input_scale")


def pack_triangle(hessian: Tensor) -> Tensor:
    """Returns the rows of the upper triangle of `hessian` `[K, K]`, end to end."""
    return torch.cat([row[index:] for index, row in enumerate(hessian.cpu())])


def unpack_triangle(packed: Tensor, size: int) -> Tensor:
    """Returns the symmetric matrix `[size, size]` of which `packed` is the upper triangle."""
    matrix = packed.new_empty(size, size)
    position = 0
    for index in range(size):
        row = packed[position : position + size - index]
        matrix[index, index:] = row
        matrix[index:, index] = row
        position += size - index
    return matrix


def stored_bytes(in_features: int) -> int:
    """Returns the bytes of one group's tensors."""
    return 4 * (in_features * (in_features + 1) // 2 + in_features + 1)


def write_statistics(file: Path, groups: dict[str, InputStatistics]) -> None:
    """Writes the statistics of `groups`, name -> measured, to one shard."""
    names = [f"{group}.{tensor}" for group in groups for tensor in TENSORS]
    with ShardWriter(file, ShardWriter.header_bound(names)) as writer:
        for group, measured in groups.items():
            writer.add(f"{group}.hessian", pack_triangle(measured.hessian))
            writer.add(f"{group}.mean_magnitude", measured.mean_magnitude)
            writer.add(f"{group}.input_scale", measured.input_scale)


@dataclass(frozen=True)
class StoredStatistics:
    """A finished folder of statistics.

    Args:
        directory: where it is.
        manifest: the content of its `lowbit_manifest.json`.
    """

    directory: Path
    manifest: dict[str, Any]

    @staticmethod
    def open(directory: str | Path) -> StoredStatistics:
        """Returns the statistics in `directory`, their manifest checked.

        Raises:
            LowbitError: there are none, or they are unfinished.
        """
        directory = Path(directory)
        make = "make them with `lowbit calibrate MODEL STATS --calibration TEXT`"
        if (directory / JOURNAL_NAME).exists():
            raise LowbitError(
                f"{directory}: is unfinished, the run was interrupted; go on with the same "
                "`lowbit calibrate` and --resume"
            )
        if not (directory / MANIFEST_NAME).is_file():
            raise LowbitError(f"{directory}: holds no statistics; {make}")
        manifest = read_json(directory / MANIFEST_NAME, "")
        fingerprint, parts = manifest.get("fingerprint"), manifest.get("parts")
        if not isinstance(fingerprint, dict) or fingerprint.get("kind") != KIND:
            raise LowbitError(f"{directory}: is something else than statistics; {make}")
        sound = isinstance(parts, dict) and all(map(_is_part, parts.values()))
        if not isinstance(parts, dict) or not sound or not _is_fingerprint(fingerprint):
            raise LowbitError(f"{directory / MANIFEST_NAME}: is corrupt; {make} again")
        for part in parts.values():
            if not (directory / part["file"]).is_file():
                raise LowbitError(f"{directory / part['file']}: the shard is missing; {make} again")
        return StoredStatistics(directory, manifest)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the statistics depend on: model, tokens, device, versions."""
        content: dict[str, Any] = self.manifest["fingerprint"]
        return content

    def description(self) -> dict[str, Any]:
        """Returns what the manifest of a checkpoint records of them, JSON values."""
        return {
            "statistics": digest_json(self.manifest),
            "of": "the full-precision model",
            **self.fingerprint["calibration"],
        }

    def summary(self) -> dict[str, Any]:
        """Returns what was measured and what it takes, JSON values."""
        parts = self.manifest["parts"].values()
        groups = [group for part in parts for group in part["modules"].values()]
        return {
            "bytes": sum((self.directory / part["file"]).stat().st_size for part in parts),
            "layers": sum(len(group["members"]) for group in groups),
            "groups": len(groups),
            "tokens": max((group["tokens"] for group in groups), default=0),
            "tokens_per_dimension": min(
                (group["tokens"] / group["in_features"] for group in groups), default=0.0
            ),
            "unreached": [name for part in parts for name in part.get("unreached", ())],
        }

    def require_model(self, config: str, weights: dict[str, str]) -> None:
        """Refuses another model than the one that was measured.

        Args:
            config: digest of its `config.json`.
            weights: file name -> SHA-256 of its shards.

        Raises:
            LowbitError: naming what differs.
        """
        measured = self.fingerprint["model"]
        again = "measure this model with `lowbit calibrate`"
        if measured["weights"] != weights:
            files = {**measured["weights"], **weights}
            name = next(f for f in files if measured["weights"].get(f) != weights.get(f))
            raise LowbitError(
                f"{self.directory}: was measured on another model, {name} differs; {again}"
            )
        if measured["config"] != config:
            raise LowbitError(
                f"{self.directory}: was measured with another config.json of this model; {again}"
            )

    def require_layers(self, widths: dict[str, int]) -> None:
        """Refuses layers that were not measured.

        Args:
            widths: module name -> in_features of every linear layer to quantize.

        Raises:
            LowbitError: naming the first one.
        """
        known: dict[str, int | None] = {}
        for part in self.manifest["parts"].values():
            known |= dict.fromkeys(part.get("unreached", ()))
            for group in part["modules"].values():
                known |= dict.fromkeys(group["members"], group["in_features"])
        for name, width in widths.items():
            if name not in known:
                raise LowbitError(
                    f"{self.directory}: has no statistics of {name}; leave it in 16 bits, or "
                    "measure this model with this version of `lowbit calibrate`"
                )
            if known[name] not in (None, width):
                raise LowbitError(
                    f"{self.directory}: has statistics of {known[name]} input features for {name}, "
                    f"which has {width}; measure this model with `lowbit calibrate`"
                )

    def groups(
        self, part_name: str, names: list[str], device: torch.device
    ) -> Iterator[tuple[list[str], Statistics | None]]:
        """Yields the layers among `names` by shared input, with its statistics on `device`.

        Args:
            part_name: of the block, or of the output projection.
            names: layers in it, see `require_layers`.
            device: where H is wanted.

        Raises:
            LowbitError: the shard is missing or has changed.
        """
        part = self.manifest["parts"].get(part_name, {"modules": {}})
        groups = [
            (group, report, [name for name in report["members"] if name in names])
            for group, report in part["modules"].items()
        ]
        entries = self._entries(part) if any(members for *_, members in groups) else {}
        for group, report, members in groups:
            if members:
                yield members, _statistics(entries, group, report, device)
        reached = {name for *_, members in groups for name in members}
        yield from (([name], None) for name in names if name not in reached)

    def _entries(self, part: dict[str, Any]) -> dict[str, TensorEntry]:
        file = self.directory / part["file"]
        if not file.is_file() or file_digest(file) != part["sha256"]:
            raise LowbitError(
                f"{file}: is missing or has changed since it was written; run `lowbit calibrate` "
                "again into a new folder"
            )
        return {entry.name: entry for entry in read_header(file)}


def _statistics(
    entries: dict[str, TensorEntry], group: str, report: dict[str, Any], device: torch.device
) -> Statistics:
    size = report["in_features"]
    packed = _read(entries, f"{group}.hessian", (size * (size + 1) // 2,))
    scale = _read(entries, f"{group}.input_scale", (1,))
    hessian = unpack_triangle(packed, size).to(device)
    return Statistics(hessian, report["tokens"], report["dropped"], input_scale=scale)


def _read(entries: dict[str, TensorEntry], name: str, shape: tuple[int, ...]) -> Tensor:
    entry = entries.get(name)
    if entry is None or entry.dtype != torch.float32 or entry.shape != shape:
        found = "missing" if entry is None else f"{entry.dtype} {list(entry.shape)}"
        raise LowbitError(
            f"tensor {name!r} of the statistics is {found}, needed torch.float32 {list(shape)}; "
            "run `lowbit calibrate` again into a new folder"
        )
    tensor = entry.read()
    if not bool(tensor.isfinite().all()):
        raise LowbitError(
            f"{entry.file}: tensor {name!r} holds NaN or Inf; run `lowbit calibrate` again into a "
            "new folder"
        )
    return tensor


def _is_fingerprint(fingerprint: dict[str, Any]) -> bool:
    model = fingerprint.get("model")
    return (
        isinstance(fingerprint.get("calibration"), dict)
        and isinstance(model, dict)
        and isinstance(model.get("config"), str)
        and isinstance(model.get("weights"), dict)
        and all(isinstance(digest, str) for digest in model["weights"].values())
    )


def _is_part(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and all(isinstance(part.get(key), str) for key in ("file", "sha256"))
        and re.fullmatch(r"stats-\d{5,9}-of-\d{5,9}\.safetensors", part["file"]) is not None
        and _are_names(part.get("unreached", []))
        and isinstance(part.get("modules"), dict)
        and all(map(_is_group, part["modules"].values()))
    )


def _is_group(group: Any) -> bool:
    return (
        isinstance(group, dict)
        and _are_names(group.get("members"))
        and all(type(group.get(key)) is int for key in ("in_features", "tokens", "dropped"))
        and group["in_features"] > 0
    )


def _are_names(names: Any) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) for name in names)
