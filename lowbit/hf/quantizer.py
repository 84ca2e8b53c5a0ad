"""How `from_pretrained` loads a lowbit checkpoint, and quantizes a 16-bit one while loading.

Both ways swap the selected modules for quantized ones on the meta device, before any weight is
read. A lowbit checkpoint then loads by name. On the fly, each module has a 16-bit placeholder
`weight`; transformers reads one weight at a time and hands it to `QuantizeOnLoad`, so that never
more than one matrix is in memory in 16 bits.

transformers checks neither shapes nor missing tensors of a quantized model strictly enough: it
initialises at random what it does not find. So the headers of the files are held against the
config first (`hf/headers.py`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer

from lowbit.checkpoint.reader import require_complete
from lowbit.errors import LowbitError
from lowbit.hf.config import LowbitConfig, sentinel_key
from lowbit.hf.headers import check_full_precision, check_quantized
from lowbit.memory import drop_mapped_pages
from lowbit.models.selection import select_modules
from lowbit.nn.linear import TiedQuantLinear
from lowbit.nn.prepared import prepare_model
from lowbit.nn.replace import module_name, replace_modules, restore_modules, tied_head_name
from lowbit.nn.stored import StoredWeight, base_left_out
from lowbit.quant import QuantizedWeight
from lowbit.scheme import Scheme

_FLOAT_TENSORS = ("weight_scale", "weight_scale_offset", "weight_scale_step", "input_scale")


class LowbitHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """The plug-in that transformers drives; one instance per loaded model.

    Attributes:
        selected: module name -> scheme, in the order of the model.
    """

    requires_calibration = False

    def __init__(self, quantization_config: LowbitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.selected: dict[str, Scheme] = {}
        self._algorithm = None if self.pre_quantized else quantization_config.data_free_algorithm()
        self._not_finite: list[str] = []
        # "<embedding>.weight" -> head, where a tied head is quantized and the embedding is not:
        # the head's weight is in the file under the embedding's name only.
        self._head_of: dict[str, str] = {}

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: Sequence[str] | None = None,
        **_: Any,
    ) -> PreTrainedModel:
        files = [Path(file) for file in checkpoint_files or ()]
        self._check_files(model, files)
        selection = self.quantization_config.selection()
        if self.pre_quantized and model.get_output_embeddings() is None:
            selection = dataclasses.replace(selection, quantize_lm_head=False)
        self.selected = select_modules(model, selection, require_matches=not self.pre_quantized)
        head = tied_head_name(model)
        if not self.pre_quantized and head in self.selected:
            embedding = module_name(model, model.get_input_embeddings())
            self._head_of = {f"{embedding}.weight": head}
        replace_modules(model, self.selected, not self.pre_quantized, model.dtype)
        if self.pre_quantized:
            check_quantized(model, self.selected, files)
        else:
            check_full_precision(model, self.selected, files)
        ignored = [sentinel_key(self.selected)] if self.pre_quantized else []
        # Some files hold the tied head a second time; it is quantized as the embedding is.
        ignored += [f"{head}.weight"] if head is not None else []
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            # The body alone has names without the prefix that they have in the file.
            *(rf"(^|\.){re.escape(name)}$" for name in ignored),
        }
        return model

    def _check_files(self, model: PreTrainedModel, files: list[Path]) -> None:
        for file in files:
            if file.suffix != ".safetensors":
                raise LowbitError(
                    f"{file}: pickled weights are not loaded, they can run code; convert them to "
                    "safetensors"
                )
        # Only a local directory must be complete: from a hub, just the needed files arrive.
        if files and Path(model.name_or_path).is_dir():
            require_complete(files[0].parent, self.quantization_config.to_dict())
        # A `save_pretrained` of the loaded model writes no manifest, so it must not name one.
        self.quantization_config.manifest = None

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        """Returns True for weights that `QuantizeOnLoad` shall see."""
        module, tensor = param_name.rpartition(".")[::2]
        if self.pre_quantized or tensor != "weight":
            return False
        return module in self.selected or param_name in self._head_of

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Returns bytes per element for `device_map="auto"`: placeholders will be gone."""
        module, tensor = param_name.rpartition(".")[::2]
        if tensor == "weight" and module in self.selected:
            return 0.0
        return float(param.element_size())

    def get_new_dtype(
        self, converter: Any, param: Any, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        """Returns the dtype to load a tensor in; None, as it is, for scales under every policy."""
        if converter.target_patterns[0].rpartition(".")[2] in _FLOAT_TENSORS:
            return None
        new_dtype: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return new_dtype

    def get_quantize_ops(self) -> QuantizeOnLoad:
        """Returns the operation for one weight."""
        return QuantizeOnLoad(self)

    def quantize_weight(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """Returns full name -> stored tensor of module `name` for `weight` `[out, in]`."""
        assert self._algorithm is not None
        if not torch.isfinite(weight).all():
            # transformers would turn an error here into a generic one; it is raised after loading.
            self._not_finite.append(f"{name}.weight")
            weight = torch.zeros_like(weight)
        quantized = self._algorithm.quantize(weight, self.selected[name], None)
        qweight = QuantizedWeight.from_codes(quantized.codes, quantized.grid)
        return {
            f"{name}.{suffix}": tensor.to(weight.device)
            for suffix, tensor in qweight.tensors().items()
        }

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_: Any
    ) -> PreTrainedModel:
        if self._not_finite:
            raise LowbitError(
                f"{model.name_or_path}: tensor {self._not_finite[0]!r} holds NaN or Inf; a model "
                "with such weights is broken, fetch it again"
            )
        restore_scale_dtypes(model)
        _require_sound_scales(model)
        prepare_model(model)
        # `prepare_model_for_kbit_training` widens every 16-bit parameter to fp32 and leaves out
        # gradient checkpointing, except for the methods that it knows: this is the flag of one.
        model.hqq_quantized = True
        return model

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Returns what `save_pretrained` writes: the model's tensors and the sentinel."""
        if getattr(model, "_hf_peft_config_loaded", False):
            with base_left_out():
                return model.state_dict(), {}  # adapters alone are saved
        self._record_merges(model)
        names = [name for name, part in model.named_modules() if isinstance(part, StoredWeight)]
        state: dict[str, Tensor] = model.state_dict()
        if names:
            state[sentinel_key(names)] = torch.empty(0, dtype=torch.uint8)
        else:
            self.remove_quantization_config(model)
        return state, {}

    def _record_merges(self, model: PreTrainedModel) -> None:
        """Lets the config say which modules are in 16 bits by now, after adapters were merged."""
        modules = dict(model.named_modules())
        if any(name.endswith(".base_layer") for name in modules):
            return  # only the adapters are saved
        plain = [
            name
            for name in self.selected
            if name in modules and not isinstance(modules[name], StoredWeight)
        ]
        config = self.quantization_config
        config.modules_to_not_convert += [
            name for name in plain if name not in config.modules_to_not_convert
        ]
        if module_name(model, model.get_output_embeddings()) in plain:
            config.quantize_lm_head = False
        if isinstance(model.get_output_embeddings(), TiedQuantLinear):
            # PEFT compares addresses after a merge, and a decoded weight is never at the same one.
            for part in (model.config, model.config.get_text_config(decoder=True)):
                part.tie_word_embeddings = True

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | str | None = None
    ) -> PreTrainedModel:
        # `save_pretrained` leaves a string in the config, from which transformers passes it on.
        named: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        restore_modules(model, named or model.dtype)
        return model

    def is_serializable(self) -> bool:
        """Returns True: `save_pretrained` writes what was loaded, bit for bit."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters train on top, gradients flow through `lowbit.linear`."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: the operators are opaque to the compiler and break no graph."""
        return True


def restore_scale_dtypes(model: PreTrainedModel) -> None:
    """Takes back the widening of scales by a policy that keeps modules in fp32.

    transformers 5.17 does not ask `get_new_dtype` yet. fp16 to fp32 and back is exact.
    """
    for module in model.modules():
        if isinstance(module, StoredWeight):
            for suffix, (_, dtype) in module.scheme.tensor_specs(module.logical_shape).items():
                stored = module._buffers.get(suffix)
                if stored is not None and stored.dtype != dtype:
                    module._buffers[suffix] = stored.to(dtype)


def _require_sound_scales(model: PreTrainedModel) -> None:
    """Refuses scales that decode to nothing: every weight of their groups would be lost."""
    for name, module in model.named_modules():
        if not isinstance(module, StoredWeight):
            continue
        for suffix in _FLOAT_TENSORS:
            values = getattr(module, suffix, None)
            if values is None or values.device.type == "meta" or not values.is_floating_point():
                continue
            # Steps are zero where all scales of a block are equal.
            zero = suffix == "weight_scale" and bool((values == 0).any())
            zero |= suffix == "input_scale" and bool((values <= 0).any())
            if zero or not bool(values.isfinite().all()):
                raise LowbitError(
                    f"{model.name_or_path}: tensor '{name}.{suffix}' holds NaN, Inf or a zero "
                    "scale; the checkpoint is damaged, fetch it again"
                )


class QuantizeOnLoad(ConversionOps):  # type: ignore[misc]
    """A 16-bit weight from a file becomes the stored tensors of its module."""

    def __init__(self, quantizer: LowbitHfQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Tensor | list[Tensor]],
        model: PreTrainedModel,
        missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, Tensor]:
        """Returns full name -> tensor, and removes the placeholder that aimed the loader here."""
        converted: dict[str, Tensor] = {}
        for key, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            name = key.removesuffix(".weight")
            head = self.quantizer._head_of.get(key)
            if head is not None:
                converted[key] = weight
                converted.update(self.quantizer.quantize_weight(head, weight))
                continue
            module = model.get_submodule(name)
            stored = weight.T if module.plain_class is Conv1D else weight
            converted.update(self.quantizer.quantize_weight(name, stored))
            drop_mapped_pages(weight)
            del module._parameters["weight"]
            if missing_keys is not None:
                missing_keys.discard(key)
        return converted
