"""`lowbit.load`: a checkpoint in any layout as a model on our kernels, its files left as they are.

transformers loads our own checkpoints by the names of their tensors. It is given those names here
too; each stands for a tensor that is made from the files when the loader asks for it, a module at
a time. So everything that `from_pretrained` can do (`device_map`, `dtype`, ...) is done by it, and
the result is a model like one from our own files: it runs, trains with PEFT, and saves as lowbit.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from lowbit.checkpoint import Checkpoint
from lowbit.checkpoint.reader import SAFETENSORS_DTYPES
from lowbit.formats.base import Layout, StoredAs
from lowbit.formats.gguf.checkpoint import GgufCheckpoint
from lowbit.formats.model_view import ModelView
from lowbit.formats.own import Bf16, Lowbit
from lowbit.formats.plan import ConversionPlan, model_dtype, plan_conversion
from lowbit.formats.reading import open_checkpoint, read_module
from lowbit.formats.table import layout_of
from lowbit.hf.loading import check_loaded
from lowbit.models.foreign import one_sentence
from lowbit.models.sources import require_shapes
from lowbit.models.streaming import model_config


def load(path: str | Path, **options: Any) -> PreTrainedModel:
    """Returns the causal language model of a checkpoint, its quantized layers on our kernels.

    Args:
        path: a folder, or the name of one on the hub: of lowbit, compressed-tensors, GPTQ, AWQ or
            bitsandbytes (4 bits), or in 16 bits; or a GGUF file.
        **options: of transformers' `from_pretrained`: `dtype`, `device_map`, ...

    Raises:
        LowbitError: for a checkpoint that is damaged, or that no kernel here runs.
    """
    checkpoint = open_checkpoint(path)
    where = str(checkpoint.path)
    options.setdefault("dtype", "auto")
    if options["dtype"] in (None, "auto"):
        options["dtype"] = model_dtype(checkpoint)
    wants_info = options.pop("output_loading_info", False)
    # The error of transformers names no tensor; `check_loaded` does.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    layout = layout_of(checkpoint)
    if isinstance(layout, (Lowbit, Bf16)):
        view = ModelView(checkpoint)
        stored = [view.module(name).name for name in layout.modules(checkpoint)]
        require_shapes(view.model, checkpoint, stored)
        with one_sentence(where, "model"):
            model, info = AutoModelForCausalLM.from_pretrained(
                checkpoint.path, use_safetensors=True, trust_remote_code=False, **options
            )
    else:
        # A GGUF file may hold nothing but types that are decoded.
        to = Lowbit.name if layout.modules(checkpoint) else Bf16.name
        plan = plan_conversion(checkpoint, to, requantize=False)
        note = checkpoint.decoded_note() if isinstance(checkpoint, GgufCheckpoint) else None
        if note is not None:
            warnings.warn(note, stacklevel=2)
        with one_sentence(where, "model"):
            model, info = _load_foreign(plan, options)
    check_loaded(where, info)
    model.name_or_path = model.config.name_or_path = where
    return (model.eval(), info) if wants_info else model.eval()


def _load_foreign(
    plan: ConversionPlan, options: Mapping[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Returns the model and what transformers says of the loading."""
    path = plan.checkpoint.path
    config = model_config(plan.checkpoint)
    if plan.written.schemes:
        config.quantization_config = plan.target.config(plan.written)
    if (path / "generation_config.json").is_file() and "generation_config" not in options:
        options = {**options, "generation_config": GenerationConfig.from_pretrained(path)}
    # Auto classes want a folder or a name; the class they choose does not.
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    return model_class.from_pretrained(  # type: ignore[no-any-return]
        None, config=config, state_dict=_state_dict(plan), **options
    )


def _state_dict(plan: ConversionPlan) -> dict[str, Any]:
    """Returns name -> tensor to be read, as a checkpoint of ours has them."""
    entries = plan.checkpoint.entries
    owned = {name for stored in plan.modules.values() for name in stored.tensors}
    state = {
        name: _LazyTensor(entry.read, entry.shape, entry.dtype)
        for name, entry in entries.items()
        if name not in owned
    }
    for module, stored in plan.modules.items():
        lazy = _LazyModule(plan.checkpoint, plan.source, module, stored)
        for suffix, (size, dtype) in stored.scheme.tensor_specs(stored.shape).items():
            name = f"{plan.targets[module].view.name}.{suffix}"
            state[name] = _LazyTensor(functools.partial(lazy.take, suffix), size, dtype)
    return state


class _LazyModule:
    """The tensors of one module, read together and given out one by one."""

    def __init__(
        self, checkpoint: Checkpoint, layout: Layout, module: str, stored: StoredAs
    ) -> None:
        self._read = (checkpoint, layout, module, stored)
        self._tensors: dict[str, Tensor] = {}
        self._lock = threading.Lock()  # the loader has several threads

    def take(self, suffix: str) -> Tensor:
        """Returns a tensor, and forgets it."""
        with self._lock:
            if suffix not in self._tensors:
                self._tensors = read_module(*self._read).tensors()
            return self._tensors.pop(suffix)


class _LazyTensor:
    """What transformers takes for a tensor of a file: it is read when indexed with `[...]`."""

    def __init__(
        self, take: Callable[[], Tensor], shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self._take, self._shape = take, shape
        self._dtype = next(name for name, known in SAFETENSORS_DTYPES.items() if known == dtype)

    def get_shape(self) -> list[int]:
        """Returns the shape."""
        return list(self._shape)

    def get_dtype(self) -> str:
        """Returns the dtype by its name in safetensors."""
        return self._dtype

    def __getitem__(self, _: Any) -> Tensor:
        return self._take()
