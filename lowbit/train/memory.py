"""What a run will need: bytes of base, adapters, gradients, optimizer and activations.

No formula per architecture: one training step is run on fake tensors, which have shapes, dtypes and
a device but no memory, and everything that operators would allocate is counted while it lives. So
checkpointing, the logits, casts of autocast and masks of packed rows are in it as they are in the
run. What operators need inside themselves is not; nor are the libraries, about 0.5 GB of a process.

Weights of few bits are counted as they are held, in the order that the kernels of the device read,
which may be wider than in the file: one weight of each kind is made and prepared.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowbit import backends
from lowbit.errors import LowbitError
from lowbit.hf.config import LowbitConfig
from lowbit.hf.loading import choose_device, is_foreign, load_config, load_whole_config
from lowbit.models.foreign import one_sentence
from lowbit.models.selection import select_modules
from lowbit.nn.replace import replace_modules
from lowbit.nn.stored import StoredWeight
from lowbit.quant import QuantizedWeight
from lowbit.scheme import Scheme
from lowbit.train.data import choose_seqlen
from lowbit.train.settings import Settings
from lowbit.train.trainable import DTYPES, add_adapters, choose_precision, enable_checkpointing

# bitsandbytes keeps two states of a byte per value, and a scale of 4 bytes for 256 of them; both
# states of small tensors in fp32 (bitsandbytes/optim/optimizer.py, min_8bit_size and blocksize).
_SMALLEST_8BIT = 4096
_BLOCK_8BIT = 256


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes on each device while it trains.

    Args:
        base_packed: weights of few bits, as they are held.
        base_rest: what of the base is not.
        adapters: A and B, in fp32.
        gradients: of the adapters.
        optimizer: its state.
        activations: everything else that is alive at the highest point of a step.
        activations_otherwise: the same with checkpointing where there is none, without where there
            is.
        checkpointing: as it was asked for.
        batch: rows at once.
        seqlen: tokens in each.
        precision: of the activations.
        device: type of the device.
    """

    base_packed: int
    base_rest: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    activations_otherwise: int
    checkpointing: bool
    batch: int
    seqlen: int
    precision: str
    device: str

    @property
    def total(self) -> int:
        """The peak."""
        return sum(self.parts().values())

    @property
    def total_otherwise(self) -> int:
        """The peak with checkpointing where there is none, without where there is."""
        return self.total - self.activations + self.activations_otherwise

    def parts(self) -> dict[str, int]:
        """Returns name -> bytes of what makes the total."""
        return {
            "base, packed": self.base_packed,
            "base, the rest": self.base_rest,
            "adapters": self.adapters,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        return {**asdict(self), "total": self.total}


def forecast(base: str | Path, settings: Settings) -> MemoryForecast:
    """Returns what training `base` with `settings` will need; reads no weights.

    Args:
        base: as for `finetune`.
        settings: of the run; of its data only the sequence length and the packing count.

    Raises:
        LowbitError: for a base or settings that `finetune` would refuse too.
    """
    if settings.qat is not None:
        raise LowbitError("the forecast of memory is for adapters; QAT has none yet")
    base = str(base)
    device = choose_device(settings.base.device)
    precision = choose_precision(settings.train.precision, device)
    seqlen = choose_seqlen(load_config(base), settings.data.seqlen)
    peaks: dict[bool, int] = {}
    counted: dict[str, int] = {}
    for checkpointing in (True, False):
        chosen = replace(settings, train=replace(settings.train, checkpointing=checkpointing))
        model = _skeleton(base, chosen, precision)
        trainable = [p for p in model.parameters() if p.requires_grad]
        counted = {
            "adapters": sum(p.nbytes for p in trainable),
            "optimizer": sum(optimizer_bytes(p, settings.train.optimizer) for p in trainable),
        }
        held = _held_bytes(model, device)
        peaks[checkpointing] = _activation_peak(model, chosen, seqlen, precision, device)
    asked = settings.train.checkpointing
    return MemoryForecast(
        **held,
        adapters=counted["adapters"],
        gradients=counted["adapters"],
        optimizer=counted["optimizer"],
        activations=peaks[asked],
        activations_otherwise=peaks[not asked],
        checkpointing=asked,
        batch=settings.train.batch,
        seqlen=seqlen,
        precision=precision,
        device=device.type,
    )


def optimizer_bytes(parameter: Tensor, optimizer: str) -> int:
    """Returns the bytes of the state that `optimizer` keeps for one parameter.

    Adafactor keeps the sums of rows and columns (Shazeer and Stern, arXiv 1804.04235, section 3).
    """
    count = parameter.numel()
    if optimizer == "adafactor":
        return 4 * (sum(parameter.shape[-2:]) if parameter.ndim >= 2 else count)
    if optimizer == "adamw" or count < _SMALLEST_8BIT:
        return 8 * count
    return 2 * (count + 4 * math.ceil(count / _BLOCK_8BIT))


def _skeleton(base: str, settings: Settings, precision: str) -> nn.Module:
    """Returns the model to train on meta: the base as it would be loaded, with adapters."""
    from transformers import AutoModelForCausalLM

    from lowbit.formats.view import open_as_own

    dtype = getattr(torch, DTYPES[precision])
    with one_sentence(base, "model"):
        config = load_whole_config(base)
        stored = getattr(config, "quantization_config", None)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    quantization = None
    if settings.base.scheme is not None:
        quantization = LowbitConfig(scheme=settings.base.scheme)
    elif is_foreign(stored):
        quantization = LowbitConfig.from_dict(open_as_own(base).config["quantization_config"])
    elif isinstance(stored, Mapping):
        quantization = LowbitConfig.from_dict(dict(stored))
    if quantization is not None:
        selected = select_modules(model, quantization.selection(), require_matches=False)
        replace_modules(model, selected, False, dtype)
    model.requires_grad_(False)
    # Any init has the same shapes, and a residual would need the weights.
    adapter = replace(settings.adapter, init="default", weights=None, statistics=None)
    adapted: nn.Module = add_adapters(model, base, adapter, settings.train.seed)
    if settings.train.checkpointing:
        enable_checkpointing(model)
    model.config.use_cache = False  # as Trainer sets it
    return adapted.train()


def _held_bytes(model: nn.Module, device: torch.device) -> dict[str, int]:
    """Returns the bytes of the base: weights of few bits as they are held, and the rest."""
    packed = 0
    sizes: dict[tuple[Scheme, tuple[int, int], bool, torch.dtype], int] = {}
    stored: set[int] = set()
    for module in model.modules():
        if not isinstance(module, StoredWeight) or not module._names():
            continue
        key = (module.scheme, module.logical_shape, module.multiplies, module.compute_dtype)
        if key not in sizes:
            sizes[key] = _stored_bytes(*key, device)
        packed += sizes[key]
        tensors = [getattr(module, name) for name in module._names()]
        stored |= {id(tensor) for tensor in tensors}
    others = {
        id(tensor): tensor.nbytes
        for tensor in (*model.parameters(), *model.buffers())
        if id(tensor) not in stored and not tensor.requires_grad
    }
    return {"base_packed": packed, "base_rest": sum(others.values())}


def _stored_bytes(
    scheme: Scheme,
    shape: tuple[int, int],
    multiplies: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Returns the bytes of one weight as it is held while training."""
    tensors = {
        name: torch.zeros(size, dtype=kind, device=device)
        for name, (size, kind) in scheme.tensor_specs(shape).items()
    }
    qweight = QuantizedWeight.from_tensors(scheme, shape, tensors, "weight")
    prepared = backends.prepare(qweight, dtype) if multiplies else None
    held = tensors if prepared is None else prepared.for_mode(True).tensors()
    return sum({t.untyped_storage().data_ptr(): t.nbytes for t in held.values()}.values())


def _activation_peak(
    model: nn.Module, settings: Settings, seqlen: int, precision: str, device: torch.device
) -> int:
    """Returns the most bytes that one step has alive beside weights and all gradients."""
    train = settings.train
    mode, live = FakeTensorMode(), _Live()
    with mode, live, _masks(settings.data.packing):
        _make_fake(model, device)
        ids = torch.zeros(train.batch, seqlen, dtype=torch.int64, device=device)
        batch = {"input_ids": ids, "labels": torch.zeros_like(ids)}
        if settings.data.packing:
            batch["position_ids"] = torch.arange(seqlen, device=device).expand(train.batch, -1)
        weights = live.now
        # Gradients of earlier batches of a step are there already in the forward pass.
        for _ in range(min(train.accumulation, 2)):
            live.peak = live.now
            _step(model, batch, precision, device)
        gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        return max(0, live.peak - weights - gradients)


def _step(
    model: nn.Module, batch: Mapping[str, Tensor], precision: str, device: torch.device
) -> None:
    """Runs forward and backward as Trainer does; outputs are gone before the backward pass."""
    autocast: Any = nullcontext()
    if precision != "fp32":
        autocast = torch.autocast(device.type, getattr(torch, DTYPES[precision]))

    def loss_of() -> Tensor:
        with autocast:
            outputs = model(**batch)
        logits = outputs.logits.float()  # accelerate widens every output
        loss: Tensor = outputs.loss.float()
        del logits
        return loss

    loss_of().backward()


def _make_fake(model: nn.Module, device: torch.device) -> None:
    """Puts a fake tensor on `device` in the place of each tensor on meta."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = (
                        nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                    )
                held[name] = made[id(tensor)]  # type: ignore[assignment]


@contextmanager
def _masks(packed: bool) -> Iterator[None]:
    """Lets rows of one example have no mask.

    transformers looks into the positions for packed rows. It cannot look into fake ones, takes them
    for packed and makes a mask, which the run will not have.
    """
    from transformers import masking_utils

    found = getattr(masking_utils, "find_packed_sequence_indices", None)
    if packed or found is None:
        yield
        return
    masking_utils.find_packed_sequence_indices = lambda *_, **__: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = found


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that operators make, while they live.

    Attributes:
        now: bytes alive.
        peak: the most there were.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes()

        def forget(_: Any) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)
