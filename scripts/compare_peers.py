"""Compares lowbit with other quantizers: same model, same calibration tokens, same evaluator.

Every tool quantizes the linear layers of the decoder blocks. Its weights are dequantized, put into
the stock model in float32 and measured by `lowbit_eval` on held-out tokens: KL to the 16-bit model,
flips, perplexity. So what is compared is the choice of codes and scales; kernels are not.

Tools are installed into environments of their own (`--environments`), kept for the next run. One
that cannot be installed or does not run on a CPU is in the result with its reason. Finished cases
are kept, one JSON line each, under `--work`; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lowbit.calibration.tokens import TOKEN_SUFFIXES, load_calibration, load_windows
from lowbit.errors import LowbitError, unknown_name
from lowbit.hf.loading import quiet_libraries
from lowbit.progress import RunProgress
from scripts import command_line
from scripts.peers.cases import Bench, Case, CaseFailedError, OurRecipe, list_cases
from scripts.peers.contenders import CONTENDERS, ENVIRONMENTS, PEERS
from scripts.peers.environments import Ready, prepare
from scripts.peers.outliers import FACTOR, SHARE, write_outlier_model
from scripts.peers.summary import NOT_RUN, draw, rows_of, sentence, verdicts
from scripts.provenance import RESULTS, ROOT, write_result
from scripts.sample_tokens import weights_digest

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lowbit-peers"
ASSETS = ROOT / "tests" / "assets"
LABELS = ("size_class", "tool", "name", "scheme", "seed")
QUICK = {"seeds": 1, "samples": 16, "windows": 8}


class Ledger:
    """Finished cases by key, one JSON line each; a line is written whole or not at all."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.results: dict[str, dict[str, Any]] = {}
        if file.exists():
            for line in file.read_text().splitlines():
                # The last line of a killed run may be cut off; its case is run again.
                if line.endswith("}"):
                    result = json.loads(line)
                    self.results[result["key"]] = result

    def add(self, result: dict[str, Any]) -> None:
        """Keeps a result, in memory and at the end of the file."""
        self.results[result["key"]] = result
        self.file.parent.mkdir(parents=True, exist_ok=True)
        cut = self.file.exists() and not self.file.read_bytes().endswith(b"\n")
        with self.file.open("a") as handle:
            handle.write(("\n" if cut else "") + json.dumps(result) + "\n")


def labels_of(case: Case) -> dict[str, Any]:
    """Returns what tells a case from others in a result."""
    return {key: getattr(case, key) for key in LABELS}


def run_cases(bench: Bench, cases: Sequence[Case], ledger: Ledger) -> list[dict[str, Any]]:
    """Runs what the ledger lacks; returns the failures, which it does not keep."""
    pending = [case for case in cases if case.key not in ledger.results]
    failures = []
    with RunProgress(bool(pending)) as bar:
        bar.stage("compare", len(pending))
        for case in pending:
            seed = "" if case.seed is None else f", seed {case.seed}"
            title = f"{case.name}, {case.scheme}{seed}"
            bar.describe(title)
            try:
                result = {"key": case.key, **labels_of(case), **bench.run(case)}
                ledger.add(result)
                outcome = "refused" if "refused" in result else "done"
            except CaseFailedError as error:
                failures.append({**labels_of(case), "failed": str(error)})
                outcome = "failed"
            bar.advance(1)
            if not sys.stderr.isatty():  # no bar is seen: a log
                print(f"{time.strftime('%H:%M:%S')} {title}: {outcome}", flush=True)
    return failures


def environments(peers: Sequence[str], folder: Path, torch_requirement: str) -> dict[str, Ready]:
    """Returns the environments that `peers` need, installing what is missing."""
    names = list(dict.fromkeys(c.environment for c in CONTENDERS if c.peer in peers))
    ready = {}
    with RunProgress(bool(names)) as bar:
        bar.stage("environments", len(names))
        for name in names:
            bar.describe(f"environment {name}")
            ready[name] = prepare(ENVIRONMENTS[name], folder, torch_requirement)
            bar.advance(1)
    return ready


def make_bench(arguments: argparse.Namespace, model: Path, ready: dict[str, Ready]) -> Bench:
    """Returns the bench of the command line.

    Raises:
        LowbitError: there is no model, or too few tokens.
    """
    config = model / "config.json"
    if not config.is_file():
        raise LowbitError(f"{model}: no decoder here (config.json is missing); give its folder")
    vocab_size = json.loads(config.read_text())["vocab_size"]
    texts = [arguments.calibration, *arguments.heldout]
    needs_tokenizer = any(Path(text).suffix.lower() not in TOKEN_SUFFIXES for text in texts)
    tokenizer = AutoTokenizer.from_pretrained(model) if needs_tokenizer else None
    seqlen = arguments.seqlen
    draws = [
        load_calibration(
            arguments.calibration, tokenizer, vocab_size, arguments.samples, seqlen, seed
        )
        for seed in range(arguments.seeds)
    ]
    tests = {
        Path(text).stem: load_windows(text, tokenizer, vocab_size, seqlen).first(arguments.windows)
        for text in arguments.heldout
    }
    return Bench(model, draws, tests, ready, arguments.limit)


def ledger_of(bench: Bench, work: Path) -> Ledger:
    """Returns the ledger of exactly this model and these tokens."""
    parts = [weights_digest(bench.model)]
    parts += [draw.digest for draw in bench.draws[:1]]
    parts += [test.digest for test in bench.tests.values()]
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return Ledger(work / f"{bench.model.name}-{name}.jsonl")


def content(
    bench: Bench,
    ledger: Ledger,
    cases: Sequence[Case],
    failures: Sequence[dict[str, Any]],
    outliers: bool,
) -> dict[str, Any]:
    """Returns the result: settings, rows, verdicts on every test set, and what did not run."""
    done = [ledger.results[case.key] for case in cases if case.key in ledger.results]
    rows = rows_of(done)
    versions: dict[str, Any] = {}
    for result in done:
        versions.setdefault(result["tool"], {}).update(result.get("versions", {}))
        if "source" in result.get("options", {}):  # compiled from an archive, not installed
            versions[result["tool"]]["source"] = result["options"]["source"]
    samples, seqlen = bench.draws[0].ids.shape
    return {
        "model": bench.model.name,
        "figure": None,
        "outliers": {"factor": FACTOR, "share": SHARE} if outliers else None,
        "calibration": {
            "source": bench.draws[0].description["source"],
            "samples": samples,
            "seqlen": seqlen,
            "digests": [draw.digest for draw in bench.draws],
        },
        "tests": {
            name: {"windows": len(test), "token_digest": test.digest}
            for name, test in bench.tests.items()
        },
        "peers": versions,
        "rows": rows,
        "verdicts": {test: verdicts(rows, test) for test in bench.tests} if rows else {},
        "refused": [
            {**{key: r[key] for key in LABELS}, "reason": r["refused"]}
            for r in done
            if "refused" in r
        ],
        "failed": list(failures),
        "runs": [{k: v for k, v in r.items() if k != "key"} for r in done if "tests" in r],
    }


def shown_command(arguments: argparse.Namespace) -> str:
    """Returns the command with paths inside the repository, file names outside of it."""

    def shown(path: str | Path) -> str:
        full = Path(path).resolve()
        return str(full.relative_to(ROOT)) if full.is_relative_to(ROOT) else full.name

    parts = [f"python scripts/compare_peers.py {shown(arguments.model)}"]
    parts += [f"--calibration {shown(arguments.calibration)}"]
    parts += [f"--heldout {' '.join(shown(text) for text in arguments.heldout)}"]
    parts += [f"--ours {' '.join(arguments.ours)}", f"--only {arguments.only}"]
    parts += [f"--{name} {getattr(arguments, name)}" for name in ("samples", "windows", "seeds")]
    if arguments.figure:
        parts.append(f"--figure {shown(arguments.figure)}")
    return " ".join(parts + (["--outliers"] if arguments.outliers else []))


def main() -> None:
    """Runs the command."""
    parser = command_line.parser(
        __doc__, "python scripts/compare_peers.py tests/assets/books-4m --only hqq,bitsandbytes"
    )
    add = parser.add_argument
    add("model", type=Path, help="folder of a 16-bit decoder")
    add(
        "--calibration",
        default=str(ASSETS / "books-4m-calibration.safetensors"),
        help="text file or token ids to calibrate on",
    )
    add(
        "--heldout",
        nargs="+",
        default=[str(ASSETS / "books-4m-test.safetensors"), "pydoc"],
        help="text files, token ids or `pydoc` to measure on",
    )
    add(
        "--ours",
        nargs="+",
        default=["rtn", "fast"],
        help="[label=]preset, [label=]algorithm[:option=value,...], or `none`",
    )
    add("--only", default=",".join(PEERS), help="tools to run, or `none`")
    add("--seeds", type=int, default=3, help="draws of calibration tokens: 0, 1, ...")
    add("--samples", type=int, default=128, help="calibration windows")
    add("--seqlen", type=int, default=512, help="tokens in a window")
    add("--windows", type=int, default=48, help="held-out windows of each test set")
    add("--quick", action="store_true", help=f"a rehearsal: {QUICK}, few iterations")
    add("--outliers", action="store_true", help="give the model synthetic outlier channels first")
    add("--stored", action="store_true", help="run nothing, make the result of finished cases")
    add("--limit", type=float, default=3600.0, help="seconds for one case of a peer")
    add("--environments", type=Path, default=CACHE / "environments", help="kept environments")
    add("--torch", default="torch==2.13.0", help="what pip installs first in each of them")
    add("--work", type=Path, default=CACHE / "work", help="finished cases, outlier models")
    add("--json", type=Path, default=RESULTS / "peers.json", help="result")
    add("--figure", type=Path, default=None, help="PNG: KL against bits per weight")  # fmt: skip
    command_line.run(parser, _run)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.quick:
        vars(arguments).update(QUICK)
    if arguments.seeds < 1 or arguments.windows < 2:
        raise LowbitError("needed at least 1 seed and, for standard errors, 2 windows")
    ours = [OurRecipe.parse(text) for text in arguments.ours if text != "none"]
    peers = [] if arguments.only == "none" else arguments.only.split(",")
    for peer in peers:
        if peer not in PEERS:
            raise unknown_name("peer", peer, PEERS)
    if not (arguments.model / "config.json").is_file():
        raise LowbitError(
            f"{arguments.model}: no decoder here (config.json is missing); give its folder"
        )
    quiet_libraries()
    model = arguments.model
    if arguments.outliers:
        name = f"{model.name}-outliers-{weights_digest(model)[:8]}"
        arguments.work.mkdir(parents=True, exist_ok=True)
        model = write_outlier_model(model, arguments.work / name)
    cases = list_cases(ours, peers, arguments.seeds, arguments.quick)
    bench = make_bench(arguments, model, {})
    if not arguments.stored:
        bench.environments = environments(peers, arguments.environments, arguments.torch)
    ledger = ledger_of(bench, arguments.work)
    if arguments.stored:
        missing = [case for case in cases if case.key not in ledger.results]
        failures = [{**labels_of(case), "failed": NOT_RUN} for case in missing]
    else:
        failures = run_cases(bench, cases, ledger)
    result = content(bench, ledger, cases, failures, arguments.outliers)
    if arguments.figure and result["rows"]:
        title = model.name + (" (synthetic outliers)" if arguments.outliers else "")
        draw(result["rows"], next(iter(bench.tests)), arguments.figure, title)
        result["figure"] = arguments.figure.name
        print(f"wrote {arguments.figure}")
    write_result(arguments.json, shown_command(arguments), result)
    for failure in (*result["refused"], *failures):
        reason = failure.get("reason") or failure.get("failed")
        print(f"{failure['name']}, {failure['scheme']}: {reason}")
    for test, found in result["verdicts"].items():
        for verdict in found:
            print(f"{test}: {sentence(verdict)}")


if __name__ == "__main__":
    main()
