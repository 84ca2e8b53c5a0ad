"""One case: a method at a scheme with one draw of calibration tokens, run and measured.

A peer runs in a process of its own, in its own environment; ours runs here. Either way the result
is a plain float32 decoder, which one evaluator measures against the original.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lowbit_eval import evaluate
from lowbit_eval.evaluate import window_logits
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lowbit import make_algorithm, quantize
from lowbit.algorithms import Algorithm
from lowbit.calibration.tokens import CalibrationTokens, TokenWindows
from lowbit.errors import LowbitError
from lowbit.nn.replace import restore_modules
from scripts.peers.contenders import CONTENDERS, OUR_SCHEMES, Contender, Storage
from scripts.peers.driver import REPORT, WEIGHTS, Job, quantized_linears, write_job
from scripts.peers.environments import Ready
from scripts.provenance import ROOT

OURS = "lowbit"
QUICK_ITERATIONS = 20


class CaseFailedError(Exception):
    """A peer crashed or gave something unusable; tried again in the next run."""


@dataclass(frozen=True)
class OurAlgorithm:
    """An algorithm of `--ours`: its label in tables, and what `make_algorithm` made."""

    label: str
    algorithm: Algorithm

    @staticmethod
    def parse(text: str) -> OurAlgorithm:
        """Returns the algorithm of `[label=]name[:option=value,...]`; values are JSON or words.

        Raises:
            LowbitError: no such algorithm or option, or the text has another form.
        """
        head, _, rest = text.partition(":")
        label, named, name = head.rpartition("=")
        options: dict[str, Any] = {}
        for pair in filter(None, rest.split(",")):
            option, equals, value = pair.partition("=")
            if not equals:
                raise LowbitError(
                    f"--ours {text!r}: {pair!r} is not option=value; write for example "
                    "gptq:act_order=false"
                )
            try:
                options[option] = json.loads(value)
            except json.JSONDecodeError:
                options[option] = value
        return OurAlgorithm(label if named else text, make_algorithm(name, **options))


@dataclass(frozen=True)
class Case:
    """A method, what it is asked for, and the draw of calibration tokens (None: sees none)."""

    size_class: str
    tool: str
    name: str
    scheme: str
    seed: int | None
    contender: Contender | None = None
    storage: Storage | None = None
    ours: OurAlgorithm | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What makes a stored result this case's: changed code or options are another case."""
        if self.ours is not None:
            made = [repr(self.ours.algorithm), _digest_of("lowbit/**/*.py")]
        else:
            assert self.contender is not None
            files = ("driver", self.contender.driver)
            made = [json.dumps(self.options, sort_keys=True)]
            made += [_digest_of(f"scripts/peers/{file}.py") for file in files]
        return "|".join([self.size_class, self.name, self.scheme, str(self.seed), *made])


def _digest_of(pattern: str) -> str:
    digest = hashlib.sha256()
    for file in sorted(ROOT.glob(pattern)):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def list_cases(
    ours: Sequence[OurAlgorithm], peers: Sequence[str], seeds: int, quick: bool
) -> list[Case]:
    """Returns the cases, all of the first seed before the second: a stopped run is still a table.

    Args:
        ours: algorithms of ours.
        peers: tools to run.
        seeds: draws of calibration tokens; once is enough for what sees none.
        quick: fewer iterations where a method has them.
    """
    cases = []
    for seed in range(seeds):
        for size_class, schemes in OUR_SCHEMES.items():
            for entry, scheme in ((entry, scheme) for entry in ours for scheme in schemes):
                cases.append(Case(size_class, OURS, entry.label, scheme, seed, ours=entry))
        for contender in CONTENDERS:
            if contender.peer in peers and (contender.calibrated or seed == 0):
                cases += _contender_cases(contender, seed, quick)
    return cases


def _contender_cases(contender: Contender, seed: int, quick: bool) -> list[Case]:
    cases = []
    for size_class, wanted in contender.storages.items():
        options = contender.options_of(size_class)
        if quick and "iters" in options:
            options["iters"] = QUICK_ITERATIONS
        for storage in wanted:
            scheme = str(options.get("type", storage))
            draw = seed if contender.calibrated else None
            common = (size_class, contender.peer, contender.name, scheme, draw, contender, storage)
            cases.append(Case(*common, options=options))
    return cases


class Replay(nn.Module):
    """Stands for the original in evaluations: its logits on every window, computed once."""

    def __init__(self, model: nn.Module, windows: Sequence[TokenWindows]) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.empty(0))
        self._logits = {
            _ids_key(ids): window_logits(model, ids) for test in windows for ids in test.ids
        }

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        """Returns the stored logits of a window that was given at construction."""
        return SimpleNamespace(logits=self._logits[_ids_key(input_ids[0])][None])


def _ids_key(ids: Tensor) -> bytes:
    return bytes(ids.numpy().tobytes())


@dataclass
class Bench:
    """The model, the tokens, and everything a case needs to run and to be measured.

    Args:
        model: folder of the original.
        draws: calibration tokens of every seed.
        tests: held-out windows by name; the first decides targets.
        environments: by name, ready or not.
        limit: seconds after which a peer's process is ended.
    """

    model: Path
    draws: Sequence[CalibrationTokens]
    tests: dict[str, TokenWindows]
    environments: dict[str, Ready]
    limit: float

    def __post_init__(self) -> None:
        self.original = self.load(self.model)
        self.replay = Replay(self.original, list(self.tests.values()))

    @staticmethod
    def load(folder: Path) -> Any:
        """Returns a decoder in float32, in which all of them are computed."""
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def run(self, case: Case) -> dict[str, Any]:
        """Returns the result of a case: its scores and sizes, or the reason why it was refused.

        Raises:
            CaseFailedError: the peer failed in a way that may not be its last word.
        """
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            tokens = folder / "tokens.safetensors"
            ids = self.draws[case.seed or 0].ids
            save_file({"input_ids": ids.to(torch.int32)}, tokens)
            model, report = (self._ours if case.ours else self._peer)(case, tokens, folder)
        if model is None:
            return report
        scores = {
            test: _kept(evaluate(model, windows, self.replay).to_dict())
            for test, windows in self.tests.items()
        }
        return {**report, "tests": scores}

    def _ours(self, case: Case, tokens: Path, folder: Path) -> tuple[Any, dict[str, Any]]:
        assert case.ours is not None
        samples, seqlen = self.draws[0].ids.shape
        start = time.perf_counter()
        done = quantize(
            self.model,
            folder / "quantized",
            scheme=case.scheme,
            algorithm=case.ours.algorithm,
            calibration=tokens,
            samples=samples,
            seqlen=seqlen,
            progress=False,
        )
        seconds = time.perf_counter() - start
        model = self.load(done.path)
        # The kernels' own rounding of activations is not what is compared.
        restore_modules(model, torch.float32)
        bits = done.bits_per_weight
        report = {
            "weights": sum(m.weight.numel() for m in quantized_linears(self.original).values()),
            "bits_per_weight": bits,
            "stored_bits_per_weight": bits,
            "options": {"algorithm": repr(case.ours.algorithm)},
            "seconds": seconds,
            "versions": {},
        }
        return model, report

    def _peer(self, case: Case, tokens: Path, folder: Path) -> tuple[Any, dict[str, Any]]:
        assert case.contender is not None
        assert case.storage is not None
        ready = self.environments[case.contender.environment]
        if ready.python is None:
            return None, {"refused": ready.reason}
        storage, output = case.storage, folder / "output"
        job = Job(
            self.model.resolve(), tokens, case.contender.method, storage.bits, storage.group_size,
            storage.symmetric, output, case.seed or 0, case.options,
        )  # fmt: skip
        write_job(folder / "job.json", job)
        module = f"scripts.peers.{case.contender.driver}"
        _run_process([str(ready.python), "-m", module, str(folder / "job.json")], self.limit)
        report = json.loads((output / REPORT).read_text())
        if "refused" in report:
            return None, report
        model = self.load(self.model)
        insert_weights(model, load_file(output / WEIGHTS))
        return model, report


def insert_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Puts a peer's dequantized weights into the stock decoder.

    Raises:
        CaseFailedError: a linear layer of a block is left as it was, a name is unknown, or a shape
            is wrong: the peer would be measured on weights that it did not quantize.
    """
    state = model.state_dict()
    missing = sorted({f"{name}.weight" for name in quantized_linears(model)} - set(weights))
    unknown = sorted(set(weights) - set(state))
    if missing or unknown:
        raise CaseFailedError(f"weights missing: {missing[:3]}, unknown: {unknown[:3]}")
    for name, weight in weights.items():
        if state[name].shape != weight.shape or not bool(weight.isfinite().all()):
            raise CaseFailedError(f"{name} is {list(weight.shape)} or not finite")
        state[name].copy_(weight)


def _run_process(command: list[str], limit: float) -> None:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Peers are compared on the CPU, whatever the machine has.
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        raise CaseFailedError(f"not finished after {limit:.0f} s") from None
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no output"]
        raise CaseFailedError(f"ended with {done.returncode}: {lines[-1][:300]}")


def _kept(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "kl": fields["divergence"]["mean"],
        "flips": fields["divergence"]["flips"],
        "perplexity": fields["perplexity"]["perplexity"],
        "perplexity_ratio": fields["perplexity_ratio"]["ratio"],
        "token_digest": fields["token_digest"],
    }
