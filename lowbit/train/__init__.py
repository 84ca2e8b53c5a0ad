"""Fine-tuning: examples, rows, settings, and runs that can be killed and resumed."""

from lowbit.train.finetune import FinetuneResult, finetune
from lowbit.train.settings import (
    AdapterSettings,
    BaseSettings,
    DataSettings,
    Settings,
    TrainSettings,
)

__all__ = [
    "AdapterSettings",
    "BaseSettings",
    "DataSettings",
    "FinetuneResult",
    "Settings",
    "TrainSettings",
    "finetune",
]
