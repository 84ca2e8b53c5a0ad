"""A checkpoint written as one GGUF file: tensor by tensor, and all or nothing.

    header, metadata, names of tensors   all sizes are known from the plan
    for each tensor: source -> blocks -> read back and compared -> appended
    SHA-256 of the data into the metadata, fsync, renamed into place

The `gguf` package writes the header; nothing of the file is in memory but one tensor.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowbit import __version__
from lowbit.checkpoint.writer import TEMPORARY_SUFFIX, disk_errors, fsync_directory
from lowbit.errors import LowbitError
from lowbit.formats.gguf.architectures import ROPE_FACTORS
from lowbit.formats.gguf.checkpoint import FILE_NAME, SUFFIX
from lowbit.formats.gguf.configuration import llama3_factors, metadata_of_config, rope_of
from lowbit.formats.gguf.converting import Converter
from lowbit.formats.gguf.digest import DIGEST_KEY, NO_DIGEST, SUMMARY_KEY, fill_in_digest
from lowbit.formats.gguf.header import read_gguf_header
from lowbit.formats.gguf.plan import GgufPlan, plan_file
from lowbit.formats.gguf.vocabulary import add_vocabulary
from lowbit.formats.own import Bf16
from lowbit.formats.reading import open_checkpoint
from lowbit.hf.loading import choose_device
from lowbit.model_card.origin import CARD_NAME
from lowbit.pipeline.output import digest_json
from lowbit.pipeline.source import require_space
from lowbit.pipeline.stored_statistics import StoredStatistics
from lowbit.progress import RunProgress

QUANTIZATION_VERSION = 2  # of ggml, since 2023
# llama_ftype by the type of most weights.
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q4_K": 14, "Q6_K": 18, "BF16": 32,
}  # fmt: skip
NAME_KEY = "general.name"
# After the name of a file that failed its check, see `lowbit/verification`.
BAD = ".bad"
# Room on the disk for what is no tensor.
HEADER_ROOM = 1 << 25


@dataclass(frozen=True)
class GgufOptions:
    """What to write.

    Args:
        kind: type of quantized weights, "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"; "BF16", "F16" or
            "F32" for none. None keeps the codes of the source. With a type the source may be a
            model in 16 bits.
        stats: folder of what `lowbit calibrate` measured of such a source: GPTQ chooses the codes.
        replace: write over a file that an interrupted run has made of this very source.
    """

    kind: str | None = None
    stats: str | Path | None = None
    replace: bool = False


def write_gguf(
    source: str | Path,
    output: str | Path,
    options: GgufOptions,
    requantize: bool = False,
    progress: bool = True,
) -> tuple[Path, dict[str, Any]]:
    """Writes a checkpoint as a GGUF file.

    Args:
        source: directory of a checkpoint in any format here or in 16 bits, or its name on the hub.
        output: the file to write if it ends in `.gguf`, else a folder for `model.gguf`.
        options: what to write.
        requantize: choose new codes where a type does not have the values of a weight.
        progress: show a progress bar on standard error.

    Returns:
        The file, and the manifest with its `summary`.

    Raises:
        LowbitError: bad input; nothing is left behind.
    """
    _require_package()
    file = file_of(output)
    require_free(file, str(source) if options.replace else None)
    checkpoint = open_checkpoint(source)
    plan = plan_file(checkpoint, options.kind, requantize)
    statistics = None if options.stats is None else StoredStatistics.open(options.stats)
    if statistics is not None and not isinstance(plan.source, Bf16):
        raise LowbitError(
            f"{checkpoint.path}: is quantized already, and --stats is for a model in 16 bits"
        )
    size = sum(tensor.size for tensor in plan.tensors)
    require_space(file.parent, size + HEADER_ROOM, "a GGUF file")
    with RunProgress(progress) as bar:
        bar.stage("checking", sum(each.stat().st_size for each in checkpoint.files()))
        digests = checkpoint.verify(bar.advance)
        if statistics is not None:
            _require_statistics(statistics, plan, digests)
        converter = Converter(plan, requantize, statistics, choose_device(None))
        bar.stage("converting", size)
        with _new_file(file) as temporary:
            reports = _write(temporary, plan, converter, bar)
        chosen: dict[str, Any] = {"requantize": requantize}
        if options.kind is not None:
            chosen["type"] = options.kind.upper()
        if statistics is not None:
            chosen["statistics"] = digest_json(statistics.manifest)
        return file, _manifest(plan, digests, reports, chosen)


def _write(
    file: Path, plan: GgufPlan, converter: Converter, bar: RunProgress
) -> dict[str, dict[str, Any]]:
    """Writes everything, and returns the report of each quantized weight by its name."""
    import gguf

    writer = gguf.GGUFWriter(None, plan.architecture.name)
    _add_metadata(writer, plan)
    factors = _rope_factors(plan)
    if factors is not None:
        shape = (len(factors),)
        writer.add_tensor_info(ROPE_FACTORS, shape, factors.dtype, factors.nbytes)
    for tensor in plan.tensors:
        number = gguf.GGMLQuantizationType(tensor.kind.number)
        # With a type given, the dtype decides only whether the shape counts bytes.
        writer.add_tensor_info(
            tensor.name, tensor.shape, torch.empty(0).numpy().dtype, tensor.size, number
        )
    reports: dict[str, dict[str, Any]] = {}
    try:
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for tensor in plan.tensors:
            bar.describe(f"{tensor.name:<40.40}")
            raw, report = converter.rows(tensor)
            if raw.numel() != tensor.size:
                raise AssertionError(f"{tensor.name}: {raw.numel()} bytes, planned {tensor.size}")
            writer.write_tensor_data(raw.numpy())
            bar.advance(tensor.size)
            if report is not None:
                reports[tensor.hub_name.removesuffix(".weight")] = {
                    **report,
                    "shape": list(tensor.shape),
                    "stored_bytes": tensor.size,
                }
    finally:
        writer.close()
    fill_in_digest(file)
    return reports


def _add_metadata(writer: Any, plan: GgufPlan) -> None:
    kinds = Counter(tensor.kind.name for tensor in plan.tensors if len(tensor.shape) > 1)
    writer.add_name(plan.checkpoint.path.resolve().name)
    writer.add_file_type(FILE_TYPES[kinds.most_common(1)[0][0]])
    writer.add_quantization_version(QUANTIZATION_VERSION)
    writer.add_quantized_by(f"lowbit {__version__}")
    for key, value in metadata_of_config(plan.config, plan.architecture).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    add_vocabulary(writer, plan.checkpoint.path, int(plan.config["vocab_size"]))
    writer.add_string(SUMMARY_KEY, json.dumps(dict(kinds), sort_keys=True))
    writer.add_string(DIGEST_KEY, NO_DIGEST)


def _rope_factors(plan: GgufPlan) -> Any | None:
    """Returns what frequencies are divided by where the model is one of Llama 3's, or None."""
    rope = rope_of(plan.config)
    if rope["rope_type"] != "llama3":
        return None
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    numbers = tuple(rope[key] for key in keys)
    return llama3_factors(plan.config["head_dim"], rope["rope_theta"], numbers)


@contextmanager
def _new_file(file: Path) -> Iterator[Path]:
    """Gives a temporary file that becomes `file` if all goes well, and is removed if not."""
    temporary = file.with_name(file.name + TEMPORARY_SUFFIX)
    with disk_errors(file):
        new_folders = [
            folder for folder in (file.parent, *file.parent.parents) if not folder.exists()
        ]
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(file)
            # Of an earlier run that failed its check.
            file.with_name(file.name + BAD).unlink(missing_ok=True)
            fsync_directory(file.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            for folder in new_folders:
                folder.rmdir()
            raise


def _require_package() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise LowbitError(
            "writing GGUF needs the gguf package; run `pip install lowbit[gguf]`"
        ) from None


def file_of(output: str | Path) -> Path:
    """Returns the file that is written for `output`: itself, or one in the folder of that name."""
    return Path(output) if Path(output).suffix == SUFFIX else Path(output) / FILE_NAME


def require_free(file: Path, source: str | None = None) -> None:
    """Refuses a file that is there, and a folder that holds something else.

    What failed its check, and what a killed run has left half-written, counts as nothing.

    Args:
        file: to be written.
        source: if given, a file that was made of this folder may be there, with its card.

    Raises:
        LowbitError: saying what is there.
    """
    own = {file.name + TEMPORARY_SUFFIX, file.name + BAD}
    if file.exists():
        if source is None or not _is_made_of(file, Path(source)):
            raise LowbitError(f"{file}: is there already; choose another output")
        own |= {file.name, CARD_NAME}
    if file.name != FILE_NAME or not file.parent.exists():
        return
    if not file.parent.is_dir():
        raise LowbitError(f"{file.parent}: is a file; choose a new folder, or a name in .gguf")
    others = {each.name for each in file.parent.iterdir()} - own
    if others:
        raise LowbitError(
            f"{file.parent}: is not empty (it holds {min(others)}); choose an empty or new folder"
        )


def _is_made_of(file: Path, source: Path) -> bool:
    """Returns whether a file names `source` as what it was made of."""
    try:
        return read_gguf_header(file).metadata.get(NAME_KEY) == source.resolve().name
    except LowbitError:
        return False


def _require_statistics(
    statistics: StoredStatistics, plan: GgufPlan, digests: dict[str, str]
) -> None:
    """Refuses statistics of another model, or without a layer that is to be quantized."""
    statistics.require_model(digest_json(plan.checkpoint.config), digests)
    searched = [tensor for tensor in plan.tensors if tensor.kind.dtype is None]
    widths = {tensor.hub_name.removesuffix(".weight"): tensor.shape[1] for tensor in searched}
    statistics.require_layers(widths)


def _manifest(
    plan: GgufPlan,
    digests: dict[str, str],
    reports: dict[str, dict[str, Any]],
    chosen: dict[str, Any],
) -> dict[str, Any]:
    weights = sum(report["shape"][0] * report["shape"][1] for report in reports.values())
    stored = sum(report["stored_bytes"] for report in reports.values())
    changed = {n: r.get("relative_error") for n, r in reports.items() if not r["exact"]}
    fingerprint = {
        "versions": {"lowbit": __version__},
        "source": {"config": digest_json(plan.checkpoint.config), "weights": digests},
        "to": "gguf",
        **chosen,
    }
    summary = {
        "format": "gguf",
        "quantized_weights": weights,
        "quantized_bytes": stored,
        "bits_per_weight": 8 * stored / weights if weights else 16.0,
        "schemes": sorted({report["type"] for report in reports.values()}),
        "exact": len(reports) - len(changed),
        "rounded": changed,
        "fallbacks": dict(plan.fallbacks),
    }
    return {"fingerprint": fingerprint, "summary": summary, "modules": reports}
