"""The comparison with other quantizers, without any of them: a fake interpreter plays the peer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build_tiny, make_tiny
from torch import Tensor

from lowbit.algorithms import GPTQ, RTN
from lowbit.calibration.tokens import TokenWindows, load_calibration
from lowbit.errors import LowbitError
from lowbit.recipe import PRESETS
from scripts import compare_peers
from scripts.compare_peers import Ledger, run_cases
from scripts.peers import cases
from scripts.peers.cases import Bench, Case, CaseFailedError, OurRecipe, insert_weights, list_cases
from scripts.peers.contenders import (
    CLASSES,
    CONTENDERS,
    ENVIRONMENTS,
    OUR_SCHEMES,
    PEERS,
    Contender,
    Storage,
    Target,
)
from scripts.peers.driver import (
    Job,
    Outcome,
    Stopwatch,
    decode_gptq,
    gptq_dense_bits,
    quantized_linears,
    report,
    write_job,
)
from scripts.peers.environments import Ready, prepare
from scripts.peers.llama_cpp import importance
from scripts.peers.outliers import FACTOR, READERS, add_outliers, write_outlier_model
from scripts.peers.summary import draw, rows_of, sentence, verdicts
from scripts.tables.peers import peers

SEQLEN = 16

# A peer that quantizes nothing: it writes what lies beside it, or does what its folder says.
FAKE = f"""#!{sys.executable} -I
import json, pathlib, shutil, sys
here = pathlib.Path(__file__).parent
job = json.loads(pathlib.Path(sys.argv[3]).read_text())
(here / "jobs.jsonl").open("a").write(json.dumps(job) + "\\n")
if (here / "broken").exists():
    sys.exit("the peer is broken")
output = pathlib.Path(job["output"])
output.mkdir()
for file in (here / "prepared").iterdir():
    shutil.copy(file, output)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny("llama", folder)
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 256, (12, SEQLEN), generator=generator, dtype=torch.int32)
    save_file({"input_ids": ids}, file)
    return file


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    """Returns the folder of a fake peer, with its interpreter and what it will write."""
    folder = tmp_path / "peer"
    (folder / "prepared").mkdir(parents=True)
    (folder / "python").write_text(FAKE)
    (folder / "python").chmod(0o755)
    return folder


@pytest.fixture
def bench(model: Path, tokens: Path, peer: Path) -> Bench:
    draws = [load_calibration(str(tokens), None, 256, 4, SEQLEN, seed) for seed in range(2)]
    windows = TokenWindows.from_rows(load_file(tokens)["input_ids"][:3].long(), SEQLEN)
    return Bench(model, draws, {"test": windows}, {"fake": Ready(peer / "python")}, 60.0)


def fake_contender(**changes: Any) -> Contender:
    fields: dict[str, Any] = {
        "name": "Fake", "peer": "fake", "environment": "fake", "driver": "gptq_model",
        "method": "plain", "storages": {"4": (Storage(4, 128, True),)},
    }  # fmt: skip
    return Contender(**{**fields, **changes})


def fake_case(seed: int | None = 0, **changes: Any) -> Case:
    contender = fake_contender(**changes)
    storage = contender.storages["4"][0]
    options = contender.options_of("4")
    return Case("4", "fake", "Fake", str(storage), seed, contender, storage, options=options)


def prepare_outcome(peer: Path, weights: dict[str, Tensor]) -> None:
    job = Job(peer, peer, "plain", 4, 128, True, peer / "prepared")
    count = sum(weight.numel() for weight in weights.values())
    report(job, Outcome(weights, count // 2, 4.125 * count, {}, Stopwatch()), ["no-such-package"])


# Finished cases


def test_ledger_keeps_results_and_forgets_a_line_that_was_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "ledger.jsonl"
    ledger = Ledger(file)
    ledger.add({"key": "first", "kl": 1.0})
    with file.open("a") as handle:
        handle.write('{"key": "second", "kl"')
    again = Ledger(file)
    assert list(again.results) == ["first"]
    again.add({"key": "second", "kl": 2.0})
    assert Ledger(file).results["second"]["kl"] == 2.0
    assert list(Ledger(file).results) == ["first", "second"]


class Counting:
    """Stands for a bench: counts what is run, and fails where it is told to."""

    def __init__(self, failing: str = "") -> None:
        self.ran: list[str] = []
        self.failing = failing

    def run(self, case: Case) -> dict[str, Any]:
        self.ran.append(case.name)
        if case.name == self.failing:
            raise CaseFailedError("ended with 1")
        return {"refused": "not on a CPU"} if case.name == "b" else {"tests": {}}


def test_a_second_run_does_what_is_missing_and_what_failed(tmp_path: Path) -> None:
    wanted = [Case("4", "lowbit", n, "W4", 0, ours=OurRecipe.parse("rtn")) for n in "abc"]
    first: Any = Counting(failing="c")
    ledger = Ledger(tmp_path / "ledger.jsonl")
    failures = run_cases(first, wanted, ledger)
    assert [failure["name"] for failure in failures] == ["c"]
    assert failures[0]["failed"] == "ended with 1"
    # A refusal is a result; a failure may have been an accident.
    second: Any = Counting()
    assert run_cases(second, wanted, Ledger(ledger.file)) == []
    assert second.ran == ["c"]


def test_cases_differ_by_recipe_options_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def ours(text: str) -> str:
        return Case("4", "lowbit", "x", "W4A16_G128", 0, ours=OurRecipe.parse(text)).key

    assert ours("gptq") == ours("x=gptq")
    assert ours("gptq") != ours("gptq:act_order=false")
    assert fake_case().key == fake_case().key
    keys = {fake_case().key, fake_case(1).key, fake_case(options={"": {"iters": 5}}).key}
    keys |= {fake_case(driver="weight_only").key}
    assert len(keys) == 4
    before = ours("gptq"), fake_case().key
    monkeypatch.setattr(cases, "digest_of", lambda patterns: "changed")
    assert ours("gptq") != before[0]
    assert fake_case().key != before[1]


def test_the_code_of_ours_is_found() -> None:
    assert cases.digest_of(["lowbit/recipe.py"]) != cases.digest_of(["lowbit/no_such_file.py"])
    nothing = cases.digest_of([])
    assert all(cases.digest_of([pattern]) != nothing for pattern in cases.OUR_CODE)


def test_every_seed_of_what_is_calibrated_and_one_of_what_is_not() -> None:
    ours = [OurRecipe.parse("rtn")]
    found = list_cases(ours, PEERS, seeds=3, quick=False)
    assert len({case.key for case in found}) == len(found)
    for contender in CONTENDERS:
        seeds = {case.seed for case in found if case.name == contender.name}
        assert seeds == ({0, 1, 2} if contender.calibrated else {None}), contender.name
    schemes = {(c.size_class, c.scheme) for c in found if c.ours and c.seed == 2}
    assert schemes == {(name, scheme) for name, them in OUR_SCHEMES.items() for scheme in them}
    # All of the first seed come first, so that a stopped run is a table.
    order = [case.seed or 0 for case in found]
    assert order == sorted(order)
    rounds = {c.options["iters"] for c in list_cases([], ["auto-round"], 1, quick=True)}
    assert rounds == {cases.QUICK_ITERATIONS}


def test_contenders_name_what_exists() -> None:
    drivers = Path(cases.__file__).parent
    for contender in CONTENDERS:
        assert contender.environment in ENVIRONMENTS
        assert set(contender.storages) <= set(CLASSES)
        assert (drivers / f"{contender.driver}.py").is_file()


# Ours


def test_entries_of_ours() -> None:
    assert OurRecipe.parse("rtn").recipe.algorithm == RTN()
    entry = OurRecipe.parse("plain=gptq:act_order=false,damp_percent=0.05")
    assert (entry.label, entry.recipe.algorithm) == ("plain", GPTQ(0.05, act_order=False))
    assert OurRecipe.parse("gptq:act_order=false").label == "gptq:act_order=false"
    for name, recipe in PRESETS.items():
        assert OurRecipe.parse(name).recipe is recipe
        assert OurRecipe.parse(f"label={name}").label == "label"
        content = json.loads(json.dumps(OurRecipe.parse(name).content()))
        assert content["algorithm"]["name"] == recipe.algorithm.name


@pytest.mark.parametrize(
    ("text", "sentence_part"),
    [
        ("gtpq", "unknown preset or algorithm 'gtpq'; did you mean 'gptq'?"),
        ("gptq:act_order", "is not option=value"),
        ("gptq:order=true", "order"),
        ("fast:act_order=false", "a preset has no options"),
    ],
)
def test_bad_entries_of_ours(text: str, sentence_part: str) -> None:
    with pytest.raises(LowbitError, match=sentence_part.replace("?", r"\?")):
        OurRecipe.parse(text)


def test_ours_is_quantized_and_measured(bench: Bench) -> None:
    case = Case("4", "lowbit", "rtn", "W4A16_G64", 1, ours=OurRecipe.parse("rtn"))
    result = bench.run(case)
    assert result["tests"]["test"]["kl"]["mean"] > 0
    assert 4.25 <= result["bits_per_weight"] < 4.6  # 168 is no multiple of 64
    assert result["options"]["algorithm"]["name"] == "rtn"
    count = sum(layer.weight.numel() for layer in quantized_linears(bench.original).values())
    assert result["weights"] == count
    eight = bench.run(Case("4", "lowbit", "rtn", "W8A16", 0, ours=OurRecipe.parse("rtn")))
    assert eight["tests"]["test"]["kl"]["mean"] < result["tests"]["test"]["kl"]["mean"] / 20


def test_what_ours_refuses_is_a_result(bench: Bench) -> None:
    case = Case("4", "lowbit", "rtn", "W4A17", 0, ours=OurRecipe.parse("rtn"))
    assert "W4A17" in bench.run(case)["refused"]


# Peers


def test_a_peer_that_changes_nothing_has_no_divergence(bench: Bench, peer: Path) -> None:
    linears = quantized_linears(bench.original)
    exact = {f"{name}.weight": layer.weight.detach() for name, layer in linears.items()}
    prepare_outcome(peer, exact)
    result = bench.run(fake_case(1, options={"": {"iters": 7}}))
    assert result["tests"]["test"]["kl"]["mean"] == pytest.approx(0, abs=1e-9)
    assert result["tests"]["test"]["flips"]["mean"] == 0
    assert result["tests"]["test"]["perplexity_ratio"] == pytest.approx(1)
    assert (result["bits_per_weight"], result["stored_bits_per_weight"]) == (4.125, 4.0)
    assert result["versions"]["no-such-package"] is None
    job = json.loads((peer / "jobs.jsonl").read_text())
    asked = {key: job[key] for key in ("bits", "group_size", "symmetric", "seed", "options")}
    assert asked == {
        "bits": 4, "group_size": 128, "symmetric": True, "seed": 1, "options": {"iters": 7},
    }  # fmt: skip

    prepare_outcome(peer, {name: weight + 0.02 for name, weight in exact.items()})
    assert bench.run(fake_case())["tests"]["test"]["kl"]["mean"] > 1e-4


def test_peers_get_the_tokens_of_their_seed(bench: Bench, tmp_path: Path) -> None:
    seen = []

    def look(case: Case, file: Path, folder: Path) -> tuple[None, dict[str, Any]]:
        seen.append(load_file(file)["input_ids"].long())
        return None, {"refused": "only looking"}

    bench._peer = look  # type: ignore[method-assign,assignment]
    for seed in (0, 1):
        bench.run(fake_case(seed))
        assert torch.equal(seen[seed], bench.draws[seed].ids)
    assert not torch.equal(seen[0], seen[1])


def test_a_peer_that_crashes_fails_with_its_last_line(bench: Bench, peer: Path) -> None:
    (peer / "broken").touch()
    with pytest.raises(CaseFailedError, match="ended with 1: the peer is broken"):
        bench.run(fake_case())


def test_a_peer_that_was_not_installed_is_refused(bench: Bench) -> None:
    bench.environments = {"fake": Ready(None, "not installed: no such package")}
    assert bench.run(fake_case()) == {"refused": "not installed: no such package"}


def test_a_peer_must_have_quantized_every_layer() -> None:
    model = make_tiny("llama")
    weights = {f"{n}.weight": layer.weight for n, layer in quantized_linears(model).items()}
    name = next(iter(weights))
    assert not any("lm_head" in other for other in weights)
    with pytest.raises(CaseFailedError, match="weights missing"):
        insert_weights(model, {key: w for key, w in weights.items() if key != name})
    with pytest.raises(CaseFailedError, match="unknown: \\['extra'\\]"):
        insert_weights(model, {**weights, "extra": weights[name]})
    with pytest.raises(CaseFailedError, match="not finite"):
        insert_weights(model, {**weights, name: torch.full_like(weights[name], torch.nan)})


def test_environments_are_installed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def fake_run(status: int) -> Callable[..., subprocess.CompletedProcess[str]]:
        def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            ran.append(command)
            if "venv" in command:
                Path(command[-1]).mkdir(exist_ok=True)
            return subprocess.CompletedProcess(command, status if "pip" in command else 0)

        return run

    environment = ENVIRONMENTS["gptqmodel"]
    monkeypatch.setattr(subprocess, "run", fake_run(1))
    failed = prepare(environment, tmp_path, "torch==1")
    assert failed.python is None
    assert "not installed" in failed.reason
    assert "gptqmodel.log" in failed.reason
    monkeypatch.setattr(subprocess, "run", fake_run(0))
    python = tmp_path / "gptqmodel" / "bin" / "python"
    assert prepare(environment, tmp_path, "torch==1") == Ready(python)
    assert ran[-1][-2:] == ["--no-build-isolation", "gptqmodel"]
    assert (tmp_path / "constraints.txt").read_text() == "torch==1\n"
    count = len(ran)
    assert prepare(environment, tmp_path, "torch==1") == Ready(python)
    assert len(ran) == count
    prepare(environment, tmp_path, "torch==2")
    assert len(ran) > count


# Bits and weights of a peer's files


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Returns AutoGPTQ's int32 words of `codes` `[n, columns]`, written bit by bit."""
    columns = []
    for column in codes.T.tolist():
        stream = "".join(format(code, f"0{bits}b")[::-1] for code in column)
        words = [int(stream[i : i + 32][::-1], 2) for i in range(0, len(stream), 32)]
        columns.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(columns, dtype=torch.int64).T.to(torch.int32)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_files_are_read_as_they_were_written(bits: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    rows, columns, group = 32, 64, 32
    codes = torch.randint(0, 1 << bits, (columns, rows), generator=generator)
    zeros = torch.randint(1, 1 << bits, (columns // group, rows), generator=generator)
    if symmetric:
        zeros = torch.full_like(zeros, 1 << (bits - 1))
    scales = torch.rand(columns // group, rows, generator=generator).half()
    tensors = {
        "x.qweight": pack_words(codes, bits),
        "x.qzeros": pack_words((zeros - 1).T.contiguous(), bits).T.contiguous(),
        "x.scales": scales,
    }
    job = Job(Path(), Path(), "plain", bits, group, symmetric, Path())
    wide = scales.double().repeat_interleave(group, 0)
    expected = ((codes - zeros.repeat_interleave(group, 0)) * wide).T
    torch.testing.assert_close(
        decode_gptq(tensors, "x", job, 1).double(), expected, rtol=1e-6, atol=0
    )
    # 64 * 32 codes, and for each of 64 groups 16 bits, and `bits` where there is a zero point.
    assert gptq_dense_bits(tensors, "x", job) == 2048 * bits + 64 * (16 + bits * (not symmetric))
    if symmetric:
        with pytest.raises(ValueError, match="symmetric zero points"):
            decode_gptq(tensors, "x", job, 0)


def test_reordered_groups_are_followed() -> None:
    codes = torch.arange(64).remainder(16)[:, None].repeat(1, 8)
    order = torch.arange(64) % 2
    tensors = {
        "x.qweight": pack_words(codes, 4),
        "x.qzeros": pack_words(torch.full((8, 2), 7), 4).T.contiguous(),
        "x.scales": torch.tensor([[1.0], [10.0]]).repeat(1, 8).half(),
        "x.g_idx": order.int(),
    }
    job = Job(Path(), Path(), "plain", 4, 32, True, Path())
    expected = (codes - 8) * torch.where(order == 0, 1.0, 10.0)[:, None]
    torch.testing.assert_close(decode_gptq(tensors, "x", job, 1), expected.T.contiguous())


def test_importance_is_the_mean_of_squared_inputs() -> None:
    model = make_tiny("llama")
    ids = torch.arange(32).reshape(2, 16) + 3
    seen: list[Tensor] = []
    layer = model.model.layers[1].mlp.down_proj
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    found = importance(model, ids)
    handle.remove()
    expected = torch.cat([x.flatten(0, 1) for x in seen]).double().square().mean(0)
    torch.testing.assert_close(found["model.layers.1.mlp.down_proj"].double(), expected)
    assert set(found) == set(quantized_linears(model))


# Synthetic outliers


def test_outliers_leave_the_function_as_it_was() -> None:
    model, plain = make_tiny("llama"), make_tiny("llama")
    ids = torch.arange(24)[None] + 3
    with torch.no_grad():
        before = model(ids).logits
        assert add_outliers(model) == len(READERS) * 3 + 3 * 2  # 1, 1 and 3 channels a block
        after = model(ids).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    norm, other = model.model.layers[0].input_layernorm, plain.model.layers[0].input_layernorm
    ratios = norm.weight / other.weight
    assert sorted(ratios.unique().tolist()) == [1.0, FACTOR]
    up, other_up = model.model.layers[0].mlp.up_proj, plain.model.layers[0].mlp.up_proj
    # Its rows are scaled up, and the columns that read the norm down.
    ratios = up.weight / other_up.weight
    assert sorted(ratios.unique().tolist()) == [1 / FACTOR, 1.0, FACTOR]
    assert int((ratios.median(1).values == FACTOR).sum()) == 3


def test_outliers_refuse_decoders_that_they_do_not_know(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match="need a decoder with `model"):
        add_outliers(make_tiny("gpt2"))
    with pytest.raises(LowbitError, match="block 0 has no"):
        add_outliers(make_tiny("phi3"))
    build_tiny("gemma2", tmp_path / "gemma2")
    # Its norms multiply by 1 + weight.
    with pytest.raises(LowbitError, match="compare it without --outliers"):
        write_outlier_model(tmp_path / "gemma2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_outlier_model_is_written_once(model: Path, tmp_path: Path) -> None:
    written = write_outlier_model(model, tmp_path / "out")
    stamp = (written / "model.safetensors").stat().st_mtime_ns
    assert write_outlier_model(model, tmp_path / "out") == written
    assert (written / "model.safetensors").stat().st_mtime_ns == stamp
    before, after = load_file(model / "model.safetensors"), load_file(written / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("input_layernorm" in name for name in changed)
    assert not any("embed" in name or "o_proj" in name for name in changed)


# Rows, verdicts, figure


def result(
    tool: str, kl: float, bits: float, size_class: str = "4", seed: int = 0, **changes: Any
) -> dict[str, Any]:
    scores = {
        "kl": {"mean": kl, "standard_error": 0.1 * kl},
        "flips": {"mean": 0.1},
        "perplexity": 20.0,
        "perplexity_ratio": 1.0 + kl,
    }
    return {
        "size_class": size_class, "tool": tool, "name": tool, "scheme": f"s{bits}", "seed": seed,
        "bits_per_weight": bits, "stored_bits_per_weight": bits, "seconds": 2.0,
        "cpu_seconds": 1.0, "tests": {"test": scores}, **changes,
    }  # fmt: skip


def test_rows_are_means_over_seeds_the_best_first() -> None:
    found = [
        result("a", 0.3, 4.1), result("b", 0.1, 4.1, seed=0), result("b", 0.2, 4.1, seed=1),
        result("a", 0.01, 2.1, "2"), {**result("c", 0.0, 4.0), "refused": "no"},
    ]  # fmt: skip
    del found[-1]["tests"]
    rows = rows_of(found)
    assert [(row["size_class"], row["name"]) for row in rows] == [
        ("4", "b"),
        ("4", "a"),
        ("2", "a"),
    ]
    scores = rows[0]["tests"]["test"]
    assert rows[0]["seeds"] == 2
    assert scores["kl"] == pytest.approx(0.15)
    assert scores["kl_standard_error"] == pytest.approx(0.015)
    assert scores["kl_seed_deviation"] == pytest.approx(0.05 * 2**0.5)
    assert rows[1]["tests"]["test"]["kl_seed_deviation"] is None


def verdict_of(target: Target, *found: dict[str, Any]) -> dict[str, Any]:
    return verdicts(rows_of(found), "test", [target])[0]


def test_a_target_is_met_against_every_peer_at_no_more_bits() -> None:
    target = Target("4", "best", 0.85)
    ours = result("lowbit", 0.080, 4.125, name="best")
    wide = result("lowbit", 0.050, 4.5, name="best")
    assert verdict_of(target, ours, result("peer", 0.1, 4.125))["met"]
    missed = verdict_of(target, ours, result("peer", 0.1, 4.125), result("good", 0.09, 4.25))
    assert (missed["met"], missed["peer"]) == (False, "good s4.25")
    assert missed["ratio"] == pytest.approx(0.08 / 0.09)
    # The wide one meets peers of its size, and none that is smaller.
    both = (ours, wide, result("peer", 0.1, 4.125))
    assert verdict_of(target, *both)["ours"] == "s4.125"
    assert verdict_of(target, *both, result("large", 0.06, 4.5))["ratio"] == pytest.approx(5 / 6)
    small = verdict_of(target, *both, result("tiny", 0.001, 4.0))
    assert small["met"]
    assert small["smaller_peers"] == ["tiny s4.0"]
    assert "left out: tiny s4.0" in sentence(small)


def test_what_a_target_leaves_out() -> None:
    target = Target("nf4", "gptq", 0.85, ("bitsandbytes",))
    ours = result("lowbit", 0.08, 4.127, "nf4", name="gptq")
    peer = result("bitsandbytes", 0.1, 4.127, "nf4")
    assert verdict_of(target, ours, peer, result("other", 0.01, 4.127, "nf4"))["met"]
    unmeasured = verdict_of(target, result("lowbit", 0.01, 4.1, "nf4", name="rtn"), peer)
    assert unmeasured["met"] is None
    assert "gptq was not measured" in sentence(unmeasured)
    assert "no peer was measured" in sentence(verdict_of(target, ours))
    smaller = verdict_of(target, ours, result("bitsandbytes", 0.1, 4.0, "nf4"))
    assert "all peers are smaller: bitsandbytes s4.0" in sentence(smaller)


def test_time_is_that_of_the_better_of_ours() -> None:
    target = Target("4", "balanced", 1.0, ("auto-round",), time=True)
    slow = result("lowbit", 0.01, 4.1, name="balanced", cpu_seconds=30.0)
    quick = result("lowbit", 0.05, 4.05, name="balanced", cpu_seconds=3.0)
    peer = result("auto-round", 0.1, 4.1, cpu_seconds=20.0)
    found = verdict_of(target, slow, quick, peer)
    assert (found["met"], found["ratio"]) == (False, 1.5)
    assert "no more CPU time than auto-round" in sentence(found)
    assert verdict_of(target, {**slow, "cpu_seconds": 20.0}, peer)["met"]


def test_figure_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = rows_of([result("lowbit", 0.1, 4.1), result("peer", 0.2, 4.2)])
    draw(rows, "test", tmp_path / "folder" / "figure.png", "tiny")
    assert (tmp_path / "folder" / "figure.png").read_bytes()[:4] == b"\x89PNG"


# The command


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["compare_peers.py", *map(str, arguments)])
    compare_peers.main()


@pytest.mark.parametrize(
    ("arguments", "sentence_part"),
    [
        (["--only", "gptqmodell"], "did you mean 'gptqmodel'"),
        (["--ours", "best-of-all"], "unknown preset or algorithm"),
        (["--seeds", "0"], "at least 1 seed"),
        (["--windows", "1"], "2 windows"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str],
    sentence_part: str,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_main(monkeypatch, model, *arguments)
    assert exit_.value.code == 2
    printed = capsys.readouterr().err
    assert sentence_part in printed
    assert printed.count("\n") == 1


def test_a_folder_without_a_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_main(monkeypatch, tmp_path, "--only", "none")
    assert exit_.value.code == 2
    assert "config.json is missing" in capsys.readouterr().err


def test_command_compares_and_goes_on(
    model: Path,
    tokens: Path,
    peer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    linears = quantized_linears(make_tiny("llama"))
    prepare_outcome(peer, {f"{n}.weight": x.weight.detach() + 0.01 for n, x in linears.items()})
    contenders = (fake_contender(),)
    monkeypatch.setattr(cases, "CONTENDERS", contenders)
    monkeypatch.setattr(compare_peers, "CONTENDERS", contenders)
    monkeypatch.setattr(compare_peers, "PEERS", ("fake",))
    monkeypatch.setattr(compare_peers, "ENVIRONMENTS", {"fake": ENVIRONMENTS["shared"]})
    monkeypatch.setattr(compare_peers, "prepare", lambda *_: Ready(peer / "python"))
    monkeypatch.setattr(cases, "OUR_SCHEMES", {"4": ("W4A16_G64", "W4A17")})
    arguments: list[object] = [
        model, "--calibration", tokens, "--heldout", tokens, "--ours", "balanced=rtn",
        "--only", "fake", "--seeds", 2, "--samples", 4, "--seqlen", SEQLEN, "--windows", 3,
        "--outliers", "--work", tmp_path / "work", "--json", tmp_path / "result.json",
    ]  # fmt: skip
    run_main(monkeypatch, *arguments)
    result = json.loads((tmp_path / "result.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert set(rows) == {"balanced", "Fake"}
    assert rows["Fake"]["seeds"] == rows["balanced"]["seeds"] == 2
    assert [entry["scheme"] for entry in result["refused"]] == ["W4A17", "W4A17"]
    assert result["failed"] == []
    assert result["outliers"]["factor"] == FACTOR
    assert "--outliers" in result["command"]
    assert str(tmp_path) not in json.dumps(result)
    assert result["peers"]["fake"]["no-such-package"] is None
    first = result["verdicts"]["tokens"][0]
    assert first["target"].startswith("class 4: balanced has no more KL")
    assert "W4A17" in capsys.readouterr().out
    page = peers(result)
    assert "| **lowbit** balanced, W4A16_G64 | " in page
    assert "- balanced, W4A17: " in page
    assert "draws)" not in page

    (peer / "jobs.jsonl").unlink()
    run_main(monkeypatch, *arguments)
    assert not (peer / "jobs.jsonl").exists(), "a finished case was run again"
    assert json.loads((tmp_path / "result.json").read_text())["rows"] == result["rows"]

    run_main(monkeypatch, *arguments, "--stored", "--seeds", 3)
    assert not (peer / "jobs.jsonl").exists()
    partial = json.loads((tmp_path / "result.json").read_text())
    assert partial["rows"] == result["rows"]
    assert {entry["seed"] for entry in partial["failed"]} == {2}
    assert "Fake, 4 bits g128 sym (2 of 3 draws)" in peers(partial)
    line = "- Fake, 4 bits g128 sym: "
    assert line not in peers(partial)
    assert line + "not run yet" in peers({**partial, "rows": []})
    for entry in partial["failed"]:
        entry["failed"] = "it crashed"
    assert line + "it crashed" in peers(partial)


def test_jobs_are_read_as_they_were_written(tmp_path: Path) -> None:
    from scripts.peers.driver import parse_job

    job = Job(tmp_path, tmp_path / "t", "awq", 3, 128, False, tmp_path / "o", 2, {"iters": 5})
    write_job(tmp_path / "job.json", job)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["driver", str(tmp_path / "job.json")])
        assert parse_job() == job
