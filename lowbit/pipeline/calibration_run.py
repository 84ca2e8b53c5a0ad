"""`calibrate`: one pass of the full-precision model, whose statistics serve any number of runs.

What is measured differs from what `quantize` measures as it goes: there, each layer's inputs come
from layers that are quantized already, for one scheme and algorithm; here nothing is quantized, so
the statistics fit all of them equally.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowbit.calibration.measure import InputStatistics, measure_inputs
from lowbit.calibration.tokens import CalibrationTokens
from lowbit.checkpoint import Checkpoint, write_json
from lowbit.checkpoint.journal import (
    MANIFEST_NAME,
    Fingerprint,
    Journal,
    claim,
    threads_of_run,
)
from lowbit.hf.loading import choose_device
from lowbit.memory import release_freed_memory
from lowbit.models.selection import measurable_modules
from lowbit.models.streaming import StreamedDecoder
from lowbit.pipeline.pieces import Piece, plan_pieces
from lowbit.pipeline.source import (
    calibration_tokens,
    check_places,
    compute_dtype,
    linear_widths,
    local_directory,
    require_space,
    split_batches,
    weights_fingerprint,
)
from lowbit.pipeline.stored_statistics import (
    KIND,
    StoredStatistics,
    stored_bytes,
    write_statistics,
)
from lowbit.pipeline.streams import Streams
from lowbit.progress import RunProgress
from lowbit.scheme import Scheme


def calibrate(
    model: str | Path,
    output: str | Path,
    *,
    calibration: str | Path,
    samples: int = 128,
    seqlen: int = 512,
    seed: int = 0,
    text_field: str | None = None,
    loss_mask: bool = False,
    device: str | torch.device | None = None,
    resume: bool = False,
    progress: bool = True,
) -> StoredStatistics:
    """Measures the inputs of every linear layer and returns the statistics, stored in `output`.

    Args:
        model: directory of a Hugging Face decoder in safetensors, or the name of one on the hub.
        output: directory to write, new or empty.
        calibration: text file, JSONL, data set name, or a .safetensors / .npy file of token ids.
        samples: calibration windows.
        seqlen: tokens per window.
        seed: chooses the windows.
        text_field: the field of JSONL or hub rows that holds a text or chat messages.
        loss_mask: of chat messages, count only the tokens of answers.
        device: where blocks are run; the GPU if there is one, else the CPU.
        resume: go on with the unfinished run in `output`.
        progress: show a progress bar on standard error.

    Raises:
        LowbitError: bad input, or too little space on the disk.
    """
    directory, where = Path(output), choose_device(device)
    checkpoint = Checkpoint.open(local_directory(model))
    check_places(checkpoint, directory, resume)
    decoder = StreamedDecoder(checkpoint, compute_dtype(checkpoint, where, True), where)
    tokens = calibration_tokens(decoder, calibration, samples, seqlen, seed, text_field, loss_mask)
    with threads_of_run(directory):
        return Calibration(decoder, tokens, directory).execute(resume, progress)


@dataclass(frozen=True)
class Calibration:
    """Everything the measuring needs, checked.

    Args:
        decoder: the streamed model.
        tokens: calibration windows.
        directory: the output.
    """

    decoder: StreamedDecoder
    tokens: CalibrationTokens
    directory: Path

    def execute(self, resume: bool, progress: bool) -> StoredStatistics:
        """Returns the finished statistics."""
        source = self.decoder.checkpoint
        with RunProgress(progress) as bar:
            bar.stage("checking weights", sum(e.end - e.begin for e in source.entries.values()))
            fingerprint = self.fingerprint(source.verify(bar.advance))
            with claim(self.directory, resume):
                journal = Journal.start(self.directory, fingerprint)
                if not journal.complete:
                    CalibrationRun(self.decoder, self.tokens, journal, bar).execute()
                    manifest = {"fingerprint": journal.fingerprint, "parts": journal.parts}
                    write_json(self.directory / MANIFEST_NAME, manifest)
                    journal.remove()
        return StoredStatistics.open(self.directory)

    def fingerprint(self, weights: dict[str, str]) -> Fingerprint:
        """Returns everything that the statistics depend on, as JSON values."""
        content = weights_fingerprint(self.decoder, weights)
        content["kind"] = KIND
        content["calibration"] = {**self.tokens.description, "digest": self.tokens.digest}
        return cast(Fingerprint, json.loads(json.dumps(content)))


class CalibrationRun:
    """The state of one run: piece after piece through load, measure, write, free.

    Args:
        decoder: the streamed model.
        tokens: calibration windows.
        journal: what is finished; its directory receives the shards.
        progress: told about blocks.
    """

    def __init__(
        self,
        decoder: StreamedDecoder,
        tokens: CalibrationTokens,
        journal: Journal,
        progress: RunProgress,
    ) -> None:
        self.decoder, self.journal, self.progress = decoder, journal, progress
        self.batches = split_batches(tokens.ids)
        self.masks = None if tokens.mask is None else split_batches(tokens.mask)
        # The scheme only says that a module belongs to a piece.
        names = dict.fromkeys(measurable_modules(decoder.model), Scheme.parse("W8A16_CHANNEL"))
        self.widths = linear_widths(decoder, names)
        self.pieces = plan_pieces(decoder, names)
        self._streams = Streams(decoder, self.batches, with_reference=False)

    def execute(self) -> None:
        """Brings the statistics of every piece to disk."""
        self.progress.stage("measuring", len(self.pieces))
        done = self.journal.parts
        last = max((i for i, piece in enumerate(self.pieces) if piece.modules), default=0)
        for index, piece in enumerate(self.pieces[: last + 1]):
            self.progress.describe(f"measuring {piece.name}")
            self._load(piece)
            if not piece.modules or piece.name in done:
                self._streams.advance(piece.block)
            else:
                self._measure(piece, index)
            self._free(piece)
            release_freed_memory()
            self.progress.advance(1)

    def _load(self, piece: Piece) -> None:
        self.decoder.load(piece.targets)
        if piece.name == self.decoder.head_name and not self.decoder.targets(piece.name):
            self.decoder.load_tied_head()

    def _measure(self, piece: Piece, index: int) -> None:
        """Measures a piece and writes its shard; a block's outputs become the next inputs."""
        modules: dict[str, nn.Module] = {
            name: self.decoder.model.get_submodule(name) for name in piece.modules
        }
        run = self._streams.runner(piece.block)
        groups, outputs = measure_inputs(
            run, len(self.batches), modules, self.widths, self.masks, stop=piece.block is None
        )
        self._check_space(piece, groups)
        if piece.block is not None:
            self._streams.inputs.hidden[:] = cast(list[Tensor], outputs)
        file = self.journal.directory / f"stats-{index + 1:05d}-of-{len(self.pieces):05d}"
        file = file.with_suffix(".safetensors")
        write_statistics(file, {group.members[0]: group for group in groups})
        reached = {name for group in groups for name in group.members}
        self.journal.finish_part(
            piece.name,
            file,
            {group.members[0]: self._report(group) for group in groups},
            unreached=[name for name in modules if name not in reached],
        )

    def _report(self, group: InputStatistics) -> dict[str, Any]:
        return {
            "members": list(group.members),
            "in_features": self.widths[group.members[0]],
            "tokens": group.tokens,
            "dropped": group.dropped,
        }

    def _check_space(self, piece: Piece, groups: list[InputStatistics]) -> None:
        """Refuses before the first shard if all of them cannot fit: blocks are much alike."""
        if self.journal.parts or piece.block is None:
            return
        block = sum(stored_bytes(self.widths[group.members[0]]) for group in groups)
        outside = [name for p in self.pieces if p.block is None for name in p.modules]
        head = sum(stored_bytes(self.widths[name]) for name in outside)
        require_space(
            self.journal.directory, block * len(self.decoder.layers) + head, "a set of statistics"
        )

    def _free(self, piece: Piece) -> None:
        if piece.block is not None:
            self.decoder.free(self.decoder.layers[piece.block])
        elif piece is self.pieces[0]:
            # What is small stays: the norm after the blocks is needed to measure the head.
            self.decoder.free(self.decoder.model.get_input_embeddings())
