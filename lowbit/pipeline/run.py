"""One quantization run: piece after piece of the decoder through load, measure, quantize, write,
free.

The pieces are the modules outside the blocks, each block, and an output projection that is not
tied. Within a piece, linears that share an input are quantized together, and statistics for the
next group are taken with the earlier groups already quantized (true sequential order, GPTQ
appendix of the public implementations). Where no statistics are wanted, nothing is run at all.

What the recipe does to a block as a whole comes before its first group and after its last one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lowbit.algorithms import make_algorithm
from lowbit.algorithms.base import Statistics
from lowbit.calibration.capture import collect_statistics, input_groups
from lowbit.checkpoint.journal import CHECKSUM, Journal
from lowbit.checkpoint.reader import read_header, read_quantized
from lowbit.checkpoint.writer import ShardWriter
from lowbit.errors import LowbitError
from lowbit.memory import release_freed_memory
from lowbit.models.streaming import StreamedDecoder, call_block
from lowbit.nn.replace import weight_is_transposed, weight_shape
from lowbit.pipeline.output import shard_name
from lowbit.pipeline.pieces import OpenPiece, Piece, plan_pieces
from lowbit.pipeline.stored_statistics import StoredStatistics
from lowbit.pipeline.streams import Streams
from lowbit.progress import RunProgress
from lowbit.quant import QuantizedWeight
from lowbit.recipe import Recipe
from lowbit.scheme import INT8_STATIC, Scheme
from lowbit.tuning.view import BlockView


class QuantizationRun:
    """The state of one run.

    Args:
        decoder: the streamed model.
        selected: module name -> scheme.
        recipe: what is done to each block.
        batches: calibration tokens, int64 `[batch, seqlen]` each; empty to run nothing.
        journal: what is finished; its directory receives the shards.
        progress: told about blocks, layers and losses.
        masks: bool `[batch, seqlen]` for each batch, which tokens statistics count; None for all.
        stored: statistics measured before, instead of batches.
    """

    def __init__(
        self,
        decoder: StreamedDecoder,
        selected: dict[str, Scheme],
        recipe: Recipe,
        batches: list[Tensor],
        journal: Journal,
        progress: RunProgress,
        masks: list[Tensor] | None = None,
        stored: StoredStatistics | None = None,
    ) -> None:
        self.decoder, self.selected, self.recipe = decoder, selected, recipe
        self.batches, self.journal, self.progress = batches, journal, progress
        self.masks, self.stored = masks, stored
        self.pieces = plan_pieces(decoder, selected)
        self.sentinel: str | None = None
        self._streams = Streams(decoder, batches, recipe.keeps_reference)
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
            self._streams.observe(piece.block)
            if finished:
                self._restore(piece)
            else:
                self._quantize_piece(piece, index)
            if propagate:
                self._streams.advance(piece.block)
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
        state = OpenPiece()
        with ShardWriter(file, bound) as writer:
            if index == 0 and self.sentinel:
                writer.add(self.sentinel, torch.empty(0, dtype=torch.uint8))
            self._fold(piece, state)
            tuned = self.recipe.tuning is not None and self._is_whole_block(piece)
            for group, statistics in self._groups(piece):
                for name in group:
                    self._describe(piece, name.removeprefix(piece.name + "."))
                    self._quantize_module(piece, name, statistics, state)
                    if not tuned:
                        self._write_module(name, state, writer)
            if tuned:
                self._tune(piece, state)
                for name in piece.modules:
                    self._write_module(name, state, writer)
            for target in piece.targets:
                if target.removesuffix(".weight") not in piece.modules:
                    changed = target in state.changed
                    writer.add(
                        target, self._stored(target) if changed else self.decoder.original(target)
                    )
        ordered = {name: state.reports[name] for name in piece.modules}
        self.journal.finish_part(piece.name, file, ordered, **state.whole)
        rest = self._weights(piece) - sum(report["weights"] for report in ordered.values())
        self.progress.advance(max(rest, 0))

    def _is_whole_block(self, piece: Piece) -> bool:
        """Returns whether steps that work on whole blocks apply to `piece`."""
        return piece.block is not None and bool(piece.modules) and bool(self.batches)

    def _fold(self, piece: Piece, state: OpenPiece) -> None:
        """Lets the recipe fold a block, and keeps a copy of it where one is needed."""
        if not self._is_whole_block(piece) or not self.recipe.keeps_reference:
            return
        assert piece.block is not None
        if self.recipe.fold is not None:
            self._describe(piece, self.recipe.fold.name)
            report = self.recipe.fold.fold(self._view(piece))
            state.changed |= set(report["changed"])
            state.whole["fold"] = report
            self._round_changed(piece, state)
        if self.recipe.mismatch:
            self._streams.keep_block(piece.block)

    def _tune(self, piece: Piece, state: OpenPiece) -> None:
        """Lets the recipe improve the quantized block, and puts the outcome in place."""
        assert self.recipe.tuning is not None
        self._describe(piece, self.recipe.tuning.name)
        tuned = self.recipe.tuning.tune(self._view(piece), state.weights, state.results)
        state.results = tuned.modules
        state.changed |= set(tuned.changed)
        state.whole["tuning"] = tuned.report
        self._round_changed(piece, state)
        for name in piece.modules:
            _set_weight(self._module(name), _qweight(name, state))

    def _view(self, piece: Piece) -> BlockView:
        assert piece.block is not None
        block, module = piece.block, self.decoder.layers[piece.block]

        def forward(hidden: Tensor, batch: int) -> Tensor:
            return call_block(module, hidden, self._streams.call(block, batch))

        inputs, targets = self._streams.inputs.hidden, self._streams.targets
        return BlockView(
            piece.name, module, piece.modules, list(inputs), list(targets), forward, self.masks
        )

    def _round_changed(self, piece: Piece, state: OpenPiece) -> None:
        """Rounds changed parameters that are not quantized to what the checkpoint stores."""
        state.whole["changed"] = sorted(state.changed)
        for target in piece.targets:
            if target in state.changed and target.removesuffix(".weight") not in piece.modules:
                parameter = self.decoder.model.get_parameter(target)
                parameter.data = self._stored(target).to(parameter)

    def _stored(self, target: str) -> Tensor:
        """Returns the parameter `target` as it is now, in the dtype of the checkpoint."""
        dtype = self.decoder.sources[target].entries[0].dtype
        parameter: Tensor = self.decoder.model.get_parameter(target)
        return parameter.detach().to(dtype)

    def _groups(self, piece: Piece) -> Iterator[tuple[list[str], Statistics | None]]:
        """Yields the modules that are quantized together, with the statistics of their input."""
        linears = {name: self._module(name) for name in piece.modules}
        for name in [n for n, module in linears.items() if isinstance(module, nn.Embedding)]:
            del linears[name]
            yield [name], None
        if self.stored is not None and linears:
            yield from self.stored.groups(piece.name, list(linears), self.decoder.device)
            return
        if not self.batches or not linears:
            yield from (([name], None) for name in linears)
            return
        run = self._streams.runner(piece.block)
        self._describe(piece, "measuring")
        groups = input_groups(lambda: run(0), linears)
        for group in groups:
            module = linears[group[0]]
            self._describe(piece, "measuring")
            static = any(piece.modules[name].activations == INT8_STATIC for name in group)
            reference = None
            if self.recipe.mismatch:
                reference = self._streams.reference(group[0], piece.block)
            width = weight_shape(module)[1]
            statistics = collect_statistics(
                run, len(self.batches), module, width, group[0], static, reference, self.masks
            )
            yield group, statistics
        called = {name for group in groups for name in group}
        yield from (([name], None) for name in linears if name not in called)

    def _quantize_module(
        self, piece: Piece, name: str, statistics: Statistics | None, state: OpenPiece
    ) -> None:
        """Quantizes one module and puts the decoded weight in place."""
        module, scheme = self._module(name), piece.modules[name]
        weight = self._float_weight(name, state)
        algorithm = self.recipe.algorithm
        report: dict[str, float | str] = {}
        if algorithm.needs_statistics and statistics is None:
            algorithm = self._data_free
            if not isinstance(module, nn.Embedding):
                report["fallback"] = "rtn: calibration never reached this layer"
        result = algorithm.quantize(weight, scheme, statistics)
        if scheme.activations == INT8_STATIC:
            state.input_scales[name] = _input_scale(name, statistics)
            report["input_scale"] = float(state.input_scales[name])
        state.results[name] = result
        if self.recipe.tuning is not None:
            state.weights[name] = weight
        if self.batches:
            _set_weight(module, _qweight(name, state))
        self.progress.advance(weight.numel())
        self._last_loss = result.report.get("loss")
        state.reports[name] = {
            "scheme": str(scheme),
            "algorithm": algorithm.name,
            "shape": list(weight.shape),
            "weights": weight.numel(),
            "stored_bytes": scheme.stored_bytes((weight.shape[0], weight.shape[1])),
            **({"tokens": statistics.tokens} if statistics else {}),
            **({"dropped_tokens": statistics.dropped} if statistics and statistics.dropped else {}),
            **report,
            **result.report,
        }

    def _float_weight(self, name: str, state: OpenPiece) -> Tensor:
        """Returns the weight `[out_features, in_features]` that module `name` is to stand for.

        As stored, for the loaded copy may have been rounded to the dtype of computation; what a
        fold has changed exists only there.
        """
        module, target = self._module(name), f"{name}.weight"
        if target in state.changed:
            weight = _weight(module).detach().clone()
        else:
            weight = self.decoder.exact(target).to(self.decoder.device)
        return weight.T if weight_is_transposed(module) else weight

    def _write_module(self, name: str, state: OpenPiece, writer: ShardWriter) -> None:
        """Appends the tensors of a module, whose codes are then no longer needed."""
        qweight = _qweight(name, state)
        for suffix, tensor in qweight.tensors().items():
            writer.add(f"{name}.{suffix}", tensor)
        # What is in memory now is what a reloaded checkpoint must decode to.
        state.reports[name][CHECKSUM] = qweight.checksum()
        del state.results[name]

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
        for target in self.journal.parts[piece.name].get("changed", ()):
            if target in entries:
                parameter = self.decoder.model.get_parameter(target)
                parameter.data = entries[target].read().to(parameter)
        self._describe(piece, "finished before")
        self.progress.advance(self._weights(piece))

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


def _qweight(name: str, state: OpenPiece) -> QuantizedWeight:
    result = state.results[name]
    return QuantizedWeight.from_codes(result.codes, result.grid, state.input_scales.get(name))


def _weight(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _set_weight(module: nn.Module, qweight: QuantizedWeight) -> None:
    weight = _weight(module)
    decoded = qweight.dequantize(weight.dtype).to(weight.device)
    weight.data = decoded.T if weight_is_transposed(module) else decoded
