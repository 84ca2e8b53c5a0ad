"""The settings of a run as Trainer's arguments."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

import torch

from lowbit.errors import LowbitError
from lowbit.train.run_folder import RunFolder
from lowbit.train.settings import GPU_OPTIMIZERS, OPTIMIZERS, Settings, TrainSettings

if TYPE_CHECKING:
    from transformers import TrainingArguments

_KEPT_CHECKPOINTS = 3


def training_arguments(
    settings: Settings, folder: RunFolder, device: torch.device, precision: str
) -> TrainingArguments:
    """Returns Trainer's arguments; making them joins the processes of a launcher."""
    from transformers import TrainingArguments

    train = settings.train
    schedule = train.schedule
    if schedule == "constant" and train.warmup:
        schedule = "constant_with_warmup"
    if train.tensorboard:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder.path / "tensorboard"))
    arguments = TrainingArguments(
        output_dir=str(folder.checkpoints),
        per_device_train_batch_size=train.batch,
        per_device_eval_batch_size=train.batch,
        gradient_accumulation_steps=train.accumulation,
        learning_rate=train.lr,
        lr_scheduler_type=schedule,
        warmup_steps=train.warmup,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=OPTIMIZERS[train.optimizer],
        seed=train.seed,
        data_seed=train.seed,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=device.type == "cpu",
        logging_strategy="steps",
        logging_steps=train.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if settings.data.validates else "no",
        metric_for_best_model="loss" if settings.data.validates else None,
        save_strategy="steps",
        save_total_limit=_KEPT_CHECKPOINTS,
        restore_callback_states_from_checkpoint=train.patience is not None,
        report_to=["tensorboard"] if train.tensorboard else [],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=device.type == "cuda",
        # Prepared weights are buffers; broadcasting them at every step would move the whole base.
        ddp_broadcast_buffers=False,
        ddp_find_unused_parameters=False,
    )
    # Several GPUs without a launcher: Trainer would copy the model to each of them at every step.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    if precision == "fp32":
        arguments.mixed_precision = "no"  # whatever the launcher was configured for
    return arguments


def check_train(settings: TrainSettings, device: torch.device) -> None:
    """Refuses what this machine cannot do."""
    _require("peft", "fine-tuning", "'lowbit[finetune]'")
    if settings.optimizer in GPU_OPTIMIZERS:
        if device.type == "cpu":
            raise LowbitError(
                f"optimizer {settings.optimizer} runs on a GPU only; use adamw or adafactor"
            )
        _require("bitsandbytes", f"optimizer {settings.optimizer}")
    if settings.tensorboard:
        _require("tensorboard", "a log for TensorBoard")


def _require(package: str, what: str, install: str | None = None) -> None:
    if importlib.util.find_spec(package) is None:
        raise LowbitError(f"{what} needs the package {package}: pip install {install or package}")
