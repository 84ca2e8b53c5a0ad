"""Makes PEFT build our layer for every quantized one, whatever makes the configuration.

PEFT can be told of layers per `LoraConfig` only, and does not save that. Everything that adds an
adapter (`get_peft_model`, `model.add_adapter`, `PeftModel.from_pretrained`, `load_adapter`) goes
through `BaseTuner.inject_adapter`, and everything that merges a model through
`BaseTuner._check_merge_allowed`: both are wrapped, once PEFT has been imported
(`hf/autoload.py`). The wrappers do nothing for models without low-bit layers.

`PeftModel.save_pretrained` asks for the state dict of the whole model and keeps the adapter. It is
wrapped as well, because bringing a prepared base into its stored form takes minutes.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

TUNERS, MODELS = "peft.tuners.tuners_utils", "peft.peft_model"
_DONE = "_lowbit_registered"


def register() -> bool:
    """Wraps PEFT's tuners and models if PEFT has been imported; again and again does nothing.

    Returns:
        Whether both are wrapped now.
    """
    tuner: Any = getattr(sys.modules.get(TUNERS), "BaseTuner", None)
    if tuner is not None and not hasattr(tuner, _DONE):
        tuner.inject_adapter = _injecting(tuner.inject_adapter)
        tuner._check_merge_allowed = _merging(tuner._check_merge_allowed)
        setattr(tuner, _DONE, True)
    model: Any = getattr(sys.modules.get(MODELS), "PeftModel", None)
    if model is not None and not hasattr(model, _DONE):
        model.save_pretrained = _saving(model.save_pretrained)
        setattr(model, _DONE, True)
    return tuner is not None and model is not None


def _injecting(original: Any) -> Any:
    @functools.wraps(original)
    def inject_adapter(tuner: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        if _may_be_quantized():
            _prepare(tuner.peft_config[adapter_name], model)
        return original(tuner, model, adapter_name, *args, **kwargs)

    return inject_adapter


def _merging(original: Any) -> Any:
    @functools.wraps(original)
    def check_merge_allowed(tuner: Any) -> Any:
        if _may_be_quantized():
            from lowbit.adapters.refusals import refuse_merge

            refuse_merge(tuner.model)
        return original(tuner)

    return check_merge_allowed


def _saving(original: Any) -> Any:
    @functools.wraps(original)
    def save_pretrained(model: Any, *args: Any, **kwargs: Any) -> Any:
        if _may_be_quantized() and kwargs.get("state_dict") is None:
            from lowbit.nn.stored import base_left_out

            with base_left_out():
                return original(model, *args, **kwargs)
        return original(model, *args, **kwargs)

    return save_pretrained


def _may_be_quantized() -> bool:
    """Returns False while nothing can have made a low-bit layer."""
    return "lowbit.nn.stored" in sys.modules


def _prepare(config: Any, model: Any) -> None:
    """Tells `config` of our layer, and refuses what would silently lose on `model`."""
    from lowbit.adapters.refusals import refuse_embedding, refuse_method

    refuse_method(config, model)
    if hasattr(config, "_register_custom_module"):
        from lowbit.adapters.layer import QuantLoraLinear
        from lowbit.nn import QuantEmbedding, QuantLinear

        config._register_custom_module(
            {QuantLinear: QuantLoraLinear, QuantEmbedding: refuse_embedding}
        )
