"""From one layout to another: module by module, shard by shard, atomically.

    every source file read once: digests, no NaN     nothing is written before that
    for each source file, one of the same name:
        module -> tensors of the target -> read back with the target's reader -> equal? -> shard
        other tensors as they are
    index, tokenizer and its like, manifest, config.json last

Without config.json a directory does not load, and the journal tells which shards are whole, so an
interrupted conversion goes on with `resume`.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit import __version__
from lowbit.checkpoint import Checkpoint, ShardWriter, write_json
from lowbit.checkpoint.journal import (
    CHECKSUM,
    MANIFEST_NAME,
    Journal,
    claim,
    module_reports,
    refuse_occupied,
)
from lowbit.checkpoint.manifest import changed_side_files, read_manifest
from lowbit.checkpoint.reader import SINGLE_NAME, file_digest
from lowbit.errors import LowbitError
from lowbit.formats.gguf.checkpoint import SUFFIX, GgufCheckpoint
from lowbit.formats.gguf.layout import Gguf
from lowbit.formats.gguf.tokenizer import write_tokenizer
from lowbit.formats.gguf.writing import GgufOptions, write_gguf
from lowbit.formats.model_view import CONV1D
from lowbit.formats.own import Bf16, Lowbit
from lowbit.formats.plan import ConversionPlan, model_dtype, plan_conversion
from lowbit.formats.reading import open_checkpoint, read_module
from lowbit.formats.regrid import regrid, requantized
from lowbit.memory import release_freed_memory
from lowbit.model_card.saving import after_gguf, after_save
from lowbit.pipeline.output import digest_json, side_files, write_index, write_side_files
from lowbit.pipeline.source import require_space
from lowbit.progress import RunProgress
from lowbit.quant import QuantizedWeight, weight_checksum
from lowbit.scheme import SCALE_DTYPES

# The longest of all names of tensors, and how many of them a module has at most.
LONGEST_SUFFIX = "weight.quant_state.bitsandbytes__nf4"
MOST_TENSORS = 8


@dataclass(frozen=True)
class ConvertedCheckpoint:
    """A finished output directory.

    Args:
        path: the directory, or the GGUF file.
        manifest: the content of its `lowbit_manifest.json`; a GGUF file has none beside it.
    """

    path: Path
    manifest: dict[str, Any]


def convert(
    source: str | Path,
    output: str | Path,
    to: str,
    *,
    requantize: bool = False,
    resume: bool = False,
    verify: bool = True,
    progress: bool = True,
    gguf: GgufOptions | None = None,
) -> ConvertedCheckpoint:
    """Converts a quantized checkpoint to another format.

    Where the format can hold the source's values they are kept bit for bit, and that is asserted
    for every weight with the reader of the target.

    Args:
        source: directory of a checkpoint in any format here, its name on the hub, or a GGUF file.
        output: directory to write, new or empty.
        to: "compressed-tensors", "gptq", "gptq_v2", "awq", "bnb", "gguf", "lowbit" or "bf16".
        requantize: round weights that the format cannot hold to the nearest scheme that it can.
        resume: go on with the unfinished conversion in `output`.
        verify: check the result as `lowbit verify` does, and mark it as bad if that fails.
        progress: show a progress bar on standard error.
        gguf: what `to="gguf"` chooses anew, of a model in 16 bits too; None keeps codes.

    Raises:
        LowbitError: bad input; nothing has been written unless the message says so.
    """
    if to.lower() == Gguf.name:
        if resume:
            raise LowbitError("a GGUF file is written as a whole; leave out --resume")
        place = open_checkpoint(source).path
        _warn_of_side_files(place)
        file, manifest = write_gguf(source, output, gguf or GgufOptions(), requantize, progress)
        return ConvertedCheckpoint(file, after_gguf(file, manifest, place, verify, progress))
    if gguf is not None:
        raise LowbitError(f"--gguf-type and --stats are for --to gguf, not for --to {to}")
    directory = Path(output)
    checkpoint = open_checkpoint(source)
    if directory.resolve() == checkpoint.path.resolve():
        raise LowbitError(f"{directory}: output and source are the same; choose another output")
    refuse_occupied(directory, resume)
    plan = plan_conversion(checkpoint, to, requantize)
    require_space(directory, _needed_bytes(plan), "a converted checkpoint")
    _warn_of_clients(plan)
    _warn_of_decoded(plan)
    _warn_of_side_files(checkpoint.path)
    with RunProgress(progress) as bar:
        sizes = sum(file.stat().st_size for file in checkpoint.files())
        bar.stage("checking", sizes)
        digests = checkpoint.verify(bar.advance)
        fingerprint = {
            "versions": {"lowbit": __version__},
            "source": {
                "config": digest_json(checkpoint.config),
                "weights": digests,
                "side_files": _side_files(checkpoint),
            },
            "to": plan.target.name,
            "requantize": requantize,
        }
        with claim(directory, resume):
            journal = Journal.start(directory, fingerprint)
            bar.stage("converting", sizes)
            _Run(plan, journal, bar).execute()
            # A finished one may be marked as bad in config.json.
            if not journal.complete:
                _finish(plan, journal)
    manifest = after_save(directory, checkpoint.path, str(source), verify, progress)
    return ConvertedCheckpoint(directory, manifest)


class _Run:
    """The shards of one conversion."""

    def __init__(self, plan: ConversionPlan, journal: Journal, bar: RunProgress) -> None:
        self.plan, self.journal, self.bar = plan, journal, bar
        self._owner = {t: name for name, s in plan.modules.items() for t in s.tensors}
        self._reports: dict[str, dict[str, Any]] = {}
        self._written = module_reports(plan.checkpoint.path)

    def execute(self) -> None:
        """Writes every shard that is not finished."""
        entries = self.plan.checkpoint.entries
        seen: set[str] = set()
        for file in self.plan.checkpoint.files():
            names = [entry.name for entry in entries.values() if entry.file == file]
            # A module whose tensors are in several files is written with the first of them.
            owners = dict.fromkeys(self._owner[name] for name in names if name in self._owner)
            modules = [name for name in owners if name not in seen]
            seen.update(modules)
            if _shard_name(file) in self.journal.parts:
                self.bar.advance(file.stat().st_size)
            else:
                self._write(file, names, modules)

    def _write(self, file: Path, names: list[str], modules: list[str]) -> None:
        others = [name for name in names if name not in self._owner]
        longest = [f"{name}.{LONGEST_SUFFIX}" for name in modules for _ in range(MOST_TENSORS)]
        markers = self.plan.target.markers(self.plan.written) if self.plan.written.schemes else {}
        first = file == self.plan.checkpoint.files()[0]
        names_of_others = [made for name in others for made in self._names(name)]
        bound = ShardWriter.header_bound([*names_of_others, *longest, *markers])
        self._reports = {}
        output = self.journal.directory / _shard_name(file)
        with ShardWriter(output, bound) as writer:
            for name, tensor in markers.items() if first else ():
                writer.add(name, tensor)
            for module in modules:
                self.bar.describe(f"{module:<40.40}")
                for name, tensor in self._converted(module).items():
                    writer.add(name, tensor)
                self._advance(self.plan.modules[module].tensors)
                release_freed_memory()
            for name in others:
                entry = self.plan.checkpoint.entries[name]
                # A tensor of no elements is the mark of our own checkpoints.
                if all(entry.shape) or not isinstance(self.plan.source, Lowbit):
                    for made, tensor in self._plain(name).items():
                        writer.add(made, tensor)
                self._advance([name])
        self.journal.finish_part(output.name, output, self._reports)

    def _names(self, name: str) -> list[str]:
        return [name] if self.plan.hub is None else self.plan.hub.names(name)

    def _plain(self, name: str) -> dict[str, Tensor]:
        """Returns what becomes of a tensor that is not quantized: experts part."""
        tensor = self.plan.checkpoint.entries[name].read()
        return {name: tensor} if self.plan.hub is None else self.plan.hub.split(name, tensor)

    def _advance(self, names: Iterable[str]) -> None:
        entries = (self.plan.checkpoint.entries[name] for name in names)
        self.bar.advance(sum(entry.end - entry.begin for entry in entries))

    def _converted(self, module: str) -> dict[str, Tensor]:
        """Returns the target's tensors of a module, checked, and notes what was done."""
        plan, stored, name = self.plan, self.plan.modules[module], self.plan.name(module)
        target = plan.targets[module]
        weight = read_module(plan.checkpoint, plan.source, module, stored)
        report: dict[str, Any] = {"from": str(stored.scheme), "shape": list(stored.shape)}
        report["weights"] = math.prod(stored.shape)
        if target.scheme is None:
            made = Bf16().tensors(name, weight, stored.input_order)
            if target.view.kind == CONV1D:
                made = {key: tensor.T.contiguous() for key, tensor in made.items()}
            report |= {"scheme": "bf16", "exact": False}
        else:
            held, error = self._regridded(module, weight)
            order = stored.input_order if target.exact else None
            made = plan.target.tensors(name, held, order)
            report |= {"scheme": str(held.scheme), "exact": error == 0.0}
            report |= {} if error == 0.0 else {"relative_error": error}
            report[CHECKSUM] = self._require_equal(name, made, held, order)
            if held.input_scale is not None:
                report["input_scale"] = held.input_scale.item()
            if error == 0.0:
                self._require_unchanged(module, report[CHECKSUM])
        stored_bytes = sum(tensor.numel() * tensor.element_size() for tensor in made.values())
        self._reports[name] = {**report, "stored_bytes": stored_bytes}
        return made

    def _regridded(self, module: str, weight: QuantizedWeight) -> tuple[QuantizedWeight, float]:
        """Returns the weight under the scheme of the target, and the relative error of that."""
        target = self.plan.targets[module]
        assert target.scheme is not None
        requantize = self.journal.fingerprint["requantize"]
        order = self.plan.modules[module].input_order
        if not target.exact:
            return requantized(weight, target.scheme, order)
        held = regrid(weight, target.scheme)
        if held is not None:
            return held, 0.0
        if not requantize:
            raise LowbitError(
                f"{self.plan.checkpoint.path}: {self.plan.target.name} has scales of "
                f"{target.scheme.scale_dtype.lower()}, which do not hold those of {module} "
                f"({weight.scheme}) exactly; --requantize rounds to {target.scheme}"
            )
        return requantized(weight, target.scheme)

    def _require_equal(
        self, module: str, made: dict[str, Tensor], held: QuantizedWeight, order: Tensor | None
    ) -> str:
        """Reads `made` with the reader of the target and compares it with what it was made of.

        Returns the checksum of the weight, its columns in the order of the activations.
        """
        target = self.plan.target
        stored = target.stored_as(module, held.scheme, held.shape, made)
        again = target.read(module, dataclasses.replace(stored, input_order=order), made)
        weight = held.dequantize()
        if not torch.equal(again.dequantize(), weight):
            raise AssertionError(f"{module}: {target.name} does not decode to what was written")
        return weight_checksum([weight if order is None else weight[:, torch.argsort(order)]])

    def _require_unchanged(self, module: str, checksum: str) -> None:
        """Refuses a source that is no longer what was in memory when it was written."""
        written = self._written.get(module, {}).get(CHECKSUM, checksum)
        if written != checksum:
            raise LowbitError(
                f"{self.plan.checkpoint.path}: {module} no longer decodes to the weights that were "
                "written; run `lowbit verify` on it, and quantize the model again"
            )


def _side_files(checkpoint: Checkpoint) -> dict[str, str]:
    """Returns name -> SHA-256 of the tokenizer and its like; a GGUF file has them inside."""
    found = side_files(checkpoint.path) if checkpoint.path.is_dir() else []
    return {file.name: file_digest(file) for file in found}


def _shard_name(file: Path) -> str:
    """Returns the name of the shard that is made of a file; a GGUF file becomes a single one."""
    return SINGLE_NAME if file.suffix == SUFFIX else file.name


def _finish(plan: ConversionPlan, journal: Journal) -> dict[str, Any]:
    """Writes everything besides the shards, config.json last, and returns the manifest."""
    directory, checkpoint = journal.directory, plan.checkpoint
    files = [_shard_name(file) for file in checkpoint.files()]
    if files != [SINGLE_NAME]:
        write_index(directory, files)
    if isinstance(checkpoint, GgufCheckpoint):
        write_tokenizer(checkpoint.header, directory)
    else:
        write_side_files(checkpoint.path, directory)
    manifest = _manifest(journal)
    write_json(directory / MANIFEST_NAME, manifest)
    dropped = ("quantization_config", "compression_config")
    config = {key: value for key, value in checkpoint.config.items() if key not in dropped}
    if plan.written.schemes:
        quantization = plan.target.config(plan.written)
        if isinstance(plan.target, Lowbit):
            quantization["manifest"] = MANIFEST_NAME
        config["quantization_config"] = quantization
    if isinstance(plan.target, Bf16):
        config = {k: "bfloat16" if k in ("dtype", "torch_dtype") else v for k, v in config.items()}
    write_json(directory / "config.json", config)
    journal.remove()
    return manifest


def _manifest(journal: Journal) -> dict[str, Any]:
    reports = {name: r for part in journal.parts.values() for name, r in part["modules"].items()}
    weights = sum(report["weights"] for report in reports.values())
    stored = sum(report["stored_bytes"] for report in reports.values())
    changed = {name: r.get("relative_error") for name, r in reports.items() if not r["exact"]}
    return {
        "fingerprint": journal.fingerprint,
        "summary": {
            "format": journal.fingerprint["to"],
            "quantized_weights": weights,
            "quantized_bytes": stored,
            "bits_per_weight": 8 * stored / weights if weights else 16.0,
            "schemes": sorted({report["scheme"] for report in reports.values()}),
            "exact": len(reports) - len(changed),
            "rounded": changed,
        },
        "parts": journal.parts,
    }


def _needed_bytes(plan: ConversionPlan) -> int:
    """Returns an estimate of what will be written, from above."""
    owned = {name for stored in plan.modules.values() for name in stored.tensors}
    entries = plan.checkpoint.entries.values()
    others = sum(entry.end - entry.begin for entry in entries if entry.name not in owned)
    needed = 0.0
    for name, stored in plan.modules.items():
        scheme = plan.targets[name].scheme
        weights = math.prod(stored.shape)
        needed += 2 * weights if scheme is None else 1.1 * scheme.stored_bytes(stored.shape)
    return others + int(needed)


def _warn_of_side_files(source: Path) -> None:
    """Says which tokenizer files and their like are not what was copied: people do edit them."""
    manifest = read_manifest(source)
    for sentence in [] if manifest is None else changed_side_files(source, manifest):
        warnings.warn(f"{source}: {sentence}; what is there is taken", stacklevel=3)


def _warn_of_decoded(plan: ConversionPlan) -> None:
    """Says which tensors of a GGUF file are in a type that is decoded, whatever the target."""
    note = plan.checkpoint.decoded_note() if isinstance(plan.checkpoint, GgufCheckpoint) else None
    if note is not None:
        warnings.warn(note, stacklevel=3)


def _warn_of_clients(plan: ConversionPlan) -> None:
    """Warns of what clients of compressed-tensors do to what the format holds.

    Engines cast scales to the dtype of the model. transformers 5.23 decodes asymmetric layers by
    the scheme of the first group, so it cannot load them beside other schemes; engines can.
    """
    schemes = set(plan.written.schemes.values())
    if plan.target.name != "compressed-tensors":
        return
    if len(schemes) > 1 and not all(scheme.symmetric for scheme in schemes):
        warnings.warn(
            "transformers (5.23) cannot load layers with zero points beside layers of another "
            "scheme, engines can; for transformers give all layers one scheme, or none zero points",
            stacklevel=3,
        )
    if plan.written.experts:
        warnings.warn(
            "transformers (5.23) cannot load experts in 16 bits beside compressed-tensors, engines "
            "can; for transformers keep the checkpoint as it is",
            stacklevel=3,
        )
    dtype = model_dtype(plan.checkpoint)
    names = {str(d).removeprefix("torch."): name for name, d in SCALE_DTYPES.items()}
    others = {scheme.scale_dtype for scheme in schemes} - {names[dtype]}
    if others:
        warnings.warn(
            f"the model is {dtype}, scales are {', '.join(sorted(others)).lower()}: engines that "
            "cast scales to the dtype of the model round them; load the model in that dtype, or "
            f"quantize with a scheme that ends in _{names[dtype]}",
            stacklevel=3,
        )
