"""What runs ask of the model and the text they are given, before they begin."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from lowbit import __version__
from lowbit.calibration.tokens import TOKEN_SUFFIXES, CalibrationTokens, load_calibration
from lowbit.checkpoint import Checkpoint
from lowbit.checkpoint.journal import Fingerprint, refuse_occupied
from lowbit.errors import LowbitError
from lowbit.hf.loading import is_hub_name, load_tokenizer
from lowbit.models.foreign import FOREIGN_ERRORS, one_line
from lowbit.models.streaming import StreamedDecoder
from lowbit.nn.replace import weight_shape
from lowbit.pipeline.output import digest_json

# Tokens that go through a block at once: enough to fill a matmul, small beside a block's weights.
BATCH_TOKENS = 4096


def local_directory(model: str | Path) -> Path:
    """Returns the directory of `model`, fetched from the hub if it is not a local path.

    Raises:
        LowbitError: if it is neither.
    """
    if not is_hub_name(str(model)):
        return Path(model)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
    try:
        return Path(snapshot_download(str(model), allow_patterns=patterns))
    except FOREIGN_ERRORS as error:
        raise LowbitError(
            f"{model}: no such folder here, and the hub does not give it ({one_line(error)}); give "
            "the folder of a checkpoint"
        ) from error


def compute_dtype(checkpoint: Checkpoint, device: torch.device, runs: bool) -> torch.dtype:
    """Returns the dtype in which blocks are loaded.

    On a CPU, blocks that are run are run in fp32: exact, and much faster than bf16 without AMX. On
    a GPU fp16 models are run in bf16, which cannot overflow. Without calibration nothing is run,
    and the checkpoint's own dtype takes the least memory.
    """
    stored = {e.dtype for e in checkpoint.entries.values() if e.dtype.is_floating_point}
    if not runs:
        return stored.pop() if len(stored) == 1 else torch.float32
    wide = torch.float32 in stored or torch.float64 in stored
    return torch.float32 if device.type == "cpu" or wide else torch.bfloat16


def check_places(checkpoint: Checkpoint, directory: Path, resume: bool) -> None:
    """Refuses a model that is quantized already, and an output that is not free for this run.

    Raises:
        LowbitError: saying what is there.
    """
    quantization = checkpoint.config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise LowbitError(
            f"{checkpoint.path}: is already quantized ({method}); start from the 16-bit model"
        )
    if directory.resolve() == checkpoint.path.resolve():
        raise LowbitError(f"{directory}: output and model are the same; choose another output")
    refuse_occupied(directory, resume)


def calibration_tokens(
    decoder: StreamedDecoder,
    source: str | Path,
    samples: int,
    seqlen: int,
    seed: int,
    text_field: str | None = None,
    loss_mask: bool = False,
) -> CalibrationTokens:
    """Returns the windows of `source` for a model; see `load_calibration`.

    Raises:
        LowbitError: the source is unusable, or something else than a path or a name.
    """
    if not isinstance(source, (str, Path)):
        raise LowbitError(
            f"calibration must be a path or a name, got {type(source).__name__}; write texts to a "
            "JSONL file, and token ids to a .npy or .safetensors file"
        )
    source = str(source)
    text_config = decoder.model.config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None)
    if limit is not None and seqlen > limit:
        raise LowbitError(f"seqlen {seqlen} is longer than the model's {limit} positions; lower it")
    is_text = Path(source).suffix.lower() not in TOKEN_SUFFIXES
    tokenizer = load_tokenizer(decoder.checkpoint.path) if is_text else None
    vocab_size = text_config.vocab_size
    return load_calibration(
        source, tokenizer, vocab_size, samples, seqlen, seed, text_field, loss_mask
    )


def linear_widths(decoder: StreamedDecoder, names: Iterable[str]) -> dict[str, int]:
    """Returns module name -> in_features of the linear layers among `names`."""
    modules = {name: decoder.model.get_submodule(name) for name in names}
    return {
        name: weight_shape(module)[1]
        for name, module in modules.items()
        if not isinstance(module, nn.Embedding)
    }


def split_batches(tokens: Tensor, batch_tokens: int = BATCH_TOKENS) -> list[Tensor]:
    """Returns `tokens` `[samples, seqlen]` in batches of at most `batch_tokens`, or of one row."""
    return list(torch.split(tokens, max(1, batch_tokens // tokens.shape[1])))


def weights_fingerprint(decoder: StreamedDecoder, weights: dict[str, str]) -> Fingerprint:
    """Returns what every result of a model depends on.

    Args:
        decoder: the streamed model.
        weights: file name -> SHA-256 of its shards.
    """
    return {
        "versions": {
            "lowbit": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
        "model": {"config": digest_json(decoder.checkpoint.config), "weights": weights},
        "device": decoder.device.type,
        "dtype": str(decoder.dtype).removeprefix("torch."),
        # How a sum is split over threads decides its last bits.
        "threads": torch.get_num_threads(),
    }


def require_space(directory: Path, needed: int, what: str) -> None:
    """Refuses a disk that has fewer than `needed` bytes free.

    Args:
        directory: where the bytes are to go; it need not exist yet.
        needed: bytes.
        what: they are, for example "a result".
    """
    existing = (directory.absolute(), *directory.absolute().parents)
    free = shutil.disk_usage(next(path for path in existing if path.exists())).free
    if free < needed:
        raise LowbitError(
            f"{directory}: {what} of about {needed / 1e9:.2f} GB does not fit, the disk has "
            f"{free / 1e9:.2f} GB free; choose another disk"
        )
