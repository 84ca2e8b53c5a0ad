"""What PEFT offers and a frozen low-bit base must refuse, each with a sentence.

PEFT writes to the base in three places: some initialisations move a part of it into the adapter,
some kinds of LoRA rewrite it first, and every method writes when it merges. On a packed weight all
of them write to a decoded copy, which is then thrown away: the model goes on as if nothing had
happened, with an adapter that belongs to another weight. What is not known to leave the base alone
is therefore refused, what later versions of PEFT bring included.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from torch import nn

from lowbit.adapters.adapter_config import HARMLESS_INITS
from lowbit.adapters.experts import expert_parameters
from lowbit.errors import LowbitError
from lowbit.nn import QuantLinear
from lowbit.nn.stored import StoredWeight

# Kinds of LoRA that are built here, by the field of LoraConfig that turns them on.
SUPPORTED_VARIANTS = frozenset(("use_dora", "alora_invocation_tokens"))
# Methods besides LoRA that compute with a packed base what they compute with the decoded one
# (tests/test_adapters_methods.py); that they merge is another matter.
TRAINABLE_METHODS = frozenset((
    "IA3", "LOHA", "LOKR", "VERA", "OFT", "HRA", "ADALORA", "FOURIERFT", "VBLORA", "LN_TUNING",
))  # fmt: skip
# They act on what goes into the blocks and never see a layer.
_PROMPTS = frozenset((
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE",
))  # fmt: skip
RESIDUAL = "lowbit.adapters.init_residual"


def refuse_config(config: Any, name: str) -> None:
    """Raises for a LoRA configuration that would write the weight of layer `name`.

    Args:
        config: a `LoraConfig`.
        name: of the layer.

    Raises:
        LowbitError: naming what to use instead.
    """
    init = config.init_lora_weights
    if not (isinstance(init, bool) or (isinstance(init, str) and init in HARMLESS_INITS)):
        known = ", ".join(("True", "False", *HARMLESS_INITS))
        raise LowbitError(
            f"{name}: init_lora_weights={init!r} may write the base weight, which is packed and "
            f"frozen; use one of {known}, and `{RESIDUAL}(model, weights)` after it for an adapter "
            "that begins with what quantization lost"
        )
    for field in fields(config):
        is_variant = field.metadata.get("is_lora_variant")
        if is_variant and field.name not in SUPPORTED_VARIANTS and getattr(config, field.name):
            raise LowbitError(
                f"{name}: {field.name} is not supported on low-bit layers; use LoRA, use_rslora, "
                "use_dora or use_qalora"
            )
    if config.use_dora and config.use_qalora:
        raise LowbitError(f"{name}: use_dora and use_qalora exclude each other; choose one")


def refuse_rank(rank: int, layer: QuantLinear, config: Any, name: str) -> None:
    """Raises for a rank that the weight of `layer` cannot have.

    Raises:
        LowbitError: with the largest rank.
    """
    rows, columns = layer.logical_shape
    what = f"{rows} x {columns}"
    if config.use_qalora:
        columns = layer.scheme.groups(columns)
        what += f" in {columns} groups"
    if rank > min(rows, columns):
        short = name.rpartition(".")[2]
        raise LowbitError(
            f"{name}: rank {rank} is larger than the layer ({what}); use at most "
            f"{min(rows, columns)}, or give it a rank of its own: rank_pattern={{{short!r}: "
            f"{min(rows, columns)}}}"
        )


def refuse_method(config: Any, model: nn.Module) -> None:
    """Raises for a method of PEFT, or parts of one, that would silently lose on low-bit layers.

    Args:
        config: of the adapter that is about to be added.
        model: the model that will get it.

    Raises:
        LowbitError: naming what to use instead.
    """
    stored = {name: part for name, part in model.named_modules() if isinstance(part, StoredWeight)}
    if not stored:
        return
    method = str(getattr(config.peft_type, "value", config.peft_type))
    if method not in {"LORA", *TRAINABLE_METHODS, *_PROMPTS}:
        raise LowbitError(
            f"{method} is not known to leave low-bit layers as they are; use LORA, or one of "
            f"{', '.join(sorted(TRAINABLE_METHODS))}"
        )
    for name, part in stored.items():
        _refuse_copies(config, name, part)
    if getattr(config, "layer_replication", None):
        raise LowbitError("layer_replication copies layers, and low-bit layers cannot be copied")
    parameters = getattr(config, "target_parameters", None) or ()
    _refuse_unmatched(parameters, model, stored)
    if not parameters and getattr(config, "target_modules", None) == "all-linear":
        _warn_of_experts(model)


def _warn_of_experts(model: nn.Module) -> None:
    names = expert_parameters(model)
    if names:
        warnings.warn(
            "target_modules='all-linear' leaves fused experts without an adapter; to adapt them "
            f"too, give target_parameters={names!r}",
            stacklevel=2,
        )


def _refuse_copies(config: Any, name: str, part: StoredWeight) -> None:
    """Raises if the quantized module `name` shall be trained itself, and not through an adapter."""
    own = name.removesuffix(".base_layer")
    for key in getattr(config, "modules_to_save", None) or ():
        if own.endswith(key):  # as PEFT reads it
            raise LowbitError(
                f"modules_to_save: {own} is quantized ({part.scheme}) and cannot be trained "
                "itself; give it an adapter (target_modules), or leave it in 16 bits"
            )
    indices = getattr(config, "trainable_token_indices", None)
    keys = indices if isinstance(indices, dict) else ["embed_tokens"] if indices else []
    if any(own.endswith(key) for key in keys):
        raise LowbitError(
            f"trainable_token_indices: {own} is quantized ({part.scheme}) and cannot be trained; "
            "leave it in 16 bits (quantize without embeddings)"
        )


def _refuse_unmatched(wanted: Iterable[str], model: nn.Module, stored: dict[str, Any]) -> None:
    """Raises for target_parameters that PEFT would pass over without a word."""
    present = [name.replace(".base_layer", "") for name, _ in model.named_parameters()]
    for key in wanted:
        module, _, parameter = key.rpartition(".")
        if any(name == module or name.endswith(f".{module}") for name in stored):
            raise LowbitError(
                f"target_parameters: {key!r} is quantized; name {module!r} in target_modules "
                "instead"
            )
        if not any(
            name == key or name.endswith(f".{key}") or f"{key}." in name or parameter == ""
            for name in (n.replace(".parametrizations", "") for n in present)
        ):
            raise LowbitError(
                f"target_parameters: the model has no parameter {key!r}; fused experts are "
                "called like 'mlp.experts.gate_up_proj' (`lowbit.adapters.expert_parameters` lists "
                "them)"
            )


def refuse_embedding(base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> nn.Module:
    """Raises: takes the place of PEFT's layer for embeddings, whose merge would be lost.

    Raises:
        LowbitError: always.
    """
    raise LowbitError(
        f"{kwargs.get('target_name') or 'the embedding'}: is quantized and takes no adapter; leave "
        "it out of target_modules, or quantize the model without its embeddings"
    )


def refuse_merge(model: nn.Module) -> None:
    """Raises if `model` has adapters on low-bit layers that only LoRA can merge.

    Raises:
        LowbitError: naming the layer.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    from lowbit.adapters.layer import QuantLoraLinear

    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer) or isinstance(module, QuantLoraLinear):
            continue
        if isinstance(module.get_base_layer(), StoredWeight):
            raise LowbitError(
                f"{name}: the base is packed, and {type(module).__module__.split('.')[-2]} would "
                "merge into a copy that is thrown away; keep it as an adapter, or use LoRA"
            )
