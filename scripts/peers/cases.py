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
from lowbit.algorithms import ALGORITHMS
from lowbit.calibration.tokens import CalibrationTokens, TokenWindows
from lowbit.errors import LowbitError, unknown_name
from lowbit.nn.replace import restore_modules
from lowbit.recipe import PRESETS, Recipe
from scripts.peers.contenders import CONTENDERS, OUR_SCHEMES, Contender, Storage
from scripts.peers.driver import REPORT, WEIGHTS, Job, Stopwatch, quantized_linears, write_job
from scripts.peers.environments import Ready
from scripts.provenance import ROOT

OURS = "lowbit"
# What decides about codes and scales of ours; the rest of the package may change between runs.
OUR_CODE = (
    "lowbit/*.py",
    *(f"lowbit/{part}/**/*.py" for part in ("algorithms", "calibration", "models", "pipeline")),
    *(f"lowbit/{part}/**/*.py" for part in ("checkpoint", "quant", "tuning")),
)
QUICK_ITERATIONS = 20


class CaseFailedError(Exception):
    """A peer crashed or gave something unusable; tried again in the next run."""


@dataclass(frozen=True)
class OurRecipe:
    """An entry of `--ours`: its label in tables, and everything that is done to the decoder."""

    label: str
    recipe: Recipe

    @staticmethod
    def parse(text: str) -> OurRecipe:
        """Returns the recipe of `[label=]preset` or `[label=]algorithm[:option=value,...]`.

        Values are JSON or words.

        Raises:
            LowbitError: no such preset, algorithm or option, or the text has another form.
        """
        head, _, rest = text.partition(":")
        label, named, name = head.rpartition("=")
        shown = label if named else text
        if name in PRESETS:
            if rest:
                raise LowbitError(
                    f"--ours {text!r}: a preset has no options; give {name} alone, or an algorithm"
                )
            return OurRecipe(shown, PRESETS[name])
        if name not in ALGORITHMS:
            raise unknown_name("preset or algorithm", name, (*PRESETS, *ALGORITHMS))
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
        return OurRecipe(shown, Recipe(make_algorithm(name, **options)))

    def content(self) -> dict[str, Any]:
        """Returns the recipe as JSON values."""
        algorithm = self.recipe.algorithm
        return {
            "algorithm": {"name": algorithm.name, **self.recipe.algorithm_options()},
            **self.recipe.surroundings(),
        }


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
    ours: OurRecipe | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What makes a stored result this case's: changed code or options are another case."""
        if self.ours is not None:
            # A frozen dataclass of frozen dataclasses: every option is in its text.
            made = [repr(self.ours.recipe), digest_of(OUR_CODE)]
        else:
            assert self.contender is not None
            files = ("driver", self.contender.driver)
            made = [json.dumps(self.options, sort_keys=True)]
            made += [digest_of([f"scripts/peers/{file}.py"]) for file in files]
        return "|".join([self.size_class, self.name, self.scheme, str(self.seed), *made])


def digest_of(patterns: Sequence[str]) -> str:
    """Returns a digest of the files of the repository that match one of `patterns`."""
    digest = hashlib.sha256()
    for file in sorted(file for pattern in patterns for file in ROOT.glob(pattern)):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def list_cases(
    ours: Sequence[OurRecipe], peers: Sequence[str], seeds: int, quick: bool
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
        tests: held-out windows by name; rows are ranked by the first.
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
        watch = Stopwatch()
        try:
            with watch:
                done = quantize(
                    self.model,
                    folder / "quantized",
                    scheme=case.scheme,
                    quality=case.ours.recipe,
                    calibration=tokens,
                    samples=samples,
                    seqlen=seqlen,
                    verify=False,  # peers do not, and it is timed
                    progress=False,
                )
        except LowbitError as error:
            return None, {"refused": str(error), "versions": {}}
        model = self.load(done.path)
        # The kernels' own rounding of activations is not what is compared.
        restore_modules(model, torch.float32)
        bits = done.bits_per_weight
        report = {
            "weights": sum(m.weight.numel() for m in quantized_linears(self.original).values()),
            "bits_per_weight": bits,
            "stored_bits_per_weight": bits,
            "options": case.ours.content(),
            "seconds": watch.seconds,
            "cpu_seconds": watch.cpu_seconds,
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
