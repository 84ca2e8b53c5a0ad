"""A checked run: what its result depends on, and the files around its shards."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor

from lowbit import __version__
from lowbit.calibration.tokens import CalibrationTokens
from lowbit.checkpoint import write_json
from lowbit.checkpoint.journal import MANIFEST_NAME, Fingerprint, Journal, claim
from lowbit.checkpoint.reader import IN_PROGRESS, file_digest
from lowbit.errors import LowbitError
from lowbit.hf.config import LowbitConfig, sentinel_key
from lowbit.models.streaming import StreamedDecoder
from lowbit.pipeline.output import digest_json, manifest, side_files, write_index, write_side_files
from lowbit.pipeline.run import QuantizationRun
from lowbit.progress import RunProgress
from lowbit.recipe import Recipe
from lowbit.scheme import Scheme

# Tokens that go through a block at once: enough to fill a matmul, small beside a block's weights.
BATCH_TOKENS = 4096


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
    """

    decoder: StreamedDecoder
    selected: dict[str, Scheme]
    recipe: Recipe
    tokens: CalibrationTokens | None
    config: LowbitConfig
    directory: Path

    def execute(self, resume: bool, progress: bool) -> QuantizedCheckpoint:
        """Returns the finished checkpoint; see `output.py` for the order of writing."""
        source = self.decoder.checkpoint
        with RunProgress(progress) as bar:
            bar.stage("checking weights", sum(e.end - e.begin for e in source.entries.values()))
            fingerprint = self.fingerprint(source.verify(bar.advance))
            self._check_space()
            with claim(self.directory, resume):
                journal = Journal.start(self.directory, fingerprint)
                if not journal.complete:
                    self._write_config({"status": IN_PROGRESS})
                    self._run(journal, bar)
        content = manifest(journal, self.selected)
        return QuantizedCheckpoint(self.directory, content)

    def _run(self, journal: Journal, bar: RunProgress) -> None:
        """Does what is not done yet, then makes the directory valid."""
        run = QuantizationRun(
            self.decoder, self.selected, self.recipe, self._batches(), journal, bar
        )
        files = run.execute(sentinel_key(self.selected))
        write_index(self.directory, files)
        write_side_files(self.decoder.checkpoint.path, self.directory)
        write_json(self.directory / MANIFEST_NAME, manifest(journal, self.selected))
        self._write_config({"manifest": MANIFEST_NAME})
        journal.remove()

    def fingerprint(self, weights: dict[str, str]) -> Fingerprint:
        """Returns everything that the bytes of the result depend on, as JSON values.

        Args:
            weights: file name -> SHA-256 of the source's files.
        """
        tokens, source = self.tokens, self.decoder.checkpoint
        content: Fingerprint = {
            "versions": {
                "lowbit": __version__,
                "torch": str(torch.__version__),
                "transformers": transformers.__version__,
            },
            "model": {
                "config": digest_json(source.config),
                "weights": weights,
                "side_files": {f.name: file_digest(f) for f in side_files(source.path)},
            },
            "ignored_tensors": self.decoder.ignored,
            "options": self.config.to_dict(),
            "calibration": {**tokens.description, "digest": tokens.digest} if tokens else None,
            "device": self.decoder.device.type,
            "dtype": str(self.decoder.dtype).removeprefix("torch."),
            # How a sum is split over threads decides its last bits.
            "threads": torch.get_num_threads(),
        }
        # Compared with what a journal gives back: tuples have become lists there.
        return cast(Fingerprint, json.loads(json.dumps(content)))

    def _batches(self) -> list[Tensor]:
        if self.tokens is None:
            return []
        ids = self.tokens.ids
        return list(torch.split(ids, max(1, BATCH_TOKENS // ids.shape[1])))

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
        existing = (self.directory.absolute(), *self.directory.absolute().parents)
        free = shutil.disk_usage(next(path for path in existing if path.exists())).free
        if free < needed:
            raise LowbitError(
                f"{self.directory}: the result needs about {needed / 1e9:.2f} GB, but the disk has "
                f"{free / 1e9:.2f} GB free; choose another disk"
            )

    def _write_config(self, state: dict[str, str]) -> None:
        """Writes `config.json`: the source's, with ours and `state` as `quantization_config`."""
        content = dict(self.decoder.checkpoint.config)
        content["quantization_config"] = {**self.config.to_dict(), **state}
        if self.decoder.head_name in self.selected:
            content["tie_word_embeddings"] = False  # the head has its own codes now
        write_json(self.directory / "config.json", content)
