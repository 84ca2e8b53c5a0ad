"""The mark of a checkpoint that failed verification, and how readers refuse it.

Every program that loads a checkpoint reads `config.json` first and wants to know the model type. So
a marked checkpoint has another `config.json`, whose model type is no model's but a sentence, with
the real one inside:

    {"model_type": "marked as bad by `lowbit verify`: ...",
     "lowbit_failed": {"checks": {name: what is wrong}, "config": {the real config.json}}}

Our readers refuse it with that sentence; transformers and the engines refuse it because they know
no such model, and print it. `lowbit/verification/` sets and clears it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError

MARK = "lowbit_failed"


def marked_config(config: dict[str, Any], failed: dict[str, str]) -> dict[str, Any]:
    """Returns the `config.json` of a marked checkpoint.

    Args:
        config: the real one, or that of a mark, which is replaced.
        failed: check -> what is wrong.
    """
    real = config[MARK]["config"] if MARK in config else config
    kind = f"marked as bad by `lowbit verify`: {', '.join(failed)}"
    return {"model_type": kind, MARK: {"checks": failed, "config": real}}


def real_config(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Returns the real config of a marked checkpoint, and any other as it is.

    Raises:
        LowbitError: the mark is corrupt.
    """
    if MARK not in config:
        return config
    mark = config[MARK] if isinstance(config[MARK], dict) else {}
    real = mark.get("config")
    if not isinstance(real, dict) or not isinstance(mark.get("checks"), dict):
        raise LowbitError(f"{directory / 'config.json'}: its {MARK} is corrupt; make it again")
    return real


def refuse_marked(directory: Path, config: dict[str, Any]) -> None:
    """Refuses a checkpoint whose `config.json` is a mark.

    Raises:
        LowbitError: saying what is wrong with it.
    """
    if MARK in config:
        real_config(directory, config)
        name, detail = next(iter(config[MARK]["checks"].items()), ("", ""))
        raise LowbitError(
            f"{directory}: is marked as bad, it failed verification ({name}: {detail}); make it "
            "again, or run `lowbit verify` on it, which clears the mark if everything passes"
        )
