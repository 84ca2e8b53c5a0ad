"""`quantize`: check everything, then claim the output directory, then work."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer

from lowbit import __version__
from lowbit.algorithms import Algorithm, algorithm_options, make_algorithm
from lowbit.calibration.tokens import CalibrationTokens, load_calibration
from lowbit.checkpoint import Checkpoint, write_json
from lowbit.checkpoint.journal import JOURNAL_NAME, MANIFEST_NAME, Fingerprint, Journal
from lowbit.checkpoint.reader import read_json
from lowbit.errors import LowbitError
from lowbit.hf.config import IN_PROGRESS, LowbitConfig, sentinel_key
from lowbit.models.selection import select_modules
from lowbit.models.streaming import StreamedDecoder
from lowbit.pipeline.output import digest_json, manifest, write_index, write_side_files
from lowbit.pipeline.run import BATCH_TOKENS, QuantizationRun
from lowbit.progress import RunProgress
from lowbit.scheme import Scheme


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


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    scheme: str | Scheme = "W4A16_G64",
    algorithm: str | Algorithm = "gptq",
    calibration: str | Path | None = None,
    samples: int = 128,
    seqlen: int = 512,
    seed: int = 0,
    device: str | torch.device | None = None,
    dynamic: Mapping[str, str | Scheme | None] | None = None,
    modules_to_not_convert: tuple[str, ...] = (),
    quantize_lm_head: bool = False,
    quantize_embeddings: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> QuantizedCheckpoint:
    """Quantizes a checkpoint to `output` and returns it; the whole model is never in memory.

    Args:
        model: directory of a Hugging Face decoder in safetensors, or the name of one on the hub.
        output: directory to write, new or empty.
        scheme: for every linear layer of the decoder blocks, for example "W4A16_G64".
        algorithm: "gptq", "rtn", or an instance with options, for example `GPTQ(act_order=False)`.
        calibration: text file, JSONL, data set name, or a .safetensors / .npy file of token ids.
            Required by "gptq"; "rtn" then weighs its scale search by it.
        samples: calibration windows.
        seqlen: tokens per window.
        seed: chooses the windows.
        device: where blocks are run and quantized; the GPU if there is one, else the CPU.
        dynamic: regex -> scheme, or None to leave a module in 16 bits; the first match counts.
        modules_to_not_convert: names of modules left in 16 bits.
        quantize_lm_head: also the output projection.
        quantize_embeddings: also the input embedding (and a head tied to it), without data.
        resume: go on with the unfinished run in `output`.
        progress: show a progress bar on standard error.

    Raises:
        LowbitError: bad input; nothing has been written unless the message says so.
    """
    chosen = make_algorithm(algorithm)
    config = LowbitConfig(
        scheme=scheme,
        dynamic=dynamic,
        modules_to_not_convert=modules_to_not_convert,
        quantize_lm_head=quantize_lm_head,
        quantize_embeddings=quantize_embeddings,
        algorithm=chosen.name,
        algorithm_options=algorithm_options(chosen),
    )
    if chosen.needs_statistics and calibration is None:
        raise LowbitError(
            f"algorithm {chosen.name} needs calibration data; give a text, JSONL or token file, or "
            "use rtn, which needs none"
        )
    directory, where = Path(output), _device(device)
    checkpoint = Checkpoint.open(local_directory(model))
    _check_places(checkpoint, directory)
    if resume:
        _restore_threads(directory)
    dtype = _compute_dtype(checkpoint, where, calibration is not None)
    decoder = StreamedDecoder(checkpoint, dtype, where)
    selected = select_modules(decoder.model, config.selection())
    tokens = None
    if calibration is not None:
        tokens = _calibration_tokens(decoder, str(calibration), samples, seqlen, seed)
    with RunProgress(progress) as bar:
        bar.stage("checking weights", sum(e.end - e.begin for e in checkpoint.entries.values()))
        weights = checkpoint.verify(bar.advance)
        fingerprint = _fingerprint(decoder, config, tokens, weights)
        _check_space(checkpoint, directory, decoder, selected)
        journal = Journal.start(directory, fingerprint, resume)
        _write_config(decoder, directory, config, selected, status=IN_PROGRESS)
        batches = _batches(tokens.ids) if tokens else []
        run = QuantizationRun(decoder, selected, chosen, batches, journal, bar)
        files = run.execute(sentinel=sentinel_key(selected))
    write_index(directory, files)
    write_side_files(checkpoint.path, directory)
    content = manifest(journal, fingerprint, selected)
    write_json(directory / MANIFEST_NAME, content)
    _write_config(decoder, directory, config, selected, status=None)
    journal.remove()
    return QuantizedCheckpoint(directory, content)


def local_directory(model: str | Path) -> Path:
    """Returns the directory of `model`, fetched from the hub if it is not a local path.

    Raises:
        LowbitError: if it is neither.
    """
    path = Path(model)
    name = str(model)
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise LowbitError(
            f"{name}: no such directory, and it could not be fetched from the hub "
            f"({type(error).__name__}); give the folder of a checkpoint"
        ) from error


def _device(device: str | torch.device | None) -> torch.device:
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise LowbitError(f"device {device!r} is not known to torch; use cpu or cuda") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise LowbitError(f"device {device!r}: torch sees no GPU here; use cpu")
    return chosen


def _compute_dtype(checkpoint: Checkpoint, device: torch.device, runs: bool) -> torch.dtype:
    """Returns the dtype in which blocks are loaded.

    On a CPU, blocks that are run are run in fp32: exact, and much faster than bf16 without AMX. On
    a GPU fp16 models are run in bf16, which cannot overflow. Without calibration nothing is run,
    and the checkpoint's own dtype takes the least memory.
    """
    stored = {e.dtype for e in checkpoint.entries.values() if e.dtype.is_floating_point}
    widest = max(stored, key=lambda dtype: dtype.itemsize, default=torch.float32)
    if not runs:
        return widest if len(stored) == 1 else torch.float32
    return torch.float32 if device.type == "cpu" or widest == torch.float32 else torch.bfloat16


def _check_places(checkpoint: Checkpoint, directory: Path) -> None:
    if "quantization_config" in checkpoint.config:
        method = checkpoint.config["quantization_config"].get("quant_method", "unknown")
        raise LowbitError(
            f"{checkpoint.path}: is already quantized ({method}); start from the 16-bit model"
        )
    if directory.resolve() == checkpoint.path.resolve():
        raise LowbitError(f"{directory}: output and model are the same; choose another output")
    if directory.exists() and not directory.is_dir():
        raise LowbitError(f"{directory}: is a file; choose a new directory")


def _check_space(
    checkpoint: Checkpoint, directory: Path, decoder: StreamedDecoder, selected: dict[str, Scheme]
) -> None:
    """Refuses before any work if the result cannot fit on the disk."""
    saved = 0
    for name, scheme in selected.items():
        keys = decoder.sources.get(f"{name}.weight", [])
        for entry in (checkpoint.entries[key] for key in keys):
            if len(entry.shape) == 2:
                saved += (
                    entry.end - entry.begin - scheme.stored_bytes((entry.shape[0], entry.shape[1]))
                )
    needed = sum(e.end - e.begin for e in checkpoint.entries.values()) - saved
    existing = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    written = (
        sum(f.stat().st_size for f in directory.glob("*.safetensors")) if directory.exists() else 0
    )
    free = shutil.disk_usage(existing).free
    if free < needed - written:
        raise LowbitError(
            f"{directory}: the result needs about {(needed - written) / 1e9:.2f} GB, but the disk "
            f"has {free / 1e9:.2f} GB free; choose another disk"
        )


def _calibration_tokens(
    decoder: StreamedDecoder, source: str, samples: int, seqlen: int, seed: int
) -> CalibrationTokens:
    text_config = decoder.model.config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None)
    if limit is not None and seqlen > limit:
        raise LowbitError(f"seqlen {seqlen} is longer than the model's {limit} positions; lower it")
    return load_calibration(
        source,
        load_tokenizer(decoder.checkpoint.path),
        text_config.vocab_size,
        samples,
        seqlen,
        seed,
    )


def load_tokenizer(directory: Path) -> Any:
    """Returns the tokenizer of a checkpoint, None if it has none."""
    names = (
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    )
    if not any((directory / name).exists() for name in names):
        return None
    try:
        return AutoTokenizer.from_pretrained(directory)
    except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise LowbitError(
            f"{directory}: its tokenizer cannot be loaded ({first_line[:200]})"
        ) from error


def _batches(ids: Tensor) -> list[Tensor]:
    return list(ids.split(max(1, BATCH_TOKENS // ids.shape[1])))


def _fingerprint(
    decoder: StreamedDecoder,
    config: LowbitConfig,
    tokens: CalibrationTokens | None,
    weights: dict[str, str],
) -> Fingerprint:
    """Returns everything that the bytes of the result depend on."""
    return {
        "versions": {
            "lowbit": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
        "model": {"config": digest_json(decoder.checkpoint.config), "weights": weights},
        "ignored_tensors": decoder.ignored,
        "options": config.to_dict(),
        "calibration": {**tokens.description, "digest": tokens.digest} if tokens else None,
        "device": decoder.device.type,
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def _restore_threads(directory: Path) -> None:
    """Takes the thread count of the run to resume: how sums are split decides their last bits."""
    journal = directory / JOURNAL_NAME
    if journal.exists():
        threads = read_json(journal, "").get("fingerprint", {}).get("threads")
        if isinstance(threads, int) and 0 < threads <= 1024:
            torch.set_num_threads(threads)


def _write_config(
    decoder: StreamedDecoder,
    directory: Path,
    config: LowbitConfig,
    selected: dict[str, Scheme],
    status: str | None,
) -> None:
    """Writes `config.json`: the source's, with ours under `quantization_config`."""
    content = dict(decoder.checkpoint.config)
    quantization = config.to_dict()
    if status is None:
        quantization["manifest"] = MANIFEST_NAME
    else:
        quantization["status"] = status
    content["quantization_config"] = quantization
    head = decoder.head_name
    if head in selected and decoder.embedding_name not in selected:
        content["tie_word_embeddings"] = False  # the head has its own codes now
    write_json(directory / "config.json", content)
