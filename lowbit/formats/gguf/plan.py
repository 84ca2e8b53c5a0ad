"""What a GGUF file will hold, known before anything is written."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowbit.checkpoint import Checkpoint
from lowbit.checkpoint.reader import TensorEntry
from lowbit.errors import LowbitError, unknown_name
from lowbit.formats.base import Layout, StoredAs
from lowbit.formats.gguf.architectures import Architecture, architecture_of
from lowbit.formats.gguf.configuration import head_dim_of
from lowbit.formats.gguf.layout import BLOCK, Gguf, written_type
from lowbit.formats.gguf.search import SEARCHED
from lowbit.formats.gguf.types import FLOAT_TYPES, GGML_TYPES, GgmlType
from lowbit.formats.model_view import ModelView
from lowbit.formats.own import Bf16
from lowbit.formats.table import layout_of

# What becomes of a tensor: the same codes; codes that are searched; floats.
EXACT, SEARCH, FLOAT = "exact", "search", "float"
FLOATS = ("BF16", "F16", "F32")
# Of a long list, so many names are shown.
SHOWN = 3


@dataclass(frozen=True)
class WrittenTensor:
    """One tensor of the file.

    Args:
        name: in the file.
        hub_name: of the tensor in the model, with `.weight` or `.bias`.
        kind: its type.
        shape: outermost dimension first.
        how: EXACT, SEARCH or FLOAT.
        module: of the source where it is quantized there, else None.
        entry: of the source where it is floats there, else None.
        heads: so many heads of rows are to be interleaved; 0 for none.
    """

    name: str
    hub_name: str
    kind: GgmlType
    shape: tuple[int, ...]
    how: str
    module: str | None = None
    entry: TensorEntry | None = None
    heads: int = 0

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.kind.row_bytes(self.shape[-1]) * math.prod(self.shape[:-1])


@dataclass(frozen=True)
class GgufPlan:
    """A checked file.

    Args:
        checkpoint: the source.
        source: its layout.
        architecture: of the file.
        config: of the model, defaults filled in.
        modules: module of the source -> how it is stored.
        tensors: of the file, in its order.
        fallbacks: name in the file -> the type that was wanted, where its blocks do not fill rows.
    """

    checkpoint: Checkpoint
    source: Layout
    architecture: Architecture
    config: Mapping[str, Any]
    modules: Mapping[str, StoredAs]
    tensors: tuple[WrittenTensor, ...]
    fallbacks: Mapping[str, str]


def plan_file(checkpoint: Checkpoint, gguf_type: str | None, requantize: bool) -> GgufPlan:
    """Returns the plan of a file.

    Args:
        checkpoint: the source, quantized or in 16 bits.
        gguf_type: of all quantized weights; None: the one that has the values of the source.
        requantize: choose new codes where a type does not have the values of a weight.

    Raises:
        LowbitError: for a model that is not written, a type that does not exist, a source in 16
            bits without a type, and without `requantize` for weights that no type has.
    """
    wanted = None
    if gguf_type is not None:
        if gguf_type.upper() not in (*SEARCHED, *FLOATS):
            raise unknown_name("type of ggml", gguf_type, (*SEARCHED, *FLOATS))
        wanted = GGML_TYPES[gguf_type.upper()]
    return _Planner(checkpoint, wanted, requantize).plan()


class _Planner:
    """Goes through the tensors of a source."""

    def __init__(self, checkpoint: Checkpoint, wanted: GgmlType | None, requantize: bool) -> None:
        self.checkpoint, self.wanted, self.requantize = checkpoint, wanted, requantize
        model_type = str(checkpoint.config.get("model_type"))[:60]
        self.architecture = architecture_of(model_type, str(checkpoint.path))
        self.source = layout_of(checkpoint)
        if isinstance(self.source, Gguf):
            raise LowbitError(f"{checkpoint.path}: is gguf already; choose another format")
        if isinstance(self.source, Bf16) and wanted is None:
            raise LowbitError(
                f"{checkpoint.path}: is not quantized; name the type to make of it, for example "
                "--gguf-type Q4_K (with --stats by GPTQ), or BF16 for none"
            )
        self.modules = self.source.modules(checkpoint)
        self.view = ModelView(checkpoint)
        self.config = _whole_config(self.view)
        self.tensors: dict[str, WrittenTensor] = {}
        self.refused: dict[str, str] = {}
        self.fallbacks: dict[str, str] = {}

    def plan(self) -> GgufPlan:
        """Returns the plan."""
        owner = {t: name for name, stored in self.modules.items() for t in stored.tensors}
        linear = set(self.view.plain_linears(())) if isinstance(self.source, Bf16) else set()
        done: set[str] = set()
        for entry in self.checkpoint.entries.values():
            module = owner.get(entry.name)
            if module is None:
                self._add_floats(entry, linear)
            elif module not in done:
                done.add(module)
                self._add_module(module)
        if self.refused:
            self._refuse()
        self._require_whole()
        self._warn()
        # Layers with the same input follow each other, as their statistics are shared.
        order = self.architecture.shapes({**self.config, "tie_word_embeddings": False})
        tensors = tuple(self.tensors[name] for name in order if name in self.tensors)
        return GgufPlan(
            self.checkpoint,
            self.source,
            self.architecture,
            self.config,
            self.modules,
            tensors,
            self.fallbacks,
        )

    def _add_module(self, module: str) -> None:
        stored, layout = self.modules[module], Gguf()
        reason = layout.refusal(stored.scheme, stored.shape)
        if stored.input_order is not None:
            reason = "its columns are grouped in the order of desc_act, blocks have neighbours"
        natural = None if reason else GGML_TYPES[written_type(layout.held_as(stored.scheme))]
        name = f"{self.view.module(module).name}.weight"
        if natural is not None and self.wanted in (None, natural):
            self._add(name, stored.shape, natural, EXACT, module)
            return
        if not self.requantize:
            what = self.wanted.name if self.wanted else ""
            self.refused[module] = reason or f"{what} has not the values of {stored.scheme}"
        wanted = self.wanted
        if wanted is None:
            nearest = layout.nearest(stored.scheme, stored.shape)
            wanted = GGML_TYPES["BF16" if nearest is None else written_type(nearest)]
        kind = self._fitting(name, stored.shape, wanted)
        self._add(name, stored.shape, kind, FLOAT if kind.dtype else SEARCH, module)

    def _add_floats(self, entry: TensorEntry, linear: set[str]) -> None:
        stem, dot, suffix = entry.name.rpartition(".")
        if 0 in entry.shape or suffix == "inv_freq":
            return  # the mark of our own checkpoints; a table that models make themselves
        module = self.view.module(stem).name
        if module == self.view.head and self.config["tie_word_embeddings"]:
            return
        name = f"{module}{dot}{suffix}"
        kind = FLOAT_TYPES.get(entry.dtype)
        if kind is None:
            raise LowbitError(
                f"{entry.file}: tensor {entry.name!r} is {entry.dtype}, needed floats"
            )
        if len(entry.shape) == 1:
            kind = GGML_TYPES["F32"]  # what llama.cpp computes norms and biases in
        elif self.wanted is not None and (module in linear or self.wanted.dtype is not None):
            kind = self._fitting(name, entry.shape, self.wanted)
        self._add(name, entry.shape, kind, FLOAT if kind.dtype else SEARCH, entry=entry)

    def _fitting(self, name: str, shape: tuple[int, ...], wanted: GgmlType) -> GgmlType:
        """Returns `wanted`, or the type that takes its place where its blocks do not fill rows."""
        if shape[-1] % wanted.block == 0:
            return wanted
        self.fallbacks[name] = wanted.name
        return GGML_TYPES["BF16" if shape[-1] % BLOCK else "Q8_0"]

    def _add(
        self,
        hub_name: str,
        shape: tuple[int, ...],
        kind: GgmlType,
        how: str,
        module: str | None = None,
        entry: TensorEntry | None = None,
    ) -> None:
        name = self.architecture.file_name(hub_name)
        if name is None:
            raise LowbitError(
                f"{self.checkpoint.path}: tensor {hub_name!r} has no place in a GGUF file of "
                f"architecture {self.architecture.name}"
            )
        heads = self.architecture.heads(name, self.config)
        self.tensors[name] = WrittenTensor(name, hub_name, kind, shape, how, module, entry, heads)

    def _refuse(self) -> None:
        names = list(self.refused)
        shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
        count = f"{len(names)} weights" if len(names) > 1 else "a weight"
        fix = "--requantize chooses new codes"
        if self.wanted is None:
            stored = self.modules[names[0]]
            nearest = Gguf().nearest(stored.scheme, stored.shape)
            fix = "--requantize leaves it in 16 bits"
            if nearest is not None:
                fix = f"the nearest is {written_type(nearest)}: --requantize converts to it"
        raise LowbitError(
            f"{self.checkpoint.path}: gguf cannot hold {count} ({shown}): "
            f"{self.refused[names[0]]}; {fix}, and --to lowbit or bf16 keeps the values"
        )

    def _require_whole(self) -> None:
        """Refuses a source that lacks a tensor, or has one of another shape."""
        path, found = self.checkpoint.path, self.tensors
        for name, shape in self.architecture.shapes(self.config).items():
            hub = self.architecture.hub_name(name)
            if name not in found:
                raise LowbitError(f"{path}: tensor {hub!r} is missing; fetch the checkpoint again")
            if found[name].shape != shape:
                raise LowbitError(
                    f"{path}: tensor {hub!r} is {list(found[name].shape)}, but config.json "
                    f"describes {list(shape)}; they do not belong together"
                )
        if self.config.get("hidden_act", "silu") != "silu":
            raise LowbitError(
                f"{path}: hidden_act is {self.config['hidden_act']!r}, but "
                f"{self.architecture.name} in llama.cpp has silu"
            )

    def _warn(self) -> None:
        rounding = [s for s in self.modules.values() if s.scheme.activations is not None]
        if rounding:
            what = f"{len(rounding)} weights are" if len(rounding) > 1 else "a weight is"
            warnings.warn(
                f"{what} {rounding[0].scheme}: a GGUF file does not say how activations are "
                "rounded, so the file has the weights only, and llama.cpp rounds activations in "
                "its own way",
                stacklevel=5,
            )
        if self.fallbacks:
            names = list(self.fallbacks)
            made = {n: self.tensors[self.architecture.file_name(n) or n].kind.name for n in names}
            kinds = ", ".join(sorted(set(made.values())))
            warnings.warn(
                f"{len(names)} weights (the first is {names[0]}) have rows that blocks of "
                f"{self.fallbacks[names[0]]} do not fill; they become {kinds}",
                stacklevel=5,
            )
        window, positions = (
            self.config.get("sliding_window"),
            self.config["max_position_embeddings"],
        )
        used = self.config.get("use_sliding_window", True)
        if window and used and window < positions:
            warnings.warn(
                f"the model attends to windows of {window} tokens, which llama.cpp does not know "
                f"of {self.architecture.name}: longer texts will differ",
                stacklevel=5,
            )


def _whole_config(view: ModelView) -> dict[str, Any]:
    """Returns the configuration with its defaults, and the width of a head."""
    config: dict[str, Any] = view.model.config.to_dict()
    return {**config, "head_dim": head_dim_of(config)}
