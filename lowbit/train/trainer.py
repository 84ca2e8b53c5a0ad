"""What Trainer does not do by itself: stop at NaN, weigh the validation loss, mark checkpoints.

Trainer replaces a NaN loss by an average of earlier ones and goes on; here the run stops before
the optimizer has stepped, and says which rows were in the batch. Its validation loss is a mean
over batches; with only answers counted, batches differ in how much they count, so it is weighed by
tokens here.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from lowbit.errors import LowbitError
from lowbit.progress import RunProgress
from lowbit.train.examples import IGNORED
from lowbit.train.packing import ROWS, Row
from lowbit.train.run_folder import RunFolder

# Rows that a message names; a batch may have hundreds.
_NAMED_ROWS = 6
# Scaled gradients overflow now and then, and the scale is halved. Below 1 it was not the scale.
_SMALLEST_SCALE = 1.0


class NotFiniteError(LowbitError):
    """A loss or a gradient became NaN or infinite; `step` is the one that was not taken."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class FineTuner(Trainer):  # type: ignore[misc] # transformers has no types
    """Trainer over rows.

    Args:
        rows: those trained on, by the number under `ROWS` in each batch.
        validation: those validated with, may be empty.
        **options: Trainer's.
    """

    def __init__(self, rows: Sequence[Row], validation: Sequence[Row], **options: Any) -> None:
        super().__init__(**options)
        self._rows = rows
        self._validation_counted = sum(row.counted for row in validation)
        self._validation_rows = len(validation)
        self._pending: list[Tensor] = []
        self.rows_seen = 0

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Returns the loss of a batch after its backward pass.

        Raises:
            NotFiniteError: the loss is NaN or infinite.
        """
        self._pending.append(inputs.pop(ROWS))
        self.rows_seen += len(inputs["input_ids"]) * self.args.world_size
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            # Only this batch is to blame; those before it in the same step were finite.
            self._pending = self._pending[-1:]
            raise self.not_finite(f"the loss became {float(loss)}")
        return loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns the loss of a batch, scaled so that the mean over rows is the mean over tokens.

        A launcher repeats rows where they do not divide among devices; those count twice.
        """
        inputs.pop(ROWS)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        counted = (inputs["labels"][..., 1:] != IGNORED).sum()
        per_row = self._validation_counted / self._validation_rows
        share = counted / (len(inputs["labels"]) * per_row)
        return outputs["loss"].detach().mean() * share, None, None

    def stepped(self) -> None:
        """Forgets the rows of a step that was taken."""
        self._pending.clear()

    def not_finite(self, what: str) -> NotFiniteError:
        """Returns the error that says at which step and in which rows `what` happened."""
        numbers = [number for batch in self._pending for number in batch.tolist()]
        names = [self._rows[number].name for number in numbers]
        rest = f" and {len(names) - _NAMED_ROWS} more rows" if len(names) > _NAMED_ROWS else ""
        step = self.state.global_step + 1
        return NotFiniteError(
            f"{what} at step {step}, in the batch of {'; '.join(names[:_NAMED_ROWS])}{rest}", step
        )


class Watch(TrainerCallback):  # type: ignore[misc] # transformers has no types
    """Stops at gradients that are not finite, marks checkpoints, and moves the progress bar.

    Args:
        folder: of the run.
        validates: there are validations, each followed by a checkpoint.
        bar: of the whole run.
        tokens_per_row: on average, for the speed.
    """

    def __init__(
        self, folder: RunFolder, validates: bool, bar: RunProgress, tokens_per_row: float
    ) -> None:
        self.folder, self.validates, self.bar = folder, validates, bar
        self.tokens_per_row = tokens_per_row
        self.trainer: FineTuner | None = None
        self._started = time.monotonic()
        self._loss = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Starts the clock."""
        self._started = time.monotonic()
        self.bar.stage("training", state.max_steps)
        self.bar.complete(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Looks at the gradients before they reach the weights.

        Raises:
            NotFiniteError: one is NaN or infinite, and not for the sake of loss scaling.
        """
        assert self.trainer is not None
        scaler = getattr(self.trainer.accelerator, "scaler", None)
        if scaler is not None and scaler.get_scale() >= _SMALLEST_SCALE:
            return
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        local = [getattr(grad, "to_local", lambda grad=grad: grad)() for grad in gradients]
        if local and not bool(torch.stack([grad.isfinite().all() for grad in local]).all()):
            raise self.trainer.not_finite("a gradient became NaN or infinite")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Asks for a checkpoint after each validation, so that the best is kept, and an entry."""
        assert self.trainer is not None
        self.trainer.stepped()
        if control.should_evaluate:
            control.should_save = True
        # What was summed since the last entry is not in a checkpoint.
        control.should_log |= control.should_save
        self.bar.complete(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **_: Any,
    ) -> None:
        """Shows loss, speed and memory."""
        if "loss" in logs:
            self._loss = f"loss {logs['loss']:.3f}"
        if "eval_loss" in logs:
            self._loss += f" (valid {logs['eval_loss']:.3f})"
        memory = peak_memory(args.device)
        self.bar.describe(f"{self._loss}  {self.speed():,.0f} tokens/s  {memory / 1e9:.2f} GB")

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any],
        **_: Any,
    ) -> None:
        """Looks at a validation loss before its checkpoint is written.

        Raises:
            NotFiniteError: it is NaN or infinite.
        """
        if not math.isfinite(metrics["eval_loss"]):
            step = state.global_step
            raise NotFiniteError(
                f"the validation loss became {metrics['eval_loss']} after step {step}", step
            )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Marks a checkpoint as whole once every process has written its part."""
        if args.world_size > 1:
            torch.distributed.barrier()
        if state.is_world_process_zero:
            self.folder.complete(state.global_step)

    def speed(self) -> float:
        """Returns tokens per second since training began or went on, validations included."""
        assert self.trainer is not None
        elapsed = max(time.monotonic() - self._started, 1e-9)
        return self.trainer.rows_seen * self.tokens_per_row / elapsed


class Patience(EarlyStoppingCallback):  # type: ignore[misc] # transformers has no types
    """Stops after validations without a better loss; `finetune` takes the best one itself."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Warns of nothing."""


def peak_memory(device: torch.device) -> int:
    """Returns the most bytes in use so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
