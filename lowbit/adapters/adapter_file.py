"""An adapter on disk, in PEFT's format, and the weights that it makes of a base model's.

    adapter_config.json         see `adapter_config.py`
    adapter_model.safetensors   <prefix><module>.lora_A.weight                float [r, in]
                                <prefix><module>.lora_B.weight                float [out, r]
                                <prefix><module>.lora_B.bias                  float [out], lora_bias
                                <prefix><module>.lora_magnitude_vector        float [out], DoRA
                                <prefix><module>.lora_embedding_A, _B         [r, rows], [dim, r]
                                <prefix><module>.base_layer.<parameter>       a trained bias, say
                                <prefix><parameter>                           a module trained whole

Only headers are read when it is opened, and each tensor when its module is merged: an adapter of
rank 256 on every layer has gigabytes. Neither PEFT nor a model is needed. The order of operations
is PEFT's, so that float32 weights are PEFT's bit for bit.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowbit.adapters.adapter_config import CONFIG_NAME, AdapterConfig
from lowbit.checkpoint.reader import TensorEntry, file_digest, read_header
from lowbit.errors import LowbitError
from lowbit.quant import QuantizedWeight

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
# What stands between a module's name and that of its own parameter where an adapter is around it.
_WRAPPED = ".base_layer."
_A, _B = "lora_A.weight", "lora_B.weight"
_EMBEDDING_A, _EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
_BIAS, _MAGNITUDE = "lora_B.bias", "lora_magnitude_vector"
_SUFFIXES = {
    **{name: name for name in (_A, _B, _EMBEDDING_A, _EMBEDDING_B, _BIAS, _MAGNITUDE)},
    "lora_magnitude_vector.weight": _MAGNITUDE,  # as older versions of PEFT named it
}


@dataclass(frozen=True)
class LoraTensors:
    """The tensors of one module's adapter.

    Args:
        module: its name in the base model.
        entries: name of `_SUFFIXES` -> where it lies.
        rank: of the two factors.
        shape: (out_features, in_features); of an embedding (rows, dimension); for zero points
            (out_features, groups).
        is_embedding: rows are looked up; the factors have names and layouts of their own.
    """

    module: str
    entries: dict[str, TensorEntry]
    rank: int
    shape: tuple[int, int]
    is_embedding: bool

    def read(self, suffix: str) -> Tensor:
        """Returns a tensor in float32.

        Raises:
            LowbitError: if it holds NaN or Inf.
        """
        return _finite(self.entries[suffix])

    def product(self) -> Tensor:
        """Returns B A, float32 in the shape of the weight."""
        if self.is_embedding:
            return (self.read(_EMBEDDING_B) @ self.read(_EMBEDDING_A)).T
        return self.read(_B) @ self.read(_A)


class AdapterFile:
    """An adapter's folder. Construct it with `AdapterFile.open`.

    Attributes:
        path: the folder.
        config: what of its configuration counts.
        lora: module name in the base model -> its factors.
        replaced: name of a parameter of the base model -> the value that it was trained to.
    """

    def __init__(
        self,
        path: Path,
        config: AdapterConfig,
        lora: dict[str, LoraTensors],
        replaced: dict[str, TensorEntry],
    ) -> None:
        self.path, self.config, self.lora, self.replaced = path, config, lora, replaced

    @staticmethod
    def open(folder: str | Path) -> AdapterFile:
        """Returns the adapter in `folder` after checking names, shapes and ranks.

        Raises:
            LowbitError: it is no LoRA adapter, damaged, pickled, or more than is understood.
        """
        path = Path(folder)
        if not path.is_dir():
            raise LowbitError(f"{path}: no such folder; give the one that holds {CONFIG_NAME}")
        config = AdapterConfig.read(path)
        file = path / WEIGHTS_NAME
        if not file.is_file():
            pickled = " (its .bin is a pickle, which can run code)" if _pickles(path) else ""
            raise LowbitError(
                f"{path}: has no {WEIGHTS_NAME}{pickled}; save the adapter with PEFT's "
                "save_pretrained"
            )
        parts: dict[str, dict[str, TensorEntry]] = {}
        replaced: dict[str, TensorEntry] = {}
        for entry in read_header(file):
            _sort_in(file, entry, parts, replaced)
        lora = {module: _lora_tensors(file, config, module, e) for module, e in parts.items()}
        if not lora and not replaced:
            raise LowbitError(f"{file}: holds no tensors; save the adapter again")
        return AdapterFile(path, config, lora, replaced)

    @property
    def modules(self) -> list[str]:
        """The modules of the base model that have an adapter, in the order of the file."""
        return list(self.lora)

    def digests(self) -> dict[str, str]:
        """Returns file name -> SHA-256 of both files."""
        return {name: file_digest(self.path / name) for name in (CONFIG_NAME, WEIGHTS_NAME)}

    def digest(self) -> str:
        """Returns one SHA-256 for the adapter."""
        joined = "".join(self.digests().values())
        return hashlib.sha256(joined.encode()).hexdigest()

    def require_shape(self, module: str, shape: tuple[int, int]) -> None:
        """Refuses a module whose weight has another shape `[out, in]` than the adapter's.

        Raises:
            LowbitError: so that it is clear that the base is another one.
        """
        found = self.lora[module].shape
        if found != tuple(shape):
            raise LowbitError(
                f"{self.path}: the adapter of {module!r} is for a weight of {list(found)}, the "
                f"base has {list(shape)}; give the base that it was trained on"
            )

    def merged(self, module: str, weight: Tensor) -> Tensor:
        """Returns the weight of `module` with the adapter in it, W + s B A, or DoRA's.

        Args:
            module: one of `modules`.
            weight: float `[out_features, in_features]`, or `[rows, dimension]` of an embedding, of
                the base model.

        Returns:
            float32, of the same shape and on the same device.

        Raises:
            LowbitError: if shapes differ, or the adapter or the result holds NaN or Inf.

        Reference:
            Hu et al. 2021, sec. 4.1; Liu et al. 2024 (DoRA), eq. 5.
        """
        self.require_shape(module, (weight.shape[0], weight.shape[1]))
        tensors = self.lora[module]
        if self.config.use_qalora:
            raise LowbitError(
                f"{self.path}: was trained for the zero points of a low-bit base (use_qalora) and "
                "can be merged only there; give that base"
            )
        delta = tensors.product().to(weight.device) * self.config.scaling(module)
        merged = weight.float() + delta
        if _MAGNITUDE in tensors.entries:
            axis = 0 if tensors.is_embedding else 1
            magnitude = tensors.read(_MAGNITUDE).to(weight.device)
            factor = magnitude / torch.linalg.norm(merged, dim=axis)
            merged = factor.unsqueeze(axis) * merged
        if not bool(merged.isfinite().all()):
            raise LowbitError(
                f"{self.path}: merging {module!r} gives NaN or Inf; the adapter is damaged"
            )
        return merged

    def merged_zero_points(self, module: str, weight: QuantizedWeight) -> QuantizedWeight:
        """Returns `weight` with the adapter of `module` in its zero points, and nowhere else.

        For adapters with `config.use_qalora`; codes and scales are the same tensors.

        Raises:
            LowbitError: if the adapter is for another scheme or shape, or holds NaN.
        """
        from lowbit.adapters.zero_point import with_merged_zero_points

        a, b = (self.lora[module].read(name) for name in (_A, _B))
        return with_merged_zero_points(weight, a, b, self.config.scaling(module), module)

    def merged_bias(self, module: str, bias: Tensor) -> Tensor:
        """Returns the bias of `module` with that of B in it, float32 `[out_features]`."""
        return bias.float() + self.bias_of_b(module).to(bias.device) * self.config.scaling(module)

    def bias_of_b(self, module: str) -> Tensor:
        """Returns the bias of B, float32 `[out_features]`; see `has_bias`."""
        return self.lora[module].read(_BIAS)

    def has_bias(self, module: str) -> bool:
        """Returns whether B has a bias, which is added to the bias of the module."""
        return module in self.lora and _BIAS in self.lora[module].entries

    def replacement(self, parameter: str) -> Tensor:
        """Returns what `parameter` was trained to, as it is stored.

        Raises:
            LowbitError: if it holds NaN or Inf.
        """
        entry = self.replaced[parameter]
        _finite(entry)
        return entry.read()


def _sort_in(
    file: Path,
    entry: TensorEntry,
    parts: dict[str, dict[str, TensorEntry]],
    replaced: dict[str, TensorEntry],
) -> None:
    """Puts a tensor where its name says that it belongs."""
    if not entry.name.startswith(PREFIX) or not entry.dtype.is_floating_point:
        raise LowbitError(
            f"{file}: tensor {entry.name!r} of {entry.dtype} is none of a LoRA adapter of PEFT; "
            "save the adapter again"
        )
    name = entry.name.removeprefix(PREFIX)
    for suffix, plain in _SUFFIXES.items():
        if name.endswith("." + suffix):
            module = name.removesuffix("." + suffix)
            if ".base_layer" in f".{module}":
                raise LowbitError(
                    f"{file}: {entry.name!r} is an adapter of an adapter (target_parameters); only "
                    "adapters of linear layers and embeddings are read"
                )
            parts.setdefault(module, {})[plain] = entry
            return
    if "lora_" in name or "token_adapter" in name:
        raise LowbitError(
            f"{file}: {entry.name!r} is not understood; only LoRA, rsLoRA and DoRA are read"
        )
    replaced[name.replace(_WRAPPED, ".")] = entry


def _lora_tensors(
    file: Path, config: AdapterConfig, module: str, entries: dict[str, TensorEntry]
) -> LoraTensors:
    """Returns the checked tensors of one module."""
    is_embedding = _EMBEDDING_A in entries or _EMBEDDING_B in entries
    a_name, b_name = (_EMBEDDING_A, _EMBEDDING_B) if is_embedding else (_A, _B)
    needed = {a_name, b_name}
    needed |= {_MAGNITUDE} if config.use_dora else set()
    needed |= {_BIAS} if config.lora_bias and not is_embedding else set()
    if needed != entries.keys():
        odd = min(needed ^ entries.keys())
        state = "is missing" if odd in needed else f"does not fit its {CONFIG_NAME}"
        raise LowbitError(f"{file}: {module}.{odd} {state}; save the adapter again")
    a, b = entries[a_name], entries[b_name]
    if len(a.shape) != 2 or len(b.shape) != 2 or 0 in (*a.shape, *b.shape):
        raise LowbitError(
            f"{file}: the factors of {module!r} are {list(a.shape)} and {list(b.shape)}, needed "
            "two matrices; convolutions and gathered shards are not read"
        )
    rank = config.rank(module)
    if a.shape[0] != rank or b.shape[1] != rank:
        raise LowbitError(
            f"{file}: the factors of {module!r} are {list(a.shape)} and {list(b.shape)}, but "
            f"{CONFIG_NAME} gives them rank {rank}; they do not belong together"
        )
    shape = (a.shape[1], b.shape[0]) if is_embedding else (b.shape[0], a.shape[1])
    outputs = b.shape[0]
    for name in (_BIAS, _MAGNITUDE):
        if name in entries and entries[name].shape != (outputs,):
            raise LowbitError(
                f"{file}: {module}.{name} is {list(entries[name].shape)}, needed [{outputs}]; "
                "save the adapter again"
            )
    return LoraTensors(module, entries, rank, shape, is_embedding)


def _finite(entry: TensorEntry) -> Tensor:
    values = entry.read().float()
    if not bool(values.isfinite().all()):
        raise LowbitError(
            f"{entry.file}: tensor {entry.name!r} holds NaN or Inf; the training went wrong, take "
            "an earlier checkpoint of it"
        )
    return values


def _pickles(folder: Path) -> bool:
    return any(folder.glob("adapter_model.bin")) or any(folder.glob("*.pt"))
