"""The settings of a run, checked when they are made.

Everything that decides what comes out is in one of these classes, so that a run is resumed with
the settings that it began with or not at all.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from lowbit.errors import LowbitError, unknown_name
from lowbit.scheme import Scheme
from lowbit.train.examples import COUNTED

# name -> what Trainer calls it
OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adafactor": "adafactor",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
GPU_OPTIMIZERS = ("adamw_8bit", "paged_adamw_8bit")
SCHEDULES = ("cosine", "linear", "constant")
INITS = ("default", "gaussian", "residual")
PRECISIONS = ("auto", "bf16", "fp16", "fp32")
ALL_LINEAR = "all-linear"
# mode -> learning rate: of weights as LLM-QAT has it (Liu et al. 2023), for billions of them;
# small models take ten times as much. Scales are trained as factors, so theirs is a relative step.
QAT_LR = {"weights": 2e-5, "scales": 1e-3}
QAT_MODES = tuple(QAT_LR)


@dataclass(frozen=True)
class DataSettings:
    """What is read and how rows are made of it.

    Args:
        seqlen: tokens in a row; None for 1024, or the model's longest if that is shorter.
        counted: "answers", or "all" tokens; of plain text all are counted anyway.
        packing: lay several examples in a row, without letting them see each other.
        validation: a source of its own to validate with.
        validation_fraction: or a share of the rows of the data.
    """

    seqlen: int | None = None
    counted: str = "answers"
    packing: bool = True
    validation: str | None = None
    validation_fraction: float | None = None

    def __post_init__(self) -> None:
        if self.counted not in COUNTED:
            raise unknown_name("choice of counted tokens", self.counted, COUNTED)
        if self.validation is not None and self.validation_fraction is not None:
            raise LowbitError(
                "validate with a file of its own or with a share of the data, not with both"
            )

    @property
    def validates(self) -> bool:
        """True if the run measures a validation loss."""
        return self.validation is not None or self.validation_fraction is not None


@dataclass(frozen=True)
class AdapterSettings:
    """The adapters.

    Args:
        rank: of A and B.
        alpha: the adapter is scaled by alpha / rank, of rsLoRA by alpha / sqrt(rank); None for
            twice the rank.
        dropout: of the adapter's input.
        targets: "all-linear" (all but the output head), or names of modules.
        rslora: rank-stabilised scaling (Kalajdzievski, arXiv 2312.03732).
        dora: also learn magnitudes (Liu et al., arXiv 2402.09353).
        qa_lora: an adapter that merges into the zero points of the base exactly (Xu et al., arXiv
            2309.14717); for asymmetric schemes.
        init: "default" (B is zero), "gaussian", or "residual": B A is the best approximation of
            what quantization lost.
        weights: of "residual", the folder of the 16-bit model; None for the base, where that is
            quantized while loading.
        statistics: of "residual", what `lowbit calibrate` wrote, to weigh the loss by.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ALL_LINEAR
    rslora: bool = False
    dora: bool = False
    qa_lora: bool = False
    init: str = "default"
    weights: str | None = None
    statistics: str | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise LowbitError(f"the rank must be at least 1, got {self.rank}")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise LowbitError(f"alpha must be above 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise LowbitError(f"the dropout must be at least 0 and below 1, got {self.dropout}")
        if not self.targets:
            raise LowbitError("there are no target modules; name some, or use all-linear")
        if self.init not in INITS:
            raise unknown_name("init", self.init, INITS)
        if self.init != "residual" and (self.weights or self.statistics):
            raise LowbitError(
                f"init {self.init!r} reads neither weights nor statistics; use init residual"
            )

    @property
    def scale_numerator(self) -> float:
        """Alpha."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


@dataclass(frozen=True)
class TrainSettings:
    """How it is trained.

    Args:
        epochs: passes over the rows; may be a fraction.
        max_steps: optimizer steps instead.
        batch: rows that go through the model at once, on each device.
        accumulation: batches for one step of the optimizer.
        optimizer: a key of `OPTIMIZERS`.
        lr: the highest learning rate.
        schedule: one of `SCHEDULES`; of what follows the warmup.
        warmup: steps, or a share of them if below 1.
        weight_decay: of AdamW.
        max_grad_norm: gradients are clipped to it; 0 does not.
        precision: of the activations: "bf16", "fp16", "fp32"; "auto" is bf16 on a GPU that has it,
            fp16 on another, and fp32 on a CPU, where bf16 is slower.
        checkpointing: recompute activations in the backward pass instead of keeping them.
        eval_steps: steps between validations; None for a tenth of the run.
        save_steps: steps between checkpoints, from which a run is resumed; None for as often.
            After each validation there is one anyway.
        patience: stop after so many validations without a better loss; None never does.
        log_steps: steps between entries of the loss curve.
        seed: of split, order, initial adapter and dropout.
        tensorboard: also write a log for TensorBoard.
    """

    epochs: float = 1.0
    max_steps: int | None = None
    batch: int = 4
    accumulation: int = 1
    optimizer: str = "adamw"
    lr: float = 2e-4
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: str = "auto"
    checkpointing: bool = True
    eval_steps: int | None = None
    save_steps: int | None = None
    patience: int | None = None
    log_steps: int = 1
    seed: int = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for kind, got, known in (
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("schedule", self.schedule, SCHEDULES),
            ("precision", self.precision, PRECISIONS),
        ):
            if got not in known:
                raise unknown_name(kind, got, known)
        counts = ("max_steps", "batch", "accumulation", "eval_steps", "save_steps", "patience")
        for name in (*counts, "log_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise LowbitError(f"{name} must be at least 1, got {value}")
        for name in ("epochs", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise LowbitError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "max_grad_norm", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise LowbitError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True)
class BaseSettings:
    """What is trained on.

    Args:
        scheme: quantize a 16-bit base to this while loading; None for a checkpoint of ours.
        device: "cpu" or "cuda"; None for the GPU if there is one.
    """

    scheme: str | None = None
    device: str | None = None


@dataclass(frozen=True)
class QatSettings:
    """Training through fake quantization, instead of an adapter; see `qat.py`.

    Args:
        scheme: what is trained for; of a base of ours, the one that it has.
        mode: "weights", or "scales" only.
    """

    scheme: str
    mode: str = "weights"

    def __post_init__(self) -> None:
        if self.mode not in QAT_MODES:
            raise unknown_name("QAT mode", self.mode, QAT_MODES)
        Scheme.parse(self.scheme)


def default_lr(qat: QatSettings | None) -> float:
    """Returns the learning rate where none is given: weights that exist move less than new ones."""
    return 2e-4 if qat is None else QAT_LR[qat.mode]


@dataclass(frozen=True)
class Settings:
    """Everything together; `adapter` counts for nothing where there is `qat`."""

    base: BaseSettings = BaseSettings()
    data: DataSettings = DataSettings()
    adapter: AdapterSettings = AdapterSettings()
    train: TrainSettings = TrainSettings()
    qat: QatSettings | None = None

    def __post_init__(self) -> None:
        if self.qat is not None and self.base.scheme is not None:
            raise LowbitError(
                f"scheme {self.base.scheme} quantizes a base before adapters are trained, and QAT "
                f"trains for {self.qat.scheme} instead; give one of them"
            )
        if self.qat is not None and self.adapter != AdapterSettings():
            raise LowbitError(
                "QAT trains the model itself and no adapter; leave the options of adapters out"
            )
        if self.train.patience is not None and not self.data.validates:
            raise LowbitError(
                "patience counts validations, and there are none; give a file or a share of the "
                "data to validate with"
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as JSON values."""
        return dataclasses.asdict(self)
