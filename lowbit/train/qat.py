"""Quantization-aware training: a model that computes with the weights that will be stored.

    prepare_qat(model, "W2A16_G64")      linear layers become fake-quantized ones, in place
    ... any trainer ...
    save_qat(model, base, output)        a checkpoint like those of `lowbit quantize`

What is trained: in mode "weights" the weights and grids of the layers that will be quantized, and
every vector (norms, biases); in mode "scales" their scales and zero points alone, a thousandth of
the memory for gradients and optimizer. Embeddings and what stays in 16 bits are frozen.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit import __version__
from lowbit.algorithms import RTN
from lowbit.checkpoint import Checkpoint, ShardWriter, write_json
from lowbit.checkpoint.journal import CHECKSUM, MANIFEST_NAME, Journal
from lowbit.checkpoint.reader import IN_PROGRESS
from lowbit.errors import LowbitError, unknown_name
from lowbit.hf.config import LowbitConfig, sentinel_key
from lowbit.model_card.saving import after_save
from lowbit.models.layers import find_decoder_layers
from lowbit.models.selection import select_modules
from lowbit.models.sources import map_sources
from lowbit.nn.linear import QuantLinear, TiedQuantLinear
from lowbit.nn.replace import tied_head_name, weight_is_transposed
from lowbit.nn.stored import StoredWeight
from lowbit.pipeline.output import digest_json, manifest, shard_name, write_index, write_side_files
from lowbit.pipeline.plan import QuantizedCheckpoint
from lowbit.quant import QuantizedWeight
from lowbit.scheme import Scheme
from lowbit.train.fake_quant import FakeQuantLinear, TrainedScalesLinear, TrainedWeightLinear
from lowbit.train.settings import QAT_MODES

_ATTRIBUTE = "_lowbit_qat"


@dataclass(frozen=True)
class QatPlan:
    """How a model was prepared.

    Args:
        config: what `config.json` of the result will say.
        mode: one of `QAT_MODES`.
        selected: module name -> scheme of everything that is stored in few bits.
    """

    config: LowbitConfig
    mode: str
    selected: dict[str, Scheme]


def prepare_qat(
    model: PreTrainedModel,
    scheme: str | Scheme | LowbitConfig | None = None,
    mode: str = "weights",
) -> PreTrainedModel:
    """Returns `model` with fake-quantized layers in place, ready to train.

    Args:
        model: a 16-bit or 32-bit decoder; for "scales" also a checkpoint of ours, whose codes (of
            GPTQ, say) then stay.
        scheme: a weight-only scheme for every linear layer of the blocks, or a config that also
            says which layers; None for what a checkpoint of ours has.
        mode: "weights" or "scales".

    Raises:
        LowbitError: for a scheme that rounds activations, embeddings or a tied head to quantize, a
            scheme beside a model that has one, or a mode that does not fit.
    """
    if mode not in QAT_MODES:
        raise unknown_name("QAT mode", mode, QAT_MODES)
    low_bit = any(isinstance(module, StoredWeight) for module in model.modules())
    plan = _plan_of_low_bit(model, scheme, mode) if low_bit else _plan(model, scheme, mode)
    for name in plan.selected:
        old = model.get_submodule(name)
        if low_bit and not (isinstance(old, QuantLinear) and type(old) is not TiedQuantLinear):
            continue  # a quantized embedding stays what it is
        model.set_submodule(name, _fake_like(old, plan.selected[name], mode))
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        of_grid = name.endswith((".log_factor", ".zero_shift"))
        trained = isinstance(owner, FakeQuantLinear) or parameter.ndim == 1
        if of_grid or (mode == "weights" and trained and parameter.is_floating_point()):
            parameter.requires_grad_(True)
    if low_bit:
        _forget_quantizer(model)
    setattr(model, _ATTRIBUTE, plan)
    return model


def save_qat(
    model: nn.Module, base: str | Path, output: str | Path, record: dict[str, Any] | None = None
) -> QuantizedCheckpoint:
    """Writes what a prepared model has learned as a packed checkpoint and returns it.

    Loaded weights are the fake-quantized ones bit for bit. What stays in 16 bits is rounded to the
    dtype in which the base stores it, in `model` as well, so that both go on computing the same.

    Args:
        model: from `prepare_qat`.
        base: folder of the model that it was, for tokenizer, configuration and dtypes.
        output: folder to write to; files of the same names are replaced.
        record: what else the manifest shall say of the training, JSON values.

    Raises:
        LowbitError: the model was not prepared, something became NaN, or the disk is full.
        VerificationError: the result fails `lowbit verify`, or has other logits than `model`.
    """
    anything: Any = model
    plan = getattr(anything, _ATTRIBUTE, None)
    if not isinstance(plan, QatPlan) or not isinstance(model, PreTrainedModel):
        raise LowbitError(
            f"a {type(model).__name__} that prepare_qat did not make cannot be saved as a "
            "checkpoint of few bits; give the model that it returned"
        )
    checkpoint, directory = Checkpoint.open(base), Path(output)
    directory.mkdir(parents=True, exist_ok=True)
    dtypes = _stored_dtypes(model, checkpoint)
    journal = Journal(directory, _fingerprint(checkpoint, plan, record))
    _write_config(checkpoint, plan, directory, {"status": IN_PROGRESS})
    groups = _groups(model, plan, dtypes)
    files = []
    sentinel = sentinel_key(plan.selected)
    with torch.no_grad():
        for index, (group, names) in enumerate(groups.items()):
            file = directory / shard_name(index, len(groups))
            keys = [f"{name}.{key}" for name in names for key in _all_keys(plan, name)]
            with ShardWriter(file, ShardWriter.header_bound([*keys, sentinel])) as writer:
                if index == 0:
                    writer.add(sentinel, torch.empty(0, dtype=torch.uint8))
                reports = _write_group(model, plan, names, dtypes, writer)
            journal.finish_part(group, file, reports)
            files.append(file.name)
    write_index(directory, files)
    write_side_files(checkpoint.path, directory)
    write_json(directory / MANIFEST_NAME, manifest(journal, plan.selected))
    _write_config(checkpoint, plan, directory, {"manifest": MANIFEST_NAME})
    journal.remove()
    content = after_save(directory, checkpoint.path, str(base), progress=False, model=model)
    return QuantizedCheckpoint(directory, content)


def _plan(model: PreTrainedModel, scheme: Any, mode: str) -> QatPlan:
    """Returns the plan for a model in 16 or 32 bits."""
    if scheme is None:
        raise LowbitError("a 16-bit model needs a scheme to train for, for example W4A16_G64")
    config = scheme if isinstance(scheme, LowbitConfig) else LowbitConfig(scheme=scheme)
    selected = select_modules(model, config.selection())
    for name, chosen in selected.items():
        if chosen.activations is not None:
            raise LowbitError(
                f"{name}: {chosen} rounds activations, which QAT does not simulate; give a "
                "weight-only scheme, for example W8A16_CHANNEL"
            )
        if isinstance(model.get_submodule(name), nn.Embedding) or name == tied_head_name(model):
            raise LowbitError(
                f"{name}: QAT is for linear layers of their own; leave embeddings and a tied head "
                "in 16 bits"
            )
    return QatPlan(_recorded(config, mode), mode, selected)


def _plan_of_low_bit(model: PreTrainedModel, scheme: Any, mode: str) -> QatPlan:
    """Returns the plan for a checkpoint of ours, as it is."""
    config: LowbitConfig = model.config.quantization_config
    if mode != "scales":
        raise LowbitError(
            "QAT of weights begins with the 16-bit model, this one is quantized already; give that "
            "one, or train scales only (mode scales)"
        )
    if scheme is not None and str(Scheme.parse(_scheme_of(scheme))) != config.scheme:
        raise LowbitError(
            f"the model is quantized to {config.scheme} already, its codes stay and {scheme} "
            "cannot be trained for; leave the scheme out, or give the 16-bit model"
        )
    quantizer: Any = model.hf_quantizer
    selected = dict(quantizer.selected)
    unfit = [name for name, chosen in selected.items() if chosen.activations is not None]
    if unfit:
        raise LowbitError(f"{unfit[0]}: QAT is for weight-only schemes, not {selected[unfit[0]]}")
    return QatPlan(_recorded(config, mode), mode, selected)


def _scheme_of(given: Any) -> Any:
    return given.scheme if isinstance(given, LowbitConfig) else given


def _recorded(config: LowbitConfig, mode: str) -> LowbitConfig:
    """Returns the config with the training in its recipe."""
    content = {k: v for k, v in config.to_dict().items() if k not in ("manifest", "status")}
    content["recipe"] = {**(content.get("recipe") or {}), "qat": {"mode": mode}}
    recorded: LowbitConfig = LowbitConfig.from_dict(content)
    return recorded


def _fake_like(old: nn.Module, scheme: Scheme, mode: str) -> FakeQuantLinear:
    bias = cast("nn.Parameter | None", old.bias)
    if isinstance(old, QuantLinear):
        return TrainedScalesLinear(old.quantized_weight, bias)
    weight = cast(nn.Parameter, old.weight).detach()
    weight = weight.T if weight_is_transposed(old) else weight
    if not bool(weight.isfinite().all()):
        raise LowbitError("a weight of the model holds NaN or Inf; fetch it again")
    found = RTN().quantize(weight, scheme, None)
    start = QuantizedWeight.from_codes(found.codes, found.grid)
    if mode == "scales":
        return TrainedScalesLinear(start, bias)
    return TrainedWeightLinear(weight, start, bias)


def _forget_quantizer(model: PreTrainedModel) -> None:
    """Lets Trainer take the model for what it is now: one whose own parameters are trained."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)


def _stored_dtypes(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, torch.dtype]:
    """Returns parameter name -> dtype in which the base stores it."""
    sources = map_sources(model, checkpoint.entries.values())
    return {name: source.entries[0].dtype for name, source in sources.items()}


def _groups(
    model: PreTrainedModel, plan: QatPlan, dtypes: dict[str, torch.dtype]
) -> dict[str, list[str]]:
    """Returns part name -> modules and parameters in it: one for each block, and the rest."""
    layers_name, layers = find_decoder_layers(model)
    groups: dict[str, list[str]] = {"outside": []}
    groups |= {f"{layers_name}.{index}": [] for index in range(len(layers))}
    tied = dict(model.all_tied_weights_keys)
    for key in model.state_dict():
        owner = key.rpartition(".")[0]
        module = model.get_submodule(owner)
        stored = isinstance(module, (FakeQuantLinear, StoredWeight)) and not key.endswith(".bias")
        name = owner if stored else key
        if key in tied and not stored:
            continue
        if not stored and key not in dtypes and key in dict(model.named_buffers()):
            continue  # computed anew when it is loaded, as in the base
        group = next((g for g in groups if name.startswith(g + ".")), "outside")
        if name not in groups[group]:
            groups[group].append(name)
    return {group: names for group, names in groups.items() if names}


def _all_keys(plan: QatPlan, name: str) -> list[str]:
    scheme = plan.selected.get(name)
    return [""] if scheme is None else list(scheme.tensor_specs((1, 1)))


def _write_group(
    model: PreTrainedModel,
    plan: QatPlan,
    names: list[str],
    dtypes: dict[str, torch.dtype],
    writer: ShardWriter,
) -> dict[str, Any]:
    """Appends the tensors of one part and returns the reports of its quantized modules."""
    reports: dict[str, Any] = {}
    state = model.state_dict()
    for name in names:
        if name not in plan.selected:
            tensor = state[name]
            rounded = tensor.to(dtypes.get(name, tensor.dtype))
            _require_finite(name, rounded)
            tensor.copy_(rounded)
            writer.add(name, rounded)
            continue
        module = model.get_submodule(name)
        trained = isinstance(module, FakeQuantLinear)
        qweight = module.quantized() if trained else cast(StoredWeight, module).quantized_weight
        for key, tensor in qweight.tensors().items():
            _require_finite(f"{name}.{key}", tensor)
            writer.add(f"{name}.{key}", tensor)
        scheme, shape = plan.selected[name], qweight.shape
        reports[name] = {
            "scheme": str(scheme),
            "algorithm": f"qat-{plan.mode}" if trained else "as in the base",
            "shape": list(shape),
            "weights": shape[0] * shape[1],
            "stored_bytes": scheme.stored_bytes(shape),
            CHECKSUM: qweight.checksum(),
        }
    return reports


def _require_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise LowbitError(
            f"{name} became NaN or Inf in training; start again with a lower learning rate"
        )


def _fingerprint(
    checkpoint: Checkpoint, plan: QatPlan, record: dict[str, Any] | None
) -> dict[str, Any]:
    """Returns where the result came from, as JSON values."""
    content = {
        "versions": {
            "lowbit": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
        "model": {"config": digest_json(checkpoint.config), "weights": checkpoint.verify()},
        "options": plan.config.to_dict(),
        "calibration": None,
        "qat": {"mode": plan.mode, **(record or {})},
    }
    found: dict[str, Any] = json.loads(json.dumps(content))
    return found


def _write_config(
    checkpoint: Checkpoint, plan: QatPlan, directory: Path, state: dict[str, str]
) -> None:
    content = dict(checkpoint.config)
    content["quantization_config"] = {**plan.config.to_dict(), **state}
    write_json(directory / "config.json", content)
