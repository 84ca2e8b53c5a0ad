"""GGUF files written: codes kept, or chosen on llama.cpp's grids; vocabulary; all or nothing."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import gguf_oracles as oracle
import numpy as np
import pytest
import torch
from gguf_files import interleaved
from tiny_models import make_tiny
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import lowbit
from lowbit.algorithms.base import Statistics
from lowbit.cli import main
from lowbit.errors import LowbitError
from lowbit.formats.gguf import digest, verify_file, vocabulary
from lowbit.formats.gguf.converting import Converter
from lowbit.formats.gguf.header import read_gguf_header
from lowbit.formats.gguf.search import SEARCHED, quantize_rows
from lowbit.formats.gguf.tokenizer import load_gguf_tokenizer
from lowbit.formats.gguf.types import GGML_TYPES
from lowbit.formats.gguf.writing import GgufOptions
from lowbit.nn import QuantLinear

gguf = pytest.importorskip("gguf")

ASSETS = Path(__file__).parent / "assets"
NARROW = {"intermediate_size": 160, "head_dim": 16, "num_hidden_layers": 1}
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "head_dim": 64}
# The gate has tests of its own.
QUIET: Any = {"progress": False, "verify": False}
IDS = torch.arange(1, 33)[None]
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*has no tokenizer", "ignore:.*no name for how", "ignore:.*decoded to bf16"
)


def saved(path: Path, family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    if family == "mistral":
        changes["sliding_window"] = None
    make_tiny(family, dtype, **changes).save_pretrained(path)
    return path


def quantized(path: Path, family: str, scheme: str, **options: Any) -> Path:
    model = saved(path / "m", family, **NARROW)
    out = path / "q"
    lowbit.quantize(model, out, scheme=scheme, algorithm="rtn", **QUIET, **options)
    return out


def run(*arguments: object) -> int:
    """Returns the exit status of a command."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def weights(path: Path) -> dict[str, torch.Tensor]:
    model = lowbit.load(path, dtype=torch.float32)
    found = {
        name: module.dequantize()
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear)
    }
    return {**found, **{name: p.detach() for name, p in model.named_parameters()}}


def require_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize(
    ("family", "scheme", "kind"),
    [
        ("llama", "W4A16_G32", "Q4_0"),
        ("llama", "W4A16_G64", "Q4_0"),
        ("mistral", "W8A16_G32", "Q8_0"),
        ("qwen2", "W4A16_CHANNEL", "Q4_0"),
        ("qwen3", "W8A16_G64", "Q8_0"),
        ("llama_tied", "W8A8", "Q8_0"),
    ],
)
def test_codes_are_kept_where_a_type_has_them(
    tmp_path: Path, family: str, scheme: str, kind: str
) -> None:
    source = quantized(tmp_path, family, scheme)
    result = lowbit.convert(source, tmp_path / "x.gguf", "gguf", **QUIET)
    assert result.manifest["summary"]["rounded"] == {}
    assert result.manifest["summary"]["schemes"] == [kind]
    require_equal(weights(tmp_path / "x.gguf"), weights(source))
    assert all(passed for _, passed, _ in verify_file(result.path))


def test_the_gguf_package_reads_what_was_written(tmp_path: Path) -> None:
    source = quantized(tmp_path, "llama", "W4A16_G32")
    lowbit.convert(source, tmp_path / "out", "gguf", **QUIET)
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    expected = weights(source)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, leaf, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
        tensor = tensors[f"blk.0.{leaf}.weight"]
        decoded = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        weight = expected[f"model.layers.0.self_attn.{name}"].numpy()
        assert np.array_equal(decoded, interleaved(weight, heads))
        assert [int(size) for size in tensor.shape] == list(weight.shape[::-1])
    assert reader.fields["llama.attention.head_count_kv"].contents() == 2


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_stock_transformers_reads_what_was_written(tmp_path: Path, family: str) -> None:
    source = quantized(tmp_path, family, "W4A16_G32")
    lowbit.convert(source, tmp_path / "out", "gguf", **QUIET)
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32
    )
    expected = weights(source)
    for name, parameter in stock.named_parameters():
        weight = expected.get(name.removesuffix(".weight"), expected.get(name))
        assert torch.equal(parameter, weight), name


def test_zero_points_become_minima_exactly_or_on_request(tmp_path: Path) -> None:
    source = quantized(tmp_path, "llama", "W4A16_ASYM_G32")
    with pytest.raises(LowbitError, match="--requantize rounds such minima and keeps"):
        lowbit.convert(source, tmp_path / "x.gguf", "gguf", **QUIET)
    assert not (tmp_path / "x.gguf").exists()
    assert not list(tmp_path.glob("*.tmp"))
    result = lowbit.convert(source, tmp_path / "x.gguf", "gguf", requantize=True, **QUIET)
    rounded = result.manifest["summary"]["rounded"]
    assert 0 < max(rounded.values()) < 2**-10
    found, expected = weights(tmp_path / "x.gguf"), weights(source)
    for name in rounded:
        decoded = found.get(name, found.get(f"{name}.weight"))
        # Decoded to bf16 when read, for these minima are no whole steps.
        torch.testing.assert_close(decoded, expected[name], rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize(
    ("scheme", "reason", "kind"),
    [
        ("W3A16_G32", "3 bits", "Q4_0"),
        ("W4A16_G32_DQ", "double-quantizes", "Q4_0"),
        ("W4A16_G16", "end within", "Q4_0"),
        ("NF4_G32", "table", "Q4_0"),
    ],
)
def test_what_no_type_has_is_refused_or_made_anew(
    tmp_path: Path, scheme: str, reason: str, kind: str
) -> None:
    source = quantized(tmp_path, "llama", scheme)
    with pytest.raises(LowbitError, match=f"7 weights .*{reason}.*nearest is {kind}"):
        lowbit.convert(source, tmp_path / "x.gguf", "gguf", **QUIET)
    result = lowbit.convert(source, tmp_path / "x.gguf", "gguf", requantize=True, **QUIET)
    kept = scheme in ("W3A16_G32", "W4A16_G32_DQ")  # the same values on a finer grid
    assert (result.manifest["summary"]["exact"] == 7) == kept
    if kept:
        require_equal(weights(tmp_path / "x.gguf"), weights(source))


def test_another_type_is_chosen_on_request(tmp_path: Path) -> None:
    source = quantized(tmp_path, "llama", "W4A16_G32")
    options = {"gguf": GgufOptions("q8_0"), **QUIET}
    with pytest.raises(LowbitError, match="Q8_0 has not the values of W4A16_G32; --requantize"):
        lowbit.convert(source, tmp_path / "x.gguf", "gguf", **options)
    # Sixteen levels are among 256.
    result = lowbit.convert(source, tmp_path / "x.gguf", "gguf", requantize=True, **options)
    assert result.manifest["summary"]["exact"] == 7
    require_equal(weights(tmp_path / "x.gguf"), weights(source))


@pytest.mark.parametrize("kind", ["BF16", "F32", "F16"])
def test_floats_of_a_model_are_kept(tmp_path: Path, kind: str) -> None:
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[kind]
    source = saved(tmp_path / "m", "qwen3", dtype, **NARROW)
    lowbit.convert(source, tmp_path / "x.gguf", "gguf", gguf=GgufOptions(kind), **QUIET)
    assert {t.kind.name for t in read_gguf_header(tmp_path / "x.gguf").tensors.values()} <= {
        kind,
        "F32",
    }
    require_equal(weights(tmp_path / "x.gguf"), weights(source))


def test_rows_that_blocks_do_not_fill_get_another_type_and_are_named(tmp_path: Path) -> None:
    changes = {**WIDE, "intermediate_size": 288}
    source = saved(tmp_path / "m", "llama", torch.bfloat16, **changes)
    with pytest.warns(UserWarning, match=r"1 weights .*down_proj.*Q4_K do not fill.*Q8_0"):
        result = lowbit.convert(
            source, tmp_path / "x.gguf", "gguf", gguf=GgufOptions("Q4_K"), **QUIET
        )
    assert set(result.manifest["summary"]["fallbacks"]) == {"model.layers.0.mlp.down_proj.weight"}
    kinds = {t.name: t.kind.name for t in read_gguf_header(result.path).tensors.values()}
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_up.weight"] == "Q4_K"
    assert kinds["token_embd.weight"] == "BF16"


@pytest.mark.parametrize("kind", SEARCHED)
def test_a_search_is_better_than_covering_the_range_and_gptq_than_that(kind: str) -> None:
    weight = torch.randn(24, 512) * torch.rand(24, 1)
    inputs = torch.randn(2048, 512) @ (torch.eye(512) + 0.3 * torch.randn(512, 512) / 512**0.5)
    inputs *= torch.rand(512) * 2
    statistics = Statistics(inputs.T @ inputs / len(inputs), len(inputs))

    def loss(raw: torch.Tensor) -> tuple[float, float]:
        decoded = oracle.decode(kind, raw.numpy())
        error = torch.from_numpy(decoded) - weight.double()
        hessian = statistics.hessian.double()
        return float(error.square().sum()), float(((error @ hessian) * error).sum())

    raw, report = quantize_rows(weight, GGML_TYPES[kind], None)
    better, with_gptq = quantize_rows(weight, GGML_TYPES[kind], statistics)
    assert loss(better)[1] < 0.8 * loss(raw)[1]
    assert (report["algorithm"], with_gptq["algorithm"]) == ("rtn", "gptq")
    if kind in ("Q4_0", "Q4_1", "Q8_0"):
        plain = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
        assert loss(raw)[0] < loss(torch.from_numpy(plain))[0]
    else:
        # The bound of a uniform grid over each sub-block's range, with room for the integers.
        width = GGML_TYPES[kind].sub_block
        groups = weight.unflatten(1, (-1, width))
        span = groups.amax(-1).clamp_min(0) - groups.amin(-1).clamp_max(0)
        levels = 15 if kind == "Q4_K" else 63
        assert loss(raw)[0] < 1.1 * width * float((span / levels).square().sum()) / 12


@pytest.mark.parametrize("kind", SEARCHED)
def test_odd_weights_are_decoded_to_something_near(kind: str) -> None:
    """Zeros, constants of either sign, one outlier, values that fp16 does not have."""
    weight = torch.randn(7, 256) * 0.01
    weight[0], weight[1], weight[2], weight[3, 5], weight[4] = 0.0, 0.03, -0.03, 40.0, 1e-9
    weight[5, :128] = 0.0
    raw, report = quantize_rows(weight, GGML_TYPES[kind], None)
    decoded = torch.from_numpy(oracle.decode(kind, raw.numpy())).float()
    assert bool(torch.isfinite(decoded).all())
    # Half a step of 15 levels over twice the largest, and what a search may clip.
    limit = weight.abs().amax(-1, keepdim=True).clamp_min(1e-7) / 4
    assert bool(((decoded - weight).abs() <= limit).all())
    assert np.isfinite(report["relative_error"])


def test_statistics_choose_the_codes_of_a_model(tmp_path: Path) -> None:
    model = saved(tmp_path / "m", "llama", torch.bfloat16, **WIDE)
    ids = np.random.default_rng().integers(3, 256, (24, 64), dtype=np.int64)
    np.save(tmp_path / "ids.npy", ids)
    text = ["--calibration", tmp_path / "ids.npy", "--samples", 24, "--seqlen", 64]
    assert run("calibrate", model, tmp_path / "s", *text) == 0
    options = ["--to", "gguf", "--gguf-type", "Q4_K"]
    stats = ["--stats", tmp_path / "s"]
    assert run("convert", model, tmp_path / "rtn.gguf", *options) == 0
    assert run("convert", model, tmp_path / "gptq.gguf", *options, *stats) == 0
    reference = make_tiny("llama", torch.bfloat16, **WIDE).float()

    def divergence(path: Path) -> float:
        with torch.no_grad():
            ours = lowbit.load(path, dtype=torch.float32)(torch.from_numpy(ids)).logits
            theirs = reference(torch.from_numpy(ids)).logits
        return float(torch.nn.functional.mse_loss(ours, theirs))

    assert divergence(tmp_path / "gptq.gguf") < divergence(tmp_path / "rtn.gguf")
    other = saved(tmp_path / "other", "qwen2", torch.bfloat16, **WIDE)
    assert run("convert", other, tmp_path / "y.gguf", *options, *stats) == 2
    assert not (tmp_path / "y.gguf").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--to", "gguf"], "is not quantized; name the type"),
        (["--to", "gguf", "--gguf-type", "Q5_K"], "Q5_K"),
        (["--to", "gguf", "--gguf-type", "Q4_K", "--resume"], "leave out --resume"),
        (["--to", "gptq", "--gguf-type", "Q4_K"], "are for --to gguf"),
        (["--to", "gguf", "--gguf-type", "Q4_K", "--stats", "nothing"], "no statistics"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    source = saved(tmp_path / "m", "llama", **NARROW)
    assert run("convert", source, tmp_path / "out", *arguments) == 2
    printed = capsys.readouterr().err
    assert reason in " ".join(printed.split())
    assert not (tmp_path / "out").exists()


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    source = saved(tmp_path / "m", "gemma2")
    with pytest.raises(LowbitError, match=r"'gemma2' are not written.*llama, mistral, qwen2, qw"):
        lowbit.convert(source, tmp_path / "x.gguf", "gguf", gguf=GgufOptions("Q8_0"))


def test_a_failure_leaves_nothing_and_a_file_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved(tmp_path / "m", "llama", **NARROW)
    rows, calls = Converter.rows, []

    def fail(self: Converter, tensor: Any) -> Any:
        calls.append(tensor)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return rows(self, tensor)

    options = {"gguf": GgufOptions("Q8_0"), **QUIET}
    monkeypatch.setattr(Converter, "rows", fail)
    with pytest.raises(KeyboardInterrupt):
        lowbit.convert(source, tmp_path / "new" / "out", "gguf", **options)
    monkeypatch.undo()
    assert not (tmp_path / "new").exists()
    lowbit.convert(source, tmp_path / "new" / "out", "gguf", **options)
    names = {path.name for path in (tmp_path / "new" / "out").iterdir()}
    assert names == {"model.gguf", "README.md"}
    for output in ("new/out", "new/out/model.gguf", "m"):
        with pytest.raises(LowbitError, match=r"already|not empty"):
            lowbit.convert(source, tmp_path / output, "gguf", **options)


def test_a_changed_byte_fails_the_check(tmp_path: Path) -> None:
    source = quantized(tmp_path, "llama", "W4A16_G32")
    file = lowbit.convert(source, tmp_path / "x.gguf", "gguf", **QUIET).path
    content = bytearray(file.read_bytes())
    tensor = read_gguf_header(file).tensors["blk.0.ffn_up.weight"]
    content[tensor.begin + 9] ^= 1
    file.write_bytes(bytes(content))
    assert [name for name, passed, _ in verify_file(file) if not passed] == ["digest"]
    content[tensor.begin : tensor.begin + 2] = bytes(2)
    file.write_bytes(bytes(content))
    assert [n for n, passed, _ in verify_file(file) if not passed] == ["scales", "digest"]
    file.write_bytes(bytes(content) + bytes(64))
    assert "placement" in [name for name, passed, _ in verify_file(file) if not passed]


def test_a_file_that_fails_the_gate_gets_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved(tmp_path / "m", "llama", **NARROW)
    calls = itertools.count(1)
    monkeypatch.setattr(digest, "data_digest", lambda file: f"{next(calls):064x}")
    command = ["convert", source, tmp_path / "x.gguf", "--to", "gguf", "--gguf-type", "Q8_0"]
    assert run(*command) == 3
    assert not (tmp_path / "x.gguf").exists()
    assert (tmp_path / "x.gguf.bad").exists()
    assert run(*command, "--no-verify") == 0


def test_the_tokenizer_goes_there_and_back(tmp_path: Path) -> None:
    source = ASSETS / "books-4m"
    with pytest.warns(UserWarning, match="'gpt-2' is nearest"):
        lowbit.convert(source, tmp_path / "x.gguf", "gguf", gguf=GgufOptions("Q8_0"), **QUIET)
    ours = AutoTokenizer.from_pretrained(source)
    found = load_gguf_tokenizer(tmp_path / "x.gguf")
    text = "It's  a dark\nand stormy night; 12 o'clock \u00e9t\u00e9 </s>"
    assert found(text)["input_ids"] == ours(text)["input_ids"]
    assert (found.bos_token_id, found.eos_token_id) == (0, 1)
    metadata = read_gguf_header(tmp_path / "x.gguf").metadata
    assert metadata["tokenizer.ggml.token_type"][:4].tolist() == [3, 3, 3, 1]
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    lowbit.convert(tmp_path / "x.gguf", tmp_path / "back", "lowbit", **QUIET)
    again = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert again(text)["input_ids"] == ours(text)["input_ids"]


@pytest.mark.parametrize("name", vocabulary.PRE_TOKENIZERS)
def test_how_text_is_split_is_recognised(name: str, tmp_path: Path) -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = vocabulary._rules(name)
    assert vocabulary._pre_name(backend, tmp_path) == name


def test_pieces_with_bytes_to_fall_back_on_have_scores(tmp_path: Path) -> None:
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<unk>", "<s>", "</s>", *byte_tokens, "\u2581", "a", "b", "ab", "\u2581ab", "<|x|>"]
    vocab = {piece: index for index, piece in enumerate(pieces[:-1])}
    merges = [("a", "b"), ("\u2581", "ab")]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.pre_tokenizer = None
    backend.decoder = decoders.ByteFallback()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|x|>"]})
    source = saved(tmp_path / "m", "llama", **NARROW, vocab_size=272)
    tokenizer.save_pretrained(source)
    file = lowbit.convert(
        source, tmp_path / "x.gguf", "gguf", gguf=GgufOptions("Q8_0"), **QUIET
    ).path
    found = read_gguf_header(file).metadata
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.add_space_prefix"] is True
    assert found["tokenizer.ggml.tokens"][262:266] == ["ab", "\u2581ab", "<|x|>", "[PAD265]"]
    types = found["tokenizer.ggml.token_type"].tolist()
    assert types[:4] == [2, 3, 3, 6]
    assert types[258:] == [6, 1, 1, 1, 1, 1, 3, *[5] * 7]
    scores = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))
    assert scores["ab"] > scores["\u2581ab"] > scores["a"]


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    source = saved(tmp_path / "m", "llama", **NARROW)
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(source)
    with pytest.raises(LowbitError, match="its tokenizer is WordPiece, needed byte-level BPE"):
        lowbit.convert(source, tmp_path / "x.gguf", "gguf", gguf=GgufOptions("Q8_0"))
    assert not (tmp_path / "x.gguf").exists()


def test_byte_level_bpe_without_merges_is_refused(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet[:200])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    source = saved(tmp_path / "m", "llama", **NARROW)
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(source)
    with pytest.raises(LowbitError, match=r"its tokenizer has no merges, and llama\.cpp"):
        lowbit.convert(source, tmp_path / "new" / "x.gguf", "gguf", gguf=GgufOptions("Q8_0"))
    assert not (tmp_path / "new").exists()


def test_rounded_activations_are_left_behind_with_a_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    (tmp_path / "a").mkdir()
    source = quantized(tmp_path / "a", "llama", "W8A8", dynamic={"down_proj": "W8A16_G32"})
    lowbit.convert(source, tmp_path / "x.gguf", "gguf", **QUIET)
    said = [str(w.message) for w in recwarn if "how activations are" in str(w.message)]
    assert len(said) == 1
    assert "6 weights" in said[0]
    assert "W8A8" in said[0]
    (tmp_path / "b").mkdir()
    recwarn.clear()
    source = quantized(tmp_path / "b", "llama", "W8A16_G32")
    lowbit.convert(source, tmp_path / "y.gguf", "gguf", **QUIET)
    assert not [w for w in recwarn if "how activations are" in str(w.message)]


def test_llama_3_scaling_goes_there_and_back(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    source = saved(tmp_path / "m", "llama", **{**NARROW, "head_dim": 32}, rope_parameters=rope)
    lowbit.convert(source, tmp_path / "x.gguf", "gguf", gguf=GgufOptions("F32"), **QUIET)
    model = lowbit.load(tmp_path / "x.gguf", dtype=torch.float32)
    assert model.config.rope_parameters == rope
    with torch.no_grad():
        expected = lowbit.load(source, dtype=torch.float32)(IDS).logits
        assert torch.equal(model(IDS).logits, expected)
    # The factors are the frequencies of transformers, divided.
    rotary = model.model.rotary_emb
    plain = 500000.0 ** -(np.arange(0, 32, 2) / 32)
    header = read_gguf_header(tmp_path / "x.gguf")
    tensor = header.tensors["rope_freqs.weight"]
    factors = np.frombuffer(header.path.read_bytes()[tensor.begin : tensor.end], np.float32)
    np.testing.assert_allclose(plain / factors, rotary.inv_freq.numpy(), rtol=1e-5)


def test_scaling_that_a_file_has_no_words_for_is_refused(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    yarn["original_max_position_embeddings"] = 64
    source = saved(tmp_path / "m", "qwen2", **NARROW, rope_parameters=yarn)
    options = {"gguf": GgufOptions("F32"), **QUIET}
    lowbit.convert(source, tmp_path / "x.gguf", "gguf", **options)
    rope = lowbit.load(tmp_path / "x.gguf", dtype=torch.float32).config.rope_parameters
    assert {key: rope[key] for key in yarn} == yarn
    source = saved(tmp_path / "n", "qwen2", **NARROW, rope_parameters={**yarn, "beta_fast": 16.0})
    with pytest.raises(LowbitError, match=r"beta_fast of the rotary embedding is 16\.0"):
        lowbit.convert(source, tmp_path / "y.gguf", "gguf", **options)
    assert not list(tmp_path.glob("y*"))


def test_the_command_prints_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = quantized(tmp_path, "llama", "W4A16_G32")
    assert run("convert", source, tmp_path / "x.gguf", "--to", "gguf", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["format"], summary["exact"], summary["rounded"]) == ("gguf", 7, {})
    assert summary["bits_per_weight"] == 4.5
