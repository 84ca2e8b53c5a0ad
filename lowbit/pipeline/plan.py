"""A checked run: what its result depends on, and the files around its shards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from lowbit.calibration.tokens import CalibrationTokens
from lowbit.checkpoint import write_json
from lowbit.checkpoint.journal import CHECKSUM, MANIFEST_NAME, Fingerprint, Journal, claim
from lowbit.checkpoint.reader import IN_PROGRESS, file_digest, read_header
from lowbit.checkpoint.replacement import begin_replacement, finish_replacement
from lowbit.hf.config import LowbitConfig, sentinel_key
from lowbit.models.streaming import StreamedDecoder
from lowbit.pipeline.allocation import require_budget
from lowbit.pipeline.output import digest_json, manifest, side_files, write_index, write_side_files
from lowbit.pipeline.run import QuantizationRun
from lowbit.pipeline.source import (
    BATCH_TOKENS,
    require_space,
    split_batches,
    weights_fingerprint,
)
from lowbit.pipeline.stored_statistics import StoredStatistics
from lowbit.progress import RunProgress
from lowbit.quant import QuantizedWeight
from lowbit.recipe import Recipe
from lowbit.scheme import Scheme

# Tuning has at least as many batches to learn from and to judge, where there are enough windows.
MIN_BATCHES = 8


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A finished output directory.

    Args:
        path: the directory.
        manifest: the content of its `lowbit_manifest.json`.
    """

    path: Path
    manifest: dict[str, Any]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight: codes, padding, scales and zero points."""
        return float(self.manifest["summary"]["bits_per_weight"])


@dataclass(frozen=True)
class Plan:
    """Everything a run needs, checked.

    Args:
        decoder: the streamed source.
        selected: module name -> scheme.
        recipe: what is done to each block.
        tokens: calibration windows, None to run nothing.
        config: what `config.json` will say.
        directory: the output.
        stored: statistics measured before, instead of tokens.
        allocated: how schemes were chosen to meet a budget, JSON values; None if they were given.
    """

    decoder: StreamedDecoder
    selected: dict[str, Scheme]
    recipe: Recipe
    tokens: CalibrationTokens | None
    config: LowbitConfig
    directory: Path
    stored: StoredStatistics | None = None
    allocated: dict[str, Any] | None = None

    def execute(self, resume: bool, progress: bool) -> QuantizedCheckpoint:
        """Returns the finished checkpoint; see `output.py` for the order of writing."""
        source = self.decoder.checkpoint
        with RunProgress(progress) as bar:
            bar.stage("checking weights", sum(e.end - e.begin for e in source.entries.values()))
            weights = source.verify(bar.advance)
            if self.stored is not None:
                own: dict[str, Any] = {"config": digest_json(source.config), "weights": weights}
                measured = source.measured_model() or own
                self.stored.require_model(measured["config"], measured["weights"])
            fingerprint = self.fingerprint(weights)
            self._check_space()
            with claim(self.directory, resume):
                journal = Journal.start(self.directory, fingerprint)
                if not journal.complete:
                    self._write_config({"status": IN_PROGRESS})
                    self._run(journal, bar)
        content = self._manifest(journal)
        if self.allocated is not None:
            stored_bytes = content["summary"]["quantized_bytes"]
            require_budget(self.allocated, self.directory, stored_bytes)
        return QuantizedCheckpoint(self.directory, content)

    def _run(self, journal: Journal, bar: RunProgress) -> None:
        """Does what is not done yet, then makes the directory valid."""
        tokens = self.tokens
        size = self._batch_tokens()
        batches = [] if tokens is None else split_batches(tokens.ids, size)
        masks = None if tokens is None or tokens.mask is None else split_batches(tokens.mask, size)
        run = QuantizationRun(
            self.decoder, self.selected, self.recipe, batches, journal, bar, masks, self.stored
        )
        files = run.execute(sentinel_key(self.selected))
        self._tune_end_to_end(journal, files, bar)
        write_index(self.directory, files)
        write_side_files(self.decoder.checkpoint.path, self.directory)
        write_json(self.directory / MANIFEST_NAME, self._manifest(journal))
        self._write_config({"manifest": MANIFEST_NAME, **self._done(journal)})
        journal.remove()

    def _done(self, journal: Journal) -> dict[str, Any]:
        """Returns the recipe without a fold that has changed nothing.

        What reads the config knows by it whether the codes stand for the model's own weights.
        """
        recipe = dict(self.config.recipe or {})
        folds = [part["fold"] for part in journal.parts.values() if "fold" in part]
        if "fold" not in recipe or any(report["changed"] for report in folds):
            return {}
        del recipe["fold"]
        return {"recipe": recipe}

    def _batch_tokens(self) -> int:
        """Returns how many tokens are run at once.

        Tuning says what it wants, but never so much that too few batches are left to hold some out.
        """
        if self.recipe.tuning is None or self.tokens is None:
            return BATCH_TOKENS
        return min(self.recipe.tuning.batch_tokens, self.tokens.ids.numel() // MIN_BATCHES)

    def _tune_end_to_end(self, journal: Journal, files: list[str], bar: RunProgress) -> None:
        """Lets the recipe improve the finished shards; a killed run goes on where it was."""
        step = self.recipe.end_to_end
        if step is None or self.tokens is None:
            return
        if step.name not in journal.stages:
            shards = [self.directory / file for file in files]
            tokens, mask = self.tokens.ids, self.tokens.mask
            tuned = step.tune(shards, self.decoder, self.selected, tokens, bar, mask)
            self._renew_checksums(journal, tuned.tensors)
            begin_replacement(journal, tuned.tensors, step.name, tuned.report)
        finish_replacement(journal)

    def _renew_checksums(self, journal: Journal, tensors: Mapping[str, Tensor]) -> None:
        """Lets the journal, when it is written next, know what changed modules decode to."""
        for part in journal.parts.values():
            file = self.directory / part["file"]
            entries = {entry.name: entry for entry in read_header(file)}
            for name, report in part["modules"].items():
                specs = Scheme.parse(report["scheme"]).tensor_specs(tuple(report["shape"]))
                stored = {key: f"{name}.{key}" for key in specs}
                if not any(full in tensors for full in stored.values()):
                    continue
                found = {
                    key: tensors[full] if full in tensors else entries[full].read()
                    for key, full in stored.items()
                }
                qweight = QuantizedWeight.from_tensors(
                    Scheme.parse(report["scheme"]), tuple(report["shape"]), found, name
                )
                report[CHECKSUM] = qweight.checksum()

    def _manifest(self, journal: Journal) -> dict[str, Any]:
        allocation = {} if self.allocated is None else {"allocation": self.allocated}
        return {**manifest(journal, self.selected), **allocation}

    def fingerprint(self, weights: dict[str, str]) -> Fingerprint:
        """Returns everything that the bytes of the result depend on, as JSON values.

        Args:
            weights: file name -> SHA-256 of the source's files.
        """
        tokens, source = self.tokens, self.decoder.checkpoint
        content = weights_fingerprint(self.decoder, weights)
        content["model"]["side_files"] = {f.name: file_digest(f) for f in side_files(source.path)}
        content["ignored_tensors"] = self.decoder.ignored
        content["options"] = self.config.to_dict()
        content["calibration"] = None
        if tokens is not None:
            content["calibration"] = {**tokens.description, "digest": tokens.digest}
        elif self.stored is not None:
            content["calibration"] = self.stored.description()
            if source.derivation is not None:
                content["calibration"]["of"] = "the full-precision model, before it was changed"
        if source.derivation is not None:
            content["derivation"] = source.derivation
        # Compared with what a journal gives back: tuples have become lists there.
        return cast(Fingerprint, json.loads(json.dumps(content)))

    def _check_space(self) -> None:
        """Refuses before any work if the result cannot fit on the disk."""
        entries = self.decoder.checkpoint.entries
        needed = sum(entry.end - entry.begin for entry in entries.values())
        for name, scheme in self.selected.items():
            source = self.decoder.sources.get(f"{name}.weight")
            for entry in source.entries if source else ():
                rows, columns = entry.shape
                needed += scheme.stored_bytes((rows, columns)) - (entry.end - entry.begin)
        # What an interrupted run has written needs no space again.
        needed -= sum(file.stat().st_size for file in self.directory.glob("*.safetensors"))
        require_space(self.directory, needed, "a result")

    def _write_config(self, state: dict[str, Any]) -> None:
        """Writes `config.json`: the source's, with ours and `state` as `quantization_config`."""
        content = dict(self.decoder.checkpoint.config)
        content["quantization_config"] = {**self.config.to_dict(), **state}
        if self.decoder.head_name in self.selected:
            content["tie_word_embeddings"] = False  # the head has its own codes now
        write_json(self.directory / "config.json", content)
