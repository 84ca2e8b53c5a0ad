"""`adapter_config.json` of a LoRA adapter, read without PEFT: only what decides the weights.

Every option of PEFT is in one of three tables: it is used here, or it is about training or about
where adapters go and changes nothing that was trained, or it changes what an adapter computes in a
way that is not built here. The last kind, and whatever later versions of PEFT add, is refused by
name as soon as it is set: a merge that left it out would be wrong without a word.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowbit import patterns
from lowbit.checkpoint.reader import read_json
from lowbit.errors import LowbitError

CONFIG_NAME = "adapter_config.json"
# Initialisations after which the base model is what it was before; True and False are PEFT's own.
HARMLESS_INITS = ("gaussian", "eva", "orthogonal")

# Where adapters go, how they are trained, where they came from: the tensors tell what matters.
_WITHOUT_EFFECT = frozenset((
    "auto_mapping", "base_model_name_or_path", "base_model_class", "parent_library", "revision",
    "task_type", "peft_type", "peft_version", "inference_mode", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "eva_config",
    "corda_config", "lora_ga_config", "velora_config", "modules_to_save", "runtime_config",
    "qalora_group_size", "megatron_core", "ensure_weight_tying", "loftq_config",
    # The layout of the base's weight; `merged` is asked for `[out, in]` whatever that is.
    "fan_in_fan_out",
    # What it trains is in the file; `AdapterFile` takes the biases from there.
    "bias",
))  # fmt: skip
_USED = frozenset((
    "r", "lora_alpha", "use_rslora", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern",
    "init_lora_weights", "use_qalora",
))  # fmt: skip


@dataclass(frozen=True)
class AdapterConfig:
    """What of an adapter's configuration decides its weights.

    Args:
        r: the rank, where no pattern says otherwise.
        lora_alpha: the numerator of the scaling, likewise.
        use_rslora: scale by alpha / sqrt(r) instead of alpha / r (Kalajdzievski 2023, eq. 3).
        use_dora: directions and magnitudes are apart (Liu et al. 2024, eq. 5).
        lora_bias: B has a bias.
        use_qalora: A sees inputs summed by group, and B A belongs to zero points; see
            `zero_point.py`.
        rank_pattern: regex on a module's name -> rank.
        alpha_pattern: regex on a module's name -> alpha.
        base_model: what it was trained on, as PEFT noted it; None where it did not.
        ties_weights: a head that is tied to the embedding was trained as one with it.
        content: everything else, unread.
    """

    r: int
    lora_alpha: float
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    use_qalora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    base_model: str | None = None
    ties_weights: bool = False
    content: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def read(folder: Path) -> AdapterConfig:
        """Returns the configuration in `folder`, checked.

        Raises:
            LowbitError: it is none of LoRA, has a wrong type, or something that is not understood.
        """
        file = folder / CONFIG_NAME
        content = read_json(file, "give the folder that holds an adapter saved by PEFT")
        kind = content.get("peft_type")
        if kind != "LORA":
            raise LowbitError(f"{file}: peft_type is {kind!r}; only LORA adapters are read")
        _require_understood(file, content)
        rank, alpha = content.get("r", 8), content.get("lora_alpha", 8)
        if type(rank) is not int or rank < 1 or not _is_number(alpha):
            raise LowbitError(
                f"{file}: r {rank!r} and lora_alpha {alpha!r} are not a positive integer and a "
                "number; save the adapter again"
            )
        base = content.get("base_model_name_or_path")
        return AdapterConfig(
            r=rank,
            lora_alpha=alpha,
            use_rslora=bool(content.get("use_rslora")),
            use_dora=bool(content.get("use_dora")),
            lora_bias=bool(content.get("lora_bias")),
            use_qalora=bool(content.get("use_qalora")),
            rank_pattern=_pattern(file, content, "rank_pattern"),
            alpha_pattern=_pattern(file, content, "alpha_pattern"),
            base_model=base if isinstance(base, str) and base else None,
            ties_weights=bool(content.get("ensure_weight_tying")),
            content=content,
        )

    def rank(self, module: str) -> int:
        """Returns the rank of the adapter of `module`."""
        return int(_matching(self.rank_pattern, module, self.r))

    def scaling(self, module: str) -> float:
        """Returns what B A is multiplied by for `module`."""
        alpha, rank = _matching(self.alpha_pattern, module, self.lora_alpha), self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _matching(pattern: Mapping[str, float], module: str, default: float) -> float:
    """Returns the value of the first regex that matches the end of a name, as PEFT reads them."""
    for key, value in pattern.items():
        if patterns.starts_with(rf"(.*\.)?({key})$", module, CONFIG_NAME):
            return value
    return default


def _require_understood(file: Path, content: Mapping[str, Any]) -> None:
    init = content.get("init_lora_weights", True)
    if not isinstance(init, bool) and init not in HARMLESS_INITS:
        raise LowbitError(
            f"{file}: init_lora_weights {init!r} is not supported, for such inits write to the "
            "base model; save the adapter with PEFT's path_initial_model_for_weight_conversion, "
            "which makes a plain LoRA of it"
        )
    if content.get("use_qalora") and (content.get("use_dora") or content.get("lora_bias")):
        raise LowbitError(
            f"{file}: use_qalora with use_dora or lora_bias is nothing that could be merged; "
            "train without one of them"
        )
    for key, value in content.items():
        if key in _WITHOUT_EFFECT or key in _USED or _is_unset(value):
            continue
        raise LowbitError(
            f"{file}: {key} = {json.dumps(value)[:80]} is not supported; only LoRA, rsLoRA and "
            "DoRA adapters of linear layers and embeddings are read"
        )


def _is_unset(value: Any) -> bool:
    return value is None or value is False or value in ({}, [], "")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _pattern(file: Path, content: Mapping[str, Any], key: str) -> dict[str, Any]:
    pattern = content.get(key) or {}
    whole = key == "rank_pattern"
    if not isinstance(pattern, dict) or not all(
        type(value) is int and value > 0 if whole else _is_number(value)
        for value in pattern.values()
    ):
        raise LowbitError(f"{file}: {key} is not an object of regex -> number, got {pattern!r}")
    for regex in pattern:
        patterns.require_pattern(regex, f"{file}: {key}")
    return pattern
