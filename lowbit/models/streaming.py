"""A decoder that is never whole in memory: a meta model of which one piece at a time has weights.

Loading goes through transformers' own conversion of checkpoint keys, so that renamed and merged
weights arrive as `from_pretrained` would build them. The arguments of every block (position
embeddings, masks, sliding windows) are made by the model itself: each block is replaced by an
identity that records how it is called, and the model runs once. Copying the first block's
arguments to all others is wrong wherever blocks differ (Gemma, sliding windows).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.initialization import no_init_weights
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from lowbit.calibration.capture import StopForwardError
from lowbit.checkpoint import Checkpoint
from lowbit.errors import LowbitError
from lowbit.models.foreign import one_sentence
from lowbit.models.layers import find_decoder_layers
from lowbit.models.sources import Source, parameter_sources
from lowbit.nn.replace import module_name

# What tables of a model may take beyond the size of its weights.
MAX_TABLE_BYTES = 1 << 27


@dataclass
class BlockCall:
    """How the model calls one block for one batch: everything except the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Activations:
    """The hidden states of all calibration batches on their way through the blocks.

    Args:
        hidden: one `[batch, seqlen, hidden]` tensor per batch, the input of the next block.
        calls: per batch, per block, how the model calls it.
    """

    hidden: list[Tensor] = field(default_factory=list)
    calls: list[list[BlockCall]] = field(default_factory=list)


class StreamedDecoder:
    """A causal decoder on the meta device whose pieces are loaded and freed on demand.

    Args:
        checkpoint: where the weights come from.
        dtype: dtype of loaded weights and of computation.
        device: where loaded pieces live.

    Raises:
        LowbitError: if the config names no known model, or disagrees with the tensors.
    """

    # Of transformers, for a subclass whose modules are quantized.
    hf_quantizer: Any = None

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self.model = self._empty_model()
        self.layers_name, self.layers = find_decoder_layers(self.model)
        self._returns_tuple: bool | None = None
        self._mapping = get_model_conversion_mapping(self.model)
        self.sources, self.ignored = parameter_sources(self.model, checkpoint)

    def _empty_model(self) -> PreTrainedModel:
        """Returns the model without weights; a subclass puts other modules in."""
        return meta_model(self.checkpoint, self.dtype)

    @property
    def embedding_name(self) -> str:
        """The module name of the input embedding."""
        name = module_name(self.model, self.model.get_input_embeddings())
        assert name is not None
        return name

    @property
    def head_name(self) -> str | None:
        """The module name of the output projection, None if the model has none."""
        return module_name(self.model, self.model.get_output_embeddings())

    def block_name(self, index: int) -> str:
        """Returns the module name of block `index`."""
        return f"{self.layers_name}.{index}"

    def original(self, target: str) -> Tensor:
        """Returns parameter `target` exactly as the checkpoint holds it, on the CPU.

        A tied head is the embedding; what transformers computes is taken from the loaded piece.
        """
        source = self._source(target)
        if source.converted:
            made: Tensor = self.model.get_parameter(target).detach()
            return made.cpu().to(source.entries[0].dtype)
        return source.entries[0].read()

    def exact(self, target: str) -> Tensor:
        """Returns `original(target)` before it is rounded, where a checkpoint computes it."""
        source = self._source(target)
        return self.original(target) if source.converted else source.entries[0].exact()

    def _source(self, target: str) -> Source:
        return self.sources.get(target) or self.sources[f"{self.embedding_name}.weight"]

    def targets(self, module_name: str) -> list[str]:
        """Returns the parameters below module `module_name`, in the model's order."""
        return [
            name
            for name in self.model.state_dict()
            if name.startswith(module_name + ".") and name in self.sources
        ]

    def load(self, targets: list[str]) -> None:
        """Gives the parameters `targets` their weights."""
        if not targets:
            return
        # Entries are read one by one when the loader gets to them.
        entries = [entry for target in targets for entry in self.sources[target].entries]
        state = {entry.name: entry for entry in entries}
        config = LoadStateDictConfig(
            device_map={"": self.device},
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            weight_mapping=self._mapping,
            hf_quantizer=self.hf_quantizer,
        )
        with _no_inner_progress_bar():
            info, _ = convert_and_load_state_dict_in_model(self.model, state, config)
        problems = {*info.unexpected_keys, *info.conversion_errors}
        problems |= {name for name, *_ in info.mismatched_keys}
        if problems:
            raise LowbitError(
                f"{self.checkpoint.path}: tensor {min(problems)!r} does not fit the model that "
                "config.json describes"
            )

    def load_tied_head(self) -> None:
        """Gives a tied output projection the embedding's weight as its own parameter."""
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        self.load([f"{self.embedding_name}.weight"])
        head.weight = nn.Parameter(embedding.weight.data, requires_grad=False)
        self.free(embedding)

    def free(self, module: nn.Module) -> None:
        """Moves every parameter of `module` back to the meta device."""
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    empty = torch.empty_like(parameter, device="meta")
                    part._parameters[name] = nn.Parameter(empty, requires_grad=False)

    def start(self, batches: list[Tensor]) -> Activations:
        """Returns the inputs of block 0 for token `batches` (int64 `[batch, seqlen]` each).

        Needs the embedding and every other small module outside the blocks to be loaded.
        """
        activations = Activations()
        for batch in batches:
            first = self._first_call(batch)
            if self._returns_tuple is None:
                self._returns_tuple = self._first_block_returns_tuple(*first)
            calls = self._record_calls(batch)
            if activations.calls:
                calls = [
                    _share(c, first) for c, first in zip(calls, activations.calls[0], strict=True)
                ]
            activations.hidden.append(first[0])
            activations.calls.append(calls)
        return activations

    def _first_block_returns_tuple(self, hidden: Tensor, call: BlockCall) -> bool:
        """Returns whether blocks return a tuple, which only a real call shows."""
        self.load(self.targets(self.block_name(0)))
        with torch.no_grad():
            returned = self.layers[0](hidden, *call.args, **call.kwargs)
        self.free(self.layers[0])
        return isinstance(returned, tuple)

    def _first_call(self, batch: Tensor) -> tuple[Tensor, BlockCall]:
        seen: list[tuple[Tensor, BlockCall]] = []

        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(_split_call(args, kwargs))
            raise StopForwardError

        handle = self.layers[0].register_forward_pre_hook(record, with_kwargs=True)
        try:
            self._forward(batch)
        finally:
            handle.remove()
        return seen[0]

    def _record_calls(self, batch: Tensor) -> list[BlockCall]:
        calls: list[BlockCall] = []

        def record(*args: Any, **kwargs: Any) -> Any:
            hidden, call = _split_call(args, kwargs)
            calls.append(call)
            if len(calls) == len(self.layers):
                raise StopForwardError  # the norm and the head need not be in memory
            return (hidden,) if self._returns_tuple else hidden

        with self._replaced_forwards(record):
            self._forward(batch)
        return calls

    def _forward(self, ids: Tensor) -> None:
        with torch.no_grad(), suppress(StopForwardError):
            self.model(input_ids=ids.to(self.device), use_cache=False)

    @contextmanager
    def _replaced_forwards(self, forward: Callable[..., Any]) -> Iterator[None]:
        for layer in self.layers:
            layer.forward = forward
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    def run_block(self, index: int, activations: Activations, batch: int) -> Tensor:
        """Returns the loaded block `index`'s output `[batch, seqlen, hidden]` for one batch."""
        call = activations.calls[batch][index]
        with torch.no_grad():
            return call_block(self.layers[index], activations.hidden[batch], call)

    def run_tail(self, activations: Activations, batch: int) -> None:
        """Runs what follows the blocks on one batch's hidden states, up to a hook that stops it."""
        with suppress(StopForwardError):
            self.logits(activations.hidden[batch])

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns the logits `[batch, seqlen, vocab]` for what the last block returned.

        With gradients, if `hidden` asks for them.

        The model runs with blocks replaced by a function that returns those states, so whatever it
        does after its blocks (norms, projections, scaling) is done by its own code.
        """

        def inject(*_: Any, **__: Any) -> Any:
            return (hidden,) if self._returns_tuple else hidden

        width = self.model.get_input_embeddings().embedding_dim
        placeholder = hidden.new_zeros(*hidden.shape[:-1], width)
        with self._replaced_forwards(inject), torch.set_grad_enabled(hidden.requires_grad):
            logits: Tensor = self.model(inputs_embeds=placeholder, use_cache=False).logits
        return logits


def call_block(block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
    """Returns the output of a loaded `block`, or of a copy of one, for `hidden`, shaped like it."""
    returned = block(hidden, *call.args, **call.kwargs)
    output: Tensor = returned[0] if isinstance(returned, tuple) else returned
    return output


@contextmanager
def _no_inner_progress_bar() -> Iterator[None]:
    """Silences transformers' own bar, one per block; the run shows its own."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def model_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """Returns the configuration of a model; that of a single file lies in no folder."""
    if checkpoint.path.is_dir():
        return AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    return AutoConfig.for_model(**config)


def meta_model(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """Returns the model of `checkpoint` without weights, its buffers on the CPU.

    Raises:
        LowbitError: if the config names no known model, or disagrees with the tensors.
    """
    with one_sentence(str(checkpoint.path), "model that config.json describes"):
        config = model_config(checkpoint)
        if checkpoint.config.get("tie_word_embeddings") is False:
            config.tie_word_embeddings = False  # a merge may part what the file ties
        depth = config.get_text_config(decoder=True).num_hidden_layers
        if depth < 1:
            raise LowbitError(
                f"{checkpoint.path}: config.json says {depth} blocks, needed at least 1; fetch it "
                "again"
            )
        if depth > len(checkpoint.entries):
            raise LowbitError(
                f"{checkpoint.path}: config.json says {depth} blocks, but there are only "
                f"{len(checkpoint.entries)} tensors; they do not belong together"
            )
        _require_room(checkpoint, config)
        # Buffers are computed where they are made; initialising weights that do not exist took
        # half of the time.
        with init_empty_weights(include_buffers=False), no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        model.tie_weights()
    return model.eval()


def _require_room(checkpoint: Checkpoint, config: PreTrainedConfig) -> None:
    """Refuses a config whose model outgrows the checkpoint, before anything is allocated for it.

    No scheme stores a weight in less than a bit. Tables (rotary frequencies, masks) are in no file,
    so nothing but a number in config.json says how large they are; GPT-2's mask is its square.
    """
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    stored = sum(entry.end - entry.begin for entry in checkpoint.entries.values())
    weights = sum(parameter.numel() for parameter in model.parameters())
    tables = sum(buffer.nbytes for buffer in model.buffers())
    if weights > 8 * stored or tables > MAX_TABLE_BYTES + stored:
        raise LowbitError(
            f"{checkpoint.path}: config.json describes a model of {weights:.3g} weights and tables "
            f"of {tables / 1e9:.3g} GB, but the files have {stored / 1e9:.3g} GB; they do not "
            "belong together"
        )


def _split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    """Returns a block's hidden states and the rest of its arguments."""
    if args:
        return args[0], BlockCall(args[1:], dict(kwargs))
    rest = dict(kwargs)
    return rest.pop("hidden_states"), BlockCall((), rest)


def _share(call: BlockCall, first: BlockCall) -> BlockCall:
    """Returns `call` with every tensor equal to the first batch's replaced by that very tensor.

    Batches of one shape get equal masks and rotary tables; without this, every batch would keep
    its own copies for every block.
    """

    def share(value: Any, other: Any) -> Any:
        if isinstance(value, Tensor) and isinstance(other, Tensor):
            same = value.shape == other.shape and value.dtype == other.dtype
            return other if same and torch.equal(value, other) else value
        if isinstance(value, tuple) and isinstance(other, tuple) and len(value) == len(other):
            return tuple(share(v, o) for v, o in zip(value, other, strict=True))
        if isinstance(value, dict) and isinstance(other, dict):
            return {key: share(v, other.get(key)) for key, v in value.items()}
        return value

    return BlockCall(share(call.args, first.args), share(call.kwargs, first.kwargs))
