"""`lowbit bench`: what it measures, prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from eval_models import save_checkpoint
from lowbit_eval.latency import Comparison, Latency, Session, Workload, compare, pieces_of
from lowbit_kernels.cpu.library import library, unavailable_reason

from lowbit import quantize
from lowbit.cli import main
from lowbit.hf.loading import load_model

SMALL = ("--prompt-tokens", "6", "--new-tokens", "3", "--rounds", "1", "--threads", "1")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("models") / "base", seed=3)


@pytest.fixture(scope="module")
def quantized(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("models") / "w4"
    quantize(base, output, scheme="W4A16_G32", algorithm="rtn")
    return output


def test_percentiles_are_those_of_the_steps() -> None:
    steps = [i / 1000 for i in range(1, 101)]
    latency = Latency.of(50, [0.5, 0.25, 1.0], steps[::-1])
    assert latency == Latency(100.0, 1e3 / 50, 50.0, 90.0, 99.0)
    assert Latency.of(1, [1.0], [0.002]).p99_ms == 2.0


def test_the_batch_from_which_16_bits_win_is_the_first_below_one() -> None:
    latency = Latency(1.0, 1.0, 1.0, 1.0, 1.0)
    assert Comparison(latency, latency, {1: 3.0, 2: 1.2, 4: 0.9, 8: 0.8}).baseline_wins_from == 4
    assert Comparison(latency, latency, {1: 3.0, 2: 1.2}).baseline_wins_from is None


def test_steps_in_the_static_cache_give_the_logits_of_one_pass(base: Path) -> None:
    model = load_model(str(base), "float32", torch.device("cpu"))
    seen: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    model.register_forward_hook(lambda _, args, output: logits.append(output.logits))
    session = Session(model, 2, 9, torch.Generator().manual_seed(0))
    for tokens in (6, 1, 1, 1):
        session.step(tokens)
    stepped = logits[-1][:, -1]
    with torch.inference_mode():
        whole = model(input_ids=torch.cat(seen, 1), use_cache=False).logits[:, -1]
    torch.testing.assert_close(stepped, whole, rtol=1e-4, atol=1e-5)


def test_both_models_are_measured_in_turns(base: Path) -> None:
    model = load_model(str(base), "float32", torch.device("cpu"))
    work = Workload(prompt_tokens=4, new_tokens=3, rounds=2, batches=(1, 2))
    advances: list[None] = []
    result = compare(model, model, work, lambda: advances.append(None))
    assert len(advances) == pieces_of(work, with_baseline=True) == 8
    assert result.baseline is not None
    assert set(result.step_ratio) == {1, 2}
    assert 0 < result.quantized.p50_ms <= result.quantized.p90_ms <= result.quantized.p99_ms
    alone = compare(model, None, work)
    assert alone.baseline is None
    assert alone.step_ratio == {}


def bench(path: Path, *arguments: str) -> int:
    """Runs `lowbit bench` in this process and returns its exit status."""
    with pytest.raises(SystemExit) as leaving:
        main(["bench", str(path), *arguments])
    assert isinstance(leaving.value.code, int)
    return leaving.value.code


def test_json_holds_both_and_the_memory(
    quantized: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(quantized, "--json", *SMALL) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["quantized"]["decode_tokens_per_second"] > 0
    assert result["baseline"]["prefill_tokens_per_second"] > 0
    assert result["peak_bytes"] > 0
    assert "baseline_wins_from_batch" in result


def test_a_16_bit_checkpoint_is_measured_alone(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(base, *SMALL) == 0
    printed = capsys.readouterr().out
    assert "as stored" in printed
    assert "16 bits" not in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--new-tokens", "1"), "--new-tokens must be at least 2"),
        (("--prompt-tokens", "0"), "--prompt-tokens must be at least 1"),
        (("--rounds", "0"), "--rounds must be at least 1"),
        (("--prompt-tokens", "100000"), "exceed the model's"),
    ],
)
def test_bad_input_is_a_sentence_and_status_2(
    base: Path, arguments: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(base, *arguments) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.skipif(unavailable_reason() is not None, reason="no native kernels")
def test_int8_activations_are_said_and_only_for_quantized_models(
    base: Path, quantized: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(quantized, *SMALL, "--json", "--activations", "int8") == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["kernels"]) == [f"cpu ({library().isa_name})"]
    assert bench(base, *SMALL, "--activations", "int8") == 2
    assert "no quantized weights" in capsys.readouterr().err
    assert bench(quantized, *SMALL, "--activations", "int4") == 2
    assert "int8" in capsys.readouterr().err
