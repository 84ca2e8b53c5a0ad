"""Fine-tuning from a file to an adapter: what is written, what is resumed, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from finetune_cases import build_base, pairs, write_rows
from kills import killed_at
from transformers import AutoModelForCausalLM

from lowbit import LowbitConfig, LowbitError
from lowbit.cli import main
from lowbit.hf.loading import quiet_libraries
from lowbit.train import (
    AdapterSettings,
    BaseSettings,
    DataSettings,
    Settings,
    TrainSettings,
    curve,
    finetune,
    trainer,
)
from lowbit.train.data import prepare_data
from lowbit.train.packing import Collator, RowDataset

SETTINGS = Settings(
    BaseSettings("W4A16_G64", "cpu"),
    DataSettings(seqlen=64, validation_fraction=0.2),
    AdapterSettings(rank=4, dropout=0.1),
    TrainSettings(epochs=2, batch=2, accumulation=2, eval_steps=4, save_steps=3, lr=1e-2),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    quiet_libraries()
    return build_base(tmp_path_factory.mktemp("finetune") / "base", num_hidden_layers=1)


@pytest.fixture(autouse=True)
def no_picture(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws in the clean run only: matplotlib takes longer than the training here."""
    monkeypatch.setattr(curve, "can_draw", lambda: False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("finetune") / "data.jsonl", pairs(30))


@pytest.fixture(scope="module")
def clean(base: Path, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the output of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("finetune") / "clean"
    finetune(base, data, output, settings=SETTINGS)
    return output


def changed(**parts: dict[str, Any]) -> Settings:
    """Returns the settings with other values: changed(train={"lr": 1.0})."""
    return replace(
        SETTINGS, **{name: replace(getattr(SETTINGS, name), **new) for name, new in parts.items()}
    )


def load_result(output: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((output / "finetune.json").read_text())
    return result


def test_a_run_leaves_an_adapter_that_peft_loads_with_the_loss_it_reports(
    base: Path, data: str, clean: Path
) -> None:
    result = load_result(clean)
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=LowbitConfig("W4A16_G64")
    )
    adapted = peft.PeftModel.from_pretrained(model, clean).eval()
    prepared = prepare_data(str(base), data, SETTINGS.data, SETTINGS.train.seed)
    rows = RowDataset(prepared.validation, packed=True)
    total = counted = 0.0
    for index, row in enumerate(prepared.validation):
        batch = Collator(0)([rows[index]])
        batch.pop("rows")
        with torch.no_grad():
            total += float(adapted(**batch, use_cache=False).loss) * row.counted
        counted += row.counted
    assert result["validation_loss"] == pytest.approx(total / counted, rel=1e-5)
    losses = [entry["loss"] for entry in result["history"] if "loss" in entry]
    assert len(losses) == result["steps"]
    assert losses[-1] < losses[0]
    best = min(entry["eval_loss"] for entry in result["history"] if "eval_loss" in entry)
    assert result["validation_loss"] == best
    assert (clean / "tokenizer.json").exists()
    assert (clean / "loss.png").read_bytes().startswith(b"\x89PNG")


# In the middle of a step, of a validation, between two steps, before the first checkpoint; and
# while a checkpoint is written, its adapter being on disk and its optimizer not.
@pytest.mark.parametrize(
    "kills",
    [
        [("training_step", 13), ("prediction_step", 2)],
        [("training_step", 3), ("_save_optimizer_and_scheduler", 3)],
        [("_save_rng_state", 2), ("training_step", 6)],
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    kills: list[tuple[str, int]], base: Path, data: str, clean: Path, tmp_path: Path
) -> None:
    output = tmp_path / "killed"
    for place, call in kills:
        killed_at(
            call,
            trainer.FineTuner,
            place,
            lambda: finetune(base, data, output, settings=SETTINGS, resume=True),
        )
        assert not (output / "adapter_config.json").exists()
    finetune(base, data, output, settings=SETTINGS, resume=True)
    before, after = load_result(clean), load_result(output)
    for result in (before, after):
        result.pop("measured")
    assert after == before
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (output / name).read_bytes() == (clean / name).read_bytes()


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    base: Path, data: str, clean: Path, tmp_path: Path
) -> None:
    output = tmp_path / "damaged"
    killed_at(
        13,
        trainer.FineTuner,
        "training_step",
        lambda: finetune(base, data, output, settings=SETTINGS),
    )
    newest = max((output / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    content = bytearray((newest / "optimizer.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "optimizer.pt").write_bytes(content)
    result = finetune(base, data, output, settings=SETTINGS, resume=True)
    assert result.manifest["measured"]["resumed_at"] < int(newest.name[11:])
    assert result.manifest["history"] == load_result(clean)["history"]


def test_resuming_a_finished_run_trains_nothing(
    base: Path, data: str, clean: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.FineTuner, "train", None)
    before = (clean / "finetune.json").read_bytes()
    result = finetune(base, data, clean, settings=SETTINGS, resume=True)
    assert result.manifest == load_result(clean)
    assert (clean / "finetune.json").read_bytes() == before
    # Killed after the last checkpoint and before the adapter was published.
    (clean / "adapter_config.json").unlink()
    again = finetune(base, data, clean, settings=SETTINGS, resume=True)
    assert again.validation_loss == result.validation_loss
    assert (clean / "adapter_config.json").exists()


def test_early_stopping_keeps_the_best_adapter(base: Path, data: str, tmp_path: Path) -> None:
    settings = changed(train={"lr": 0.3, "warmup": 0, "epochs": 20, "patience": 2, "eval_steps": 1})
    result = finetune(base, data, tmp_path / "out", settings=settings)
    losses = [e["eval_loss"] for e in result.manifest["history"] if "eval_loss" in e]
    assert result.manifest["stopped_early"]
    assert result.step == 1 + losses.index(min(losses)) == result.steps - 2
    resumed = finetune(base, data, tmp_path / "out", settings=settings, resume=True)
    assert resumed.manifest == result.manifest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"lr": 1e-3}}, r"another settings.train.lr: 0.01, now 0.001"),
        ({"adapter": {"rank": 8}}, r"another settings.adapter.rank: 4, now 8"),
        ({"data": {"counted": "all"}}, r"another data.train.counted_tokens"),
    ],
)
def test_resuming_with_something_else_is_refused(
    change: dict[str, Any], message: str, base: Path, data: str, clean: Path
) -> None:
    with pytest.raises(LowbitError, match=message):
        finetune(base, data, clean, settings=changed(**change), resume=True)


def test_resuming_with_other_data_or_another_base_is_refused(
    base: Path, clean: Path, data: str, tmp_path: Path
) -> None:
    other = write_rows(tmp_path / "data.jsonl", pairs(30, seed=5))
    with pytest.raises(LowbitError, match=r"another data\.train\."):
        finetune(base, other, clean, settings=SETTINGS, resume=True)
    retrained = build_base(tmp_path / "base", num_hidden_layers=1)
    file = retrained / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(LowbitError, match=r"another base.weights.model.safetensors"):
        finetune(retrained, data, clean, settings=SETTINGS, resume=True)


def test_nan_stops_the_run_and_names_step_rows_and_the_last_good_adapter(
    base: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = trainer.FineTuner.compute_loss

    def poisoned(self: Any, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        loss = original(self, model, inputs, *rest, **options)
        return loss * float("nan") if self.state.global_step == 4 else loss

    monkeypatch.setattr(trainer.FineTuner, "compute_loss", poisoned)
    output = tmp_path / "out"
    with pytest.raises(LowbitError) as error:
        finetune(base, data, output, settings=SETTINGS)
    assert "the loss became nan at step 5, in the batch of data.jsonl:" in str(error.value)
    assert f"the last good adapter is {output}/checkpoints/checkpoint-4;" in str(error.value)
    assert not (output / "adapter_config.json").exists()
    assert peft.PeftConfig.from_pretrained(str(output / "checkpoints" / "checkpoint-4"))


def test_a_gradient_that_is_not_finite_stops_the_run(
    base: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = trainer.FineTuner.training_step

    def poisoned(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        loss = original(self, model, inputs, *rest)
        if self.state.global_step == 1:
            next(p for p in model.parameters() if p.grad is not None).grad[0] = float("inf")
        return loss

    monkeypatch.setattr(trainer.FineTuner, "training_step", poisoned)
    with pytest.raises(LowbitError, match="a gradient became NaN or infinite at step 2") as error:
        finetune(base, data, tmp_path / "out", settings=SETTINGS)
    assert "no checkpoint yet" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter": {"rank": 40}}, "rank 40 is larger than the layer .32 x 64."),
        ({"adapter": {"targets": ("no_proj",)}}, "PEFT refuses these adapters: .*no_proj"),
        ({"data": {"seqlen": 4096}}, "seqlen 4096 is longer than the model's 128 positions"),
        ({"data": {"seqlen": 8}}, "has a token to learn"),
        ({"train": {"optimizer": "paged_adamw_8bit"}}, "runs on a GPU only"),
        ({"train": {"precision": "fp16"}}, "fp16 needs a GPU"),
        ({"base": {"scheme": "W9"}}, "W9"),
        ({"adapter": {"qa_lora": True}}, "W4A16_ASYM_G64"),
        ({"adapter": {"qa_lora": True}, "base": {"scheme": None}}, "a 16-bit base has none"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(
    change: dict[str, Any], message: str, base: Path, data: str, tmp_path: Path
) -> None:
    with pytest.raises(LowbitError, match=message):
        finetune(base, data, tmp_path / "out", settings=changed(**change))
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (TrainSettings, {"optimizer": "adam"}, "unknown optimizer 'adam'; did you mean 'adamw'"),
        (TrainSettings, {"schedule": "cosinus"}, "unknown schedule 'cosinus'; did you mean"),
        (TrainSettings, {"lr": 0.0}, "lr must be above 0"),
        (TrainSettings, {"batch": 0}, "batch must be at least 1"),
        (AdapterSettings, {"rank": 0}, "rank must be at least 1"),
        (AdapterSettings, {"init": "pissa"}, "unknown init 'pissa'"),
        (DataSettings, {"counted": "some"}, "unknown choice of counted tokens"),
        (Settings, {"train": TrainSettings(patience=1)}, "patience counts validations"),
    ],
)
def test_settings_are_checked_when_they_are_made(
    part: Any, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(LowbitError, match=message):
        part(**values)


def test_an_output_that_holds_something_is_left_alone(
    base: Path, data: str, clean: Path, tmp_path: Path
) -> None:
    with pytest.raises(LowbitError, match="already holds the result of a run"):
        finetune(base, data, clean, settings=SETTINGS)
    (tmp_path / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(LowbitError, match=r"not empty \(it holds notes.txt\)"):
            finetune(base, data, tmp_path, settings=SETTINGS, resume=resume)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]


def test_without_matplotlib_there_is_no_picture_and_no_failure(
    base: Path, data: str, tmp_path: Path
) -> None:
    finetune(base, data, tmp_path / "out", settings=changed(train={"max_steps": 1}))
    assert not (tmp_path / "out" / "loss.png").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_the_command_prints_one_json_object(
    precision: str,
    optimizer: str,
    base: Path,
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    command = ["finetune", str(base), "--data", data, "--output", str(output), "--json"]
    command += ["--scheme", "NF4_DQ", "--precision", precision, "--optimizer", optimizer]
    command += ["--max-steps", "2", "--rank", "4", "--seqlen", "64", "--device", "cpu"]
    command += ["--target", "q_proj", "--target", "down_proj", "--dora", "--rslora"]
    with pytest.raises(SystemExit) as status:
        main([*command, "--no-packing"])
    assert status.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["precision"], printed["steps"]) == (precision, 2)
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["use_dora"], config["use_rslora"]) == (True, True)
    assert sorted(config["target_modules"]) == ["down_proj", "q_proj"]


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("W2A16_G32", ["--init", "residual"]),
        ("W4A16_ASYM_G32", ["--qa-lora"]),
        ("none", ["--init", "gaussian", "--loss-on", "all"]),
    ],
)
def test_every_kind_of_adapter_trains_and_its_memory_is_foretold(
    scheme: str, options: list[str], base: Path, data: str, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    command = ["finetune", str(base), "--data", data, "--output", str(output), *options]
    command += ["--max-steps", "2", "--rank", "2", "--seqlen", "64", "--device", "cpu"]
    command += [] if scheme == "none" else ["--scheme", scheme]
    for last in ("--dry-run", "--json"):
        with pytest.raises(SystemExit) as status:
            main([*command, last])
        assert status.value.code == 0
    assert (output / "adapter_config.json").exists()


def test_the_command_prints_a_sentence_and_exits_with_2(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text('{"instruction": "a", "response": "b"}\n{"instruction": "a"}\n')
    with pytest.raises(SystemExit) as status:
        main(["finetune", str(base), "--data", str(file), "--output", str(tmp_path / "out")])
    assert status.value.code == 2
    assert capsys.readouterr().err.startswith("lowbit: d.jsonl:2 needs the field")


def test_a_run_that_was_refused_leaves_nothing_behind(
    base: Path, data: str, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with pytest.raises(LowbitError, match="rank 5000 is larger than the layer"):
        finetune(base, data, output, settings=changed(adapter={"rank": 5000}))
    assert not output.exists()
    with pytest.raises(LowbitError, match="no such file"):
        finetune(base, tmp_path / "missing.jsonl", output, settings=SETTINGS)
    assert not output.exists()
