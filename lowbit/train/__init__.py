"""Fine-tuning: examples, rows, settings, and runs that can be killed and resumed."""

from lowbit.train.finetune import FinetuneResult, finetune
from lowbit.train.settings import (
    AdapterSettings,
    BaseSettings,
    DataSettings,
    QatSettings,
    Settings,
    TrainSettings,
    default_lr,
)

__all__ = [
    "AdapterSettings",
    "BaseSettings",
    "DataSettings",
    "FinetuneResult",
    "QatSettings",
    "Settings",
    "TrainSettings",
    "default_lr",
    "finetune",
]
