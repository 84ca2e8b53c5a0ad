"""Folds leave what a block computes unchanged, in every family."""

from __future__ import annotations

import pytest
import torch
from tiny_models import TINY, make_tiny
from torch import Tensor, nn

from lowbit.models.layers import find_decoder_layers
from lowbit.nn.replace import weight_is_transposed
from lowbit.tuning.folds import FOLDS, Fold, find_folds

# Family -> sources of its folds. What is missing here is not valid there.
EXPECTED = {
    "llama": ("input_layernorm", "v_proj", "post_attention_layernorm", "up_proj"),
    "gemma2": ("input_layernorm", "v_proj", "pre_feedforward_layernorm", "up_proj"),
    "phi3": ("input_layernorm", "qkv_proj", "post_attention_layernorm", "gate_up_proj"),
    "olmo2": ("v_proj", "up_proj"),
    "gpt_neox": ("input_layernorm", "query_key_value", "post_attention_layernorm"),
    "opt": ("self_attn_layer_norm", "v_proj", "final_layer_norm", "fc1"),
    "gpt2": ("ln_1", "c_attn", "ln_2"),
}
SAME = {"llama_tied": "llama", "mistral": "llama", "qwen2": "llama", "qwen3": "llama"}
SAME |= {"gemma3_text": "gemma2"}

# Variants of a family whose folds differ: name -> (family, changes of the config).
VARIANTS = {
    "opt after": ("opt", {"do_layer_norm_before": False}, ("v_proj", "fc1")),
    "opt gelu": (
        "opt",
        {"activation_function": "gelu"},
        ("self_attn_layer_norm", "v_proj", "final_layer_norm"),
    ),
    "opt plain norms": ("opt", {"layer_norm_elementwise_affine": False}, ("v_proj", "fc1")),
    "gpt_neox relu": (
        "gpt_neox",
        {"hidden_act": "relu"},
        (*EXPECTED["gpt_neox"], "dense_h_to_4h"),
    ),
    "gpt_neox sequential": ("gpt_neox", {"use_parallel_residual": False}, EXPECTED["gpt_neox"]),
    "gpt2 relu": ("gpt2", {"activation_function": "relu"}, (*EXPECTED["gpt2"], "c_fc")),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}, EXPECTED["llama"]),
    "llama one head": ("llama", {"num_key_value_heads": 1}, EXPECTED["llama"]),
    "llama no groups": ("llama", {"num_key_value_heads": 4}, EXPECTED["llama"]),
}
CASES = {
    **{name: (name, {}, EXPECTED[SAME.get(name, name)]) for name in TINY},
    **VARIANTS,
}


def model_of(case: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model with norms that are not all ones, for a fold that ignores them must show."""
    family, changes, _ = CASES[case]
    model = make_tiny(family, torch.float32, **changes).to(dtype)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            noise = torch.rand(parameter.shape, generator=generator) - 0.5
            around = parameter.detach().float() if "bias" not in name else 0.0
            parameter.data = (around + 0.8 * noise).to(dtype)
    return model


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out: Tensor = model(input_ids=ids, use_cache=False).logits
    return out


def blocks(model: nn.Module) -> nn.ModuleList:
    return find_decoder_layers(model)[1]  # type: ignore[arg-type]


def random_scales(fold: Fold, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(len(fold.rows), generator=generator, dtype=torch.float64) * 6 - 3).exp2()


@pytest.mark.parametrize("case", CASES)
def test_a_family_has_its_folds_and_no_others(case: str) -> None:
    block = blocks(model_of(case))[0]
    assert tuple(f.point.source.rsplit(".", 1)[-1] for f in find_folds(block)) == CASES[case][2]


@pytest.mark.parametrize("case", CASES)
def test_folding_leaves_the_logits(case: str) -> None:
    model = model_of(case)
    before = logits(model)
    for number, block in enumerate(blocks(model)):
        for fold in find_folds(block):
            source = fold.source.weight.clone()
            readers = [reader.weight.clone() for reader in fold.readers]
            fold.apply(random_scales(fold, number))
            # It did something, to every module that takes part.
            assert not torch.allclose(source, fold.source.weight)
            assert not any(
                torch.allclose(old, reader.weight)
                for old, reader in zip(readers, fold.readers, strict=True)
            )
    difference = (logits(model) - before).abs().max()
    # RMSNorms of Llama's kind compute in float32 inside, whatever comes in.
    assert difference <= 2e-6 * before.abs().max()


@pytest.mark.parametrize("case", ["llama", "qwen2", "gemma2", "phi3", "gpt_neox", "gpt2"])
def test_powers_of_two_change_no_bit_of_plain_weights(case: str) -> None:
    model = model_of(case, torch.float32)
    for fold in find_folds(blocks(model)[0]):
        if fold.point.offset:
            continue  # (1 + w) / s - 1 rounds
        scales = random_scales(fold).log2().round().exp2()
        parameters = [fold.source.weight, *(reader.weight for reader in fold.readers)]
        before = [parameter.clone() for parameter in parameters]
        fold.apply(scales)
        fold.apply(1 / scales)
        assert all(torch.equal(b, p) for b, p in zip(before, parameters, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", ["llama", "gemma3_text", "gpt2"])
def test_a_norm_divided_by_storable_scales_is_exact_in_16_bits(
    case: str, dtype: torch.dtype
) -> None:
    model = model_of(case, torch.float32)
    model.to(dtype).float()  # the checkpoint's weights, computed with in float32
    for fold in find_folds(blocks(model)[0]):
        if fold.source.weight.ndim > 1:
            continue
        gain = fold.source.weight.double() + fold.point.offset
        scales = fold.storable(random_scales(fold))
        assert (scales > 0).all()
        assert ((scales / random_scales(fold)).log2().abs() < 0.2).all()
        fold.apply(scales)
        stored = fold.source.weight.to(dtype)
        assert torch.equal(stored.float(), fold.source.weight)
        torch.testing.assert_close(
            (stored.double() + fold.point.offset) * scales, gain, rtol=1e-12, atol=0
        )


def test_channels_that_a_norm_switches_off_keep_their_scale() -> None:
    model = model_of("llama", torch.float32)
    fold = find_folds(blocks(model)[0])[0]
    fold.source.weight.data[3] = 0.0
    scales = fold.storable(random_scales(fold))
    assert scales[3] == 1
    fold.apply(scales)
    assert fold.source.weight[3] == 0
    assert all(reader.weight.isfinite().all() for reader in fold.readers)


def test_all_query_heads_of_a_group_read_the_same_channel() -> None:
    block = blocks(model_of("llama"))[0]
    fold = next(f for f in find_folds(block) if f.point.source == "self_attn.v_proj")
    head_dim, uses = 16, 2  # 4 query heads, 2 heads of k and v
    for channel in (0, 5, 16, 31):
        group, within = divmod(channel, head_dim)
        heads = [group * uses + head for head in range(uses)]
        assert fold.columns[channel].tolist() == [head * head_dim + within for head in heads]
    factors = torch.arange(1.0, 33.0)
    assert torch.equal(fold.over_channels(fold.scale_of_inputs(factors)), factors)


def test_names_of_changed_parameters_are_those_that_change() -> None:
    for case in ("qwen2", "gpt2", "phi3"):
        block = blocks(model_of(case))[0]
        for fold in find_folds(block):
            before = {name: p.clone() for name, p in block.named_parameters()}
            fold.apply(random_scales(fold))
            changed = {n for n, p in block.named_parameters() if not torch.equal(p, before[n])}
            assert changed == set(fold.parameters())


def test_unknown_blocks_and_replaced_modules_have_no_folds() -> None:
    assert find_folds(nn.Linear(4, 4)) == []
    block = blocks(model_of("llama"))[0]

    class Adapted(nn.Linear):
        pass

    block.mlp.down_proj = Adapted(168, 64)
    assert [f.point.source for f in find_folds(block)][-1] == "post_attention_layernorm"


def test_the_table_names_only_modules_of_the_block() -> None:
    """A misspelt name would make a point absent without anybody noticing."""
    found = set()
    for case in CASES:
        block = blocks(model_of(case))[0]
        names = dict(block.named_modules())
        found.add(type(block).__name__)
        for point in FOLDS[type(block).__name__]:
            assert {point.source, point.inside, *point.readers} <= names.keys()
    assert found == FOLDS.keys()
    assert not any(weight_is_transposed(module) for module in blocks(model_of("llama")).modules())
