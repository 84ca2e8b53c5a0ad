"""What a conversion will do, known before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lowbit.checkpoint import Checkpoint
from lowbit.errors import LowbitError
from lowbit.formats import awq, gptq
from lowbit.formats.base import Layout, StoredAs, Written
from lowbit.formats.compressed_tensors import HEAD
from lowbit.formats.gguf.layout import Gguf
from lowbit.formats.hub_names import HubNames, expert_groups
from lowbit.formats.model_view import CONV1D, EMBEDDING, LINEAR, OTHER, ModelView, ModuleView
from lowbit.formats.own import Bf16, Lowbit
from lowbit.formats.table import layout_named, layout_of
from lowbit.models.sources import require_shapes
from lowbit.scheme import Scheme

# What the layouts write that do not have our own tensors.
SUFFIXES: dict[str, Iterable[str]] = {
    "gptq": gptq.SUFFIXES,
    "gptq_v2": gptq.SUFFIXES,
    "awq": awq.SUFFIXES,
    "bnb": ("weight", "weight.absmax", "weight.quant_map"),
}
# Of a long list, so many names are shown.
SHOWN = 3


@dataclass(frozen=True)
class Target:
    """What becomes of one module.

    Args:
        scheme: that the target's tensors will have; None: it is decoded to 16 bits.
        exact: the target holds the scheme of the source, so no value may change.
        view: what the module is in the model.
    """

    scheme: Scheme | None
    exact: bool
    view: ModuleView


@dataclass(frozen=True)
class ConversionPlan:
    """A checked conversion.

    Args:
        checkpoint: the source.
        source: its layout.
        target: the layout to write.
        modules: module name -> how it is stored, in the order of the files.
        targets: module name -> what becomes of it.
        written: what the config is written for.
        hub: gives tensors the names that files on the hub have; None where they keep their own.
    """

    checkpoint: Checkpoint
    source: Layout
    target: Layout
    modules: Mapping[str, StoredAs]
    targets: Mapping[str, Target]
    written: Written
    hub: HubNames | None = None

    def name(self, module: str) -> str:
        """Returns the name of a module in the output."""
        return module if self.hub is None else self.hub.module(module)


def plan_conversion(checkpoint: Checkpoint, to: str, requantize: bool) -> ConversionPlan:
    """Returns the plan of a conversion.

    Args:
        checkpoint: the source.
        to: name of the target layout.
        requantize: round to the nearest scheme where the target cannot hold one.

    Raises:
        LowbitError: for a source that is not quantized or impossible, and without `requantize` for
            weights that the target cannot hold, with the nearest scheme that it does.
    """
    dtype = model_dtype(checkpoint)
    target = layout_named(to, dtype)
    source = layout_of(checkpoint)
    if isinstance(source, Bf16):
        raise LowbitError(
            f"{checkpoint.path}: is not quantized; run `lowbit quantize` first and convert its "
            "output"
        )
    if source.name == target.name:
        raise LowbitError(f"{checkpoint.path}: is {source.name} already; choose another format")
    modules = source.modules(checkpoint)
    if not modules and isinstance(source, Gguf) and not isinstance(target, Bf16):
        raise LowbitError(
            f"{checkpoint.path}: holds no weight that a scheme here has exactly; --to bf16 decodes "
            "it, and `lowbit quantize` makes another model of that"
        )
    if not modules and not isinstance(source, Gguf):
        raise LowbitError(
            f"{checkpoint.path}: config.json says {source.name}, but no tensor is quantized so; "
            "they do not belong together"
        )
    view = ModelView(checkpoint)
    views = {name: view.module(name) for name in modules}
    _require_fit(checkpoint, modules, views)
    require_shapes(view.model, checkpoint, [each.name for each in views.values()])
    targets = {
        name: _target(name, stored, views[name], target, requantize)
        for name, stored in modules.items()
    }
    _refuse(checkpoint, target, targets, modules, views)
    _require_single(checkpoint, target, targets, modules)
    hub = None if isinstance(target, Lowbit) else HubNames(view.model)
    written = _written(checkpoint, target, targets, modules, view, hub)
    if written.schemes:
        target.config(written)  # refuses mixtures that it has no words for
    return ConversionPlan(checkpoint, source, target, modules, targets, written, hub)


def model_dtype(checkpoint: Checkpoint) -> str:
    """Returns the dtype of the model by its config, "bfloat16" where that says nothing."""
    config = checkpoint.config
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if part.get(key) in ("float16", "bfloat16", "float32"):
                return str(part[key])
    return "bfloat16"


def _require_fit(
    checkpoint: Checkpoint, modules: Mapping[str, StoredAs], views: Mapping[str, ModuleView]
) -> None:
    """Refuses weights of another shape than the model has."""
    for name, stored in modules.items():
        shape = views[name].shape
        if shape is not None and shape != stored.shape:
            raise LowbitError(
                f"{checkpoint.path}: the quantized weight of {name} is {list(stored.shape)}, but "
                f"config.json describes {list(shape)}; they do not belong together"
            )


def _target(
    name: str, stored: StoredAs, view: ModuleView, target: Layout, requantize: bool
) -> Target:
    """Returns what becomes of a module; one that is refused has `scheme` None and `exact`."""
    if isinstance(target, Bf16):
        return Target(None, False, view)
    reason = _reason(name, stored, view, target)
    if reason is None:
        return Target(target.held_as(stored.scheme), True, view)
    if not requantize:
        return Target(None, True, view)
    nearest = None if wrong_kind(view, target) else target.nearest(stored.scheme, stored.shape)
    return Target(None if nearest is None else target.held_as(nearest), False, view)


def _reason(name: str, stored: StoredAs, view: ModuleView, target: Layout) -> str | None:
    """Returns why the target cannot hold a module, None if it can."""
    if stored.input_order is not None and not target.holds_order:
        return (
            "its columns are grouped in the order of desc_act, and the format has groups of "
            "neighbours"
        )
    return wrong_kind(view, target) or target.refusal(stored.scheme, stored.shape)


def wrong_kind(view: ModuleView, target: Layout) -> str | None:
    """Returns why a layout has no place for this kind of module, None if it has one."""
    if isinstance(target, Lowbit):
        if view.kind == OTHER:
            return "it is one of many that the model fuses (an expert), which lowbit does not run"
        return None
    if view.kind == EMBEDDING and target.name != Gguf.name:
        return "it is an embedding, the format has linear layers only"
    if view.kind == CONV1D and target.name != "bnb":
        return "it is a Conv1D, the format has plain linear layers only"
    if target.name == "awq" and view.kind == LINEAR and not _is_inner(view.name):
        return "it is the output head, which the format leaves in 16 bits"
    return None


def _is_inner(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _refuse(
    checkpoint: Checkpoint,
    target: Layout,
    targets: Mapping[str, Target],
    modules: Mapping[str, StoredAs],
    views: Mapping[str, ModuleView],
) -> None:
    """Raises if a module is refused, naming modules and what would do."""
    refused = [name for name, plan in targets.items() if plan.scheme is None and plan.exact]
    if not refused:
        return
    first = refused[0]
    stored, view = modules[first], views[first]
    nearest = None
    if not wrong_kind(view, target):
        nearest = target.nearest(stored.scheme, stored.shape)
    names = ", ".join(refused[:SHOWN]) + (", ..." if len(refused) > SHOWN else "")
    fix = (
        f"the nearest that it holds is {target.held_as(nearest)}: --requantize converts to it, and "
        "--to lowbit or bf16 keeps the values"
        if nearest is not None
        else "--requantize leaves it in 16 bits"
    )
    reason = _reason(first, stored, view, target)
    if stored.input_order is not None:
        fix += "; gptq and gptq_v2 keep the order"
        fix = fix.replace("--to lowbit or bf16 keeps", "--to bf16 keeps")
    count = f"{len(refused)} weights" if len(refused) > 1 else "a weight"
    raise LowbitError(
        f"{checkpoint.path}: {target.name} cannot hold {count} ({names}): {reason}; {fix}"
    )


def _require_single(
    checkpoint: Checkpoint,
    target: Layout,
    targets: Mapping[str, Target],
    modules: Mapping[str, StoredAs],
) -> None:
    """Refuses a tensor that belongs to no module and has a name that one will be written under."""
    for name, stored in modules.items():
        scheme = targets[name].scheme
        suffixes: Iterable[str] = ("weight",)
        if scheme is not None and target.name in SUFFIXES:
            suffixes = SUFFIXES[target.name]
        elif scheme is not None:
            suffixes = ("weight", *scheme.tensor_specs(stored.shape))
        for suffix in suffixes:
            entry = checkpoint.entries.get(f"{name}.{suffix}")
            # A tensor of no elements is the mark of our own checkpoints.
            if entry is not None and entry.name not in stored.tensors and all(entry.shape):
                raise LowbitError(
                    f"{entry.file}: tensor {entry.name!r} is stored beside the quantized {name}, "
                    "and only one of them can be meant; remove the one that is stale"
                )


def _written(
    checkpoint: Checkpoint,
    target: Layout,
    targets: Mapping[str, Target],
    modules: Mapping[str, StoredAs],
    view: ModelView,
    hub: HubNames | None,
) -> Written:
    """Returns what the config is written for."""
    kept = {name: plan for name, plan in targets.items() if plan.scheme is not None}
    if isinstance(target, Lowbit):
        # In the order of the model: the first one names the tensor that marks our checkpoints.
        found = {plan.view.name: plan.scheme for plan in kept.values() if plan.scheme}
        schemes = {name: found[name] for name, _ in view.model.named_modules() if name in found}
        plain = (*view.plain_linears(schemes), *view.experts())
        return Written(schemes, plain, view.head, view.embedding, False)
    assert hub is not None
    schemes = {hub.module(name): plan.scheme for name, plan in kept.items() if plan.scheme}
    matrices = {
        name.removesuffix(".weight")
        for key, entry in checkpoint.entries.items()
        if entry.dtype.is_floating_point
        for name in _matrices(key, entry.shape, hub)
    }
    matrices |= {hub.module(name) for name in modules if name not in kept}
    heads = {view.head or HEAD, HEAD}
    matrices = (matrices | heads) - schemes.keys()
    experts, others = expert_groups(sorted(matrices))
    # One pattern for all experts of a layer, unless some of them are quantized.
    mixed = tuple(
        f"{group}." for group in experts if any(n.startswith(f"{group}.") for n in schemes)
    )
    others += [name for name in matrices if mixed and name.startswith(mixed)]
    groups = tuple(group for group in experts if f"{group}." not in mixed)
    ordered = any(modules[name].input_order is not None for name in kept)
    head = next((name for name in schemes if name in heads), view.head)
    return Written(schemes, tuple(sorted(others)), head, view.embedding, ordered, groups)


def _matrices(key: str, shape: tuple[int, ...], hub: HubNames) -> list[str]:
    """Returns the names on the hub of the matrices that a tensor is, or is made of."""
    names = hub.names(key)
    matrix = len(shape) == 2 or len(names) > 1
    return [name for name in names if matrix and name.endswith(".weight")]
