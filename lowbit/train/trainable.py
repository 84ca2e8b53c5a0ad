"""From the name of a base to a model that Trainer trains: loaded, frozen, with adapters."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowbit.errors import LowbitError
from lowbit.hf.loading import load_model
from lowbit.nn.stored import StoredWeight
from lowbit.train.settings import AdapterSettings, BaseSettings, Settings

if TYPE_CHECKING:
    from peft import PeftModel

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def choose_precision(asked: str, device: torch.device) -> str:
    """Returns "bf16", "fp16" or "fp32": what was asked for, or what suits the device.

    A launcher that was told a precision (`accelerate launch --mixed_precision`) has been asked.

    Raises:
        LowbitError: for fp16 on a CPU, which has no loss scaling there.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked == "auto" and launched in ("bf16", "fp16"):
        asked = launched
    if asked == "fp16" and device.type == "cpu":
        raise LowbitError("precision fp16 needs a GPU; use bf16 or fp32 on a CPU")
    if asked != "auto":
        return asked
    if device.type == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def prepare_trainable(
    base: str, settings: Settings, precision: str, device: torch.device
) -> nn.Module:
    """Returns the model to train: every way of training begins here.

    Args:
        base: a checkpoint of ours, or a 16-bit one.
        settings: of the run.
        precision: "bf16", "fp16" or "fp32".
        device: where it trains.

    Raises:
        LowbitError: see `load_base` and `add_adapters`.
    """
    if settings.qat is not None:
        return _prepare_qat(base, settings, device)
    model = load_base(base, settings.base, precision, device)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        share_out(model)
    adapted: nn.Module = add_adapters(model, base, settings.adapter, settings.train.seed)
    if settings.train.checkpointing:
        enable_checkpointing(model)
    return adapted


def _prepare_qat(base: str, settings: Settings, device: torch.device) -> nn.Module:
    """Returns the base with fake-quantized layers, in float32 whatever activations are in."""
    from lowbit.train.qat import prepare_qat

    assert settings.qat is not None
    model: Any = load_model(base, DTYPES["fp32"], device)
    prepared: nn.Module = prepare_qat(model, settings.qat.scheme, settings.qat.mode)
    if settings.train.checkpointing:
        enable_checkpointing(prepared)
    return prepared


def load_base(base: str, settings: BaseSettings, precision: str, device: torch.device) -> nn.Module:
    """Returns the base, frozen, in evaluation mode; see `load_model` for what it refuses."""
    model = load_model(base, DTYPES[precision], device, scheme=settings.scheme)
    return model.requires_grad_(False)


def share_out(model: nn.Module) -> None:
    """Gives weights their stored form, whose packed tensors are parameters: FSDP shards those.

    What kernels read is held in buffers, of which every process would keep all.
    """
    for module in model.modules():
        if isinstance(module, StoredWeight):
            module.restore()


def adapter_config(settings: AdapterSettings) -> Any:
    """Returns PEFT's `LoraConfig`."""
    from peft import LoraConfig

    targets = settings.targets
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.scale_numerator,
        lora_dropout=settings.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        use_qalora=settings.qa_lora,
        init_lora_weights="gaussian" if settings.init == "gaussian" else True,
        task_type="CAUSAL_LM",
    )


def add_adapters(model: nn.Module, base: str, settings: AdapterSettings, seed: int) -> PeftModel:
    """Returns the model with trainable adapters in float32 on its frozen layers.

    Args:
        model: the base, changed in place.
        base: where it came from.
        settings: of the adapters.
        seed: of their initial values.

    Raises:
        LowbitError: nothing of the model is called as the targets are, PEFT refuses them, or a
            layer is smaller than the rank.
    """
    from peft import get_peft_model

    from lowbit.adapters import register

    register()
    if settings.qa_lora and not any(isinstance(m, StoredWeight) for m in model.modules()):
        raise LowbitError(
            f"{base}: QA-LoRA merges into zero points, and a 16-bit base has none; quantize it as "
            "W4A16_ASYM_G64, say"
        )
    torch.manual_seed(seed)
    anything: Any = model
    try:
        adapted: Any = get_peft_model(anything, adapter_config(settings))
    except LowbitError:
        raise
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise LowbitError(f"{base}: PEFT refuses these adapters: {reason}") from error
    peft_model: PeftModel = adapted
    _check_ranks(peft_model)
    if settings.init == "residual":
        _init_residual(peft_model, base, settings)
    return peft_model


def enable_checkpointing(model: nn.Module) -> None:
    """Recomputes the activations of each block in the backward pass.

    Not reentrant: inputs need no gradient then, and DDP is content.

    Raises:
        LowbitError: the architecture cannot.
    """
    anything: Any = model
    try:
        if hasattr(anything, "activation_checkpointing_enable"):  # not in transformers 5.17 yet
            anything.activation_checkpointing_enable(
                activation_checkpointing_kwargs={"use_reentrant": False}
            )
        else:
            anything.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
    except ValueError as error:
        raise LowbitError(
            f"{type(model).__name__} cannot recompute its activations; train without checkpointing"
        ) from error


def _check_ranks(model: nn.Module) -> None:
    """Refuses a rank that a 16-bit layer cannot have; those of few bits refuse it themselves."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        smallest = min(int(module.in_features or 0), int(module.out_features or 0))
        for rank in module.r.values():
            if rank > smallest:
                raise LowbitError(
                    f"{name.removeprefix('base_model.model.')}: rank {rank} is larger than the "
                    f"layer ({module.out_features} x {module.in_features}); use at most {smallest}"
                )


def _init_residual(model: PeftModel, base: str, settings: AdapterSettings) -> None:
    from lowbit.adapters import init_residual

    weights = settings.weights or base
    options: dict[str, Any] = {}
    if settings.statistics is not None:
        options["statistics"] = settings.statistics
    init_residual(model, weights, **options)
