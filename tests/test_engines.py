"""The limits of engines: each one fires, and what is within all of them is served."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from datetime import date
from typing import Any

import pytest
from tiny_models import tiny_config

from lowbit.engines import ENGINES, engine_named, findings
from lowbit.engines.choice import Target
from lowbit.engines.limits import (
    ATTRIBUTES,
    DATA,
    MORE,
    REFUSED,
    SAID,
    STRUCTURAL,
    UNKNOWN,
    Limit,
    engines,
)
from lowbit.engines.linter import CHECKS, Checkpoint, examine, listed
from lowbit.engines.weights import Model, Weight, model_of
from lowbit.errors import LowbitError
from lowbit.formats.table import LAYOUTS
from lowbit.scheme import SCALE_DTYPES, Scheme

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
}
CONFIG: dict[str, Any] = tiny_config("llama", **SIZES).to_dict()
ATTENTION = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")]
LEAVES = [*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
NAMES = [f"model.layers.{block}.{leaf}" for block in range(2) for leaf in LEAVES]


def schemes(text: str, **other: str) -> dict[str, Scheme]:
    """Returns one scheme for all layers, and others for those whose name ends so."""
    found = {name: Scheme.parse(text) for name in NAMES}
    for end, scheme in other.items():
        found |= {name: Scheme.parse(scheme) for name in NAMES if name.endswith(end)}
    return found


def test_the_file_is_what_its_reader_says() -> None:
    data = json.loads(DATA.read_text())
    assert set(data) == {"engines"}
    assert ENGINES == ("vllm", "sglang", "llama.cpp", "transformers", "tensorrt-llm")
    known = {*LAYOUTS, "gguf"}
    for name, fields in data["engines"].items():
        assert set(fields) == {
            "version", "hardware", "serve", "parallel", "writes", "limits", "formats", "refused",
        }  # fmt: skip
        assert "{path}" in fields["serve"]
        assert fields["writes"]
        assert set(fields["writes"]) <= set(fields["formats"])
        # Nothing is left open: every format is either served or refused.
        assert set(fields["formats"]) | set(fields["refused"]) == known, name
        assert not set(fields["formats"]) & set(fields["refused"])
        for reason in fields["refused"].values():
            assert set(reason) == {"because", "source", "checked"}


def every_limit() -> list[Any]:
    """Returns (engine, format, limit) of the whole file."""
    return [
        pytest.param(engine, layout, limit, id=f"{engine}-{layout}-{index}-{limit.kind}")
        for engine, own in engines().items()
        for layout, limits in own.formats.items()
        for index, limit in enumerate(limits)
    ]


@pytest.mark.parametrize(("engine", "layout", "limit"), every_limit())
def test_every_limit_has_a_source_and_a_date(engine: str, layout: str, limit: Limit) -> None:
    assert limit.kind in (*ATTRIBUTES, *STRUCTURAL)
    assert limit.kind in CHECKS or limit.kind in (*ATTRIBUTES, "note")
    assert limit.reason.because
    assert "\n" not in limit.reason.because
    assert limit.reason.source
    assert all(address.startswith("https://") for address in limit.reason.source)
    assert date(2026, 1, 1) <= limit.reason.checked <= date.today()
    assert set(limit.when) <= set(ATTRIBUTES)
    if limit.kind in ATTRIBUTES:
        assert isinstance(limit.value, list)
        if limit.kind == "group_size":
            assert all(size is None or isinstance(size, int) for size in limit.value)


def wrong(kind: str, allowed: list[Any]) -> Any:
    """Returns a value that an attribute may have, and a limit does not allow."""
    values: dict[str, tuple[Any, ...]] = {
        "bits": (2, 3, 4, 8),
        "symmetric": (True, False),
        "group_size": (16, 32, 48, 64, 128, 256, None),
        "codebook": ("nf4", None),
        "double_quant": (True, False),
        "activations": (None, "int8", "int8_static"),
        "scale_dtype": tuple(SCALE_DTYPES),
        "kind": ("linear", "head", "embedding"),
        "expert": (True, False),
        "ordered": (True, False),
        "tensor_parallel": (1, 2),
    }
    return next((value for value in values[kind] if value not in allowed), None)


def weight(name: str, shape: tuple[int, int] | None, fields: Mapping[str, Any]) -> Weight:
    """Returns a weight with these attributes."""
    own = {k: v for k, v in fields.items() if k not in ("kind", "expert", "ordered")}
    if own.get("activations") is not None:
        own |= {"bits": 8, "group_size": None, "symmetric": True}
    if own.get("codebook") is not None:
        own |= {"bits": 4, "symmetric": True}
    scheme = Scheme(**{"group_size": 128, **own})
    kind, ordered = fields.get("kind", "linear"), fields.get("ordered", False)
    name = f"model.layers.0.mlp.experts.0.{name}" if fields.get("expert") else f"layers.0.x.{name}"
    return Weight(name, scheme, shape, kind, ordered)


def breaking(limit: Limit) -> tuple[list[Weight], Model, int]:
    """Returns weights of a model that are beyond a limit, and among how many GPUs."""
    asked = {k: v[-1] for k, v in limit.when.items() if k != "tensor_parallel"}
    base = {"bits": 4} | asked
    gpus = 2 if limit.when.get("tensor_parallel") == MORE else 1
    model = Model({}, heads=8, kv_heads=4)
    if limit.kind == "heads":
        return [weight("q_proj", (512, 512), base)], model, 3
    if limit.kind == "split":
        return [weight("q_proj", (513, 512), base)], model, 2
    if limit.kind == "tensor_parallel":
        return [weight("q_proj", (512, 512), base)], model, wrong(limit.kind, limit.value)
    if limit.kind == "whole_groups":
        return [weight("o_proj", (512, 512 + 64), base | {"group_size": 128})], model, 1
    if limit.kind == "whole_words" and limit.value == "in":
        return [weight("o_proj", (512, 2 * 40), base | {"bits": 3, "group_size": 40})], model, 2
    if limit.kind == "whole_words":
        return [weight("q_proj", (2 * 516, 512), base | {"bits": 4})], model, 2
    if limit.kind == "tile":
        shape = (520, 512) if base.get("activations") is None else (512, 520)
        return [weight("o_proj", shape, base)], model, 1
    if limit.kind == "zero_points":
        first, second = {"symmetric": False}, {"symmetric": False, "bits": 8}
        both = [weight("q_proj", None, base | first), weight("o_proj", None, base | second)]
        return both, model, 1
    if limit.kind == "fused":
        odd = {"bits": 8 if base["bits"] == 4 else 4}
        both = [weight("q_proj", None, base), weight("k_proj", None, base | odd)]
        return both, model, 1
    if limit.kind == "scales":
        return [weight("q_proj", None, base)], dataclasses.replace(model, dtype="float32"), 1
    if limit.kind == "plain_experts":
        moe = dataclasses.replace(model, experts={"model.layers.0.mlp.experts": (64, 64)})
        return [weight("q_proj", None, base)], moe, 1
    if limit.kind == "note":
        return [weight("q_proj", None, base)], model, gpus
    return [weight("q_proj", None, base | {limit.kind: wrong(limit.kind, limit.value)})], model, 1


@pytest.mark.parametrize(("engine", "layout", "limit"), every_limit())
def test_every_limit_can_fire(engine: str, layout: str, limit: Limit) -> None:
    weights, model, gpus = breaking(limit)
    alone = dataclasses.replace(engine_named(engine), formats={layout: (limit,)})
    given = Checkpoint(layout, tuple(weights), model)
    verdict = examine(alone, given, gpus)
    told = {REFUSED: verdict.findings, UNKNOWN: verdict.unknown, SAID: verdict.said}[limit.then]
    assert any(limit.reason.because in s or str(limit.value) in s for s in told), verdict
    assert sum(map(len, (verdict.findings, verdict.unknown, verdict.said))) == len(told)


@pytest.mark.parametrize(
    ("engine", "layout", "scheme", "gpus"),
    [
        ("vllm", "compressed-tensors", "W4A16_G64", 1),
        ("vllm", "compressed-tensors", "W4A16_ASYM_G64", 4),
        ("vllm", "compressed-tensors", "W2A16_G32", 2),
        ("vllm", "compressed-tensors", "W3A16_G64", 8),
        ("vllm", "compressed-tensors", "W8A8_STATIC", 2),
        ("vllm", "gptq", "W8A16_CHANNEL", 2),
        ("vllm", "gptq_v2", "W4A16_G128", 4),
        ("vllm", "awq", "W4A16_ASYM", 2),
        ("sglang", "compressed-tensors", "W4A16_ASYM", 2),
        ("sglang", "compressed-tensors", "W8A8", 4),
        ("sglang", "gptq", "W4A16_G32", 2),
        ("sglang", "awq", "W4A16_ASYM", 1),
        ("transformers", "lowbit", "NF4_DQ", 1),
        ("transformers", "compressed-tensors", "W3A16_ASYM_G64", 1),
        ("transformers", "bnb", "NF4", 1),
        ("llama.cpp", "gguf", "W4A16_G32", 1),
    ],
)
def test_what_is_within_the_limits_is_served(
    engine: str, layout: str, scheme: str, gpus: int
) -> None:
    text = scheme.replace("_G128", "")
    assert findings(engine, layout, schemes(text), CONFIG, gpus) == []


@pytest.mark.parametrize(
    ("engine", "layout", "chosen", "gpus", "said"),
    [
        ("vllm", "lowbit", schemes("W4A16"), 1, "lowbit's own format is not read"),
        ("vllm", "bnb", schemes("NF4"), 1, "no longer read"),
        ("vllm", "gptq", schemes("W3A16"), 1, r"have 3 bits, but GPTQ weights have 4 or 8"),
        ("vllm", "gptq", schemes("W4A16_ASYM"), 1, "have zero points, but .* symmetric"),
        ("vllm", "compressed-tensors", schemes("W4A16"), 3, "8 attention heads do not divide"),
        ("vllm", "compressed-tensors", schemes("W4A16_G256"), 4, r"o_proj \(2 weights\) have 128"),
        (
            "vllm", "compressed-tensors", schemes("W4A16", k_proj="W8A16"), 1,
            r"q_proj \(2 weights\).*k_proj.*multiplied as one, in W4A16 and W8A16",
        ),
        ("sglang", "compressed-tensors", schemes("W2A16"), 1, "have 2 bits, but"),
        ("sglang", "compressed-tensors", schemes("W8A8_STATIC"), 1, "static scale"),
        ("sglang", "gptq", schemes("W4A16", down_proj="W8A16", gate_proj="W8A16", up_proj="W8A16"),
         1, "the rest in W4A16"),
        ("sglang", "bnb", schemes("NF4"), 2, "cannot be split"),
        ("transformers", "compressed-tensors", schemes("W4A16_ASYM", o_proj="W8A16"), 1, "beside"),
        ("tensorrt-llm", "compressed-tensors", schemes("W4A16"), 1, "FP8, NVFP4 and MXFP4"),
        ("llama.cpp", "gptq", schemes("W4A16"), 1, "GGUF files only"),
        ("llama.cpp", "something", schemes("W4A16"), 1, "nothing is known of it"),
    ],
)  # fmt: skip
def test_what_is_beyond_them_is_a_sentence(
    engine: str, layout: str, chosen: dict[str, Scheme], gpus: int, said: str
) -> None:
    found = findings(engine, layout, chosen, CONFIG, gpus)
    assert len(found) >= 1
    assert any(re.search(said, sentence) for sentence in found), found


def test_desc_act_is_read_from_the_config() -> None:
    quantization = {"quant_method": "gptq", "desc_act": True, "group_size": 128}
    for engine, served in (("vllm", False), ("sglang", True)):
        config = {**CONFIG, "quantization_config": quantization}
        assert (findings(engine, "gptq", schemes("W4A16"), config) == []) is served
    config["quantization_config"] = {"config_groups": {"g": {"weights": {"actorder": "group"}}}}
    assert findings("vllm", "compressed-tensors", schemes("W4A16"), config)


def test_shapes_are_those_of_the_model_and_experts_have_names_of_their_own() -> None:
    config = {
        "model_type": "mixtral", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_local_experts": 2,
    }  # fmt: skip
    model = model_of(config)
    prefix = next(iter(model.experts or {}))
    assert model.shape(f"{prefix}.1.w1") == (96, 64)
    assert model.shape(f"{prefix}.1.down_proj") == (64, 96)
    assert model.shape("model.layers.0.self_attn.k_proj") == (32, 64)
    assert (model.heads, model.kv_heads) == (4, 2)
    names = [f"{prefix}.{e}.{leaf}" for e in (0, 1) for leaf in ("w1", "w2", "w3")]
    chosen = {name: Scheme.parse("W4A16_ASYM_G32") for name in names}
    assert findings("vllm", "compressed-tensors", chosen, config) == []
    assert "experts" in findings("transformers", "compressed-tensors", chosen, config)[0]
    chosen[names[0]] = Scheme.parse("W8A16_G32")
    assert "multiplied as one" in findings("vllm", "compressed-tensors", chosen, config)[0]


def test_a_model_that_is_not_known_says_what_is_not_checked() -> None:
    config = {"model_type": "nobody", "num_attention_heads": 8, "num_key_value_heads": 8}
    given = Checkpoint.of_config("compressed-tensors", schemes("W4A16"), config)
    verdict = examine(engine_named("vllm"), given, 2)
    assert not verdict.findings
    assert "does not tell the shapes" in verdict.unknown[0]
    assert examine(engine_named("vllm"), given, 3).findings


@pytest.mark.parametrize(
    ("name", "gpus", "message"),
    [
        ("vlm", 1, r"unknown engine 'vlm'; did you mean 'vllm'\? \(known: llama.cpp, sglang"),
        ("vllm", 0, r"--tp is a number of GPUs, 1 or more, got 0"),
    ],
)
def test_bad_names_are_a_sentence(name: str, gpus: int, message: str) -> None:
    with pytest.raises(LowbitError, match=message):
        findings(name, "gptq", schemes("W4A16"), CONFIG, gpus)
    with pytest.raises(LowbitError, match=message):
        Target.named(name, gpus)


def test_names_of_several_blocks_are_one() -> None:
    names = [f"m.layers.{i}.mlp.up_proj" for i in range(4)]
    assert listed(names) == "m.layers.*.mlp.up_proj (4 weights)"
    assert listed(names[:1]) == names[0]
    assert listed([*"abcd"]) == "a, b, c, ..."


@pytest.mark.parametrize(
    ("engine", "scheme", "gpus", "layout"),
    [
        ("vllm", "W4A16_G64", 4, "compressed-tensors"),
        ("transformers", "NF4_DQ", 1, "lowbit"),
        ("sglang", "W4A16", 2, "compressed-tensors"),
        ("sglang", "NF4", 1, "bnb"),
    ],
)
def test_the_best_format_is_chosen(engine: str, scheme: str, gpus: int, layout: str) -> None:
    given = Checkpoint.of_config("", schemes(scheme), CONFIG)
    assert Target.named(engine, gpus).serve(given).layout == layout


@pytest.mark.parametrize(
    ("engine", "scheme", "gpus", "message"),
    [
        ("vllm", "NF4", 1, r"--for vllm: compressed-tensors cannot hold .*q_proj \(2 weights\).*"
         r"the nearest that would do for all layers is --scheme W4A16_G64"),
        ("vllm", "W4A16_G64_DQ", 2, r"--for vllm --tp 2: .*is --scheme W4A16_G64$"),
        ("vllm", "W3A16_G256", 8, r"is --scheme W3A16_G64$"),
        ("sglang", "W3A16", 1, r"have 3 bits.*is --scheme W4A16$"),
        ("vllm", "W4A16", 6, r"8 attention heads.*with --tp 4"),
        ("tensorrt-llm", "W4A16", 1, "reads no format of quantized weights .*it serves --to bf16"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_would_do(engine: str, scheme: str, gpus: int, message: str) -> None:
    given = Checkpoint.of_config("", schemes(scheme), CONFIG)
    with pytest.raises(LowbitError, match=message):
        Target.named(engine, gpus).serve(given)
