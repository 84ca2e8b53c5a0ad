"""Which modules are quantized, and what a wrong choice is told."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import TINY, make_tiny
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig

from lowbit.errors import LowbitError
from lowbit.models.layers import find_decoder_layers
from lowbit.models.selection import Selection, select_modules
from lowbit.nn.replace import weight_is_transposed
from lowbit.scheme import Scheme

W4, W8 = Scheme.parse("W4A16_G32"), Scheme.parse("W8A16_G32")


def select(family: str, **choice: Any) -> dict[str, Scheme]:
    return select_modules(make_tiny(family), Selection(W4, **choice))


@pytest.mark.parametrize("family", TINY)
def test_every_matrix_of_the_blocks_is_selected_in_order(family: str) -> None:
    model = make_tiny(family)
    prefix, layers = find_decoder_layers(model)
    matrices = [
        name.removesuffix(".weight")
        for name, parameter in model.named_parameters()
        if name.startswith(f"{prefix}.") and parameter.ndim == 2
    ]
    assert list(select_modules(model, Selection(W4))) == matrices
    assert len(layers) == model.config.num_hidden_layers


def test_head_and_embedding_are_selected_when_asked() -> None:
    names = list(select("llama", quantize_lm_head=True, quantize_embeddings=True))
    assert (names[0], names[-1]) == ("model.embed_tokens", "lm_head")
    assert "lm_head" in select("llama_tied", quantize_lm_head=True)


def test_a_head_tied_to_a_quantized_embedding_is_not_listed() -> None:
    names = select("llama_tied", quantize_lm_head=True, quantize_embeddings=True)
    assert "model.embed_tokens" in names
    assert "lm_head" not in names


def test_the_first_regex_found_in_a_name_wins() -> None:
    dynamic = ((r"layers\.0\..*down_proj", None), (r"down_proj", W8), (r"layers\.0\.", W8))
    chosen = select("llama", dynamic=dynamic)
    assert "model.layers.0.mlp.down_proj" not in chosen
    assert chosen["model.layers.1.mlp.down_proj"] == W8
    assert chosen["model.layers.0.mlp.up_proj"] == W8
    assert chosen["model.layers.1.mlp.up_proj"] == W4


@pytest.mark.parametrize("entry", ["mlp.down_proj", "model.layers.1", "o_proj"])
def test_excluded_parts_of_names_match_whole_components(entry: str) -> None:
    everything = select("llama")
    kept = select("llama", modules_to_not_convert=(entry,))
    assert everything.keys() - kept.keys() == {n for n in everything if f".{entry}." in f".{n}."}


def test_excluding_what_is_not_quantized_anyway_is_fine() -> None:
    assert select("llama", modules_to_not_convert=("lm_head",)) == select("llama")


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"modules_to_not_convert": ("dwn_proj",)}, "did you mean 'down_proj'"),
        ({"modules_to_not_convert": ("layers.1.mlp.gate",)}, "unknown module"),
        ({"dynamic": ((r"experts", W8),)}, r"'experts' is found in no module.*self_attn.q_proj"),
        ({"dynamic": ((r"lm_head", W8),)}, "found in no module"),
        ({"dynamic": ((r"(", W8),)}, "not a regular expression"),
        ({"modules_to_not_convert": ("layers",)}, "nothing is left"),
    ],
)
def test_a_choice_that_matches_nothing_is_refused(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(LowbitError, match=message):
        select("llama", **choice)


def test_linear_subclasses_and_tiny_outputs_stay() -> None:
    class Special(nn.Linear):
        pass

    model = make_tiny("llama")
    model.model.layers[0].mlp.up_proj = Special(64, 168)
    model.model.layers[0].mlp.shared_expert_gate = nn.Linear(64, 1)
    chosen = select_modules(model, Selection(W4))
    assert "model.layers.0.mlp.up_proj" not in chosen
    assert "model.layers.0.mlp.shared_expert_gate" not in chosen


def test_an_unknown_embedding_is_refused_only_when_asked_for() -> None:
    class Normed(nn.Embedding):
        pass

    model = make_tiny("llama")
    model.set_input_embeddings(Normed(256, 64))
    assert select_modules(model, Selection(W4))
    with pytest.raises(LowbitError, match=r"model\.embed_tokens: a Normed cannot be quantized"):
        select_modules(model, Selection(W4, quantize_embeddings=True))


def test_fused_experts_are_named_unless_excluded() -> None:
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(LowbitError, match=r"layers\.0\.mlp\.experts: fused experts.* \d+% of"):
        select_modules(model, Selection(W4))
    by_name = select_modules(model, Selection(W4, modules_to_not_convert=("experts",)))
    by_regex = select_modules(model, Selection(W4, dynamic=((r"experts$", None),)))
    assert list(by_name) == list(by_regex)
    assert all("self_attn" in name for name in by_name)


def test_only_conv1d_stores_its_weight_transposed() -> None:
    assert weight_is_transposed(make_tiny("gpt2").transformer.h[0].mlp.c_fc)
    assert not weight_is_transposed(make_tiny("llama").model.layers[0].mlp.up_proj)
