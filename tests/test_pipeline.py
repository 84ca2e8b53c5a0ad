"""The streamed run gives what the whole model in memory gives, and survives interruption."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import TINY, build_tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig

import lowbit
from lowbit.algorithms import GPTQ, RTN, Algorithm
from lowbit.calibration.statistics import HessianAccumulator
from lowbit.calibration.tokens import load_calibration
from lowbit.checkpoint.journal import Journal
from lowbit.models.selection import Selection, select_modules
from lowbit.nn.replace import weight_is_transposed
from lowbit.pipeline.source import BATCH_TOKENS
from lowbit.quant import QuantizedWeight
from lowbit.scheme import Scheme

SAMPLES, SEQLEN, VOCAB = 6, 48, 256


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.torch import save_file

    ids = torch.randint(1, VOCAB - 1, (8, SEQLEN), generator=torch.Generator().manual_seed(3))
    file = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file({"input_ids": ids.to(torch.int32)}, file)
    return file


def quantize_streamed(
    model: Path, output: Path, token_file: Path, **options: object
) -> dict[str, Tensor]:
    settings: dict[str, object] = {
        "scheme": "W4A16_G32",
        "calibration": str(token_file),
        "samples": SAMPLES,
        "seqlen": SEQLEN,
        "progress": False,
    }
    lowbit.quantize(model, output, **{**settings, **options})
    return all_tensors(output)


def all_tensors(directory: Path) -> dict[str, Tensor]:
    return {k: v for f in sorted(directory.glob("*.safetensors")) for k, v in load_file(f).items()}


def quantize_whole(
    model_path: Path, ids: Tensor, scheme: str, algorithm: Algorithm
) -> dict[str, Tensor]:
    """The unstreamed oracle: the full model, every statistic from a complete forward pass."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    selected = select_modules(model, Selection(Scheme.parse(scheme)))
    batches = list(ids.split(max(1, BATCH_TOKENS // SEQLEN)))
    stored: dict[str, Tensor] = {}
    for group in call_groups(model, list(selected), batches[0]):
        statistics = hessian_of(model, model.get_submodule(group[0]), batches)
        for name in group:
            module = model.get_submodule(name)
            weight = module.weight.T if weight_is_transposed(module) else module.weight
            result = algorithm.quantize(weight, selected[name], statistics)
            qweight = QuantizedWeight.from_codes(result.codes, result.grid)
            stored |= {f"{name}.{key}": value for key, value in qweight.tensors().items()}
            decoded = qweight.dequantize()
            module.weight.data = decoded.T if weight_is_transposed(module) else decoded
    return stored


def call_groups(model: nn.Module, names: list[str], batch: Tensor) -> Iterator[list[str]]:
    """Yields names that share an input tensor, in calling order."""
    calls: list[tuple[Tensor, str]] = []
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: calls.append((args[0], name))
        )
        for name in names
    ]
    with torch.no_grad():
        model(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    while calls:
        first = calls[0][0]
        yield [name for tensor, name in calls if tensor is first]
        calls = [(tensor, name) for tensor, name in calls if tensor is not first]


def hessian_of(model: nn.Module, module: nn.Module, batches: list[Tensor]):  # type: ignore[no-untyped-def]
    inputs: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(batch, use_cache=False)
    hook.remove()
    accumulator = HessianAccumulator(inputs[0].shape[-1])
    for x in inputs:
        accumulator.add(x)
    return accumulator.statistics()


@pytest.mark.parametrize("name", TINY)
def test_streamed_equals_unstreamed(name: str, tmp_path: Path, token_file: Path) -> None:
    build_tiny(name, tmp_path / "model", torch.bfloat16, max_shard_size="60KB")
    streamed = quantize_streamed(tmp_path / "model", tmp_path / "out", token_file)
    ids = load_calibration(str(token_file), None, VOCAB, SAMPLES, SEQLEN, 0).ids
    expected = quantize_whole(tmp_path / "model", ids, "W4A16_G32", GPTQ())
    assert expected
    for key, value in expected.items():
        assert torch.equal(streamed[key], value), key
    # Everything else is the original, bit for bit.
    quantized = {key.rsplit(".", 1)[0] + ".weight" for key in expected}
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    for key, value in streamed.items():
        if key not in expected and key not in quantized:
            assert torch.equal(value, original[key]), key


@pytest.mark.usefixtures("reference_backend")
@pytest.mark.parametrize("name", TINY)
def test_loaded_model_equals_the_decoded_one(name: str, tmp_path: Path, token_file: Path) -> None:
    build_tiny(name, tmp_path / "model", torch.bfloat16)
    tensors = quantize_streamed(tmp_path / "model", tmp_path / "out", token_file, algorithm="rtn")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for module_name, scheme in select_modules(stock, Selection(Scheme.parse("W4A16_G32"))).items():
        module = stock.get_submodule(module_name)
        rows, columns = module.weight.shape
        shape = (columns, rows) if weight_is_transposed(module) else (rows, columns)
        own = {key: tensors[f"{module_name}.{key}"] for key in scheme.tensor_specs(shape)}
        decoded = QuantizedWeight.from_tensors(scheme, shape, own).dequantize(torch.bfloat16)
        module.weight.data = decoded.T if weight_is_transposed(module) else decoded
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(1, 33)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, stock(ids).logits)


class StopRunError(Exception):
    """Stands for a kill right after a part became durable."""


@pytest.mark.parametrize("parts", range(5))
def test_resume_after_any_part_is_bit_identical(
    parts: int, tmp_path: Path, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_tiny("llama", tmp_path / "model", torch.bfloat16)
    quantize_streamed(tmp_path / "model", tmp_path / "whole", token_file)
    finish = Journal.finish_part

    def stop_after(journal: Journal, name: str, file: Path, modules: dict[str, object]) -> None:
        if len(journal.parts) == parts:
            raise StopRunError
        finish(journal, name, file, modules)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finish_part", stop_after)
        with pytest.raises(StopRunError):
            quantize_streamed(tmp_path / "model", tmp_path / "out", token_file)
    with pytest.raises(lowbit.LowbitError, match="resume"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    quantize_streamed(tmp_path / "model", tmp_path / "out", token_file, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path, token_file: Path) -> None:
    build_tiny("llama", tmp_path / "model", torch.bfloat16)
    quantize_streamed(tmp_path / "model", tmp_path / "out", token_file)
    before = contents(tmp_path / "out")
    quantize_streamed(tmp_path / "model", tmp_path / "out", token_file, resume=True)
    assert contents(tmp_path / "out") == before


def test_resume_refuses_another_model(
    tmp_path: Path, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_tiny("llama", tmp_path / "model", torch.bfloat16)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finish_part", lambda *_: (_ for _ in ()).throw(StopRunError()))
        with pytest.raises(StopRunError):
            quantize_streamed(tmp_path / "model", tmp_path / "out", token_file)
    before = contents(tmp_path / "out")
    changes: dict[str, Callable[[], dict[str, object]]] = {
        "calibration.seed": lambda: {"seed": 1},
        "options.scheme": lambda: {"scheme": "W3A16_G32"},
        "options.algorithm_options.act_order": lambda: {"algorithm": GPTQ(act_order=False)},
        "model.weights": lambda: flip_one_byte(tmp_path / "model") or {},
    }
    for field, change in changes.items():
        with pytest.raises(lowbit.LowbitError, match=f"cannot resume, {field}"):
            quantize_streamed(
                tmp_path / "model", tmp_path / "out", token_file, resume=True, **change()
            )
    assert contents(tmp_path / "out") == before


def flip_one_byte(model: Path) -> None:
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-8] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma3_text", "gpt2"])
@pytest.mark.parametrize(("head", "embeddings"), [(True, False), (False, True), (True, True)])
def test_head_and_embeddings(
    name: str, head: bool, embeddings: bool, tmp_path: Path, token_file: Path
) -> None:
    original = build_tiny(name, tmp_path / "model", torch.bfloat16)
    tensors = quantize_streamed(
        tmp_path / "model",
        tmp_path / "out",
        token_file,
        quantize_lm_head=head,
        quantize_embeddings=embeddings,
    )
    tied = original.config.get_text_config().tie_word_embeddings
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    packed = {key.removesuffix(".weight_packed") for key in tensors if key.endswith("_packed")}
    outside = {key for key in packed if "layers" not in key and ".h." not in key}
    assert len(outside) == (1 if tied else head + embeddings)
    ids = torch.arange(1, 33)[None]
    with torch.no_grad():
        difference = model(ids).logits.float() - original(ids).logits.float()
    assert difference.norm() < 0.5 * original(ids).logits.float().norm()
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_dynamic_overrides_are_kept(tmp_path: Path, token_file: Path) -> None:
    build_tiny("llama", tmp_path / "model", torch.bfloat16)
    tensors = quantize_streamed(
        tmp_path / "model",
        tmp_path / "out",
        token_file,
        dynamic={r"down_proj": "W8A16_G32", r"layers\.1\.": None},
    )
    assert "model.layers.1.mlp.up_proj.weight" in tensors
    columns = tensors["model.layers.0.mlp.down_proj.weight_shape"].tolist()[1]
    packed = tensors["model.layers.0.mlp.down_proj.weight_packed"]
    assert packed.shape[1] == -(-columns * 8 // 32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model.model.layers[1].mlp.up_proj) is nn.Linear
    assert str(model.model.layers[0].mlp.down_proj.scheme) == "W8A16_G32"


def test_bits_per_weight_is_what_the_files_hold(tmp_path: Path, token_file: Path) -> None:
    build_tiny("llama", tmp_path / "model", torch.bfloat16)
    result = lowbit.quantize(
        tmp_path / "model", tmp_path / "out", scheme="NF4_DQ", algorithm=RTN(), progress=False
    )
    tensors = all_tensors(tmp_path / "out")
    stored = sum(t.numel() * t.element_size() for k, t in tensors.items() if ".weight_" in k)
    shapes = [t.tolist() for k, t in tensors.items() if k.endswith("weight_shape")]
    assert result.bits_per_weight == 8 * stored / sum(a * b for a, b in shapes)
    scheme = Scheme.parse("NF4_DQ")
    assert stored == sum(scheme.stored_bytes((a, b)) for a, b in shapes)


def test_calibration_that_is_no_path_is_refused(tmp_path: Path) -> None:
    build_tiny("llama", tmp_path / "model", torch.bfloat16)
    with pytest.raises(lowbit.LowbitError, match="must be a path or a name, got list"):
        lowbit.quantize(tmp_path / "model", tmp_path / "out", calibration=["a text"])  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_finished_directory_without_manifest_is_refused(tmp_path: Path) -> None:
    build_tiny("llama", tmp_path / "model", torch.bfloat16)
    lowbit.quantize(tmp_path / "model", tmp_path / "out", algorithm="rtn", progress=False)
    (tmp_path / "out" / "lowbit_manifest.json").unlink()
    with pytest.raises(lowbit.LowbitError, match="lowbit_manifest"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_index_covers_every_tensor(tmp_path: Path) -> None:
    build_tiny("gpt2", tmp_path / "model", torch.float32)
    lowbit.quantize(tmp_path / "model", tmp_path / "out", algorithm="rtn", progress=False)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == all_tensors(tmp_path / "out").keys()


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_excluded_experts_are_carried_over(
    algorithm: str, tmp_path: Path, token_file: Path
) -> None:
    """transformers merges the experts of a Mixtral file into one parameter each while loading."""
    config = MixtralConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
        max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    original = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    original.save_pretrained(tmp_path / "model")
    options: dict[str, object] = {"algorithm": algorithm, "scheme": "W8A16_G32"}
    with pytest.raises(lowbit.LowbitError, match="fused experts cannot be quantized yet"):
        quantize_streamed(tmp_path / "model", tmp_path / "out", token_file, **options)
    options["modules_to_not_convert"] = ("experts",)
    if algorithm == "rtn":
        options["calibration"] = None
    lowbit.quantize(
        tmp_path / "model",
        tmp_path / "out",
        **{"calibration": str(token_file), "samples": SAMPLES, "seqlen": SEQLEN, **options},
        progress=False,
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before, after = original.state_dict(), loaded.state_dict()
    for name in before:
        if "experts" in name:
            assert torch.equal(after[name], before[name]), name
    ids = torch.arange(1, 33)[None]
    with torch.no_grad():
        difference = (loaded(ids).logits - original(ids).logits).float().norm()
        assert difference < 0.05 * original(ids).logits.float().norm()
