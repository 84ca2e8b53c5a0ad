"""`finetune`: from a base and a file of examples to an adapter in PEFT's format.

Transformers' Trainer trains, PEFT adapts, accelerate places; under `accelerate launch` or torchrun
every process comes here, and the first one alone writes. What is added: rows (`packing.py`),
a folder that can be resumed after a kill (`run_folder.py`), and stopping at NaN (`trainer.py`).

The result is always the adapter of a checkpoint on disk, that of the best validation loss, or the
last one where nothing was validated. With QAT settings it is a checkpoint of few bits instead.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowbit.checkpoint.reader import read_header, read_json
from lowbit.errors import LowbitError
from lowbit.hf.loading import choose_device, load_config, load_tokenizer
from lowbit.memory import map_large_blocks
from lowbit.progress import RunProgress
from lowbit.train import curve
from lowbit.train.arguments import check_train, training_arguments
from lowbit.train.data import Prepared, prepare_data
from lowbit.train.fingerprint import run_fingerprint
from lowbit.train.packing import Collator, RowDataset, require_isolation
from lowbit.train.qat_run import publish_qat, trained_parameters
from lowbit.train.run_folder import (
    CONFIG_NAME,
    RESULT_NAME,
    STATE_NAME,
    WEIGHTS_NAME,
    RunFolder,
    threads_of,
)
from lowbit.train.settings import Settings
from lowbit.train.trainable import choose_precision, prepare_trainable

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from lowbit.train.trainer import FineTuner, NotFiniteError

# Validations and checkpoints of a run, where it is not said how often.
_DEFAULT_STOPS = 10


@dataclass(frozen=True)
class FinetuneResult:
    """What a run has made.

    Args:
        output: the folder with the adapter.
        step: of the optimizer, that the adapter is from.
        steps: taken in all.
        train_loss: of the last entry of the loss curve, nats per counted token.
        validation_loss: of the adapter, None where nothing was validated.
        trainable: parameters of the adapter.
        manifest: everything that `finetune.json` records.
    """

    output: Path
    step: int
    steps: int
    train_loss: float
    validation_loss: float | None
    trainable: int
    manifest: dict[str, Any]


def finetune(
    base: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    settings: Settings | None = None,
    resume: bool = False,
    progress: bool = False,
) -> FinetuneResult:
    """Trains an adapter on a frozen base and returns what came of it.

    Args:
        base: a checkpoint of ours, or a 16-bit one (quantized while loading, with a scheme).
        data: JSONL, text, `pydoc`, or a hub data set; see `examples.py`.
        output: a new or empty folder.
        settings: of the run; None for all defaults.
        resume: go on with the run in `output`, exactly, or start it if there is none.
        progress: show a bar on standard error.

    Raises:
        LowbitError: for bad input, and if the loss becomes NaN (`NotFiniteError`).
    """
    settings = settings or Settings()
    folder = RunFolder(Path(output), CONFIG_NAME if settings.qat is None else RESULT_NAME)
    device = choose_device(settings.base.device)
    precision = choose_precision(settings.train.precision, device)
    check_train(settings.train, device)
    arguments = training_arguments(settings, folder, device, precision)
    first = arguments.process_index == 0
    if first and folder.path.resolve() == Path(base).resolve():
        raise LowbitError(f"{output}: output and base are the same; choose another output")
    with folder.claim(resume) if first else nullcontext():
        prepared = prepare_data(str(base), str(data), settings.data, settings.train.seed)
        stored = folder.fingerprint() if first else None
        with threads_of(stored):
            fingerprint = run_fingerprint(
                str(base), settings, prepared.description, arguments, precision
            )
            if first:
                folder.begin(fingerprint)
                folder.remove_broken()
            _wait(arguments)
            finished = folder.result()
            if finished is None:
                run = _Run(folder, str(base), settings, prepared, arguments, precision)
                finished = run.execute(fingerprint, progress and first)
    return FinetuneResult(
        folder.path, **{key: finished[key] for key in _RESULT_FIELDS}, manifest=finished
    )


_RESULT_FIELDS = ("step", "steps", "train_loss", "validation_loss", "trainable")


class _Run:
    """One run, from the data to the published adapter."""

    def __init__(
        self,
        folder: RunFolder,
        base: str,
        settings: Settings,
        prepared: Prepared,
        arguments: TrainingArguments,
        precision: str,
    ) -> None:
        self.folder, self.base, self.settings, self.prepared = folder, base, settings, prepared
        self.arguments, self.precision = arguments, precision
        self._set_steps()

    def execute(self, fingerprint: Mapping[str, Any], shown: bool) -> dict[str, Any]:
        """Trains what is left to train, publishes, and returns what is recorded."""
        reached = self.folder.whole_checkpoints()
        state = self._state(reached[-1]) if reached else None
        measured: dict[str, Any] = {}
        if state is None or not self._is_over(state):
            measured = self._train(reached[-1] if reached else None, shown)
            _wait(self.arguments)
            reached = self.folder.whole_checkpoints()
            state = self._state(reached[-1])
        result = self._result(state, fingerprint, measured)
        if self.arguments.process_index == 0:
            self._publish(result)
        _wait(self.arguments)
        return result

    def _set_steps(self) -> None:
        """Tells Trainer how many steps there are, and when to stop for what."""
        train, arguments = self.settings.train, self.arguments
        batches = math.ceil(len(self.prepared.train) / (train.batch * arguments.world_size))
        per_epoch = math.ceil(batches / train.accumulation)
        arguments.max_steps = train.max_steps or math.ceil(train.epochs * per_epoch)
        often = max(1, arguments.max_steps // _DEFAULT_STOPS)
        arguments.eval_steps = train.eval_steps or often
        arguments.save_steps = train.save_steps or often

    def _train(self, step: int | None, shown: bool) -> dict[str, Any]:
        """Trains, from the checkpoint of `step` on; returns speed and memory."""
        from lowbit.train.trainer import NotFiniteError, Watch

        device = self.arguments.device
        tokens_per_row = sum(map(len, self.prepared.train)) / len(self.prepared.train)
        begin = time.monotonic()
        if device.type == "cpu":
            map_large_blocks()
        with RunProgress(shown) as bar:
            bar.stage("loading", 1)
            watch = Watch(self.folder, self.settings.data.validates, bar, tokens_per_row)
            trainer = self._trainer(watch)
            whole = None if step is None else str(self.folder.checkpoint(step))
            try:
                trainer.train(resume_from_checkpoint=whole)
            except NotFiniteError as error:
                raise self._with_last_good(error) from error
            return {
                "seconds": time.monotonic() - begin,
                "tokens_per_second": watch.speed(),
                "peak_memory_bytes": _peak_memory(device),
                "resumed_at": step,
            }

    def _trainer(self, watch: Any) -> FineTuner:
        from transformers import PrinterCallback

        from lowbit.train.trainer import FineTuner, Patience

        packing = self.settings.data.packing
        model = prepare_trainable(self.base, self.settings, self.precision, self.arguments.device)
        if packing:
            require_isolation(model, load_config(self.base).vocab_size)
        patience = self.settings.train.patience
        stopping = [Patience(patience)] if patience is not None else []
        trainer = FineTuner(
            self.prepared.train,
            self.prepared.validation,
            model=model,
            args=self.arguments,
            data_collator=Collator(self.prepared.padding_id),
            train_dataset=RowDataset(self.prepared.train, packing),
            eval_dataset=RowDataset(self.prepared.validation, packing)
            if self.prepared.validation
            else None,
            callbacks=[watch, *stopping],
        )
        trainer.remove_callback(PrinterCallback)
        watch.trainer = trainer
        return trainer

    def _with_last_good(self, error: NotFiniteError) -> NotFiniteError:
        """Returns the error with what is left of the run and what to do."""
        from lowbit.train.trainer import NotFiniteError

        good = self.folder.whole_checkpoints()
        kept = (
            f"the last good adapter is {self.folder.checkpoint(good[-1])}"
            if good
            else "there was no checkpoint yet"
        )
        return NotFiniteError(
            f"{error}; {kept}; look at these examples, or start again with a lower learning rate",
            error.step,
        )

    def _state(self, step: int) -> dict[str, Any]:
        """Returns Trainer's state in a checkpoint."""
        return read_json(self.folder.checkpoint(step) / STATE_NAME, "the checkpoint is damaged")

    def _is_over(self, state: Mapping[str, Any]) -> bool:
        """Returns True if a run that stopped in `state` had come to its end."""
        if state["global_step"] >= self.arguments.max_steps:
            return True
        stopping = state.get("stateful_callbacks", {}).get("Patience", {})
        waited = stopping.get("attributes", {}).get("early_stopping_patience_counter", 0)
        patience = self.settings.train.patience
        return patience is not None and waited >= patience

    def _result(
        self, state: Mapping[str, Any], fingerprint: Mapping[str, Any], measured: Mapping[str, Any]
    ) -> dict[str, Any]:
        history = [
            {key: value for key, value in entry.items() if key in _HISTORY}
            for entry in state["log_history"]
        ]
        history = [entry for entry in history if "loss" in entry or "eval_loss" in entry]
        best = state.get("best_global_step") if self.settings.data.validates else None
        return {
            "step": best or state["global_step"],
            "steps": state["global_step"],
            "train_loss": [entry["loss"] for entry in history if "loss" in entry][-1],
            "validation_loss": state["best_metric"] if best else None,
            "trainable": self._trainable(best or state["global_step"]),
            "stopped_early": state["global_step"] < self.arguments.max_steps,
            "precision": self.precision,
            "measured": dict(measured),
            "fingerprint": dict(fingerprint),
            "history": history,
        }

    def _trainable(self, step: int) -> int:
        """Returns the number of parameters in the adapter of a checkpoint."""
        if self.settings.qat is not None:
            return trained_parameters(self.folder.checkpoint(step), self.settings.qat)
        entries = read_header(self.folder.checkpoint(step) / WEIGHTS_NAME)
        return sum(math.prod(entry.shape) for entry in entries)

    def _publish(self, result: dict[str, Any]) -> None:
        if curve.can_draw():
            title = f"{Path(self.base).name}, {self.prepared.description['train']['source']}"
            curve.draw(result["history"], title, self.folder.path / curve.PLOT_NAME)
        if self.settings.qat is not None:
            publish_qat(self.folder, self.base, self.settings, self.precision, result)
            return
        tokenizer: Any = load_tokenizer(self.base)
        tokenizer.save_pretrained(self.folder.path)
        self.folder.publish(result["step"], result)


_HISTORY = ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss")


def _peak_memory(device: torch.device) -> int:
    from lowbit.train.trainer import peak_memory

    return peak_memory(device)


def _wait(arguments: TrainingArguments) -> None:
    """Waits for all processes of a launcher."""
    if arguments.world_size > 1:
        torch.distributed.barrier()
