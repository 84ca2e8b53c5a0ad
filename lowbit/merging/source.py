"""Base and adapter as one checkpoint: tensors that are computed when somebody reads them.

    stored parts of a quantized weight --decode--> W or Q --adapter--> W + s B A --round--> 16 bits

Every tensor of the merged model is an entry like that of a file, so whatever reads checkpoints
reads a merge: the writer of 16-bit shards takes one tensor after the other, the quantizer one
block, and neither knows of adapters. Nothing is kept after it was read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowbit.adapters.adapter_file import AdapterFile
from lowbit.checkpoint.computed import ComputedEntry
from lowbit.checkpoint.journal import MANIFEST_NAME
from lowbit.checkpoint.reader import Checkpoint, TensorEntry, read_json, read_quantized
from lowbit.errors import LowbitError
from lowbit.formats.view import open_as_own
from lowbit.hf.config import sentinel_key
from lowbit.inventory import module_schemes
from lowbit.models.sources import Source, map_sources
from lowbit.models.streaming import meta_model
from lowbit.nn.replace import weight_is_transposed, weight_shape
from lowbit.pipeline.output import digest_json

FLOATS: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class MergedCheckpoint(Checkpoint):
    """A base model with an adapter in it. Construct it with `MergedCheckpoint.of`.

    Attributes:
        base: the checkpoint as it is on disk.
        adapter: what goes into it.
        dtype: the dtype of what is merged or decoded; that of the model.
    """

    def __init__(
        self,
        base: Checkpoint,
        adapter: AdapterFile,
        dtype: torch.dtype,
        config: dict[str, Any],
        entries: dict[str, TensorEntry],
    ) -> None:
        super().__init__(base.path, config, entries)
        self.base, self.adapter, self.dtype = base, adapter, dtype
        self._digests = adapter.digests()
        self._weights: dict[str, str] | None = None
        self.derivation = {"merged": "LoRA", "adapter": adapter.digest()}

    @staticmethod
    def of(base_path: str | Path, adapter_path: str | Path) -> MergedCheckpoint:
        """Returns the model of `base_path`, in any layout, with the adapter in `adapter_path`.

        Raises:
            LowbitError: one of them is damaged or of a kind that is not read, or they do not fit.
        """
        base, adapter = open_as_own(base_path), AdapterFile.open(adapter_path)
        dtype = _model_dtype(base)
        model = meta_model(base, dtype)
        decoded = _decoded_entries(base, model, dtype)
        merge = _Merge(base, adapter, model, decoded)
        config = {key: v for key, v in base.config.items() if key != "quantization_config"}
        entries, parted = merge.entries()
        if parted:
            config["tie_word_embeddings"] = False
        return MergedCheckpoint(base, adapter, dtype, config, entries)

    @property
    def quantization(self) -> dict[str, Any] | None:
        """What the base's `config.json` says of its quantization; None for a 16-bit base."""
        found: dict[str, Any] | None = self.base.config.get("quantization_config")
        return found

    def files(self) -> list[Path]:
        """Returns the files of the base."""
        return self.base.files()

    def verify(self, advance: Callable[[int], None] | None = None) -> dict[str, str]:
        """Returns file name -> SHA-256 of the files of base and adapter, every weight read."""
        self._weights = self.base.verify(advance)
        return {**self._weights, **self._digests}

    def measured_model(self) -> dict[str, Any] | None:
        """Returns the digests of the base, or of the 16-bit model that a low-bit base was.

        Statistics of inputs are of the model before fine-tuning, which moves weights little; the
        manifest says that they were.
        """
        if self.quantization is None:
            weights = self._weights if self._weights is not None else self.base.verify()
            return {"config": digest_json(self.base.config), "weights": weights}
        manifest = read_json(self.path / MANIFEST_NAME, "a low-bit base of ours has one")
        # What was converted has the manifest of the run that chose its codes inside.
        chosen: Any = manifest.get("quantized", manifest)
        model: Any = chosen.get("fingerprint", {}).get("model")
        if not isinstance(model, dict):
            raise LowbitError(f"{self.path / MANIFEST_NAME}: is corrupt; quantize the base again")
        return model


def _model_dtype(base: Checkpoint) -> torch.dtype:
    """Returns the dtype that `config.json` names, else that of most of the float weights."""
    named = base.config.get("dtype", base.config.get("torch_dtype"))
    if isinstance(named, str) and named in FLOATS:
        return FLOATS[named]
    sizes = dict.fromkeys(FLOATS.values(), 0)
    for entry in base.entries.values():
        if entry.dtype in sizes:
            sizes[entry.dtype] += entry.end - entry.begin
    return max(sizes, key=lambda dtype: sizes[dtype])


def _decoded_entries(
    base: Checkpoint, model: PreTrainedModel, dtype: torch.dtype
) -> dict[str, TensorEntry]:
    """Returns the entries of `base` with `<module>.weight` in place of its stored parts."""
    quantization = base.config.get("quantization_config")
    if quantization is None:
        return dict(base.entries)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method != "lowbit":
        raise LowbitError(
            f"{base.path}: is quantized by {method!r}; merge into a 16-bit model or into one that "
            "lowbit quantized"
        )
    schemes = module_schemes(base)
    parts = {f"{n}.{key}" for n, (s, shape) in schemes.items() for key in s.tensor_specs(shape)}
    sentinels = {sentinel_key([name]) for name in schemes}
    entries: dict[str, TensorEntry] = {}
    for key, entry in base.entries.items():
        name = key.removesuffix(".weight_packed")
        if name in schemes and name != key:
            shape = schemes[name][1]
            transposed = weight_is_transposed(_module(base, model, name))

            def decode(name: str = name, transposed: bool = transposed) -> Tensor:
                weight = read_quantized(base.entries, name, *schemes[name]).dequantize()
                return weight.T.contiguous() if transposed else weight

            stored = shape[::-1] if transposed else shape
            target = f"{name}.weight"
            entries[target] = ComputedEntry.like(target, entry.file, dtype, stored, decode)
        elif key not in parts and not (key in sentinels and not all(entry.shape)):
            entries[key] = entry
    return entries


def _module(base: Checkpoint, model: PreTrainedModel, name: str) -> nn.Module:
    try:
        module: nn.Module = model.get_submodule(name)
    except AttributeError:
        raise LowbitError(
            f"{base.path}: {name!r} is quantized, but the {type(model).__name__} of config.json "
            "has no such module; they do not belong together"
        ) from None
    return module


class _Merge:
    """Where each tensor of an adapter goes.

    Args:
        base: for messages.
        adapter: the adapter.
        model: of the base, without weights.
        decoded: its entries in 16 bits.
    """

    def __init__(
        self,
        base: Checkpoint,
        adapter: AdapterFile,
        model: PreTrainedModel,
        decoded: dict[str, TensorEntry],
    ) -> None:
        self.base, self.adapter, self.model, self.decoded = base, adapter, model, decoded
        self.sources = map_sources(model, decoded.values())
        self.schemes = module_schemes(base)
        self.tied = dict(model.all_tied_weights_keys)

    def entries(self) -> tuple[dict[str, TensorEntry], bool]:
        """Returns the merged entries, and whether a head had to be parted from its embedding."""
        touched = {f"{module}.weight" for module in self.adapter.modules}
        touched |= {f"{m}.bias" for m in self.adapter.modules if self.adapter.has_bias(m)}
        touched |= self.adapter.replaced.keys()
        parted = self._part_ties(touched)
        entries = dict(self.decoded)
        wanted = touched | parted.keys() | set(parted.values())
        found = {target: self._source(target).entries[0] for target in sorted(wanted)}
        for before in found.values():
            entries.pop(before.name, None)
        for target, before in found.items():
            # Where a tie was parted, a name of the file may stand for either of the two.
            name = target if target in {*parted, *parted.values()} else before.name
            compute = self._computation(target, before)
            entries[name] = ComputedEntry.like(
                name, before.file, before.dtype, before.shape, compute
            )
        return entries, bool(parted)

    def _part_ties(self, touched: set[str]) -> dict[str, str]:
        """Returns copy -> original of tied weights that are no longer the same.

        PEFT adapts the one of two tied modules that was named, and the other goes on with the
        weight of the base, unless it was asked to train both as one.
        """
        parted = {}
        for copy, original in self.tied.items():
            if copy in touched or (original in touched and not self.adapter.config.ties_weights):
                parted[copy] = original
        return parted

    def _source(self, target: str) -> Source:
        source = self.sources.get(target)
        # A file holds tied weights under the name of one of the two, or of both.
        twins = [self.tied.get(target), *(c for c, o in self.tied.items() if o == target)]
        source = source or next((self.sources[t] for t in twins if t in self.sources), None)
        module = target.rpartition(".")[0]
        if source is None:
            raise LowbitError(
                f"{self.adapter.path}: the adapter has {target!r}, which {self.base.path} lacks; "
                "give the base that it was trained on"
            )
        if source.converted:
            raise LowbitError(
                f"{self.adapter.path}: {module!r} is made of several tensors when it is loaded, "
                "such weights cannot be merged yet; leave it out of target_modules"
            )
        return source

    def _computation(self, target: str, before: TensorEntry) -> Callable[[], Tensor]:
        """Returns what computes the parameter `target` with the adapter in it."""
        adapter = self.adapter
        start = before.exact
        if target in adapter.replaced:
            found = adapter.replaced[target].shape
            if found != before.shape:
                raise LowbitError(
                    f"{adapter.path}: {target!r} was trained as {list(found)}, the base has "
                    f"{list(before.shape)}; give the base that it was trained on"
                )

            def start() -> Tensor:
                return adapter.replacement(target)

        module, _, attribute = target.rpartition(".")
        if module not in adapter.lora:
            return start
        if attribute == "bias":
            biased = adapter.has_bias(module)
            return (lambda: adapter.merged_bias(module, start())) if biased else start
        owner = _module(self.base, self.model, module)
        if adapter.config.use_qalora:
            return self._zero_point_computation(module, weight_is_transposed(owner))
        if not isinstance(owner, (nn.Linear, Conv1D, nn.Embedding)):
            raise LowbitError(
                f"{adapter.path}: {module!r} is a {type(owner).__name__}; only adapters of linear "
                "layers and embeddings can be merged"
            )
        adapter.require_shape(module, weight_shape(owner))
        if weight_is_transposed(owner):
            return lambda: adapter.merged(module, start().T).T.contiguous()
        return lambda: adapter.merged(module, start())

    def _zero_point_computation(self, module: str, transposed: bool) -> Callable[[], Tensor]:
        """Returns what decodes `module` with the adapter in its zero points."""
        adapter, entries = self.adapter, self.base.entries
        if module not in self.schemes:
            raise LowbitError(
                f"{adapter.path}: the adapter of {module!r} is for zero points (use_qalora), which "
                f"{self.base.path} does not have there; give the base that it was trained on"
            )
        scheme, shape = self.schemes[module]
        adapter.require_shape(module, (shape[0], scheme.groups(shape[1])))

        def decode() -> Tensor:
            stored = read_quantized(entries, module, scheme, shape)
            weight = adapter.merged_zero_points(module, stored).dequantize()
            return weight.T.contiguous() if transposed else weight

        return decode
