"""`quantize`: check everything, then claim the output directory, then work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from lowbit.algorithms import Algorithm
from lowbit.calibration.tokens import TOKEN_SUFFIXES, CalibrationTokens, load_calibration
from lowbit.checkpoint import Checkpoint
from lowbit.checkpoint.journal import refuse_occupied, threads_of_run
from lowbit.errors import LowbitError
from lowbit.hf.config import LowbitConfig
from lowbit.hf.loading import choose_device, is_hub_name, load_tokenizer
from lowbit.models.foreign import FOREIGN_ERRORS, one_line
from lowbit.models.selection import select_modules
from lowbit.models.streaming import StreamedDecoder
from lowbit.pipeline.plan import Plan, QuantizedCheckpoint
from lowbit.recipe import Recipe, make_recipe
from lowbit.scheme import Scheme


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    scheme: str | Scheme = "W4A16_G64",
    algorithm: str | Algorithm | None = None,
    quality: str | Recipe | None = None,
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
        algorithm: "gptq" (where neither it nor `quality` is given), "rtn", or an instance with
            options, for example `GPTQ(act_order=False)`; nothing else is done then.
        quality: instead of `algorithm`, a recipe: "fast", "balanced", "best", or a `Recipe`.
        calibration: text file, JSONL, data set name, or a .safetensors / .npy file of token ids.
            Required by "gptq" and by schemes with static activations; "rtn" then weighs its
            scale search by it.
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
    recipe = make_recipe(algorithm, quality)
    config = LowbitConfig(
        scheme=scheme,
        dynamic=dynamic,
        modules_to_not_convert=modules_to_not_convert,
        quantize_lm_head=quantize_lm_head,
        quantize_embeddings=quantize_embeddings,
        algorithm=recipe.algorithm.name,
        algorithm_options=recipe.algorithm_options(),
        recipe=recipe.surroundings(),
    )
    directory, where = Path(output), choose_device(device)
    checkpoint = Checkpoint.open(local_directory(model))
    _check_places(checkpoint, directory, resume)
    if recipe.needs_data and calibration is None:
        what = f"quality {quality}" if isinstance(quality, str) else "the recipe"
        what = f"algorithm {recipe.algorithm.name}" if quality is None else what
        raise LowbitError(
            f"{what} needs calibration data; give a text, JSONL or token file (--calibration), or "
            "use algorithm rtn, which needs none"
        )
    if config.needs_activation_scales and calibration is None:
        raise LowbitError(
            f"scheme {scheme}: a stored scale of activations needs calibration data; give a text, "
            "JSONL or token file, or use W8A8, which computes a scale per token"
        )
    dtype = _compute_dtype(checkpoint, where, calibration is not None)
    decoder = StreamedDecoder(checkpoint, dtype, where)
    selected = select_modules(decoder.model, config.selection())
    tokens = None
    if calibration is not None:
        tokens = _calibration_tokens(decoder, str(calibration), samples, seqlen, seed)
    plan = Plan(decoder, selected, recipe, tokens, config, directory)
    with threads_of_run(directory):
        return plan.execute(resume, progress)


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


def _compute_dtype(checkpoint: Checkpoint, device: torch.device, runs: bool) -> torch.dtype:
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


def _check_places(checkpoint: Checkpoint, directory: Path, resume: bool) -> None:
    quantization = checkpoint.config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise LowbitError(
            f"{checkpoint.path}: is already quantized ({method}); start from the 16-bit model"
        )
    if directory.resolve() == checkpoint.path.resolve():
        raise LowbitError(f"{directory}: output and model are the same; choose another output")
    refuse_occupied(directory, resume)


def _calibration_tokens(
    decoder: StreamedDecoder, source: str, samples: int, seqlen: int, seed: int
) -> CalibrationTokens:
    text_config = decoder.model.config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None)
    if limit is not None and seqlen > limit:
        raise LowbitError(f"seqlen {seqlen} is longer than the model's {limit} positions; lower it")
    is_text = Path(source).suffix.lower() not in TOKEN_SUFFIXES
    tokenizer = load_tokenizer(decoder.checkpoint.path) if is_text else None
    return load_calibration(source, tokenizer, text_config.vocab_size, samples, seqlen, seed)
