"""Which modules of a model are quantized, and with which scheme."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from lowbit import patterns
from lowbit.errors import LowbitError, unknown_name
from lowbit.models.layers import find_decoder_layers
from lowbit.nn.replace import module_name, tied_head_name, weight_is_transposed, weight_shape
from lowbit.scheme import Scheme

# Gates of a few outputs (`shared_expert_gate` has one) decide a lot and weigh nothing.
MIN_OUT_FEATURES = 16


@dataclass(frozen=True)
class Selection:
    """The user's choice.

    Args:
        scheme: for every linear layer of the decoder blocks.
        dynamic: (regex, scheme or None) pairs; the first regex found in a module's name wins, None
            leaves the module in 16 bits.
        modules_to_not_convert: names, or dotted parts of names, that stay in 16 bits.
        quantize_lm_head: also the output head.
        quantize_embeddings: also the input embedding, and the head if it is tied to it.

    Raises:
        LowbitError: for a pattern that is no regular expression.
    """

    scheme: Scheme
    dynamic: tuple[tuple[str, Scheme | None], ...] = ()
    modules_to_not_convert: tuple[str, ...] = ()
    quantize_lm_head: bool = False
    quantize_embeddings: bool = False

    def __post_init__(self) -> None:
        for pattern, _ in self.dynamic:
            patterns.require_pattern(pattern, "dynamic")


def select_modules(
    model: PreTrainedModel, selection: Selection, require_matches: bool = True
) -> dict[str, Scheme]:
    """Returns module name -> scheme of everything to quantize, in the order of the model.

    A head tied to a quantized embedding is not listed: it uses the embedding's tensors.

    Args:
        model: may be on the meta device.
        selection: the user's choice.
        require_matches: False for a checkpoint that is quantized already and may be loaded
            without its head, where a name that matched then matches nothing now.

    Raises:
        LowbitError: for a regex or name that matches nothing, an embedding that cannot be
            quantized, or fused experts that would silently stay in 16 bits.
    """
    layers_name, _ = find_decoder_layers(model)
    candidates = _candidates(model, layers_name, selection)
    experts = fused_experts(model, layers_name)
    if require_matches:
        _require_all_match(model, selection, [*candidates, *experts])
    chosen: dict[str, Scheme] = {}
    for name in [*candidates, *experts]:
        scheme = scheme_for(name, selection)
        if scheme is not None and name in experts:
            raise _experts_error(model, name, experts)
        if scheme is not None:
            _require_products(model, name, scheme)
            chosen[name] = scheme
    if not chosen:
        raise LowbitError("nothing is left to quantize: every linear layer is excluded")
    return chosen


def measurable_modules(model: PreTrainedModel) -> list[str]:
    """Returns the names of all linear layers whose inputs a run may want to measure.

    These are those of the decoder blocks, and the output head even where it is tied.
    """
    layers_name, _ = find_decoder_layers(model)
    head = module_name(model, model.get_output_embeddings()) is not None
    everything = Selection(Scheme.parse("W8A16_CHANNEL"), quantize_lm_head=head)
    return _candidates(model, layers_name, everything)


def _candidates(model: PreTrainedModel, layers_name: str, selection: Selection) -> list[str]:
    """Returns the names of all modules that the flags of `selection` allow."""
    embedding = module_name(model, model.get_input_embeddings())
    head = module_name(model, model.get_output_embeddings())
    asked = set()
    if selection.quantize_embeddings:
        _require_known_embedding(embedding, model.get_input_embeddings())
        asked.add(embedding)
    if selection.quantize_lm_head:
        if head is None:
            raise LowbitError(f"{type(model).__name__} has no output head to quantize")
        if tied_head_name(model) is None or not selection.quantize_embeddings:
            asked.add(head)
    return [
        name
        for name, module in model.named_modules()
        if name in asked or (name.startswith(f"{layers_name}.") and _is_linear(module))
    ]


def _require_products(model: PreTrainedModel, name: str, scheme: Scheme) -> None:
    """Refuses rounded activations for an embedding, which is looked up and not multiplied."""
    if scheme.activations is not None and isinstance(model.get_submodule(name), nn.Embedding):
        raise LowbitError(
            f"{name}: {scheme} rounds activations, and an embedding has none; with `dynamic`, give "
            "it a weight-only scheme, for example W8A16_CHANNEL"
        )


def _is_linear(module: nn.Module) -> bool:
    """Returns True for exactly nn.Linear (a subclass may compute something else) and Conv1D."""
    plain = type(module) is nn.Linear or weight_is_transposed(module)
    return plain and weight_shape(module)[0] >= MIN_OUT_FEATURES


def _require_known_embedding(name: str | None, module: nn.Module) -> None:
    # Gemma's subclasses multiply every row by `scalar_embed_scale` and do nothing else.
    known = type(module) is nn.Embedding or (
        type(module).__name__.endswith("TextScaledWordEmbedding")
        and isinstance(getattr(module, "scalar_embed_scale", None), float)
    )
    if not known or module.max_norm is not None:
        raise LowbitError(
            f"{name}: a {type(module).__name__} cannot be quantized, what it computes is unknown; "
            "leave the embeddings in 16 bits"
        )


def fused_experts(model: PreTrainedModel, layers_name: str) -> dict[str, int]:
    """Returns module name -> parameters, of modules in the blocks that own 3-D weights."""
    found = {}
    for name, module in model.named_modules():
        if not name.startswith(f"{layers_name}.") or isinstance(module, nn.Conv1d):
            continue
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        if any(parameter.ndim == 3 for parameter in own):
            found[name] = sum(parameter.numel() for parameter in own)
    return found


def _experts_error(model: PreTrainedModel, name: str, experts: dict[str, int]) -> LowbitError:
    total = sum(parameter.numel() for parameter in model.parameters())
    suffix = name.rsplit(".", 1)[-1]
    return LowbitError(
        f"{name}: fused experts cannot be quantized yet, {sum(experts.values()) / total:.0%} of "
        "all parameters would stay in 16 bits; to accept that, exclude "
        f"{suffix!r} with modules_to_not_convert"
    )


def scheme_for(name: str, selection: Selection) -> Scheme | None:
    """Returns the scheme that `selection` gives the module `name`, None for 16 bits."""
    if any(_names_part(entry, name) for entry in selection.modules_to_not_convert):
        return None
    for pattern, scheme in selection.dynamic:
        if patterns.is_in(pattern, name, "dynamic"):
            return scheme
    return selection.scheme


def _names_part(entry: str, name: str) -> bool:
    """Returns True if `entry` is `name` or consecutive dotted parts of it."""
    return f".{entry}." in f".{name}."


def _require_all_match(model: PreTrainedModel, selection: Selection, candidates: list[str]) -> None:
    every_name = [name for name, _ in model.named_modules() if name]
    for entry in selection.modules_to_not_convert:
        if not any(_names_part(entry, name) for name in every_name):
            parts = {part for name in every_name for part in name.split(".") if not part.isdigit()}
            raise unknown_name("module in modules_to_not_convert", entry, parts)
    for pattern, _ in selection.dynamic:
        if not any(patterns.is_in(pattern, name, "dynamic") for name in candidates):
            raise LowbitError(
                f"dynamic: {pattern!r} is found in no module that would be quantized; names look "
                f"like {candidates[0]!r}"
                if candidates
                else f"dynamic: {pattern!r} matches nothing"
            )
