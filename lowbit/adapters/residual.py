"""Adapters that begin with what quantization lost: B A is the best approximation of W - Q.

Training then starts nearer to the 16-bit model than the low-bit base is, which matters at 2 and 3
bits. The base is not written, so this works for every scheme, and the adapter is an ordinary one.

`iterations` beyond the first alternate: quantize W - B A, then fit B A to what that lost (LoftQ).
This changes the codes of the base, so that the adapter belongs to the changed base and to no other:
it has to be written too (`base_output`), and the adapter's configuration then names it.

Reference: Li et al. 2023, LoftQ, algorithm 1; Guo et al. 2023, LQ-LoRA, for the weighting.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.adapters.layer import QuantLoraLinear
from lowbit.adapters.low_rank import best_low_rank, hessian_factor, weighted_norm
from lowbit.adapters.replaced_base import replace_weight, require_replaceable, save_base
from lowbit.algorithms import GPTQ, RTN
from lowbit.algorithms.base import Statistics
from lowbit.algorithms.gptq import damping
from lowbit.checkpoint import Checkpoint
from lowbit.errors import LowbitError
from lowbit.models.streaming import StreamedDecoder
from lowbit.nn.replace import weight_is_transposed
from lowbit.pipeline.output import digest_json
from lowbit.pipeline.stored_statistics import StoredStatistics
from lowbit.progress import RunProgress
from lowbit.quant import QuantizedWeight

_DAMP = 0.01
# ||W - Q|| / ||W|| of 2 bits is about a half; of the weights of another model, the root of 2.
_MOST_LOST = 1.0


@dataclass(frozen=True)
class ResidualReport:
    """What the initialisation did to one layer.

    Args:
        name: of the layer in the base model.
        before: ||(W - Q) L|| / ||W L||, see `adapters/low_rank.py`; L is 1 without statistics.
        after: the same with Q + scaling B A in the place of Q.
    """

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class _Fit:
    """What one layer is to get: factors, and another base weight where it was requantized."""

    layer: QuantLoraLinear
    report: ResidualReport
    a: Tensor
    b: Tensor
    weight: QuantizedWeight | None


def init_residual(
    model: nn.Module,
    weights: str | Path,
    adapter: str = "default",
    statistics: str | Path | None = None,
    iterations: int = 1,
    base_output: str | Path | None = None,
    progress: bool = False,
) -> list[ResidualReport]:
    """Fills A and B so that Q + scaling B A is as close to the 16-bit weight as the rank allows.

    One weight is read after the other. Nothing is changed before all of them are known.

    Args:
        model: a PEFT model, or one that `add_adapter` gave an adapter; DoRA's magnitudes follow.
        weights: folder of the 16-bit model that the base was quantized from.
        adapter: name of the adapter.
        statistics: folder that `lowbit calibrate` wrote for that model, to weigh errors by the
            inputs of each layer; None weighs all alike.
        iterations: more than 1 also requantizes the base, see the module's docstring: with GPTQ
            where there are statistics, else by rounding. A step that loses is not taken.
        base_output: folder to write the requantized base to; needed for more than 1 iteration.
        progress: show a progress bar.

    Returns:
        A report per layer, in the order of the model.

    Raises:
        LowbitError: for another model's weights or statistics, a base whose weights were folded,
            an adapter that is not there or merged, or iterations without `base_output`.
    """
    if iterations < 1 or (iterations > 1) != (base_output is not None):
        raise LowbitError(
            f"init_residual: {iterations} iterations with base_output={base_output}: every "
            "iteration after the first requantizes the base, which must then be written for the "
            "adapter to be of use; give 1 iteration, or more and base_output"
        )
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    layers = _adapted(base, adapter)
    _require_unfolded(base)
    if base_output is not None:
        require_replaceable(base, Path(base_output))
    checkpoint = Checkpoint.open(weights)
    decoder = StreamedDecoder(checkpoint, torch.float32, torch.device("cpu"))
    _require_fit(decoder, layers)
    fits: dict[str, _Fit] = {}
    with RunProgress(progress) as bar, torch.no_grad():
        bar.stage(
            "residual", sum(layer.in_features * layer.out_features for layer in layers.values())
        )
        for name, measured in _with_statistics(checkpoint, layers, statistics):
            fits[name] = _fit(decoder, name, layers[name], adapter, measured, iterations)
            bar.advance(layers[name].in_features * layers[name].out_features)
    for fit in fits.values():
        _apply(fit, adapter)
    if base_output is not None:
        save_base(base, Path(base_output), checkpoint.path)
        base.peft_config[adapter].base_model_name_or_path = str(base_output)
    return [fits[name].report for name in layers]


def _adapted(base: nn.Module, adapter: str) -> dict[str, QuantLoraLinear]:
    """Returns module name -> layer of all low-bit layers with this adapter."""
    layers = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, QuantLoraLinear) and adapter in module.lora_A
    }
    if not layers:
        raise LowbitError(
            f"init_residual: no low-bit layer has an adapter {adapter!r}; add one with "
            "get_peft_model, or name another"
        )
    for name, layer in layers.items():
        if layer.merged:
            raise LowbitError(f"{name}: is merged; call unmerge_adapter() first")
        if layer.lora_A[adapter].in_features != layer.in_features:
            raise LowbitError(
                f"{name}: adapters for zero points (use_qalora) cannot hold what quantization "
                "lost, only one number per group; leave their initialisation as it is"
            )
        if layer.scaling[adapter] <= 0:
            raise LowbitError(
                f"{name}: the adapter is scaled by {layer.scaling[adapter]}; use a positive "
                "lora_alpha"
            )
    return layers


def _require_unfolded(base: Any) -> None:
    """Refuses a base whose float weights were changed before they were quantized."""
    quantization = getattr(base.config, "quantization_config", None)
    fold = (getattr(quantization, "recipe", None) or {}).get("fold")
    if fold is not None:
        raise LowbitError(
            f"init_residual: the base was folded ({fold.get('name')}) before it was quantized, so "
            "its layers approximate other weights than the 16-bit model has; use a base without "
            "folds, for example GPTQ, or another initialisation"
        )


def _require_fit(decoder: StreamedDecoder, layers: dict[str, QuantLoraLinear]) -> None:
    for name, layer in layers.items():
        try:
            plain = decoder.model.get_submodule(name)
        except AttributeError:
            plain = None
        shape = getattr(plain, "weight", torch.empty(0)).shape
        wanted = layer.quantized.logical_shape
        if plain is None or tuple(shape) not in (wanted, wanted[::-1]):
            raise LowbitError(
                f"{decoder.checkpoint.path}: has no {list(wanted)} weight {name!r}; give the "
                "16-bit model that the base was quantized from"
            )


def _with_statistics(
    checkpoint: Checkpoint, layers: dict[str, QuantLoraLinear], folder: str | Path | None
) -> Iterator[tuple[str, Statistics | None]]:
    """Yields every layer's name with its statistics; layers that share an input follow each other.

    Raises:
        LowbitError: if they were measured on another model, or lack a layer.
    """
    if folder is None:
        yield from ((name, None) for name in layers)
        return
    stored = StoredStatistics.open(folder)
    stored.require_model(digest_json(checkpoint.config), checkpoint.verify())
    stored.require_layers({name: layer.in_features for name, layer in layers.items()})
    for part_name, part in stored.manifest["parts"].items():
        here = {name for group in part["modules"].values() for name in group["members"]}
        here |= set(part.get("unreached", ()))
        names = [name for name in layers if name in here]
        for members, measured in stored.groups(part_name, names, torch.device("cpu")):
            yield from ((name, measured) for name in members)


def _weight(decoder: StreamedDecoder, name: str) -> Tensor:
    """Returns the 16-bit weight of a layer, fp32 `[out_features, in_features]`."""
    weight: Tensor
    target, plain = f"{name}.weight", decoder.model.get_submodule(name)
    source = decoder.sources.get(target)
    if source is not None and source.converted:
        decoder.load([target])
        weight = decoder.model.get_parameter(target).detach().float()
        decoder.free(plain)
    else:
        weight = decoder.original(target).float()
    if not bool(weight.isfinite().all()):
        raise LowbitError(f"{decoder.checkpoint.path}: {target!r} holds NaN or Inf; fetch it again")
    return weight.T if weight_is_transposed(plain) else weight


def _fit(
    decoder: StreamedDecoder,
    name: str,
    layer: QuantLoraLinear,
    adapter: str,
    measured: Statistics | None,
    iterations: int,
) -> _Fit:
    """Returns the factors of one layer, and its base weight where iterations changed it."""
    device, scaling = layer.quantized.qweight.device, layer.scaling[adapter]
    weight = _weight(decoder, name).to(device)
    factor = None
    if measured is not None:
        measured = Statistics(measured.hessian.to(device), measured.tokens, measured.dropped)
        factor = hessian_factor(measured.hessian, damping(_DAMP, measured))
    size = max(weighted_norm(weight, factor), torch.finfo(torch.float32).tiny)
    error = weight - layer.quantized.dequantize(torch.float32)
    before = weighted_norm(error, factor) / size
    if weighted_norm(error, None) > _MOST_LOST * float(weight.norm()) > 0:
        raise LowbitError(
            f"{decoder.checkpoint.path}: {name} differs from the base's by more than itself; give "
            "the 16-bit model that the base was quantized from"
        )
    rank, changed = layer.r[adapter], None
    b, a = best_low_rank(error, rank, factor)
    after = weighted_norm(error - b @ a, factor) / size
    for _ in range(iterations - 1):
        algorithm = RTN() if measured is None else GPTQ()
        result = algorithm.quantize(weight - b @ a, layer.quantized.scheme, measured)
        stored = layer.quantized.quantized_weight
        candidate = QuantizedWeight.from_codes(result.codes, result.grid, stored.input_scale)
        error = weight - candidate.dequantize()
        next_b, next_a = best_low_rank(error, rank, factor)
        lost = weighted_norm(error - next_b @ next_a, factor) / size
        if lost >= after:
            break
        b, a, after, changed = next_b, next_a, lost, candidate
    root = scaling**0.5
    return _Fit(layer, ResidualReport(name, before, after), a / root, b / root, changed)


@torch.no_grad()
def _apply(fit: _Fit, adapter: str) -> None:
    layer = fit.layer
    if fit.weight is not None:
        replace_weight(layer.quantized, fit.weight)
    a = layer.lora_A[adapter].weight
    # Where nothing was lost A stays random: with zeros in A and B neither would ever learn.
    found = (fit.a != 0).any(1, keepdim=True).to(a.device)
    a.copy_(torch.where(found, fit.a.to(a), a))
    layer.lora_B[adapter].weight.copy_(fit.b)
    if layer.lora_bias[adapter]:
        layer.lora_B[adapter].bias.zero_()
    if adapter in layer.lora_magnitude_vector:
        magnitude = layer.lora_magnitude_vector[adapter].weight
        magnitude.copy_(layer.weight_norm(adapter))
