"""A Hugging Face checkpoint, checked before use and read one tensor at a time.

Nothing in a checkpoint is trusted: names in the index may not leave the directory, every header is
held against the size of its file, and only safetensors are read (a pickle can run code). Tensors
are read with plain file reads instead of a memory map, so that what was read does not stay in the
resident set of a process that must stay below a memory limit.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.mark import refuse_marked
from lowbit.errors import LowbitError
from lowbit.quant import QuantizedWeight
from lowbit.scheme import Scheme

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# The safetensors library refuses longer headers too.
MAX_HEADER_BYTES = 100_000_000
# `status` in the quantization_config of an output directory until its manifest is written.
IN_PROGRESS = "in progress"
HASH_CHUNK_BYTES = 1 << 22
MAX_DIMENSIONS = 64  # torch has no more

SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: bytes `begin ... end - 1` of `file`."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    def __getitem__(self, _: Any) -> Tensor:
        """Returns the whole tensor: transformers' loader asks lazy tensors for `[...]`."""
        return self.exact()

    def is_floating_point(self) -> bool:
        """Returns whether it holds floats, which the loader of a quantized model asks."""
        return self.dtype.is_floating_point

    def exact(self) -> Tensor:
        """Returns the tensor before it is rounded to `dtype`, where it is computed; else `read`."""
        return self.read()

    def read(self) -> Tensor:
        """Returns the tensor, freshly allocated on the CPU."""
        buffer = bytearray(self.end - self.begin)
        if not buffer:
            return torch.empty(self.shape, dtype=self.dtype)
        with self.file.open("rb") as handle:
            handle.seek(self.begin)
            got = handle.readinto(buffer)
        if got != len(buffer):
            raise LowbitError(
                f"{self.file}: tensor {self.name!r} ends after {got} of {len(buffer)} bytes; "
                "the file changed while it was read, fetch it again"
            )
        return torch.frombuffer(buffer, dtype=self.dtype).view(self.shape)


class Checkpoint:
    """A local checkpoint directory. Construct it with `Checkpoint.open`.

    Attributes:
        path: the directory.
        config: the parsed `config.json`.
        entries: tensor name -> `TensorEntry`, in the order of files and offsets.
        derivation: how tensors are computed from those of the files, JSON values, for a subclass
            whose entries are (a merge); part of what every result depends on.
    """

    derivation: dict[str, Any] | None = None

    def __init__(self, path: Path, config: dict[str, Any], entries: dict[str, TensorEntry]) -> None:
        self.path, self.config, self.entries = path, config, entries

    @staticmethod
    def open(path: str | Path) -> Checkpoint:
        """Returns the checkpoint at `path` after checking every header and size.

        Raises:
            LowbitError: for a path that is no checkpoint, pickled weights, a missing or truncated
                shard, an index that points outside the directory, a header that does not fit, a
                checkpoint that failed verification.
        """
        directory = Path(path)
        if not directory.exists():
            raise LowbitError(f"{directory}: no such directory; give the folder of a checkpoint")
        if not directory.is_dir():
            raise LowbitError(f"{directory}: is a file; give the folder that holds config.json")
        config = read_json(directory / CONFIG_NAME, "a Hugging Face checkpoint has one")
        refuse_marked(directory, config)
        if "model_type" not in config:
            raise LowbitError(f"{directory / CONFIG_NAME}: has no model_type, so no model is known")
        require_complete(directory, config.get("quantization_config"))
        entries: dict[str, TensorEntry] = {}
        weight_map = _weight_map(directory)
        for file_name in sorted(set(weight_map.values())) if weight_map else [SINGLE_NAME]:
            for entry in read_header(directory / file_name):
                if entry.name in entries:
                    other = entries[entry.name].file.name
                    raise LowbitError(
                        f"{directory}: tensor {entry.name!r} is in both {other} and {file_name}; "
                        "keep one"
                    )
                entries[entry.name] = entry
        for name, file_name in (weight_map or {}).items():
            if name not in entries or entries[name].file.name != file_name:
                raise LowbitError(
                    f"{directory / INDEX_NAME}: says that {file_name} holds {name!r}, but it does "
                    "not; fetch the checkpoint again"
                )
        return Checkpoint(directory, config, entries)

    def files(self) -> list[Path]:
        """Returns the safetensors files, sorted by name."""
        return sorted({entry.file for entry in self.entries.values()})

    def measured_model(self) -> dict[str, Any] | None:
        """Returns the digests of the model whose statistics fit, where it is another one.

        `config` and `weights` as `StoredStatistics.require_model` takes them. None: this one.
        """
        return None

    def verify(self, advance: Callable[[int], None] | None = None) -> dict[str, str]:
        """Returns file name -> SHA-256 of every weight file, after reading every weight once.

        Args:
            advance: told the bytes of every chunk that was read.

        Raises:
            LowbitError: naming a tensor that holds NaN or Inf, or a shard that is not the one in
                the manifest of the run of ours that wrote it.
        """
        from lowbit.checkpoint.manifest import require_written  # which reads with this file

        digests, broken = self.scan(advance, stop=True)
        for entry, kind in broken:
            raise LowbitError(
                f"{entry.file}: tensor {entry.name!r} holds {kind}; a model with such weights is "
                "broken, fetch it again"
            )
        require_written(self.path, digests)
        return digests

    def scan(
        self, advance: Callable[[int], None] | None = None, stop: bool = False
    ) -> tuple[dict[str, str], list[tuple[TensorEntry, str]]]:
        """Returns the SHA-256 of every weight file, and the tensors that hold NaN or Inf.

        Args:
            advance: told the bytes of every chunk that was read.
            stop: at the first such tensor.
        """
        by_file: dict[Path, list[TensorEntry]] = {file: [] for file in self.files()}
        for entry in self.entries.values():
            by_file[entry.file].append(entry)
        digests: dict[str, str] = {}
        broken: dict[str, tuple[TensorEntry, str]] = {}
        for file, entries in by_file.items():
            digests[file.name] = _scan_file(file, entries, broken, advance)
            if broken and stop:
                break
        return digests, list(broken.values())


def _scan_file(
    file: Path,
    entries: list[TensorEntry],
    broken: dict[str, tuple[TensorEntry, str]],
    advance: Callable[[int], None] | None,
) -> str:
    """Returns the SHA-256 of `file`, and notes what is `broken` in it.

    `entries` are its tensors in file order, without holes.
    """
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        digest.update(handle.read(entries[0].begin if entries else -1))
        for entry in entries:
            remaining = entry.end - entry.begin
            while remaining:
                chunk = bytearray(handle.read(min(remaining, HASH_CHUNK_BYTES)))
                digest.update(chunk)
                kind = _not_finite(torch.frombuffer(chunk, dtype=entry.dtype))
                if kind is not None:
                    broken.setdefault(entry.name, (entry, kind))
                remaining -= len(chunk)
                if advance is not None:
                    advance(len(chunk))
    return digest.hexdigest()


def _not_finite(values: Tensor) -> str | None:
    """Returns what is among `values` that is no number, if anything."""
    if not values.is_floating_point():
        return None
    low, high = torch.aminmax(values)  # NaN propagates; one pass, nothing allocated
    if torch.isfinite(low) and torch.isfinite(high):
        return None
    return "NaN" if torch.isnan(low) else "Inf"


def require_complete(directory: Path, quantization: Any) -> None:
    """Refuses an output directory of ours whose run has not ended, or that lost its manifest.

    Args:
        directory: a local checkpoint.
        quantization: its `quantization_config`, whatever that is.
    """
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "lowbit":
        return
    if quantization.get("status") == IN_PROGRESS:
        raise LowbitError(
            f"{directory}: is unfinished, its quantization was interrupted; go on with the same "
            "`lowbit quantize` and --resume"
        )
    manifest = quantization.get("manifest")
    if isinstance(manifest, str) and not (directory / manifest).is_file():
        raise LowbitError(
            f"{directory / manifest}: missing, but config.json names it; the checkpoint is "
            "incomplete, copy it again"
        )


def read_json(file: Path, needed: str) -> dict[str, Any]:
    """Returns the object in `file`.

    Raises:
        LowbitError: if it is missing (with `needed` as the reason) or not a JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LowbitError(f"{file}: not found; {needed}") from None
    except OSError as error:
        raise LowbitError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # also bad UTF-8, endless digits, deep nesting
        raise LowbitError(f"{file}: is not valid JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise LowbitError(f"{file}: holds a JSON {type(content).__name__}, needed an object")
    return content


def file_digest(file: Path) -> str:
    """Returns the SHA-256 of a file as hex."""
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while chunk := handle.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _weight_map(directory: Path) -> dict[str, str] | None:
    """Returns tensor name -> file name of a sharded checkpoint, None for a single file."""
    index = directory / INDEX_NAME
    single = (directory / SINGLE_NAME).exists()
    if single and index.exists():
        raise LowbitError(
            f"{directory}: holds both {SINGLE_NAME} and {INDEX_NAME}, two models in one folder; "
            "remove the one that is stale"
        )
    if not index.exists():
        if single:
            return None
        pickles = sorted(
            p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern)
        )
        if pickles:
            raise LowbitError(
                f"{directory}: holds pickled weights ({pickles[0]}), which can run code when read; "
                "convert them to safetensors first (save_pretrained does)"
            )
        raise LowbitError(
            f"{directory}: has neither {SINGLE_NAME} nor {INDEX_NAME}; give a complete checkpoint"
        )
    weight_map = read_json(index, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LowbitError(f"{index}: has no weight_map; fetch it again")
    for name, file_name in weight_map.items():
        # A plain file name only: no separator of any system, no drive, no parent.
        if (
            not isinstance(file_name, str)
            or file_name in ("", ".", "..")
            or any(mark in file_name for mark in "/\\:\0")
        ):
            raise LowbitError(
                f"{index}: tensor {name!r} points to {file_name!r}, outside the directory; an "
                "index may only name files beside it"
            )
        if not file_name.endswith(".safetensors"):
            raise LowbitError(f"{index}: {file_name!r} is no safetensors file; only those are read")
    return weight_map


def read_header(file: Path) -> list[TensorEntry]:
    """Returns the entries of one safetensors file, in file order.

    Raises:
        LowbitError: if the header does not describe exactly the bytes of the file.
    """
    fetch = "fetch the file again"
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise LowbitError(f"{file}: {size} bytes are too few for its header; {fetch}")
            header = json.loads(handle.read(length))
    except LowbitError:
        raise
    except FileNotFoundError:
        raise LowbitError(f"{file}: the shard is missing; {fetch}") from None
    except OSError as error:
        raise LowbitError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise LowbitError(f"{file}: the safetensors header is corrupt; {fetch}") from None
    if not isinstance(header, dict):
        raise LowbitError(f"{file}: the safetensors header is corrupt; {fetch}")
    start = 8 + length
    entries = [
        _entry(file, name, fields, start)
        for name, fields in header.items()
        if name != "__metadata__"
    ]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    position = start
    for entry in entries:
        if entry.begin != position:
            raise LowbitError(f"{file}: tensor {entry.name!r} overlaps or leaves a hole; {fetch}")
        position = entry.end
    if position != size:
        kind = "truncated" if position > size else "longer than its header says"
        raise LowbitError(f"{file}: is {kind} ({size} bytes, needed {position}); {fetch}")
    return entries


def _entry(file: Path, name: str, fields: Any, start: int) -> TensorEntry:
    try:
        dtype_name, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
        plain = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        plain = plain and isinstance(dtype_name, str) and len(shape) <= MAX_DIMENSIONS
    except (KeyError, TypeError, ValueError):
        plain = False
    if not plain:
        raise LowbitError(f"{file}: the entry of tensor {name!r} is corrupt; fetch the file again")
    dtype = SAFETENSORS_DTYPES.get(dtype_name)
    if dtype is None:
        raise LowbitError(
            f"{file}: tensor {name!r} is {dtype_name}, which is not supported; "
            f"needed one of {', '.join(SAFETENSORS_DTYPES)}"
        )
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise LowbitError(
            f"{file}: tensor {name!r} of {dtype_name} {shape} does not fit its {end - begin} "
            "bytes; fetch the file again"
        )
    return TensorEntry(name, file, dtype, tuple(shape), start + begin, start + end)


def read_quantized(
    entries: Mapping[str, TensorEntry], name: str, scheme: Scheme, shape: tuple[int, int]
) -> QuantizedWeight:
    """Returns the quantized weight of module `name`, read and checked against its scheme."""
    full_names = {key: f"{name}.{key}" for key in scheme.tensor_specs(shape)}
    found = {key: entries[full].read() for key, full in full_names.items() if full in entries}
    return QuantizedWeight.from_tensors(scheme, shape, found, name)
