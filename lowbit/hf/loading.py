"""Loading for our own commands: everything that is wrong with a path ends in one sentence.

A local folder is checked by our own reader before transformers sees it, because transformers gives
random weights to tensors that it misses and only warns.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.calibration.tokens import TOKEN_SUFFIXES, Tokenizer, TokenWindows, load_windows
from lowbit.errors import LowbitError, unknown_name
from lowbit.hf.config import LowbitConfig
from lowbit.models.foreign import one_line, one_sentence
from lowbit.nn import prepare_model

DTYPES: dict[str, Any] = {
    "auto": "auto",
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

# The window of the evaluation's protocol; a shorter model takes its own longest.
PROTOCOL_SEQLEN = 2048

# Any of these makes a folder one with a tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)


def quiet_libraries() -> None:
    """Silences warnings and loading bars of the Hugging Face libraries; errors still raise.

    For a process that is ours, such as a command; never called on import.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("huggingface_hub", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|huggingface_hub|torch)(\.|$)")


def choose_device(device: str | torch.device | None) -> torch.device:
    """Returns the device named, or the first GPU, or the CPU.

    Raises:
        LowbitError: there is no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()  # `meta` can hold tensors, but not compute
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise LowbitError(
            f"device {str(device)!r} cannot be used here ({one_line(error)}); try cpu"
        ) from error
    return chosen


def use_threads(threads: int | None) -> None:
    """Lets torch use this many CPU threads; None leaves its default, every core.

    Raises:
        LowbitError: for less than one.
    """
    if threads is None:
        return
    if threads < 1:
        raise LowbitError(f"--threads must be at least 1, got {threads}")
    torch.set_num_threads(threads)


def load_config(path: str) -> Any:
    """Returns the text model's configuration, after checking every file of a local folder.

    Args:
        path: a folder, or the hub name `owner/name`.

    Raises:
        LowbitError: there is no checkpoint, it is damaged, or its architecture is unknown.
    """
    return load_whole_config(path).get_text_config()


def load_whole_config(path: str) -> Any:
    """Returns the configuration, that of a text model inside of another one or not."""
    from transformers import AutoConfig

    if is_hub_name(path):
        with _loading(path, "configuration"):
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            _check_quantization(path, config)
        return config
    from lowbit.formats.base import quantization_of
    from lowbit.formats.reading import open_checkpoint
    from lowbit.models.streaming import model_config

    checkpoint = open_checkpoint(path)
    with _loading(path, "configuration"):
        config = model_config(checkpoint)
        if quantization := quantization_of(checkpoint):
            config.quantization_config = quantization
        _check_quantization(path, config)
    return config


def load_tokenizer(path: str | Path) -> Tokenizer | None:
    """Returns the tokenizer of a checkpoint, or None for one without."""
    from transformers import AutoTokenizer

    from lowbit.formats.reading import gguf_file

    path = str(path)
    if (file := gguf_file(path)) is not None:
        from lowbit.formats.gguf.tokenizer import load_gguf_tokenizer

        found: Tokenizer | None = load_gguf_tokenizer(file)
        return found
    if not is_hub_name(path) and not any((Path(path) / name).exists() for name in TOKENIZER_FILES):
        return None
    with _loading(path, "tokenizer"):
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    return tokenizer


def evaluation_windows(
    path: str, text: str, seqlen: int | None = None, limit: int | None = None
) -> TokenWindows:
    """Returns the windows of `text` to evaluate a model on, tokenised by its own tokenizer.

    Args:
        path: the model.
        text: see `load_windows`.
        seqlen: tokens in a window; None for the protocol's 2048, or the model's longest.
        limit: only so many windows, None for all.

    Raises:
        LowbitError: see `load_config` and `load_windows`; also a window the model is too short for.
    """
    if limit is not None and limit < 1:
        raise LowbitError(f"--windows must be at least 1, got {limit}")
    config = load_config(path)
    longest = getattr(config, "max_position_embeddings", None)
    if seqlen is None:
        seqlen = min(PROTOCOL_SEQLEN, longest or PROTOCOL_SEQLEN)
    elif longest is not None and seqlen > longest:
        raise LowbitError(f"--seqlen {seqlen} is longer than the {longest} tokens of {path}")
    needs_tokenizer = Path(text).suffix.lower() not in TOKEN_SUFFIXES
    tokenizer = load_tokenizer(path) if needs_tokenizer else None
    found = load_windows(text, tokenizer, config.vocab_size, seqlen)
    return found if limit is None else found.first(limit)


def load_model(
    path: str,
    dtype: str = "auto",
    device: torch.device | None = None,
    activations: str = "float",
    scheme: str | None = None,
) -> nn.Module:
    """Returns the causal language model of a checkpoint, in evaluation mode on `device`.

    Args:
        path: a folder, the hub name `owner/name`, or a GGUF file; of lowbit, in 16 bits, or of a
            layout that `lowbit.load` reads: all of them run on our kernels.
        dtype: "auto" (as stored), "float32", "float16" or "bfloat16".
        device: None for `choose_device(None)`.
        activations: "float", or "int8", see `lowbit.prepare_model`.
        scheme: quantize a 16-bit checkpoint to this while loading, by rounding.

    Raises:
        LowbitError: see `load_config`; also weights that are missing or of another shape, a scheme
            for a checkpoint that is quantized already, and "int8" activations where nothing here
            multiplies by them.
    """
    if dtype.lower() not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    target = device or choose_device(None)
    options: dict[str, Any] = {}
    quantization = getattr(load_whole_config(path), "quantization_config", None)
    if quantization is None:
        if scheme is not None:
            options["quantization_config"] = LowbitConfig(scheme=scheme)
    elif scheme is not None:
        raise LowbitError(
            f"{path}: is already quantized, so it cannot be quantized to {scheme} while loading; "
            "give the 16-bit model, or leave the scheme out"
        )
    # A map loads straight to the GPU; on the CPU there is nothing to place.
    if target.type != "cpu":
        options["device_map"] = {"": target}
    if is_foreign(quantization):
        from lowbit.formats.loading import load

        loaded: nn.Module = load(path, dtype=DTYPES[dtype.lower()], **options)
    else:
        loaded = _load_own(path, dtype=DTYPES[dtype.lower()], **options)
    if activations != "float" and not prepare_model(loaded, activations):
        raise LowbitError(
            f"--activations {activations}: {path} has no quantized weights that the native CPU "
            "kernels run; leave it out"
        )
    return loaded


def _load_own(path: str, **options: Any) -> nn.Module:
    """Returns a model of ours, in 16 bits, or of a method that only transformers knows."""
    from transformers import AutoModelForCausalLM

    with _loading(path, "model"):
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            # Its own error names no tensor; `check_loaded` does.
            ignore_mismatched_sizes=True,
            **options,
        )
    check_loaded(path, info)
    loaded: nn.Module = model.eval()
    return loaded


def is_foreign(quantization: Any) -> bool:
    """Returns whether a `quantization_config` is of another tool whose files we read."""
    from lowbit.formats.own import Bf16, Lowbit
    from lowbit.formats.table import LAYOUTS

    fields = quantization if isinstance(quantization, dict) else {}
    others = (layout for layout in LAYOUTS.values() if not isinstance(layout, (Bf16, Lowbit)))
    return any(layout.matches(fields) for layout in others)


def check_loaded(path: str, info: dict[str, Any]) -> None:
    """Refuses weights that transformers left at random; warns of those that it left out."""
    if mismatched := sorted(info["mismatched_keys"]):
        name, stored, needed = mismatched[0]
        raise LowbitError(
            f"{path}: {name!r} has the shape {list(stored)}, but config.json needs {list(needed)}; "
            "the two files do not belong together"
        )
    if missing := sorted(info["missing_keys"]):
        raise LowbitError(
            f"{path}: {len(missing)} weights are missing from the checkpoint, the first is "
            f"{missing[0]!r}; fetch it again"
        )
    if unexpected := sorted(info["unexpected_keys"]):
        print(
            f"warning: {path}: the model does not use {len(unexpected)} tensors of the checkpoint, "
            f"the first is {unexpected[0]!r}",
            file=sys.stderr,
        )


def _check_quantization(path: str, config: Any) -> None:
    """Refuses a method that transformers does not know: it would skip it with a warning."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    quantization = getattr(config, "quantization_config", None)
    if quantization is None or is_foreign(quantization):
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method is not None and method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise LowbitError(
            f"{path}: the quantization method {method!r} is unknown to transformers; load it with "
            "the tool that wrote it"
        )


def _loading(path: str, what: str) -> AbstractContextManager[None]:
    """Turns the ways in which transformers and the hub refuse a checkpoint into a `LowbitError`."""
    hub = is_hub_name(path)
    return one_sentence(f"{path} (no folder here, so the hub was asked)" if hub else path, what)


def is_hub_name(path: str) -> bool:
    """Returns True for `owner/name` unless there is such a folder here."""
    return path.count("/") == 1 and path[0] not in "./~" and not os.path.exists(path)  # noqa: PTH110
