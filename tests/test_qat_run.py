"""`lowbit finetune --qat`: the result loads with the loss that was reported, kills lose nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_cases import build_base, pairs, write_rows
from kills import killed_at
from transformers import AutoModelForCausalLM

from lowbit import LowbitError, quantize
from lowbit.cli import main
from lowbit.hf.loading import quiet_libraries
from lowbit.train import (
    AdapterSettings,
    BaseSettings,
    DataSettings,
    QatSettings,
    Settings,
    TrainSettings,
    curve,
    finetune,
    trainer,
)
from lowbit.train.data import prepare_data
from lowbit.train.packing import Collator, RowDataset

SCHEME = "W3A16_ASYM_G64"
TRAIN = TrainSettings(max_steps=8, batch=2, eval_steps=4, save_steps=3, lr=3e-3)
LR = {"weights": 3e-3, "scales": 3e-2}
DATA = DataSettings(seqlen=64, validation_fraction=0.2)


def settings(mode: str, **train: Any) -> Settings:
    """Returns the settings of a QAT run of 8 steps."""
    chosen = TrainSettings(**{**TRAIN.__dict__, **train})
    return Settings(
        BaseSettings(None, "cpu"), DATA, AdapterSettings(), chosen, QatSettings(SCHEME, mode)
    )


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curve, "can_draw", lambda: False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    quiet_libraries()
    return build_base(
        tmp_path_factory.mktemp("qat") / "base", "llama_tied", torch.bfloat16, num_hidden_layers=1
    )


@pytest.fixture(scope="module")
def low(base: Path) -> Path:
    """Returns a base that is quantized already."""
    folder = base.parent / "low"
    quantize(base, folder, scheme=SCHEME, algorithm="rtn", progress=False)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("qat") / "data.jsonl", pairs(30))


def validation_loss(base: Path, data: str, folder: Path) -> float:
    """Returns the loss of the checkpoint in `folder` on the rows that the run validated with."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).dequantize()
    prepared = prepare_data(str(base), data, DATA, TRAIN.seed)
    rows, total, counted = RowDataset(prepared.validation, packed=True), 0.0, 0
    for index, row in enumerate(prepared.validation):
        batch = Collator(0)([rows[index]])
        batch.pop("rows")
        with torch.no_grad():
            total += float(model(**batch, use_cache=False).loss) * row.counted
        counted += row.counted
    return total / counted


@pytest.mark.parametrize(
    ("mode", "start"), [("weights", "base"), ("scales", "base"), ("scales", "low")]
)
def test_the_result_is_a_packed_checkpoint_with_the_loss_that_was_reported(
    mode: str, start: str, base: Path, low: Path, data: str, tmp_path: Path
) -> None:
    begin = low if start == "low" else base
    result = finetune(begin, data, tmp_path / "out", settings=settings(mode, lr=LR[mode]))
    assert result.validation_loss is not None
    # Norms were rounded to the bf16 of the base, which is all that is lost.
    found = validation_loss(base, data, tmp_path / "out")
    assert found == pytest.approx(result.validation_loss, rel=2e-3 if mode == "weights" else 1e-5)
    manifest = json.loads((tmp_path / "out" / "lowbit_manifest.json").read_text())
    assert manifest["summary"]["schemes"] == [SCHEME]
    assert manifest["fingerprint"]["qat"]["step"] == result.step
    assert result.validation_loss < validation_loss(base, data, low) - 0.01
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    # Rows of all linear layers with one group of 64, and of down_proj with three; twice for zeros.
    grids = 2 * (64 + 32 + 32 + 64 + 168 + 168 + 3 * 64)
    assert mode == "weights" or result.trainable == grids


def test_a_killed_run_ends_bit_identical(base: Path, data: str, tmp_path: Path) -> None:
    from lowbit.checkpoint.journal import Journal

    chosen = settings("weights")
    finetune(base, data, tmp_path / "whole", settings=chosen)
    kills: list[tuple[int, Any, str]] = [
        (6, trainer.FineTuner, "training_step"),
        (2, trainer.FineTuner, "_save_optimizer_and_scheduler"),
        (2, Journal, "finish_part"),  # while the result is packed
    ]
    for kill in kills:
        killed_at(
            *kill, lambda: finetune(base, data, tmp_path / "out", settings=chosen, resume=True)
        )
        assert not (tmp_path / "out" / "finetune.json").exists()
    finetune(base, data, tmp_path / "out", settings=chosen, resume=True)
    names = {file.name for file in (tmp_path / "whole").iterdir() if file.is_file()}
    assert {f.name for f in (tmp_path / "out").iterdir() if f.is_file()} == names
    for name in names - {"finetune.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(LowbitError, match="already holds the result"):
        finetune(base, data, tmp_path / "out", settings=chosen)


def refused(work: Callable[[], Any]) -> str:
    with pytest.raises(LowbitError) as caught:
        work()
    return str(caught.value)


def test_what_does_not_go_together_is_refused(
    base: Path, low: Path, data: str, tmp_path: Path
) -> None:
    qat = QatSettings(SCHEME)
    assert "give one of them" in refused(lambda: Settings(BaseSettings("W4A16"), qat=qat))
    adapter = AdapterSettings(rank=4)
    assert "no adapter" in refused(lambda: Settings(adapter=adapter, qat=qat))
    assert "QAT mode" in refused(lambda: QatSettings(SCHEME, "codes"))
    assert "5 bits" in refused(lambda: QatSettings("W5A16"))
    out = tmp_path / "out"
    assert "16-bit" in refused(lambda: finetune(low, data, out, settings=settings("weights")))


def test_the_command_takes_a_scheme(base: Path, data: str, tmp_path: Path, capsys: Any) -> None:
    arguments = [
        base,
        "--data",
        data,
        "--output",
        tmp_path / "out",
        "--qat",
        SCHEME,
        "--seqlen",
        64,
    ]
    arguments += ["--max-steps", 2, "--batch", 2, "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        main(["finetune", *map(str, arguments)])
    assert not stop.value.code
    assert f"{SCHEME} model" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert result["fingerprint"]["settings"]["train"]["lr"] == 2e-5
