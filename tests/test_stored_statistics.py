"""Statistics on disk: what they hold, what uses them, and every way in which they do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import build_tiny, make_tiny

from lowbit.calibration.capture import counted_tokens
from lowbit.calibration.tokens import CalibrationTokens, load_calibration
from lowbit.checkpoint import Checkpoint
from lowbit.checkpoint.reader import read_header
from lowbit.errors import LowbitError
from lowbit.models.streaming import StreamedDecoder
from lowbit.pipeline import calibrate, quantize
from lowbit.pipeline.calibration_run import Calibration, CalibrationRun
from lowbit.pipeline.stored_statistics import StoredStatistics, pack_triangle, unpack_triangle

DATA = {"samples": 6, "seqlen": 32, "progress": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stored") / "model"
    build_tiny("llama_tied", directory, torch.float32)
    return directory


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(file, np.random.default_rng(0).integers(1, 255, (8, 64)).astype(np.int32))
    return file


@pytest.fixture(scope="module")
def stats(model: Path, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stats") / "stats"
    calibrate(model, directory, calibration=tokens, **DATA)
    return directory


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def inputs_of_layers(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns module name -> its inputs `[samples, seqlen, K]` in the whole model, float64."""
    seen: dict[str, torch.Tensor] = {}
    whole = make_tiny("llama_tied").double()
    for name, module in whole.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.__setitem__(name, args[0])
            )
    with torch.no_grad():
        whole(input_ids=ids, use_cache=False)
    return seen


def check_against(seen: dict[str, torch.Tensor], stats: Path, mask: torch.Tensor | None) -> None:
    stored = StoredStatistics.open(stats)
    names = set()
    for part in stored.manifest["parts"].values():
        entries = {entry.name: entry for entry in read_header(stats / part["file"])}
        for group, report in part["modules"].items():
            x = seen[group].flatten(0, 1) if mask is None else seen[group][mask]
            packed = entries[f"{group}.hessian"].read()
            hessian = unpack_triangle(packed, report["in_features"]).double()
            expected = x.T @ x / len(x)
            assert (hessian - expected).abs().max() < 1e-4 * expected.abs().max(), group
            magnitude = entries[f"{group}.mean_magnitude"].read().double()
            assert torch.allclose(magnitude, x.abs().mean(0), rtol=1e-3, atol=1e-6), group
            assert float(entries[f"{group}.input_scale"].read()) > 0
            assert report["tokens"] == len(x)
            for member in report["members"]:
                assert torch.equal(seen[member], seen[group])
            names |= set(report["members"])
    assert names == set(seen)


def test_statistics_are_those_of_the_full_precision_model(stats: Path, tokens: Path) -> None:
    ids = load_calibration(str(tokens), None, 256, 6, 32, 0).ids
    check_against(inputs_of_layers(ids), stats, None)


def test_a_mask_leaves_other_tokens_out_of_everything(
    model: Path, tokens: Path, tmp_path: Path
) -> None:
    drawn = load_calibration(str(tokens), None, 256, 6, 32, 0)
    mask = torch.rand(6, 32, generator=torch.Generator().manual_seed(0)) < 0.5
    decoder = StreamedDecoder(Checkpoint.open(model), torch.float32, torch.device("cpu"))
    masked = CalibrationTokens(drawn.ids, drawn.digest, drawn.description, mask)
    Calibration(decoder, masked, tmp_path / "stats").execute(resume=False, progress=False)
    check_against(inputs_of_layers(drawn.ids), tmp_path / "stats", mask)


def test_a_layer_that_sees_other_vectors_than_tokens_cannot_be_masked() -> None:
    with pytest.raises(LowbitError, match="7 vectors for 8 tokens"):
        counted_tokens(torch.zeros(7, 4), torch.ones(2, 4, dtype=torch.bool))


def test_triangle_holds_a_symmetric_matrix() -> None:
    matrix = torch.randn(5, 5)
    matrix = matrix + matrix.T
    assert pack_triangle(matrix).shape == (15,)
    assert torch.equal(unpack_triangle(pack_triangle(matrix), 5), matrix)


def test_quantizing_from_statistics_runs_no_model_and_records_them(
    model: Path, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a forward pass was run")

    monkeypatch.setattr(StreamedDecoder, "_forward", forbidden)
    result = quantize(
        model, tmp_path / "w4", scheme="W4A16_G32", stats=stats, progress=False,
        verify=False,  # its probe runs the model
    )  # fmt: skip
    fingerprint = result.manifest["fingerprint"]
    stored = StoredStatistics.open(stats)
    assert fingerprint["calibration"] == stored.description()
    assert fingerprint["calibration"]["digest"] == stored.fingerprint["calibration"]["digest"]
    reports = [r for part in result.manifest["parts"].values() for r in part["modules"].values()]
    assert {report["algorithm"] for report in reports} == {"gptq"}
    assert all(report["tokens"] == 192 for report in reports)


def test_the_first_layers_are_quantized_as_a_live_run_does(
    model: Path, stats: Path, tokens: Path, tmp_path: Path
) -> None:
    # Nothing is quantized before them, so both runs measure the same inputs.
    live = quantize(model, tmp_path / "a", scheme="W3A16_G32", calibration=tokens, **DATA)
    from_stats = quantize(model, tmp_path / "b", scheme="W3A16_G32", stats=stats, progress=False)
    name = "model.layers.0.self_attn.q_proj"
    losses = [
        result.manifest["parts"]["model.layers.0"]["modules"][name]["loss"]
        for result in (live, from_stats)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert live.bits_per_weight == from_stats.bits_per_weight


def test_static_activations_take_their_scale_from_statistics(
    model: Path, stats: Path, tmp_path: Path
) -> None:
    result = quantize(model, tmp_path / "w8", scheme="W8A8_STATIC", stats=stats, progress=False)
    part = result.manifest["parts"]["model.layers.0"]["modules"]
    assert all(report["input_scale"] > 0 for report in part.values())


def test_an_interrupted_calibration_goes_on_to_the_same_files(
    model: Path, stats: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, seen = CalibrationRun._measure, []

    def interrupted(self: CalibrationRun, piece: Any, index: int) -> None:
        seen.append(piece.name)
        if len(seen) == 3:
            raise KeyboardInterrupt
        measure(self, piece, index)

    with monkeypatch.context() as patch:
        patch.setattr(CalibrationRun, "_measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, tmp_path / "stats", calibration=tokens, **DATA)
    with pytest.raises(LowbitError, match=r"is unfinished.*--resume"):
        StoredStatistics.open(tmp_path / "stats")
    with pytest.raises(LowbitError, match="--resume"):
        calibrate(model, tmp_path / "stats", calibration=tokens, **DATA)
    calibrate(model, tmp_path / "stats", calibration=tokens, resume=True, **DATA)
    files = {file.name: file.read_bytes() for file in stats.iterdir()}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "stats").iterdir()}


def refusal(model: Path, stats: Path, tmp_path: Path, **options: Any) -> str:
    with pytest.raises(LowbitError) as caught:
        quantize(model, tmp_path / "out", stats=stats, progress=False, **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def test_another_model_is_refused(model: Path, stats: Path, tmp_path: Path) -> None:
    other = copy(model, tmp_path / "other")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    message = refusal(other, stats, tmp_path)
    assert "was measured on another model, model.safetensors differs" in message


def test_layers_that_were_not_measured_are_refused(
    model: Path, stats: Path, tmp_path: Path
) -> None:
    changed = copy(stats, tmp_path / "stats")
    manifest = json.loads((changed / "lowbit_manifest.json").read_text())
    del manifest["parts"]["model.layers.1"]
    (changed / "lowbit_manifest.json").write_text(json.dumps(manifest))
    assert "has no statistics of model.layers.1" in refusal(model, changed, tmp_path)


def test_text_beside_statistics_is_refused(
    model: Path, stats: Path, tokens: Path, tmp_path: Path
) -> None:
    message = refusal(model, stats, tmp_path, calibration=tokens)
    assert "are both given" in message


def test_a_recipe_that_runs_the_model_is_refused(model: Path, stats: Path, tmp_path: Path) -> None:
    from lowbit.algorithms import make_algorithm
    from lowbit.recipe import Recipe

    recipe = Recipe(make_algorithm("gptq"), mismatch=True)
    assert "mismatch must run the model" in refusal(model, stats, tmp_path, quality=recipe)


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        (lambda d: (d / "lowbit_manifest.json").unlink(), "holds no statistics"),
        (lambda d: (d / "lowbit_manifest.json").write_text("{}"), "something else than"),
        (lambda d: (d / "lowbit_manifest.json").write_text("[1"), "not valid JSON"),
        (lambda d: (d / "lowbit_journal.json").write_text("{}"), "is unfinished"),
    ],
)
def test_a_folder_without_finished_statistics_is_refused(
    model: Path, stats: Path, tmp_path: Path, change: Any, needle: str
) -> None:
    broken = copy(stats, tmp_path / "stats")
    change(broken)
    assert needle in refusal(model, broken, tmp_path)


def test_a_changed_shard_is_refused_before_it_is_used(
    model: Path, stats: Path, tmp_path: Path
) -> None:
    broken = copy(stats, tmp_path / "stats")
    file = sorted(broken.glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    with pytest.raises(LowbitError, match="has changed since it was written"):
        quantize(model, tmp_path / "out", stats=broken, progress=False)


def test_a_disk_without_room_is_refused_before_the_first_shard(
    model: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 9))
    with pytest.raises(LowbitError, match=r"a set of statistics of about .* does not fit"):
        calibrate(model, tmp_path / "stats", calibration=tokens, **DATA)
    assert not list((tmp_path / "stats").glob("*.safetensors"))
