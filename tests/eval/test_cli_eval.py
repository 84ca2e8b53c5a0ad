"""The commands `eval` and `generate`: what they print, and status 2 for everything wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import eval_oracles as oracle
import numpy as np
import pytest
import torch
from eval_models import BOS, VOCABULARY, byte_tokenizer, logits_of, save_checkpoint, tiny_llama

from lowbit.cli import main

TEXT = "The quick brown fox jumps over the lazy dog. " * 8
ONE_THREAD = ("--threads", "1")


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process; an unexpected exception fails the test."""

    def call(*arguments: object) -> Outcome:
        threads = torch.get_num_threads()
        try:
            main([str(argument) for argument in (*arguments, *ONE_THREAD)])
            status: Any = 0
        except SystemExit as leaving:
            status = leaving.code or 0
        finally:
            torch.set_num_threads(threads)
        return Outcome(status, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("models") / "model", seed=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("models") / "base", seed=2)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT)
    return path


def test_eval_of_a_text_matches_the_oracle(run: Run, model: Path, text: Path) -> None:
    done = run("eval", model, "--text", text, "--seqlen", 32, "--json", "-")
    assert (done.status, done.err) == (0, "")
    ids = torch.tensor([BOS, *byte_tokenizer()(TEXT, add_special_tokens=False)["input_ids"]])
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    tiny = tiny_llama(1)
    nll = [oracle.window_nll(row.tolist(), logits_of(tiny, row)) for row in windows]
    result = json.loads(done.out)
    assert result["windows"] == len(windows) == 11
    assert result["perplexity"]["perplexity"] == pytest.approx(oracle.perplexity(nll), rel=1e-6)
    assert result["size"]["bits_per_parameter"] == 32
    assert result["environment"]["threads"] == 1


def test_eval_against_a_baseline_reports_and_writes_json(
    run: Run, model: Path, base: Path, text: Path, tmp_path: Path
) -> None:
    target = tmp_path / "result.json"
    arguments = ("eval", model, "--text", text, "--against", base, "--seqlen", 32)
    done = run(*arguments, "--windows", 3, "--slices", "--json", target)
    assert done.status == 0
    assert max(map(len, done.out.splitlines())) <= 100
    for words in ("KL to baseline", "top-1 flips", "model / baseline", "corpus.txt"):
        assert words in done.out
    result = json.loads(target.read_text())
    assert (result["windows"], result["against"]) == (3, str(base))
    assert result["divergence"]["mean"]["mean"] > 0.1
    assert result["slices"][0]["tokens"] == 3 * 31


def test_eval_repeats_itself(run: Run, model: Path, base: Path, text: Path) -> None:
    arguments = ("eval", model, "--text", text, "--against", base, "--seqlen", 32, "--json", "-")
    first, second = (json.loads(run(*arguments).out) for _ in range(2))
    for result in (first, second):
        del result["speed"]
    assert first == second


def test_eval_of_token_ids_needs_no_tokenizer(run: Run, tmp_path: Path) -> None:
    bare = save_checkpoint(tmp_path / "bare", tokenizer=False)
    np.save(tmp_path / "t.npy", np.arange(96, dtype=np.uint16).reshape(2, 48))
    done = run("eval", bare, "--text", tmp_path / "t.npy", "--seqlen", 16, "--json", "-")
    assert (done.status, json.loads(done.out)["windows"]) == (0, 6)
    refused = run("eval", bare, "--text", "pydoc", "--seqlen", 16)
    assert refused.status == 2
    assert "give token ids instead" in refused.err


def test_default_window_is_the_models_longest(run: Run, model: Path, text: Path) -> None:
    done = run("eval", model, "--text", text, "--json", "-")
    assert json.loads(done.out)["seqlen"] == 64


def break_config(path: Path) -> None:
    (path / "config.json").write_text('{"model_type": "llama", ')


def truncate_weights(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def garble_header(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])


def pickle_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()
    torch.save(tiny_llama().state_dict(), path / "pytorch_model.bin")


def lose_shard(path: Path) -> None:
    (path / "model.safetensors").unlink()
    tiny_llama().save_pretrained(path, max_shard_size="20KB")
    sorted(path.glob("model-*.safetensors"))[0].unlink()


def edit_config(**fields: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        file = path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return edit


@pytest.mark.parametrize("command", ["eval", "generate"])
@pytest.mark.parametrize(
    "damage",
    [
        break_config,
        truncate_weights,
        garble_header,
        pickle_weights,
        lose_shard,
        lambda path: (path / "config.json").unlink(),
        edit_config(model_type="no_such_model"),
        edit_config(hidden_size=64),
        edit_config(num_hidden_layers=3),
        edit_config(num_attention_heads="two"),
        edit_config(quantization_config={"quant_method": "no_such_method"}),
    ],
    ids=[
        "config is no JSON",
        "weights truncated",
        "header garbled",
        "pickle only",
        "shard lost",
        "no config",
        "unknown architecture",
        "shapes differ",
        "weights missing",
        "field of the wrong type",
        "unknown quantization",
    ],
)
def test_damaged_checkpoint_is_one_sentence_and_status_2(
    run: Run, tmp_path: Path, text: Path, damage: Callable[[Path], None], command: str
) -> None:
    path = save_checkpoint(tmp_path / "damaged")
    damage(path)
    # Short enough that nothing but the damage can be refused.
    options = {
        "eval": ("--text", text, "--seqlen", 16),
        "generate": ("Once", "--max-new-tokens", 4),
    }
    assert_refused(run(command, path, *options[command]), "damaged")


def test_damaged_baseline_is_refused(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    assert_refused(run("eval", model, "--text", text, "--against", tmp_path / "nowhere"), "nowhere")


def test_baseline_with_fewer_tokens_is_refused(
    run: Run, model: Path, text: Path, tmp_path: Path
) -> None:
    small = save_checkpoint(tmp_path / "small", vocab_size=200, bos_token_id=1, eos_token_id=2)
    assert_refused(run("eval", model, "--text", text, "--against", small), "vocabulary of 200")
    large = save_checkpoint(tmp_path / "large", vocab_size=VOCABULARY + 2)
    assert_refused(run("eval", model, "--text", text, "--against", large), "share their tokens")


@pytest.mark.parametrize(
    ("options", "needle"),
    [
        (("--seqlen", 65), "longer than the 64 tokens"),
        (("--seqlen", 1), "at least 2 tokens"),
        (("--windows", 0), "--windows must be at least 1"),
        (("--dtype", "float31"), "did you mean 'float32'"),
        (("--device", "abacus"), "cannot be used here"),
        (("--labels", "missing.txt"), "no such file"),
        (("--json", "missing/out.json"), "folder that exists"),
        (("--text", "missing.txt"), "no such file"),
        (("--text", "missing.npy"), "no such file"),
    ],
)
def test_bad_option_is_one_sentence_and_status_2(
    run: Run, model: Path, text: Path, options: tuple[object, ...], needle: str
) -> None:
    assert_refused(run("eval", model, "--text", text, *options), needle)


def test_labels_must_fit_the_documents(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("one\ntwo\n")
    assert_refused(run("eval", model, "--text", text, "--labels", labels), "has 2 lines")


def test_generate_greedily_matches_argmax(run: Run, model: Path) -> None:
    done = run("generate", model, "Once", "--max-new-tokens", 12, "--json")
    assert (done.status, done.err) == (0, "")
    tokenizer, tiny = byte_tokenizer(), tiny_llama(1)
    ids = tokenizer("Once", return_tensors="pt")["input_ids"][0]
    prompt = len(ids)
    for _ in range(12):
        ids = torch.cat([ids, torch.tensor([int(logits_of(tiny, ids)[-1].argmax())])])
    result = json.loads(done.out)
    assert result["text"] == tokenizer.decode(ids[prompt:], skip_special_tokens=True)
    assert result["tokens"] == 12


def test_generate_streams_text_and_prints_speed_apart(run: Run, model: Path) -> None:
    done = run("generate", model, "Once", "--max-new-tokens", 12)
    as_json = json.loads(run("generate", model, "Once", "--max-new-tokens", 12, "--json").out)
    assert done.out == as_json["text"] + "\n"
    assert re.fullmatch(r"12 tokens, the first after .* tokens/s\n", done.err)


def test_generate_samples_by_its_seed(run: Run, model: Path) -> None:
    def sample(seed: int) -> str:
        arguments = ("--max-new-tokens", 24, "--temperature", 1.5, "--seed", seed, "--json")
        text: str = json.loads(run("generate", model, "Once", *arguments).out)["text"]
        return text

    assert sample(1) == sample(1) != sample(2)


@pytest.mark.parametrize(
    ("options", "needle"),
    [
        (("--max-new-tokens", 0), "at least 1"),
        (("--max-new-tokens", 60), "exceed the model's 64"),
        (("--temperature", -1), "--temperature must be 0 to 100"),
        (("--temperature", "nan"), "--temperature must be 0 to 100"),
    ],
)
def test_bad_generation_option_is_refused(
    run: Run, model: Path, options: tuple[object, ...], needle: str
) -> None:
    assert_refused(run("generate", model, "Once", *options), needle)


def test_generate_without_tokenizer_is_refused(run: Run, tmp_path: Path) -> None:
    bare = save_checkpoint(tmp_path / "bare", tokenizer=False)
    assert_refused(run("generate", bare, "Once"), "has no tokenizer")


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_help_shows_an_example_within_100_columns(run: Run, command: str) -> None:
    done = run(command, "--help")
    assert done.status == 0
    assert f"Example: lowbit {command}" in done.out
    assert max(map(len, done.out.splitlines())) <= 100


def assert_refused(done: Outcome, needle: str = "") -> None:
    """Holds that a command ended with status 2 and one sentence on standard error."""
    assert done.status == 2, done
    assert done.out == ""
    assert done.err.count("\n") == 1, done.err
    assert done.err.startswith("lowbit: ")
    assert needle in done.err
