"""Siblings in one launch: what is computed together, and everything that must come to itself."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_backend import LAUNCHES, fake, kernel_names  # noqa: F401 - a fixture
from test_hf import IDS, WHOLE, load, logits
from test_ops import random_qweight
from tiny_models import TINY, build_tiny
from torch import Tensor, nn

from lowbit.hf.config import LowbitConfig
from lowbit.nn import QuantLinear, prepare_model
from lowbit.nn.siblings import MAX_ROWS, STRIKES, Siblings, fuse_siblings
from lowbit.nn.stored import StoredWeight

pytestmark = pytest.mark.usefixtures("fake")
ROWS = {"q_proj": 33, "k_proj": 16, "v_proj": 20}


class Attention(nn.Module):
    """Three siblings and a layer that is none."""

    def __init__(self, scheme: str = "W4A16_G32", bias: bool = False) -> None:
        super().__init__()
        for seed, (name, rows) in enumerate({**ROWS, "o_proj": 33}.items()):
            qweight = random_qweight(scheme, (rows, 75), seed)
            layer = QuantLinear.from_quantized(
                qweight, torch.randn(rows) if bias else None, torch.float32
            )
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.get_submodule(name)(x) for name in ROWS], -1)


def joined(model: nn.Module) -> list[Siblings]:
    found = (m._siblings[0] for m in model.modules() if isinstance(m, StoredWeight) and m._siblings)
    return [group for group in dict.fromkeys(found) if group.weight is not None]


def pair(scheme: str = "W4A16_G32", bias: bool = False) -> tuple[Attention, Attention]:
    """Returns an attention with joined siblings, and the same one layer by layer."""
    plain = Attention(scheme, bias).eval()
    together = copy.deepcopy(plain)
    for layer in plain.children():
        assert layer.prepare()
    assert prepare_model(together) == 4
    assert len(joined(together)) == 1
    return together, plain


def storages(model: nn.Module) -> dict[int, int]:
    """Returns address -> bytes of the memory behind all tensors of `model`."""
    tensors = [*model.parameters(), *model.buffers()]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scheme", ["W4A16_G32", "W3A16_ASYM_G32", "NF4_DQ", "W8A16_CHANNEL"])
@pytest.mark.parametrize("shape", [(1, 75), (2, 5, 75), (MAX_ROWS, 75), (0, 75)])
def test_one_launch_and_the_same_results(scheme: str, bias: bool, shape: tuple[int, ...]) -> None:
    together, plain = pair(scheme, bias)
    x = torch.randn(shape)
    expected = outputs(plain, x)
    LAUNCHES.clear()
    for _ in range(2):
        torch.testing.assert_close(outputs(together, x), expected)
    assert LAUNCHES == {"linear": 2}
    assert joined(together)[0]._kept is None


def test_layers_and_memory_are_what_they_were() -> None:
    together, plain = pair("W3A16_ASYM_G16_DQ")
    for (name, layer), other in zip(together.named_children(), plain.children(), strict=True):
        state = other.state_dict()
        assert layer.state_dict().keys() == state.keys()
        assert all(torch.equal(t, state[key]) for key, t in layer.state_dict().items()), name
        assert torch.equal(layer.dequantize(), other.dequantize())
        assert layer.extra_repr() == other.extra_repr()
    assert sum(storages(together).values()) == sum(storages(plain).values())
    whole = joined(together)[0].weight
    assert whole is not None
    for tensor in whole.tensors().values():
        assert tensor.untyped_storage().data_ptr() in storages(together)


def test_only_the_very_tensor_unchanged_is_taken() -> None:
    together, plain = pair()
    x = torch.randn(2, 75)
    with torch.no_grad():
        together.q_proj(x)
        twin = x.clone()
        torch.testing.assert_close(together.k_proj(twin), plain.k_proj(twin))
        together.q_proj(x)
        x.mul_(2)
        torch.testing.assert_close(together.k_proj(x), plain.k_proj(x))
        torch.testing.assert_close(together.v_proj(x), plain.v_proj(x))
        view = x[:]  # another object over the same memory
        together.q_proj(x)
        torch.testing.assert_close(together.k_proj(view), plain.k_proj(view))


def test_asking_twice_and_in_any_order() -> None:
    together, plain = pair()
    x = torch.randn(2, 75)
    with torch.no_grad():
        LAUNCHES.clear()
        for name in ("v_proj", "v_proj", "q_proj", "k_proj", "k_proj", "q_proj", "v_proj"):
            layer, other = together.get_submodule(name), plain.get_submodule(name)
            torch.testing.assert_close(layer(x), other(x))
    # All, v, all again after k's second call, and the seven of the plain layers.
    assert LAUNCHES["linear"] == 3 + 7
    assert joined(together)


def test_not_with_gradients_many_rows_or_autocast() -> None:
    together, plain = pair(bias=True)
    x = torch.randn(2, 75, requires_grad=True)
    LAUNCHES.clear()
    together(x).sum().backward()
    assert LAUNCHES == {"linear": 3, "grad_input": 3}
    gradient, x.grad = x.grad, None
    plain(x).sum().backward()
    torch.testing.assert_close(gradient, x.grad)
    many = torch.randn(MAX_ROWS + 1, 75)
    LAUNCHES.clear()
    assert torch.equal(outputs(together, many), outputs(plain, many))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(outputs(together, many[:2]), outputs(plain, many[:2]))
    assert LAUNCHES == {"linear": 12}


def test_inference_mode_counts_no_writes_so_nothing_is_shared() -> None:
    together, plain = pair()
    with torch.inference_mode():
        x = torch.randn(2, 75)
        together.q_proj(x)
        x.mul_(2)
        assert torch.equal(together.k_proj(x), plain.k_proj(x))
    outside = torch.randn(2, 75)
    LAUNCHES.clear()
    with torch.inference_mode():
        together(outside)
    assert LAUNCHES == {"linear": 1}


def test_nothing_is_kept_longer_than_needed() -> None:
    together, _ = pair()
    (group,) = joined(together)
    with torch.no_grad():
        x = torch.randn(2, 75)
        first = together.q_proj(x)
        assert group._kept is not None
        product = weakref.ref(group._kept.out)
        rest = together.k_proj(x), together.v_proj(x)
        activations = weakref.ref(x)
        del first, rest, x
        gc.collect()
        assert product() is None
        assert activations() is None
        # Nobody else came: the product goes with the activations.
        x = torch.randn(2, 75)
        together.q_proj(x)
        product = weakref.ref(group._kept.out)
        del x
        gc.collect()
        assert product() is None
        assert group._kept is None
    lost = weakref.ref(group)
    del together, group
    assert lost() is None  # and no cycle keeps a deleted model


def test_layers_that_turn_out_to_be_no_siblings_part() -> None:
    together, plain = pair()
    own, other = torch.randn(2, 75), torch.randn(4, 75)
    for _ in range(STRIKES + 2):
        with torch.no_grad():  # as cross attention
            torch.testing.assert_close(together.q_proj(own), plain.q_proj(own))
            torch.testing.assert_close(together.k_proj(other), plain.k_proj(other))
            torch.testing.assert_close(together.v_proj(other), plain.v_proj(other))
    assert not joined(together)
    LAUNCHES.clear()
    outputs(together, own)
    assert LAUNCHES == {"linear": 3}


def test_biases_that_change_are_used() -> None:
    together, plain = pair(bias=True)
    x = torch.randn(2, 75)
    outputs(together, x)
    for model in (together, plain):
        with torch.no_grad():
            model.k_proj.bias.fill_(3.0)  # as an optimizer does
    torch.testing.assert_close(outputs(together, x), outputs(plain, x))
    for model in (together, plain):
        model.v_proj.bias.data = torch.full((20,), 5.0)
    torch.testing.assert_close(outputs(together, x), outputs(plain, x))
    for model in (together, plain):
        model.q_proj.bias = nn.Parameter(torch.full((33,), 7.0))
    torch.testing.assert_close(outputs(together, x), outputs(plain, x))


def test_hooks_that_change_activations_are_obeyed() -> None:
    together, plain = pair()
    x = torch.randn(2, 75)
    for model in (together, plain):
        model.k_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        model.v_proj.register_forward_hook(lambda module, args, output: output + 1)
    for _ in range(STRIKES + 1):
        torch.testing.assert_close(outputs(together, x), outputs(plain, x))


def test_replaced_buffers_are_used() -> None:
    together, plain = pair()
    x = torch.randn(2, 75)
    changed = {name: t.clone() for name, t in plain.named_buffers() if "k_proj" in name}
    changed["k_proj.kernel_scale"] *= 2
    with torch.no_grad():
        expected = torch.func.functional_call(plain, changed, (x,))
        torch.testing.assert_close(torch.func.functional_call(together, changed, (x,)), expected)
    torch.testing.assert_close(outputs(together, x), outputs(plain, x))


def test_moving_parts_and_joins_again() -> None:
    together, plain = pair()
    x = torch.randn(2, 75)
    expected = outputs(plain, x)
    (group,) = joined(together)
    whole = group.weight
    together.to("cpu").share_memory()
    assert group.weight is whole
    together.half()
    assert group.weight is whole
    together.float()._apply(lambda tensor: tensor.clone())  # as between two devices of one type
    assert joined(together) == [group]
    assert group.weight is not whole
    torch.testing.assert_close(outputs(together, x), expected)
    together.double()  # refused by the backend
    assert not joined(together)
    assert not kernel_names(together)
    together.float()
    assert joined(together)
    LAUNCHES.clear()
    torch.testing.assert_close(outputs(together, x), expected)
    assert LAUNCHES == {"linear": 1}
    together.k_proj.restore()
    torch.testing.assert_close(outputs(together, x), expected)
    assert not joined(together)


def test_training_takes_coded_scales_apart() -> None:
    together, plain = pair("NF4_DQ")
    x = torch.randn(2, 75)
    together.train()
    assert not joined(together)
    assert together.k_proj.kernel_scale.dtype == torch.uint8
    torch.testing.assert_close(outputs(together, x), outputs(plain, x))
    together.eval()
    assert joined(together)
    torch.testing.assert_close(outputs(together, x), outputs(plain, x))


def test_loading_a_state_dict_joins_again() -> None:
    together, _ = pair()
    other = Attention("W4A16_G32").eval()
    for layer in other.children():
        with torch.no_grad():
            layer.weight_scale *= 3
    together.load_state_dict(other.state_dict())
    assert joined(together)
    x = torch.randn(2, 75)
    torch.testing.assert_close(outputs(together, x), outputs(other, x))


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_are_apart_and_can_be_joined(way: str) -> None:
    together, plain = pair()
    x = torch.randn(2, 75)
    if way == "deepcopy":
        twin = copy.deepcopy(together)
    else:
        file = io.BytesIO()
        torch.save(together, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert not joined(twin)
    torch.testing.assert_close(outputs(twin, x), outputs(plain, x))
    twin.q_proj.kernel_scale.zero_()
    torch.testing.assert_close(outputs(together, x), outputs(plain, x))
    assert fuse_siblings(twin) == 1
    expected = outputs(plain, x)
    expected[:, :33] = 0
    torch.testing.assert_close(outputs(twin, x), expected)


def test_only_the_same_kind_is_joined() -> None:
    mixed = Attention().eval()
    mixed.q_proj = QuantLinear.from_quantized(random_qweight("NF4", (33, 75)), None, torch.float32)
    mixed.eval()
    prepare_model(mixed)
    assert [len(group.spans) for group in joined(mixed)] == [2]
    LAUNCHES.clear()
    outputs(mixed, torch.randn(2, 75))
    assert LAUNCHES == {"linear": 2}


def model_of(family: str, path: Path, scheme: str = "W4A16_G32") -> Any:
    build_tiny(family, path)
    return load(path, quantization_config=LowbitConfig(scheme, **WHOLE))


@pytest.mark.parametrize("family", TINY)
def test_every_family_computes_the_same(family: str, tmp_path: Path) -> None:
    model = model_of(family, tmp_path)
    groups = joined(model)
    LAUNCHES.clear()
    together = logits(model)
    launches = LAUNCHES["linear"]
    generated = model.generate(IDS[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert all(group._kept is None and group.weight is not None for group in groups)
    for group in groups:
        group.part()
    LAUNCHES.clear()
    torch.testing.assert_close(logits(model), together)
    assert launches == LAUNCHES["linear"] - sum(len(group.spans) - 1 for group in groups)
    again = model.generate(IDS[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(generated, again)
    blocks = model.config.num_hidden_layers
    per_block = {"phi3": 0, "gpt_neox": 0, "gpt2": 0, "opt": 1}.get(family, 2)
    assert len(groups) == per_block * blocks


def test_adapters_on_siblings(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = model_of("llama", tmp_path)
    expected = logits(model)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    ).eval()
    assert len(joined(adapted)) == 6
    LAUNCHES.clear()
    changed = logits(adapted)
    assert LAUNCHES["linear"] == 3 * 4 + 1
    for group in joined(adapted):
        group.part()
    torch.testing.assert_close(logits(adapted), changed)
    assert not torch.allclose(changed, expected)
    assert fuse_siblings(adapted) == 6


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("bias", [False, True])
def test_compiled_siblings_are_one_launch(backend: str, bias: bool) -> None:
    together, plain = pair(bias=bias)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled: Any = torch.compile(together, fullgraph=True, backend=backend)
    with torch.no_grad():
        for rows in (1, 3):
            x = torch.randn(rows, 75)
            compiled(x)
            LAUNCHES.clear()
            result = compiled(x)
            assert LAUNCHES == {"linear": 1}
            torch.testing.assert_close(result, plain(x))
        if bias:
            together.k_proj.bias.fill_(3.0)
            plain.k_proj.bias.fill_(3.0)
            torch.testing.assert_close(compiled(x), plain(x))
    assert not torch._dynamo.utils.counters["graph_break"]
    assert joined(together)[0]._traced is None
    # Eager calls after compiled ones, and the other way round.
    torch.testing.assert_close(outputs(together, x), outputs(plain, x))
    x = torch.randn(1, 75, requires_grad=True)
    torch.testing.assert_close(compiled(x), plain(x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_that_writes_to_activations(backend: str) -> None:
    together, plain = pair()

    def run(model: Attention, x: Tensor) -> Tensor:
        x = x * 2
        q = model.q_proj(x)
        x.add_(1)
        k, v = model.k_proj(x), model.v_proj(x.clone())
        return torch.cat([q, k, v], -1)

    torch._dynamo.reset()
    compiled: Any = torch.compile(run, fullgraph=True, backend=backend)
    x = torch.randn(2, 75)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(together, x), run(plain, x))


def test_compiled_in_inference_mode() -> None:
    together, plain = pair()
    torch._dynamo.reset()
    compiled: Any = torch.compile(together, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        x = torch.randn(2, 75)
        torch.testing.assert_close(compiled(x), plain(x))


def test_layers_compiled_one_by_one() -> None:
    together, plain = pair()
    torch._dynamo.reset()
    for name in ROWS:
        together.get_submodule(name).compile(fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(2, 75)
        torch.testing.assert_close(outputs(together, x), outputs(plain, x))


def test_a_compiled_block_generates(tmp_path: Path) -> None:
    model = model_of("qwen2", tmp_path)
    expected = logits(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(IDS, use_cache=False)
        LAUNCHES.clear()
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, expected)
    assert LAUNCHES["linear"] == 3 * 4 + 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert not any(group._traced for group in joined(model))


def test_compiled_code_knows_that_joined_weights_stay_where_they_are() -> None:
    together, _ = pair()
    whole = joined(together)[0].weight
    assert whole is not None
    for tensor in whole.tensors().values():
        assert tensor._dynamo_static_input_type == "unguarded"
