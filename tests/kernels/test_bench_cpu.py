"""The CPU benchmark: tiny cases from end to end, and what is made of results."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lowbit_kernels.cpu import library as native
from torch import Tensor

BENCHMARKS = Path(__file__).parents[2] / "kernels/benchmarks"
sys.path.append(str(BENCHMARKS))

import cpu  # noqa: E402 - after the path
import cpu_candidates  # noqa: E402
import cpu_linear  # noqa: E402
import cpu_merge  # noqa: E402
import cpu_report  # noqa: E402
import cpu_targets  # noqa: E402
import cpu_timing  # noqa: E402
from cpu_candidates import Candidate, make_inputs  # noqa: E402
from cpu_peers import PEERS  # noqa: E402
from cpu_units import OPPONENTS, Settings, Unit  # noqa: E402
from cpu_workers import Supervisor  # noqa: E402
from rich.console import Console  # noqa: E402

from lowbit.errors import LowbitError  # noqa: E402
from lowbit.progress import RunProgress  # noqa: E402
from scripts.readme_tables import render  # noqa: E402

needs_kernels = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason="there are no native kernels"
)
needs_c_compiler = pytest.mark.skipif(
    not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")),
    reason="the read ceiling needs a C compiler",
)
ORIGIN = {
    "device": {"cpu": "a processor", "cores": 2, "gpu": None},
    "versions": {"torch": "2", "transformers": "5"},
    "commit": "c0ffee",
    "date": "2026-01-01",
}


def command_line(out: Path, *arguments: str) -> list[str]:
    """Returns the arguments of the benchmark for two tiny cases."""
    line = ["--out", str(out), "--quick", "--peers", "none", "--threads", "1", "--tokens", "1,5"]
    line += ["--shapes", "32x256", "--cache-mib", "1", "--schemes", "W4A16", "--commit", "test"]
    return [*line, *arguments]


@needs_kernels
def test_the_command_measures_every_case_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = command_line(tmp_path, "--only", "linear,avx2")
    ran = subprocess.run(
        [sys.executable, str(BENCHMARKS / "cpu.py"), *line],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    result = json.loads((tmp_path / "cpu.json").read_text())
    assert [(row["M"], row["threads"]) for row in result["linear"]] == [(1, 1), (5, 1)]
    for row in result["linear"]:
        assert row["clock"] == "process CPU time"
        assert {"bf16", "lowbit A16", "lowbit A8", "read 1", "read 4"} < set(row["candidates"])
        for name, entry in row["candidates"].items():
            assert 0 < entry["low_us"] <= entry["us"] <= entry["high_us"], name
            assert entry["kind"] == "ceiling" or entry["error"] < 0.02, name
        # Peers were not asked for; those in torch are there all the same, the others say why not.
        assert set(row["candidates"]) | set(row["refused"]) > set(OPPONENTS["W4A16"])
        assert "--peers none" in row["refused"]["openvino u4"]
    assert result["provenance"]["commit"] == "test"
    assert "Targets" in ran.stdout
    if native.library().isa >= native.ISAS.index("avx2"):
        assert ran.returncode == 0, ran.stdout + ran.stderr
        for row in result["avx2"]:
            assert row["isa"] == row["limited_to"] == "avx2"
            assert "fp32" not in row["candidates"]
        assert len(result["avx2"]) == 2
        before = (tmp_path / "linear.jsonl").read_text()
        assert cpu.main(line) == 0
        assert (tmp_path / "linear.jsonl").read_text() == before
    assert cpu.main([*line, "--commit", "other"]) == 2
    assert "holds results of commit test" in capsys.readouterr().err


def test_candidates_take_turns_and_copies_rotate() -> None:
    seen: list[tuple[str, int]] = []

    def calls(name: str, copies: int) -> list[Callable[[], None]]:
        return [lambda copy=copy: seen.append((name, copy)) for copy in range(copies)]  # type: ignore[misc]

    times = cpu_timing.measure({"a": calls("a", 3), "b": calls("b", 2)}, 1, 1e-9)
    assert {name: timing.repeats for name, timing in times.items()} == {"a": 3, "b": 3}
    for name, copies in (("a", 3), ("b", 2)):
        order = [copy for who, copy in seen if who == name]
        assert order == [i % copies for i in range(len(order))]
    names = [name for name, _ in seen[4:]]  # behind the two calls each that are a probe
    assert names == [*"aaabb"] * 3


def test_copies_pass_the_cache_within_the_memory() -> None:
    mib = 1 << 20
    assert cpu_timing.copies_of(8 * mib, 32 * mib, 1 << 30) * 8 >= 2 * 32
    assert cpu_timing.copies_of(100 * mib, 32 * mib, 150 * mib) == 2
    assert cpu_timing.copies_of(1, 32 * mib, 1 << 30) == cpu_timing.MAX_COPIES


def test_the_last_cache_is_found(tmp_path: Path) -> None:
    for index, size in enumerate(("48K", "2048K", "32M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert cpu_timing.cache_bytes(tmp_path) == 32 << 20
    with pytest.raises(LowbitError, match="--cache-mib"):
        cpu_timing.cache_bytes(tmp_path / "nothing")


@needs_c_compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("streams", [1, 4])
def test_plain_reading_reads_everything(streams: int, threads: int) -> None:
    read = cpu_candidates.stream_library().bench_read
    size = 64 * 8 * streams * threads * 5
    words = torch.randint(-(2**63), 2**63 - 1, (size // 8 + 8,))
    words = words[(-words.data_ptr() % 64) // 8 :][: size // 8]
    wanted = 0
    for word in words.tolist():
        wanted ^= word % 2**64
    assert read(words.data_ptr(), size, streams, threads) == wanted
    words[-1] ^= 1
    assert read(words.data_ptr(), size, streams, threads) == wanted ^ 1


def tiny_inputs(scheme: str, shape: tuple[int, int] = (32, 256)) -> cpu_candidates.Inputs:
    """Returns inputs of a small weight with two copies, for one thread."""
    return make_inputs(scheme, shape, lambda size: 2, (1,), tokens=5)


@pytest.mark.parametrize(
    ("scheme", "peer"),
    [
        (scheme, peer)
        for scheme, peers in OPPONENTS.items()
        for peer in peers
        if PEERS[peer].bundled
    ],
)
def test_peers_in_torch_multiply_by_our_weights(scheme: str, peer: str) -> None:
    inputs = tiny_inputs(scheme)
    candidate = PEERS[peer].make(inputs, Settings())
    assert candidate.name == peer
    calls = candidate.bind(inputs.x, 1)
    assert len(calls) == 2
    for call in calls:
        result = candidate.output(call())
        # Beside what it stores, and beside what we do: 8-bit rows are one percent from groups.
        assert candidate.expected is not None
        assert cpu_candidates.relative_error(result, candidate.expected) < 0.02
        assert cpu_candidates.relative_error(result, inputs.expected()) < 0.03


def test_peers_refuse_what_would_crash_them() -> None:
    with pytest.raises(LowbitError, match="multiple of 32"):
        PEERS["torch int8pack"].make(tiny_inputs("W8A16", (32, 250)), Settings())
    with pytest.raises(LowbitError, match="groups of 32, 64, 128 or 256"):
        PEERS["torch int4pack"].make(tiny_inputs("W4A16_CHANNEL", (32, 240)), Settings())
    with pytest.raises(LowbitError, match="--llama"):
        PEERS["llama.cpp q4_0"].make(tiny_inputs("W4A16"), Settings())


@needs_kernels
@needs_c_compiler
def test_a_wrong_result_is_refused_and_a_crash_is_left_out(tmp_path: Path) -> None:
    unit, crash = Unit("W4A16", 32, 256), ("crashing", 5, 1, "the process ended with signal 11")
    settings = Settings(threads=(1,), seconds=1e-3, crashed=(crash,))
    journal = cpu_linear.Journal(tmp_path / "lines", tmp_path / "current")
    inputs = tiny_inputs("W4A16")
    measured = cpu_linear.Measured(unit, settings, journal, inputs)

    def twice(x: Tensor, threads: int) -> list[Callable[[], Tensor]]:
        return [lambda: 2 * (x.float() @ inputs.weight.T)]

    def once(x: Tensor, threads: int) -> list[Callable[[], Tensor]]:
        return [lambda: x.float() @ inputs.weight.T]

    expected = inputs.expected()
    for name, bind in (("bf16", once), ("wrong", twice), ("crashing", once)):
        measured.candidates.append(Candidate(name, "peer", "float", 1, bind, expected))
    row = measured.case(5, 1)
    assert list(row["candidates"]) == ["bf16"]
    assert row["refused"]["wrong"].startswith("LowbitError: wrong result: relative error 1 ")
    assert row["refused"]["crashing"] == crash[3]
    assert measured.case(1, 1)["candidates"].keys() == {"bf16", "crashing"}


WORKER = """
import json, os, signal, sys
names = sys.argv[1::2]
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
settings = json.loads(given["--settings"])
for tokens in (1, 4):
    key = f"best W4A16 32x256 M={tokens} threads=1"
    if key in settings["done"]:
        continue
    refused = {name: why for name, m, _, why in settings["crashed"] if m == tokens}
    for name in ("good", "bad"):
        if name in refused:
            continue
        open(given["--current"], "w").write(json.dumps([name, tokens, 1]))
        if name == "bad" and tokens == 4:
            os.kill(os.getpid(), signal.SIGSEGV)
    row = {"scheme": "W4A16", "shape": "32x256", "M": tokens, "threads": 1, "limited_to": ""}
    open(given["--lines"], "a").write(json.dumps({**row, "refused": refused}) + chr(10))
"""


def test_a_candidate_that_ends_its_process_is_left_out(tmp_path: Path) -> None:
    script, errors = tmp_path / "worker.py", dict[str, str]()
    script.write_text(WORKER)
    supervisor = Supervisor(script, tmp_path, "linear", {}, errors)
    with RunProgress(False) as bar:
        bar.stage("cases", 2)
        supervisor.run(Unit("W4A16", 32, 256).to_json(), Settings(), bar)
    rows = [json.loads(line) for line in (tmp_path / "linear.jsonl").read_text().splitlines()]
    assert [row["M"] for row in rows] == [1, 4]
    assert [row["refused"] for row in rows] == [
        {},
        {"bad": f"the process ended with signal {int(signal.SIGSEGV)}"},
    ]
    assert errors == {}


def test_settings_survive_a_command_line() -> None:
    settings = Settings(tokens=(1, 2), crashed=(("a", 1, 2, "why"),), done=("x",), tiny=True)
    assert Settings.from_json(settings.to_json()) == settings
    unit = Unit("NF4", 8, 16, "avx2")
    assert Unit.from_json(unit.to_json()) == unit
    first, *_ = unit.cases(dataclasses.replace(settings, done=(unit.key(1, 1),)))
    assert first == (2, 1)


def row_of(scheme: str, tokens: int, shape: str = "64x64", **microseconds: float) -> dict[str, Any]:
    """Returns a measured case; keywords are candidates with _ for blanks."""
    kinds = {"bf16": "torch", "lowbit": "ours", "read": "ceiling"}
    candidates = {}
    for name, us in microseconds.items():
        kind = kinds.get(name.split("_")[0], "peer")
        activations = "int8" if name in ("lowbit_A8", "llama") else "float"
        entry = {"us": us, "low_us": us, "high_us": us, "repeats": 3, "copies": 2, "error": 0.01}
        candidates[name.replace("_", " ")] = {
            **entry,
            "kind": kind,
            "activations": activations,
            "weight_bytes": 10,
            "version": "1",
        }
    return {
        "scheme": scheme,
        "shape": shape,
        "M": tokens,
        "threads": 1,
        "limited_to": "",
        "isa": "amx",
        "clock": "process CPU time",
        "candidates": candidates,
        "refused": {"openvino u4": "OSError: nothing there"},
    }


def judged(linear: list[dict[str, Any]], **other: Any) -> dict[str, dict[str, Any]]:
    """Returns the targets by their text."""
    result = {"isa": "amx", "linear": linear, **other}
    return {entry["target"]: entry for entry in cpu_targets.judge_all(result)}


def test_targets_take_the_worst_case() -> None:
    rows = [
        row_of("W4A16", 1, bf16=100, lowbit_A16=20, lowbit_A8=10, read_1=19, read_4=18),
        row_of("NF4", 1, bf16=100, lowbit_A16=25, lowbit_A8=10, read_1=23, read_4=24),
        row_of("W8A16", 1, bf16=100, lowbit_A16=40),
    ]
    targets = judged(rows)
    four = targets["4 bits, M = 1, A16: times bf16"]
    assert (four["measured"], four["met"], four["where"]) == (4.0, False, "NF4 64x64 M=1")
    share = targets["4 bits, M = 1, A16: share of the read ceiling"]
    assert (share["measured"], share["met"]) == (0.9, True)  # 18 / 20 is worse than 23 / 25
    assert targets["8 bits, M = 1, A16: times bf16"]["met"] is True
    assert targets["2 bits, M = 1, A16: times bf16"]["met"] is None
    assert all(entry["applies"] for entry in targets.values())
    assert not judged(rows, isa="avx512")["4 bits, M = 1, A16: times bf16"]["applies"]


def test_a_peer_meets_the_way_that_rounds_as_it_does() -> None:
    row = row_of("W4A16", 1, bf16=100, lowbit_A16=20, lowbit_A8=10, llama=15, plain=18)
    assert list(cpu_targets.against_peers([row])) == [
        (1.5, "llama, W4A16 64x64 M=1"),
        (0.9, "plain, W4A16 64x64 M=1"),
    ]


def decoder_row() -> dict[str, Any]:
    """Returns a measured decoder."""
    speeds = {"bf16": (10.0, 2.0), "lowbit A16": (20.0, 8.0), "lowbit A8": (40.0, 9.0)}
    entries = {
        name: {
            "prefill_tokens_per_second": prefill,
            "decode_tokens_per_second": decode,
            "prefill_vs_llama": prefill / 16,
            "decode_vs_llama": decode / 10,
            "logit_error": 0.01,
        }
        for name, (prefill, decode) in speeds.items()
    }
    row = {"threads": 1, "prompt": 512, "new": 64, "scheme": "W4A16", "clock": "wall clock"}
    return {**row, "refused": {}, "candidates": entries}


def run_folder(folder: Path, rows: list[dict[str, Any]], commit: str = "c0ffee") -> Path:
    """Writes the files of a run."""
    folder.mkdir()
    head = {"command": "make bench-cpu", "provenance": {**ORIGIN, "commit": commit}, "isa": "amx"}
    (folder / "run.json").write_text(json.dumps({**head, "peers": {"gguf": "1"}, "errors": {}}))
    (folder / "linear.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "decoder.jsonl").write_text(json.dumps(decoder_row()) + "\n")
    return folder


def test_runs_are_merged_drawn_and_shown(tmp_path: Path) -> None:
    old = [row_of("W4A16", m, bf16=100, lowbit_A16=50, llama=40, read_1=30) for m in (1, 16)]
    new = [
        row_of("W4A16", 1, bf16=100, lowbit_A16=20, llama=40, read_1=15),
        row_of("W4A16", 1, "64x128", bf16=100, lowbit_A16=5, llama=40, read_1=4),
    ]
    folders = [run_folder(tmp_path / "old", old), run_folder(tmp_path / "new", new)]
    result = cpu_merge.collect(folders)
    assert len(result["linear"]) == 3
    ours = next(e for e in result["summary"] if e["candidate"] == "lowbit A16")
    assert ours["vs_bf16"] == {"1": 10.0, "16": 2.0}  # sqrt(5 * 20)
    cpu_merge.publish(result, tmp_path)
    # JSON has no tuples and no other keys than text, so nothing may change on its way.
    assert json.loads((tmp_path / "cpu.json").read_text()) == result
    if importlib.util.find_spec("matplotlib") is not None:
        assert (tmp_path / "cpu.png").stat().st_size > 10_000
    console = Console(file=io.StringIO(), width=130)
    cpu_report.show(result, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "10.00" in text
    assert "OSError: nothing there" in text
    page = render("<!-- table:cpu -->\n<!-- /table:cpu -->", tmp_path)
    assert "| `W4A16` | 10.00 / - / 2.50 | 2.00 / - / 2.50 | 77% |" in page
    assert "| lowbit A8, threads: 1 | 40.0 | 9.0 |" in page
    decoding = judged([], decoder=result["decoder"])
    assert decoding["decoding: times llama.cpp Q4_0"]["met"] is False
    assert decoding["prefill: times llama.cpp Q4_0"]["met"] is True


def test_runs_of_different_commits_are_not_merged(tmp_path: Path) -> None:
    rows = [row_of("W4A16", 1, bf16=100, lowbit_A16=50)]
    folders = [run_folder(tmp_path / "a", rows), run_folder(tmp_path / "b", rows, "other")]
    with pytest.raises(LowbitError, match="merge runs of one machine and one commit"):
        cpu_merge.collect(folders)
