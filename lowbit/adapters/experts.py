"""Fused experts under adapters: what to name in `target_parameters`.

Experts are one 3-D parameter for all, which lowbit leaves in 16 bits. PEFT's `target_parameters`
adapts such parameters; `all-linear` and `target_modules` pass over them without a word, so whoever
wants every weight of a mixture of experts adapted needs their names.
"""

from __future__ import annotations

from torch import nn


def expert_parameters(model: nn.Module) -> list[str]:
    """Returns the endings that name the fused experts of `model` in `target_parameters`.

    Args:
        model: with or without adapters.

    Returns:
        For example `["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]`, sorted; nothing for
        a model without fused experts. Experts that are linear layers of their own are not listed:
        `target_modules` reaches them.
    """
    endings: set[str] = set()
    for name, parameter in model.named_parameters():
        if parameter.ndim != 3 or "lora_" in name:
            continue
        parts = name.replace(".base_layer", "").split(".")
        last_number = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
        if last_number >= 0:  # inside a list of blocks
            endings.add(".".join(parts[last_number + 1 :]))
    return sorted(endings)
