"""End-to-end tuning: right gradients on packed codes, never worse, codes untouched, killable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from schemes import every_scheme
from tiny_models import TINY, build_tiny
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.checkpoint import Checkpoint, replacement
from lowbit.checkpoint.journal import Journal
from lowbit.checkpoint.reader import file_digest, read_header
from lowbit.models.selection import Selection, select_modules
from lowbit.models.streaming import StreamedDecoder
from lowbit.nn.replace import restore_modules
from lowbit.progress import RunProgress
from lowbit.quant import Grid, QuantizedWeight
from lowbit.scheme import Scheme
from lowbit.tuning import packed_model as packed
from lowbit.tuning.end_to_end import ScaleTuning, Teacher, TunedScales
from lowbit.tuning.packed_model import ScaledLinear, ScaledWeight, packed_model

CPU = torch.device("cpu")
SILENT = RunProgress(False)
QUICK = ScaleTuning(
    steps=8, learning_rate=0.01, vector_rate=0, batch_windows=2, held_out=0.25, evaluations=2
)


def tokens_of(windows: int, seqlen: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 256, (windows, seqlen), generator=generator)


class Quantized:
    """A tiny model, quantized without data, as tuning finds it."""

    def __init__(self, folder: Path, family: str, scheme: str, **selection: Any) -> None:
        build_tiny(family, folder / "model")
        self.path = folder / "quantized"
        options = {"algorithm": "rtn", "progress": False, "scheme": scheme}
        lowbit.quantize(folder / "model", self.path, **options, **selection)
        self.decoder = StreamedDecoder(Checkpoint.open(folder / "model"), torch.float32, CPU)
        chosen = Selection(Scheme.parse(scheme), **selection)
        self.selected = select_modules(self.decoder.model, chosen)
        self.shards = sorted(self.path.glob("*.safetensors"))

    def original(self) -> Any:
        path = self.decoder.checkpoint.path
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def loaded(self) -> Any:
        """The checkpoint as users load it, with decoded weights: kernels round in their own way."""
        model = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()
        restore_modules(model, torch.float32)
        return model

    def tune(self, options: ScaleTuning, tokens: Tensor, **others: Any) -> TunedScales:
        return options.tune(self.shards, self.decoder, self.selected, tokens, SILENT, **others)

    def stored(self) -> dict[str, Tensor]:
        return {k: v for file in self.shards for k, v in load_file(file).items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    return Quantized(tmp_path_factory.mktemp("llama"), "llama", "W2A16_G32")


@torch.no_grad()
def divergence(original: Any, quantized: Any, ids: Tensor) -> float:
    """KL(original || quantized) per token by torch's own function."""
    log_p = log_softmax(original(ids).logits.double(), -1)
    log_q = log_softmax(quantized(ids).logits.double(), -1)
    return float(kl_div(log_q, log_p, reduction="sum", log_target=True) / ids.numel())


def random_weight(scheme: Scheme, shape: tuple[int, int]) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator)
    groups = scheme.groups(shape[1])
    scales = 0.1 + 0.1 * torch.rand(shape[0], groups, generator=generator)
    if scheme.signed_scales:
        scales *= torch.randint(0, 2, scales.shape, generator=generator) * 2 - 1
    zeros = None if scheme.symmetric else torch.ones_like(scales)
    grid = Grid.storable(scheme, shape[1], scales, zeros)
    return QuantizedWeight.from_codes(grid.round(weight), grid)


@every_scheme
def test_gradients_are_those_of_the_decoded_weight(scheme: Scheme, monkeypatch: Any) -> None:
    """Oracle: w = levels * scales in float64, differentiated by autograd, scales = exp(t) s."""
    monkeypatch.setattr(packed, "_SLICE_WEIGHTS", 3 * 168)  # several slices, the last one short
    stored = random_weight(scheme, (10, 168))
    layer = ScaledLinear(ScaledWeight("m", stored, CPU), None)
    x = torch.randn(2, 5, 168, requires_grad=True)
    upstream = torch.randn(2, 5, 10)
    layer(x).backward(upstream)

    grid, codes = stored.grid(), stored.codes()
    levels = grid.dequantize(codes).double() / grid.per_column(grid.scales).double()
    factor = torch.zeros_like(grid.scales, dtype=torch.float64, requires_grad=True)
    x64 = x.detach().double().requires_grad_(True)
    weight = levels * grid.per_column(grid.scales.double() * factor.exp())
    (x64 @ weight.T).backward(upstream.double())
    assert x64.grad is not None
    assert factor.grad is not None
    torch.testing.assert_close(x.grad, x64.grad.float(), rtol=1e-4, atol=1e-5)
    found = layer.scaled.log_factor.grad
    torch.testing.assert_close(found, factor.grad.float(), rtol=1e-4, atol=1e-5)


@every_scheme
def test_untouched_scales_are_the_stored_ones_and_trained_ones_are_storable(scheme: Scheme) -> None:
    stored = random_weight(scheme, (12, 80))
    weight = ScaledWeight("m", stored, CPU)
    assert torch.equal(weight.scales(), stored.grid().scales)
    torch.nn.init.normal_(weight.log_factor, std=3.0)
    new = {key.removeprefix("m."): tensor for key, tensor in weight.tensors().items()}
    again = QuantizedWeight.from_tensors(scheme, stored.shape, {**stored.tensors(), **new}, "m")
    torch.testing.assert_close(weight.scales(), again.grid().scales, rtol=1e-6, atol=0)
    assert torch.equal(again.grid().scales.sign(), stored.grid().scales.sign())
    assert torch.equal(again.codes(), stored.codes())


@pytest.mark.parametrize("family", TINY)
def test_both_models_say_what_transformers_models_say(family: str, tmp_path: Path) -> None:
    """The packed student against the loaded checkpoint, the streamed teacher against the source."""
    everything = {"quantize_lm_head": True, "quantize_embeddings": True}
    case = Quantized(tmp_path, family, "W4A16_G32", **everything)
    ids = tokens_of(3)
    entries = {entry.name: entry for file in case.shards for entry in read_header(file)}
    model, weights = packed_model(case.decoder, entries, case.selected)
    assert len(weights) == len(case.selected)
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids, use_cache=False).logits, case.loaded()(ids).logits, rtol=1e-4, atol=1e-5
        )
        teacher = Teacher(case.decoder, ids, SILENT)
        torch.testing.assert_close(
            teacher.logits([2, 0]), case.original()(ids[[2, 0]]).logits, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("family", "scheme", "selection"),
    [
        ("llama_tied", "W3A16_ASYM_G64", {}),
        ("gemma2", "NF4_DQ", {"quantize_embeddings": True}),
        ("gpt2", "W2A16_G64_DQ", {"quantize_lm_head": True}),
        ("opt", "W2A16_G32", {"quantize_embeddings": True, "quantize_lm_head": True}),
    ],
)
def test_tuning_lowers_what_the_loaded_checkpoint_diverges(
    family: str, scheme: str, selection: dict[str, bool], tmp_path: Path
) -> None:
    case = Quantized(tmp_path, family, scheme, **selection)
    # Random models have nothing that other windows would share, so all windows are the same.
    ids, before = tokens_of(1).repeat(4, 1), case.stored()
    held, original = ids[:1], case.original()
    tuned = case.tune(ScaleTuning(**{**vars(QUICK), "vector_rate": 0.01}), ids)
    assert tuned.report["kl_before"] == pytest.approx(
        divergence(original, case.loaded(), held), rel=1e-3
    )
    _replace(case, tuned)
    assert tuned.report["kl_after"] == pytest.approx(
        divergence(original, case.loaded(), held), rel=1e-3
    )
    assert tuned.report["kept"]
    assert tuned.report["kl_after"] < 0.9 * tuned.report["kl_before"]
    after = case.stored()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not {n for n in changed if n.endswith(("_packed", "_zero_point", "_shape"))}


def _replace(case: Quantized, tuned: TunedScales) -> None:
    journal = Journal(case.path, {})
    journal.parts = {
        str(i): {"file": file.name, "sha256": file_digest(file), "modules": {}}
        for i, file in enumerate(case.shards)
    }
    _finish(journal, tuned)
    journal.remove()


def test_what_is_no_better_on_held_out_windows_is_left_out(llama: Quantized) -> None:
    ruinous = ScaleTuning(**{**vars(QUICK), "learning_rate": 30.0})
    tuned = llama.tune(ruinous, tokens_of(6))
    assert tuned.tensors == {}
    assert tuned.report["kept"] is False
    assert tuned.report["kl_after"] == tuned.report["kl_before"]


def test_tuning_is_deterministic(llama: Quantized) -> None:
    first, second = (llama.tune(QUICK, tokens_of(6)) for _ in range(2))
    assert first.report == second.report
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
    assert all(name.endswith("weight_scale") for name in first.tensors)


def test_masked_tokens_do_not_count(llama: Quantized) -> None:
    """Under a causal mask, tokens after the last one that counts can be anything."""
    ids, mask = tokens_of(6), torch.ones(6, 16, dtype=torch.bool)
    mask[:, 9:] = False
    other = torch.where(mask, ids, tokens_of(6, seed=1))
    first, second = (llama.tune(QUICK, tokens, mask=mask) for tokens in (ids, other))
    assert first.report["kl_before"] == pytest.approx(second.report["kl_before"], rel=1e-5)
    assert first.report["kl_after"] == pytest.approx(second.report["kl_after"], rel=1e-4)
    whole = llama.tune(QUICK, ids).report
    assert whole["kl_before"] != pytest.approx(first.report["kl_before"], rel=1e-3)


def test_few_logits_at_a_time_give_the_same_gradient(llama: Quantized, monkeypatch: Any) -> None:
    whole = llama.tune(QUICK, tokens_of(6)).report
    monkeypatch.setattr("lowbit.tuning.end_to_end._LOGITS", 1)
    assert llama.tune(QUICK, tokens_of(6)).report["kl_after"] == pytest.approx(
        whole["kl_after"], rel=1e-3
    )


@pytest.mark.parametrize(("scheme", "windows"), [("W8A8", 3), ("W4A16", 1)])
def test_what_cannot_be_tuned_is_left_out_with_a_warning(
    llama: Quantized, scheme: str, windows: int
) -> None:
    selected = {"m": Scheme.parse(scheme)}
    with pytest.warns(UserWarning, match="end-to-end tuning is left out: it"):
        tuned = QUICK.tune([], llama.decoder, selected, tokens_of(windows), SILENT)
    assert tuned.tensors == {}
    assert tuned.report.keys() == {"kept", "skipped"}


class Killed(Exception):  # noqa: N818 - stands for a signal
    """Raised in place of a kill."""


def test_a_kill_at_any_moment_of_replacing_loses_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    expected: dict[str, str] | None = None
    tuned = Quantized(tmp_path / "same", "llama", "W2A16_G32").tune(QUICK, tokens_of(6))
    for moment in range(40):
        case = Quantized(tmp_path / str(moment), "llama", "W2A16_G32")
        parts = json.loads((case.path / "lowbit_manifest.json").read_text())["parts"]
        (case.path / "lowbit_manifest.json").unlink()
        journal = Journal(case.path, {})
        journal.parts = parts
        journal._write()
        killed = _killed_at(moment, journal, tuned, monkeypatch)
        journal = Journal.start(case.path, {})  # refuses a shard that is neither old nor new
        _finish(journal, tuned)
        assert not (case.path / replacement.REPLACEMENT_NAME).exists()
        found = {file.name: file_digest(file) for file in case.shards}
        assert {part["file"]: part["sha256"] for part in journal.parts.values()} == found
        assert journal.replacements() == {}
        expected = expected or found
        assert found == expected
        if not killed:
            assert moment > 5
            break


def _finish(journal: Journal, tuned: TunedScales) -> None:
    """Does what is not done yet; a second tuning would find the same."""
    if "end_to_end" not in journal.stages:
        replacement.begin_replacement(journal, tuned.tensors, "end_to_end", tuned.report)
    replacement.finish_replacement(journal)


def _killed_at(moment: int, journal: Journal, tuned: TunedScales, monkeypatch: Any) -> bool:
    """Finishes, killed before the `moment`-th change of the directory (from 0)."""
    count = 0
    move, remove = Path.replace, Path.unlink

    def step() -> None:
        nonlocal count
        if count == moment:
            raise Killed
        count += 1

    def replace(self: Path, target: Path) -> Path:
        step()
        return move(self, target)

    def unlink(self: Path, missing_ok: bool = False) -> None:
        if self.name == replacement.REPLACEMENT_NAME:
            step()
        remove(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        patch.setattr(Path, "unlink", unlink)
        try:
            _finish(journal, tuned)
        except Killed:
            return True
    return False
