"""`quantize`: check everything, then claim the output directory, then work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from lowbit.algorithms import Algorithm
from lowbit.allocation.allocate import Allocation
from lowbit.calibration.coverage import warn_of_few_tokens
from lowbit.checkpoint import Checkpoint
from lowbit.checkpoint.journal import threads_of_run
from lowbit.engines.choice import Target
from lowbit.errors import LowbitError
from lowbit.formats.gguf.layout import Gguf
from lowbit.hf.config import LowbitConfig
from lowbit.hf.loading import choose_device
from lowbit.model_card.saving import after_save
from lowbit.models.selection import select_modules
from lowbit.models.streaming import StreamedDecoder
from lowbit.pipeline.allocation import choose_schemes, make_allocation
from lowbit.pipeline.plan import Plan, QuantizedCheckpoint
from lowbit.pipeline.serving import DEFAULT_SCHEME, Serving, check_output
from lowbit.pipeline.source import (
    calibration_tokens,
    compute_dtype,
    linear_widths,
    local_directory,
)
from lowbit.pipeline.stored_statistics import StoredStatistics
from lowbit.recipe import Recipe, make_recipe
from lowbit.scheme import Scheme


def quantize(
    model: str | Path | Checkpoint,
    output: str | Path,
    *,
    scheme: str | Scheme | None = None,
    algorithm: str | Algorithm | None = None,
    quality: str | Recipe | None = None,
    calibration: str | Path | None = None,
    samples: int = 128,
    seqlen: int = 512,
    seed: int = 0,
    text_field: str | None = None,
    loss_mask: bool = False,
    stats: str | Path | None = None,
    target_bits: float | None = None,
    target_size: int | str | None = None,
    allocation: Allocation | None = None,
    device: str | torch.device | None = None,
    dynamic: Mapping[str, str | Scheme | None] | None = None,
    modules_to_not_convert: tuple[str, ...] = (),
    quantize_lm_head: bool = False,
    quantize_embeddings: bool = False,
    engine: str | None = None,
    tensor_parallel: int = 1,
    resume: bool = False,
    verify: bool = True,
    progress: bool = True,
) -> QuantizedCheckpoint:
    """Quantizes a checkpoint to `output` and returns it; the whole model is never in memory.

    Args:
        model: directory of a Hugging Face decoder in safetensors, the name of one on the hub, or a
            checkpoint whose tensors are computed as they are asked for (see `lowbit.merging`).
        output: directory to write, new or empty.
        scheme: for every linear layer of the decoder blocks; None for "W4A16_G64", or the scheme
            nearest to it that `engine` serves.
        algorithm: "gptq" (where neither it nor `quality` is given), "rtn", "awq" (folds, then
            rounds to nearest), "awq+gptq", or an instance with options, for example
            `GPTQ(act_order=False)`; nothing else is done then.
        quality: instead of `algorithm`, a recipe: "fast", "balanced", "best", or a `Recipe`.
        calibration: text file, JSONL, data set name, or a .safetensors / .npy file of token ids.
            Required by "gptq" and by schemes with static activations; "rtn" then weighs its
            scale search by it.
        samples: calibration windows.
        seqlen: tokens per window.
        seed: chooses the windows.
        text_field: the field of JSONL or hub rows that holds a text or chat messages.
        loss_mask: of chat messages, count only the tokens of answers in the statistics.
        stats: instead of `calibration`, a folder that `calibrate` has written; the model is not
            run. Refused with a recipe that needs it to run.
        target_bits: choose a scheme for every layer of the blocks, so that the quantized weights
            take at most this many bits each, scales and zero points included. `scheme` is then for
            what is quantized outside the blocks.
        target_size: the same for the bytes of all safetensors files, a number or "4.2GB".
        allocation: the same with options, see `Allocation`.
        device: where blocks are run and quantized; the GPU if there is one, else the CPU.
        dynamic: regex -> scheme, or None to leave a module in 16 bits; the first match counts.
        modules_to_not_convert: names of modules left in 16 bits.
        quantize_lm_head: also the output projection.
        quantize_embeddings: also the input embedding (and a head tied to it), without data.
        engine: of `lowbit.engines.ENGINES`; what it would refuse is refused before any work, and
            the output is in the format that it serves best. None for our own format.
        tensor_parallel: GPUs among which it divides every layer.
        resume: go on with the unfinished run in `output`.
        verify: check the result as `lowbit verify` does, and mark it as bad if that fails.
        progress: show a progress bar on standard error.

    Raises:
        LowbitError: bad input; nothing has been written unless the message says so.
        VerificationError: the result fails a check; nothing is deleted.
    """
    target = None if engine is None else Target.named(engine, tensor_parallel)
    recipe = make_recipe(algorithm, quality)
    allocation = make_allocation(allocation, target_bits, target_size, calibration is not None)
    config = LowbitConfig(
        scheme=DEFAULT_SCHEME if scheme is None else scheme,
        dynamic=dynamic,
        modules_to_not_convert=modules_to_not_convert,
        quantize_lm_head=quantize_lm_head,
        quantize_embeddings=quantize_embeddings,
        algorithm=recipe.algorithm.name,
        algorithm_options=recipe.algorithm_options(),
        recipe=recipe.surroundings(),
    )
    directory, where = Path(output), choose_device(device)
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint.open(local_directory(model))
    check_output(checkpoint, directory, target, resume)
    stored = None if stats is None else StoredStatistics.open(stats)
    has_data = calibration is not None or stored is not None
    if calibration is not None and stored is not None:
        raise LowbitError(
            "calibration text and statistics are both given; give one of them (the statistics hold "
            "what was measured on a text before)"
        )
    if stored is not None and recipe.surroundings():
        raise LowbitError(
            f"the recipe's {', '.join(recipe.surroundings())} must run the model, which stored "
            "statistics cannot replace; give calibration text instead, or only an algorithm"
        )
    if recipe.needs_data and not has_data:
        what = f"quality {quality}" if isinstance(quality, str) else "the recipe"
        what = f"algorithm {recipe.algorithm.name}" if quality is None else what
        raise LowbitError(
            f"{what} needs calibration data; give a text, JSONL or token file (--calibration), or "
            "use algorithm rtn, which needs none"
        )
    if config.needs_activation_scales and not has_data:
        raise LowbitError(
            f"scheme {config.scheme}: a stored scale of activations needs calibration data; give a "
            "text, JSONL or token file, or use W8A8, which computes a scale per token"
        )
    dtype = compute_dtype(checkpoint, where, calibration is not None)
    decoder = StreamedDecoder(checkpoint, dtype, where)
    serving = Serving(target, decoder, fixed=scheme is not None)
    if allocation is None:
        config = serving.fitted(config)
    else:
        allocation = serving.allowed(allocation, config)
    tokens = None
    if calibration is not None:
        tokens = calibration_tokens(
            decoder, calibration, samples, seqlen, seed, text_field, loss_mask
        )
    allocated = None
    if allocation is not None and tokens is not None:
        with threads_of_run(directory):
            allocated = choose_schemes(
                allocation, config, decoder, tokens, recipe.algorithm, progress
            )
    layout = serving.layout(config)
    selected = select_modules(decoder.model, config.selection())
    widths = linear_widths(decoder, selected)
    if stored is not None:
        stored.require_layers(widths)
    if recipe.needs_data:
        counted = tokens.counted if tokens is not None else 0
        warn_of_few_tokens(counted if stored is None else stored.summary()["tokens"], widths)
    plan = Plan(decoder, selected, recipe, tokens, config, directory, stored, allocated)
    with threads_of_run(directory):
        made = serving.execute(plan, layout, resume, verify, progress)
    if layout == Gguf.name:
        return made  # one file, checked and described as such
    name = None if isinstance(model, Checkpoint) else str(model)
    manifest = after_save(directory, checkpoint.path, name, verify, progress, where)
    return QuantizedCheckpoint(directory, manifest)
