"""The GPU benchmark without a GPU: every part on tiny sizes, and what is made of the results."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

BENCHMARKS = Path(__file__).parents[2] / "kernels/benchmarks"
sys.path.append(str(BENCHMARKS))

import bench_gptq  # noqa: E402 - after the path
import compile_tiles  # noqa: E402
import gpu  # noqa: E402
import merge  # noqa: E402
import processes  # noqa: E402
import timing  # noqa: E402
import tune  # noqa: E402
from decoder_model import Decoding, build  # noqa: E402
from lowbit_kernels.gpu import configs, matmul  # noqa: E402
from model_shapes import SCHEMES, SHAPES, copy_of, random_weight  # noqa: E402
from parts import DeadDeviceError, OutOfTimeError, Part  # noqa: E402
from targets import judge_all  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from lowbit.errors import LowbitError  # noqa: E402
from lowbit.scheme import Scheme  # noqa: E402

needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the smoke test is for machines without a GPU"
)


def smoke(out: Path, *arguments: str) -> dict[str, Any]:
    """Runs the command in this process and returns its JSON; it must not have failed."""
    command = ["--smoke", "--in-process", "--out", str(out), *arguments]
    status = gpu.main(command)
    result: dict[str, Any] = json.loads((out / "bench-gpu.json").read_text())
    assert result["errors"] == {}
    assert status == 0
    return result


@needs_interpreter
def test_the_command_measures_linear_layers_in_processes_of_their_own(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--smoke", "--out", str(tmp_path)]
    command += ["--only", "check,linear", "--schemes", "W4A16_G128,NF4_DQ"]
    ran = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    result = json.loads((tmp_path / "bench-gpu.json").read_text())
    assert set(result["check"]["results"]) == {"W4A16_G128", "NF4_DQ"}
    rows = result["linear"]["rows"]
    assert {(r["name"], r["peer"]) for r in rows} == {
        ("bf16", False),
        ("W4A16_G128", False),
        ("NF4_DQ", False),
        ("plain float32", True),
    }
    assert len(rows) == 2 * 3 * 4  # shapes, numbers of tokens, candidates
    for row in rows:
        assert row["low_us"] <= row["us"] <= row["high_us"]
        assert row["us"] > 0
        tokens = 2 * row["M"] * sum(map(int, row["shape"].split("x")))
        moved = row["weight_bytes"] + tokens
        assert row["gbps"] == pytest.approx(1e-3 * moved / row["us"], rel=1e-3)
    assert result["provenance"]["versions"]["torch"] == torch.__version__
    if importlib.util.find_spec("matplotlib") is None:
        assert result["no_picture"] == "matplotlib is not installed"
    else:
        assert (tmp_path / "roofline.png").stat().st_size > 10_000
    assert "Linear layers" in ran.stdout
    assert "Targets" in ran.stdout


@needs_interpreter
def test_backward_and_the_other_layers_are_measured(tmp_path: Path) -> None:
    result = smoke(tmp_path, "--only", "backward,extra", "--schemes", "NF4_DQ")
    assert {row["scheme"] for row in result["backward"]["backward"]} == {"NF4_DQ"}
    assert result["extra"]["w8a8"] or "w8a8" in result["extra"]["absent"]
    assert result["extra"]["experts"] or "experts" in result["extra"]["absent"]


@needs_interpreter
def test_a_decoder_and_gptq_are_measured(tmp_path: Path) -> None:
    result = smoke(tmp_path, "--only", "decoder,gptq")
    assert [row["batch"] for row in result["decoder"]["decode"]] == [1, 16]
    assert result["gptq"]["run"]["blocks_run"] == result["gptq"]["blocks"] == 2
    assert result["gptq"]["trial"]["blocks_run"] == 1
    # What is outside the blocks, each block, and the head.
    assert len(result["gptq"]["run"]["seconds_per_file"]) == 4
    assert 4 < result["gptq"]["run"]["bits_per_weight"] < 5


@needs_interpreter
def test_tuning_writes_a_table_that_the_kernels_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = smoke(tmp_path / "out", "--only", "tune")
    file = tmp_path / result["tune"]["file_name"]
    (tmp_path / "out" / file.name).rename(file)
    assert not (configs.DIRECTORY / file.name).exists()  # a smoke test ships nothing
    table = json.loads(file.read_text())
    monkeypatch.setattr(configs, "DIRECTORY", tmp_path)
    configs.table.cache_clear()
    configs.choose.cache_clear()
    try:
        tile = configs.choose(0, "int4", 16, 128, 512)
        chosen = table["kinds"]["int4"]["16"]
        assert tile is not None
        assert (tile.block_n, tile.warps) == (chosen["block_n"], chosen["warps"])
    finally:
        configs.table.cache_clear()
        configs.choose.cache_clear()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tuning_cuts_up_a_product_as_the_tables_do(scheme: str) -> None:
    table = json.loads((configs.DIRECTORY / "default.json").read_text())
    for shape in SHAPES[:2]:
        weight = random_weight(scheme, shape.rows // 16, shape.columns // 8, "cpu")
        columns = weight.words.shape[1] * 64
        for block_m in (16, 32, 64, 128):
            entry = {**table["tiles"], **table["kinds"].get("int4", {})}[str(block_m)]
            chosen = configs.choose(0, "int4", block_m, weight.padded_rows, columns)
            assert compile_tiles.tile_of(entry, block_m, weight) == chosen


@needs_interpreter
def test_workers_launch_their_share_and_survive_what_fails(tmp_path: Path) -> None:
    good = {"block_n": 64, "warps": 4, "stages": 2, "programs_per_sm": 2}
    launches = [
        {"scheme": scheme, "shape": [64, 256], "block_m": 16, "entry": entry}
        for scheme, entry in (
            ("W4A16_G128", good),
            ("W4A16_G128", {**good, "block_n": 128}),  # does not divide the rows
            ("W5A16", good),
            ("NF4_DQ", good),
        )
    ]
    file = tmp_path / "launches.json"
    file.write_text(json.dumps(launches))
    assert compile_tiles.work(str(file), "0", "1", "cpu") == 2
    assert compile_tiles.work(str(file), "1", "2", "cpu") == 1


@pytest.mark.parametrize("block_m", tune.BLOCKS)
def test_tuning_tries_few_tiles(block_m: int) -> None:
    assert 2 <= len(tune.candidates(block_m, smoke=False)) <= 20


@pytest.mark.parametrize("scheme", SCHEMES)
def test_random_weights_use_every_code_and_finite_scales(scheme: str) -> None:
    weight = random_weight(scheme, 192, 512, "cpu")
    bits = Scheme.parse(scheme).bits
    counts = torch.bincount(weight.codes().flatten().int(), minlength=1 << bits)
    expected = 192 * 512 / (1 << bits)
    assert counts.shape == (1 << bits,)
    assert ((counts - expected).abs() < 6 * expected**0.5).all()
    assert weight.scale.dtype == torch.float16
    assert weight.scale.isfinite().all()
    other = copy_of(weight)
    assert torch.equal(other.words, weight.words)
    assert other.words.data_ptr() != weight.words.data_ptr()
    assert matmul.dequantize(other, torch.float32).isfinite().all()


def test_copies_exceed_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "l2_bytes", lambda: 60 << 20)
    for size in (1 << 20, 30 << 20, 1 << 30):
        number = timing.copies_needed(size)
        assert number >= 2
        assert (number - 1) * size >= 3 * (60 << 20) or number == 2


FAILING_CAPTURE = """
import sys
sys.path.insert(0, sys.argv[1])
import timing, torch
from random_tensors import normal
x = torch.ones(1024, device="cuda")
try:
    timing.capture([lambda: x.sum().item()], torch.cuda.graph_pool_handle())
except RuntimeError:
    pass
else:
    sys.exit("a read on the host was captured")
y = normal((1024,), "cuda")
replay = timing.capture([lambda: x.add_(y)] * 3, torch.cuda.graph_pool_handle())
before = x.clone()
replay.run()
torch.testing.assert_close(x, before + 3 * y)
times = timing.measure({"add": replay, "copy": timing.capture([lambda: x.copy_(y)])})
assert 0 < times["add"].low <= times["add"].seconds <= times["add"].high < 1e-3, times
assert timing.copy_bandwidth() > 1e11
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_capture_that_fails_does_not_spoil_the_next() -> None:
    """In a process of its own, because it does spoil torch's default generator."""
    ran = subprocess.run(
        [sys.executable, "-c", FAILING_CAPTURE, str(BENCHMARKS)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


class ReadsOnTheHost(TorchDispatchMode):
    """Fails where a value of a tensor is needed on the host: a CUDA graph could not hold that."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "reads a tensor"
        assert func is not torch.ops.aten.nonzero.default, "a shape depends on values"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scheme", [None, "W4A16_G128"])
def test_a_decoding_step_can_be_captured_and_equals_the_model(
    scheme: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []
    model = build(scheme, "cpu", smoke=True)

    def watched(**arguments: Any) -> Any:
        out = model(**arguments)
        logits.append(out.logits[:, -1])
        return out

    randint = torch.randint

    def remembered(*arguments: Any, **options: Any) -> torch.Tensor:
        prompts.append(randint(*arguments, **options))
        return prompts[-1]

    monkeypatch.setattr(torch, "randint", remembered)
    session = Decoding.start(model, 2, 5, 16)
    session.forward = watched
    written = [prompts[-1]]
    with ReadsOnTheHost():
        for _ in range(4):
            session.step()
            written.append(session.ids.clone())
    assert int(session.position) == 9
    # The prompt's last token is read twice: once with the prompt, once as the first step.
    read = torch.cat([prompts[-1], prompts[-1][:, -1:], *written[1:]], 1)
    with torch.no_grad():
        expected = model(input_ids=read[:, :-1], use_cache=False).logits
    for step in range(4):
        torch.testing.assert_close(logits[step], expected[:, 5 + step], rtol=1e-4, atol=1e-5)
        assert torch.equal(written[1 + step][:, 0], logits[step].argmax(-1))


def test_an_error_is_recorded_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = Part("p", tmp_path / "p.json", 60.0)
    with part.guarded("first"):
        raise ValueError("this one is wrong")
    part.set("second", 2)
    written = json.loads((tmp_path / "p.json").read_text())
    assert "this one is wrong" in written["errors"]["first"]
    assert written["second"] == 2
    with pytest.raises(OutOfTimeError), part.guarded("third"):
        part.need(61.0, "more")
    assert "third" not in part.results["errors"]
    monkeypatch.setattr("parts._device_lives", lambda: False)
    with pytest.raises(DeadDeviceError), part.guarded("fourth"):
        raise RuntimeError("an illegal memory access was encountered")


def test_a_process_that_does_not_end_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.0)
    child = tmp_path / "child"
    code = (
        "import subprocess, sys, time; "
        f"p = subprocess.Popen(['sleep', '60']); open({str(child)!r}, 'w').write(str(p.pid)); "
        "time.sleep(60)"
    )
    jobs = [
        processes.Job("stuck", ["-c", code], tmp_path / "a", 4.0),
        processes.Job("fails", ["-c", "raise SystemExit(7)"], tmp_path / "b", 30.0),
    ]
    assert processes.run_all(jobs, lambda: None) == {"stuck": -9, "fails": 7}
    for _ in range(100):  # the signal is on its way
        if _has_ended(child.read_text()):
            return
        time.sleep(0.05)
    raise AssertionError("the child of a killed process still runs")


def _has_ended(process: str) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return True
    return state.rpartition(")")[2].split()[0] == "Z"


@needs_interpreter
def test_a_shape_that_loses_the_device_is_skipped_and_the_rest_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bench_linear

    measured = bench_linear._measure_shape

    def lose_the_device(shape: Any, *rest: Any) -> None:
        if shape.key == "128x256":
            raise DeadDeviceError(shape.key)
        measured(shape, *rest)

    monkeypatch.setattr(bench_linear, "_measure_shape", lose_the_device)
    command = ["--smoke", "--in-process", "--out", str(tmp_path), "--only", "linear"]
    assert gpu.main([*command, "--schemes", "W4A16_G128"]) == 1
    result = json.loads((tmp_path / "bench-gpu.json").read_text())
    assert {row["shape"] for row in result["linear"]["rows"]} == {"192x384"}
    assert list(result["errors"]) == ["linear"]


def test_a_check_that_crashes_refuses_its_scheme_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = gpu.parse(["--out", str(tmp_path), "--schemes", "W4A16_G128,NF4_DQ"])
    monkeypatch.setattr(gpu, "describe_gpu", dict)
    benchmark = gpu.Benchmark(arguments, tmp_path)
    shares: dict[str, list[str]] = {}

    def start(jobs: Any) -> dict[str, int]:
        for job in jobs:
            settings = gpu.Settings.from_json(job.command[job.command.index("--settings") + 1])
            (scheme,) = settings.schemes
            shares.setdefault(scheme, []).append(job.command[job.command.index("--share") + 1])
            if scheme == "W4A16_G128":
                found = {scheme: {"M=1": 1.0}} if job.label.endswith(" 0") else {}
                job.file.write_text(json.dumps({"errors": {}, "results": found}))
        return {job.label: -11 if "NF4" in job.label else 0 for job in jobs}

    monkeypatch.setattr(benchmark, "_start", start)
    benchmark.run(["check"])
    assert set(shares) == {"W4A16_G128", "NF4_DQ"}
    for found in shares.values():
        assert found == [f"{i}/{len(found)}" for i in range(len(found))]
    assert benchmark.settings.refused == {"NF4_DQ": "the check ended with status -11"}
    assert benchmark.result["check"]["results"] == {"W4A16_G128": {"M=1": 1.0}}


@needs_interpreter
def test_a_scheme_with_wrong_results_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = matmul.linear

    def wrong(x: torch.Tensor, weight: Any, bias: Any = None) -> torch.Tensor:
        return linear(x, weight, bias) * (1.05 if weight.format.codebook else 1.0)

    monkeypatch.setattr(matmul, "linear", wrong)
    command = ["--smoke", "--in-process", "--out", str(tmp_path), "--only", "check,linear"]
    assert gpu.main([*command, "--schemes", "W4A16_G128,NF4_DQ"]) == 1
    result = json.loads((tmp_path / "bench-gpu.json").read_text())
    assert list(result["refused"]) == ["NF4_DQ"]
    assert "times the error" in result["refused"]["NF4_DQ"]
    assert "NF4_DQ" not in {row["name"] for row in result["linear"]["rows"]}
    assert "W4A16_G128" in {row["name"] for row in result["linear"]["rows"]}


def row(name: str, m: int, **fields: Any) -> dict[str, Any]:
    base = {"name": name, "M": m, "peer": False, "shape": "s", "weight_bytes": 3e7, "us": 10.0}
    return {**base, **fields}


def test_targets_take_the_worst_value_that_they_speak_of() -> None:
    rows = [
        row("W4A16_G128", 1, copy_fraction=0.9, vs_bf16=3.0),
        row("W4A16_G128", 16, copy_fraction=0.65, vs_bf16=2.9),
        row("W4A16_G128", 16, copy_fraction=0.1, vs_bf16=0.5, weight_bytes=2e7),
        row("NF4_DQ", 8, copy_fraction=0.61, vs_bf16=2.5),
        row("bf16", 1, copy_fraction=0.2, vs_bf16=1.0),
        row("other", 16, peer=True, us=9.0),
        row("other", 128, peer=True, us=1.0),
    ]
    result = {
        "linear": {"rows": rows, "peers": {"other": {"comparable": "W4A16_G128"}}},
        "decoder": {"decode": [{"batch": 1, "vs_bf16": 2.0, "compiled": False}]},
        "compiled": {"decode": [{"batch": 1, "vs_bf16": 2.9, "compiled": True}]},
        "gptq": {"blocks": 32, "run": {"blocks_run": 16, "seconds": 50.0}},
        "backward": {"backward": [{"times_bf16": 1.2, "scheme": "NF4_DQ", "shape": "s"}]},
    }
    judged = [(t["measured"], t["met"]) for t in judge_all(result)]
    assert judged == [
        (0.65, False),
        (2.9, True),
        (0.61, True),
        (None, None),
        (None, None),
        (0.9, False),
        (1.2, False),
        (2.9, True),
        (None, None),  # half of the blocks is not the whole model
    ]


def result_of(commit: str, **parts: Any) -> dict[str, Any]:
    versions = {"versions": {"torch": "2"}, "commit": commit}
    base = {"gpu": {"name": "G"}, "provenance": versions, "smoke": False, "checked": True}
    return {**base, "errors": {}, "seconds": {}, "left_out": ["gptq"], **parts}


def test_runs_are_merged_part_by_part() -> None:
    gptq = {"blocks": 32, "run": {"blocks_run": 32, "seconds": 100.0}}
    old = {"rows": [row("W4A16_G128", 64, vs_bf16=1.0)]}
    new = {"rows": [row("W4A16_G128", 64, vs_bf16=2.5)]}
    first = result_of("c", linear=old, errors={"linear": {"a": "b"}, "tune": {"c": "d"}})
    second = result_of("c", linear=new, gptq=gptq, seconds={"gptq": 110.0})
    whole = merge.merge([first, second])
    assert whole["linear"] == new
    assert whole["gptq"] == gptq
    assert whole["errors"] == {"tune": {"c": "d"}}
    assert whole["left_out"] == []
    measured = {t["target"]: t["met"] for t in whole["targets"] if t["met"] is not None}
    assert list(measured.values()) == [True, True]
    assert first["linear"] == old
    with pytest.raises(LowbitError, match="result 2 has commit d"):
        merge.merge([first, result_of("d")])


def test_gptq_runs_as_many_blocks_as_fit() -> None:
    shape = dict(bench_gptq.LLAMA_8B)
    trial = {"seconds": 30.0, "blocks_run": 2, "seconds_per_file": [0.0, 20.0, 4.0, 2.0]}
    assert bench_gptq._possible_blocks(trial, 1000.0, 10**12, shape, 32) == 32
    fits = bench_gptq._possible_blocks(trial, 100.0, 10**12, shape, 32)
    assert 2 < fits < (100 - 22) / 4
    assert bench_gptq._possible_blocks(trial, 1000.0, 10 * 10**9, shape, 32) < 10


def test_peers_that_are_not_there_say_so() -> None:
    from peers import PEERS, Peer

    assert {peer.name for peer in PEERS} >= {"bitsandbytes NF4", "torch int4pack", "marlin"}
    missing = Peer("x", "x", "no_such_module_here", "NF4_DQ", PEERS[0].prepare)
    assert missing.refusal() == "no_such_module_here is not installed"
    assert missing.version() is None

    def broken() -> str | None:
        raise OSError("libcudart.so: cannot open shared object file")

    refusal = Peer("x", "torch", "torch", "NF4_DQ", PEERS[0].prepare, broken).refusal()
    assert refusal == "OSError: libcudart.so: cannot open shared object file"


def test_unknown_parts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.parse(["--only", "linear,decoding"])
    assert "unknown parts: decoding" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert ran.returncode == 2
    assert "no CUDA device" in ran.stderr
    assert not (tmp_path / "out").exists()
