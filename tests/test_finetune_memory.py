"""What a dry run says, against what is allocated when the same step is run."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_cases import build_base, pairs, write_rows
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowbit import LowbitError
from lowbit.cli import main
from lowbit.hf.loading import quiet_libraries
from lowbit.train import (
    AdapterSettings,
    BaseSettings,
    DataSettings,
    QatSettings,
    Settings,
    TrainSettings,
    finetune,
    trainer,
)
from lowbit.train.memory import forecast, optimizer_bytes

SEQLEN = 96
SETTINGS = Settings(
    BaseSettings("W4A16_G64", "cpu"),
    DataSettings(seqlen=SEQLEN),
    AdapterSettings(rank=8),
    TrainSettings(batch=3, max_steps=1),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    quiet_libraries()
    return build_base(tmp_path_factory.mktemp("memory") / "base", num_hidden_layers=2)


class Allocated(TorchDispatchMode):
    """Counts real storages while they live; an oracle that shares no code with the forecast."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if id(storage) not in self.sizes:
                    self.sizes[id(storage)] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, id(storage))
        self.peak = max(self.peak, self.now)
        return result


@pytest.mark.parametrize(
    ("packing", "precision", "checkpointing"),
    [(True, "fp32", True), (False, "fp32", False), (False, "bf16", True), (True, "bf16", False)],
)
def test_activations_are_what_a_step_allocates(
    packing: bool,
    precision: str,
    checkpointing: bool,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = replace(
        SETTINGS,
        data=replace(SETTINGS.data, packing=packing),
        train=replace(SETTINGS.train, precision=precision, checkpointing=checkpointing),
    )
    peaks = []
    original = trainer.FineTuner.training_step

    def counting(self: Any, *arguments: Any) -> Any:
        with Allocated() as counter:
            loss = original(self, *arguments)
        peaks.append(counter.peak)
        return loss

    monkeypatch.setattr(trainer.FineTuner, "training_step", counting)
    text = "".join(row["response"] for row in pairs(120))
    rows = [{"text": text[at : at + SEQLEN - 1]} for at in range(0, 6 * SEQLEN, SEQLEN)]
    finetune(base, write_rows(tmp_path / "d.jsonl", rows), tmp_path / "out", settings=settings)
    said = forecast(base, settings)
    # Gradients are part of what is allocated in a step.
    assert said.activations + said.gradients == pytest.approx(max(peaks), rel=0.1)


def test_what_a_dry_run_counts_of_the_model_is_what_is_there(base: Path, tmp_path: Path) -> None:
    from lowbit.nn.stored import StoredWeight
    from lowbit.train.trainable import prepare_trainable

    for scheme in ("W4A16_G64", "NF4_DQ", "W3A16_ASYM_G32"):
        settings = replace(SETTINGS, base=BaseSettings(scheme, "cpu"))
        model = prepare_trainable(str(base), settings, "fp32", torch.device("cpu")).train()
        said = forecast(base, settings)
        packed, rest, trained = {}, {}, {}
        owners = {
            id(tensor)
            for module in model.modules()
            if isinstance(module, StoredWeight)
            for tensor in (*module._parameters.values(), *module._buffers.values())
        }
        for tensor in (*model.parameters(), *model.buffers()):
            kind = trained if tensor.requires_grad else packed if id(tensor) in owners else rest
            storage = tensor.untyped_storage()
            kind[storage.data_ptr()] = storage.nbytes()
        sizes = [sum(kind.values()) for kind in (packed, rest, trained)]
        assert [said.base_packed, said.base_rest, said.adapters] == pytest.approx(sizes, rel=0.01)


@pytest.mark.parametrize("shape", [(48, 64), (80,), (8, 168)])
def test_the_state_of_an_optimizer_is_what_it_keeps(shape: tuple[int, ...]) -> None:
    from transformers.optimization import Adafactor

    for name, make in (("adamw", torch.optim.AdamW), ("adafactor", Adafactor)):
        parameter = torch.nn.Parameter(torch.randn(shape))
        optimizer = make([parameter])
        parameter.grad = torch.randn(shape)
        optimizer.step()
        kept = [v for v in optimizer.state[parameter].values() if isinstance(v, torch.Tensor)]
        bytes_kept = sum(tensor.nbytes for tensor in kept if tensor.ndim)
        assert optimizer_bytes(parameter, name) == bytes_kept
    large = torch.nn.Parameter(torch.zeros(128, 168))
    assert optimizer_bytes(large, "adamw_8bit") == 2 * (128 * 168 + 4 * 84)


def test_checkpointing_makes_activations_smaller_and_a_batch_makes_them_larger(base: Path) -> None:
    small = forecast(base, replace(SETTINGS, train=TrainSettings(batch=2)))
    large = forecast(base, replace(SETTINGS, train=TrainSettings(batch=8)))
    assert small.activations < small.activations_otherwise
    assert large.activations / small.activations == pytest.approx(4, rel=0.15)
    assert (small.adapters, small.base_packed) == (large.adapters, large.base_packed)


def test_the_command_prints_the_table_and_writes_nothing(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["finetune", str(base), "--data", "pydoc", "--output", str(tmp_path / "out")]
    command += ["--scheme", "NF4_DQ", "--seqlen", "64", "--device", "cpu", "--dry-run"]
    for options in ([], ["--json"]):
        with pytest.raises(SystemExit) as status:
            main([*command, *options])
        assert status.value.code == 0
    table, _, printed = capsys.readouterr().out.partition("{")
    found = json.loads("{" + printed)
    assert f"{found['total']:,}" in table
    assert found["total"] == forecast(base, _of(command)).total
    assert not (tmp_path / "out").exists()


def _of(command: list[str]) -> Settings:
    return Settings(BaseSettings("NF4_DQ", "cpu"), DataSettings(seqlen=64))


def test_qat_has_no_forecast(base: Path) -> None:
    with pytest.raises(LowbitError, match="for adapters"):
        forecast(base, Settings(qat=QatSettings("W4A16_G64")))
