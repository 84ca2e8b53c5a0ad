"""One quantization run: piece after piece of the decoder through load, measure, quantize, write,
free.

The pieces are the modules outside the blocks, each block, and an output projection that is not
tied. Within a piece, linears that share an input are quantized together, and statistics for the
next group are taken with the earlier groups already quantized (true sequential order, GPTQ
appendix of the public implementations). Where no statistics are wanted, nothing is run at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.algorithms import Algorithm, make_algorithm
from lowbit.algorithms.base import Statistics
from lowbit.calibration.capture import collect_statistics, input_groups
from lowbit.checkpoint.journal import Journal
from lowbit.checkpoint.reader import read_header, read_quantized
from lowbit.checkpoint.writer import ShardWriter
from lowbit.errors import LowbitError
from lowbit.memory import release_freed_memory
from lowbit.models.streaming import Activations, StreamedDecoder
from lowbit.nn.replace import weight_is_transposed, weight_shape
from lowbit.pipeline.output import shard_name
from lowbit.progress import RunProgress
from lowbit.quant import QuantizedWeight
from lowbit.scheme import INT8_STATIC, Scheme


@dataclass(frozen=True)
class Piece:
    """A part of the decoder that is loaded, quantized and written as a whole.

    Args:
        name: its name in the journal and the manifest.
        targets: the parameters that belong to it.
        modules: name -> scheme of what is quantized in it, in the model's order.
        block: the index of the block, None outside the blocks.
    """

    name: str
    targets: list[str]
    modules: dict[str, Scheme]
    block: int | None = None


class QuantizationRun:
    """The state of one run.

    Args:
        decoder: the streamed model.
        selected: module name -> scheme.
        algorithm: chooses codes.
        batches: calibration tokens, int64 `[batch, seqlen]` each; empty to run nothing.
        journal: what is finished; its directory receives the shards.
        progress: told about blocks, layers and losses.
    """

    def __init__(
        self,
        decoder: StreamedDecoder,
        selected: dict[str, Scheme],
        algorithm: Algorithm,
        batches: list[Tensor],
        journal: Journal,
        progress: RunProgress,
    ) -> None:
        self.decoder, self.selected, self.algorithm = decoder, selected, algorithm
        self.batches, self.journal, self.progress = batches, journal, progress
        self.pieces = plan_pieces(decoder, selected)
        self.sentinel: str | None = None
        self._activations: Activations | None = None
        self._last_loss: float | int | str | None = None
        # Embeddings are looked up, not multiplied: their inputs have no Hessian.
        self._data_free = make_algorithm("rtn")

    def execute(self, sentinel: str) -> list[str]:
        """Brings every piece to disk and returns the names of the shards.

        Args:
            sentinel: name of the 0-element tensor that makes loading without lowbit fail.
        """
        total = sum(self._weights(piece) for piece in self.pieces)
        self.progress.stage("quantizing", total)
        self.sentinel = sentinel
        done = self.journal.parts
        open_pieces = [i for i, p in enumerate(self.pieces) if p.modules and p.name not in done]
        last_measured = max(open_pieces, default=-1)
        for index, piece in enumerate(self.pieces):
            finished = piece.name in done
            propagate = bool(self.batches) and index < last_measured
            if finished and not propagate:
                self.progress.advance(self._weights(piece))
                continue
            self._load(piece)
            if finished:
                self._restore(piece)
            else:
                self._quantize_piece(piece, index)
            if propagate:
                self._propagate(piece)
            self._free(piece)
            release_freed_memory()
        return [self.journal.parts[piece.name]["file"] for piece in self.pieces]

    def _load(self, piece: Piece) -> None:
        """Gives a piece its weights, as far as it will be run.

        Without calibration it will not: weights are then read one by one, as they are quantized,
        except for those that transformers makes out of several tensors.
        """
        if not self.batches:
            sources = self.decoder.sources
            self.decoder.load([target for target in piece.targets if sources[target].converted])
            return
        self.decoder.load(piece.targets)
        if piece.name == self.decoder.head_name and not self.decoder.targets(piece.name):
            self.decoder.load_tied_head()

    def _weights(self, piece: Piece) -> int:
        sources = (self.decoder.sources[target] for target in piece.targets)
        return sum(math.prod(entry.shape) for source in sources for entry in source.entries)

    def _quantize_piece(self, piece: Piece, index: int) -> None:
        file = self.journal.directory / shard_name(index, len(self.pieces))
        specs = [
            f"{name}.{key}" for name, scheme in piece.modules.items() for key in _all_keys(scheme)
        ]
        bound = ShardWriter.header_bound([*piece.targets, *specs, self.sentinel or ""])
        reports: dict[str, Any] = {}
        done: set[str] = set()
        with ShardWriter(file, bound) as writer:
            if index == 0 and self.sentinel:
                writer.add(self.sentinel, torch.empty(0, dtype=torch.uint8))
            for group, statistics in self._groups(piece):
                for name in group:
                    self._describe(piece, name.removeprefix(piece.name + "."))
                    reports[name] = self._quantize_module(
                        name, piece.modules[name], statistics, writer
                    )
                    done.add(f"{name}.weight")
            for target in piece.targets:
                if target not in done:
                    writer.add(target, self.decoder.original(target))
        ordered = {name: reports[name] for name in piece.modules}
        self.journal.finish_part(piece.name, file, ordered)
        rest = self._weights(piece) - sum(report["weights"] for report in reports.values())
        self.progress.advance(max(rest, 0))

    def _groups(self, piece: Piece) -> Iterator[tuple[list[str], Statistics | None]]:
        """Yields the modules that are quantized together, with the statistics of their input."""
        linears = {name: self._module(name) for name in piece.modules}
        for name in [n for n, module in linears.items() if isinstance(module, nn.Embedding)]:
            del linears[name]
            yield [name], None
        if not self.batches or not linears:
            yield from (([name], None) for name in linears)
            return
        run = self._runner(piece)
        self._describe(piece, "measuring")
        groups = input_groups(lambda: run(0), linears)
        for group in groups:
            module = linears[group[0]]
            self._describe(piece, "measuring")
            static = any(piece.modules[name].activations == INT8_STATIC for name in group)
            statistics = collect_statistics(
                run, len(self.batches), module, weight_shape(module)[1], group[0], static
            )
            yield group, statistics
        called = {name for group in groups for name in group}
        yield from (([name], None) for name in linears if name not in called)

    def _runner(self, piece: Piece) -> Callable[[int], Any]:
        activations = self._require_activations()
        if piece.block is None:
            return lambda batch: self.decoder.run_tail(activations, batch)
        block = piece.block
        return lambda batch: self.decoder.run_block(block, activations, batch)

    def _quantize_module(
        self, name: str, scheme: Scheme, statistics: Statistics | None, writer: ShardWriter
    ) -> dict[str, Any]:
        """Quantizes one module, appends its tensors, puts the decoded weight in place."""
        module = self._module(name)
        # As stored: the loaded copy may have been rounded to the dtype of computation.
        weight = self.decoder.original(f"{name}.weight").to(self.decoder.device)
        weight = weight.T if weight_is_transposed(module) else weight
        algorithm = self.algorithm
        report: dict[str, float | str] = {}
        if algorithm.needs_statistics and statistics is None:
            algorithm = self._data_free
            if not isinstance(module, nn.Embedding):
                report["fallback"] = "rtn: calibration never reached this layer"
        result = algorithm.quantize(weight, scheme, statistics)
        input_scale = None
        if scheme.activations == INT8_STATIC:
            input_scale = _input_scale(name, statistics)
            report["input_scale"] = float(input_scale)
        qweight = QuantizedWeight.from_codes(result.codes, result.grid, input_scale)
        for suffix, tensor in qweight.tensors().items():
            writer.add(f"{name}.{suffix}", tensor)
        if self.batches:
            _set_weight(module, qweight)
        self.progress.advance(weight.numel())
        self._last_loss = result.report.get("loss")
        return {
            "scheme": str(scheme),
            "algorithm": algorithm.name,
            "shape": list(qweight.shape),
            "weights": weight.numel(),
            "stored_bytes": scheme.stored_bytes(qweight.shape),
            **({"tokens": statistics.tokens} if statistics else {}),
            **({"dropped_tokens": statistics.dropped} if statistics and statistics.dropped else {}),
            **report,
            **result.report,
        }

    def _describe(self, piece: Piece, doing: str) -> None:
        """Shows block, layer and the loss of the layer before."""
        block = piece.name if piece.block is None else f"block {piece.block + 1}"
        of = "" if piece.block is None else f"/{len(self.decoder.layers)}"
        loss = "" if self._last_loss is None else f"loss {float(self._last_loss):.1e}"
        self.progress.describe(f"{block}{of} {doing:<20.20} {loss:<12}")

    def _restore(self, piece: Piece) -> None:
        """Puts the decoded weights of a finished piece in place, from its shard."""
        file = self.journal.directory / self.journal.parts[piece.name]["file"]
        entries = {entry.name: entry for entry in read_header(file)}
        for name, scheme in piece.modules.items():
            module = self._module(name)
            _set_weight(module, read_quantized(entries, name, scheme, weight_shape(module)))
        self._describe(piece, "finished before")
        self.progress.advance(self._weights(piece))

    def _propagate(self, piece: Piece) -> None:
        """Runs a quantized piece, so that the next one is measured on what it will really see."""
        if piece.block is None:
            self._activations = self.decoder.start(self.batches)
            return
        activations = self._require_activations()
        for batch in range(len(self.batches)):
            activations.hidden[batch] = self.decoder.run_block(piece.block, activations, batch)

    def _require_activations(self) -> Activations:
        if self._activations is None:
            raise AssertionError("the pieces before this one did not run")
        return self._activations

    def _free(self, piece: Piece) -> None:
        if piece.block is not None:
            self.decoder.free(self.decoder.layers[piece.block])
        elif piece is not self.pieces[0]:
            return
        else:
            # What is small stays: the norm after the blocks is needed to measure the head.
            self.decoder.free(self.decoder.model.get_input_embeddings())

    def _module(self, name: str) -> nn.Module:
        module: nn.Module = self.decoder.model.get_submodule(name)
        return module


def plan_pieces(decoder: StreamedDecoder, selected: dict[str, Scheme]) -> list[Piece]:
    """Returns the pieces of a decoder in the order in which they are processed."""
    head = decoder.head_name
    blocks = [decoder.block_name(index) for index in range(len(decoder.layers))]
    inside = {target for name in blocks for target in decoder.targets(name)}
    head_targets = decoder.targets(head) if head else []
    outside = [t for t in decoder.sources if t not in inside and t not in head_targets]
    pieces = [Piece("outside", outside, _within(selected, {decoder.embedding_name}))]
    for index, name in enumerate(blocks):
        modules = {m: s for m, s in selected.items() if m.startswith(name + ".")}
        pieces.append(Piece(name, decoder.targets(name), modules, index))
    head_modules = _within(selected, {head} if head else set())
    if head and (head_targets or head_modules):
        pieces.append(Piece(head, head_targets, head_modules))
    return pieces


def _within(selected: dict[str, Scheme], names: set[str]) -> dict[str, Scheme]:
    return {name: scheme for name, scheme in selected.items() if name in names}


def _all_keys(scheme: Scheme) -> list[str]:
    return list(scheme.tensor_specs((1, 1)))


def _input_scale(name: str, statistics: Statistics | None) -> Tensor:
    """Returns the calibrated scale of the inputs of module `name`.

    Raises:
        LowbitError: if calibration never reached it; a guess would go unnoticed.
    """
    if statistics is None or statistics.input_scale is None:
        raise LowbitError(
            f"{name}: calibration never reached this layer, so its activations have no scale; "
            "give more calibration text, or, with `dynamic`, a scheme without one, such as W8A8"
        )
    return statistics.input_scale.cpu()


def _weight(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _set_weight(module: nn.Module, qweight: QuantizedWeight) -> None:
    weight = _weight(module)
    decoded = qweight.dequantize(weight.dtype).to(weight.device)
    weight.data = decoded.T if weight_is_transposed(module) else decoded
