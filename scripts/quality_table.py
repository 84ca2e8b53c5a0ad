"""Measures what quantization costs the bundled model: schemes x algorithms x calibration seeds.

Two test sets, neither seen by the calibration: tokens sampled from the original (where mean log P/Q
is a divergence of whole sequences, see `sample_tokens.py`), and pydoc, the help texts of CPython, a
domain far from the books that the model learned.

    rtn absmax   round to nearest on the grid that covers the extremes; needs no data
    rtn          the same with searched scales, weighted by the calibration's activations
    gptq one fit with scales fitted to the original weights only
    gptq         the default: scales fitted again to the targets of the first solution
    gptq swept   and then every code and scale reconsidered, four times
    gptq aimed   the same, towards the full-precision model's outputs on the inputs there really are

A seed draws the calibration windows from the pool, so the spread over seeds is what another draw
of calibration data would change.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from lowbit_eval import EvaluationResult, evaluate
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowbit import quantize
from lowbit.algorithms import GPTQ, RTN
from lowbit.calibration.tokens import TokenWindows, load_windows
from lowbit.errors import LowbitError
from lowbit.hf.loading import quiet_libraries
from lowbit.progress import RunProgress
from lowbit.recipe import Recipe
from scripts import command_line
from scripts.provenance import RESULTS, ROOT, write_result

ASSETS = ROOT / "tests" / "assets"
MODEL = ASSETS / "books-4m"
CALIBRATION = ASSETS / "books-4m-calibration.safetensors"
TEST = ASSETS / "books-4m-test.safetensors"
SEQLEN = 512
SCHEMES = ("W4A16_G64", "W3A16_G64", "W2A16_G64")

# Name in the table -> what is done to each block, whether it sees calibration data.
METHODS: dict[str, tuple[Recipe, bool]] = {
    "rtn absmax": (Recipe(RTN(search=False)), False),
    "rtn": (Recipe(RTN()), True),
    "gptq one fit": (Recipe(GPTQ(refit=False)), True),
    "gptq": (Recipe(GPTQ()), True),
    "gptq swept": (Recipe(GPTQ(sweeps=4)), True),
    "gptq aimed": (Recipe(GPTQ(sweeps=4), mismatch=True), True),
}


def test_sets(windows: int) -> dict[str, TokenWindows]:
    """Returns the test sets by name, at most `windows` of 512 tokens each."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    vocab_size = len(tokenizer)
    return {
        "sampled": load_windows(str(TEST), None, vocab_size, SEQLEN).first(windows),
        "pydoc": load_windows("pydoc", tokenizer, vocab_size, SEQLEN).first(windows),
    }


def load(directory: Path) -> Any:
    """Returns the model in float32, where all of them are computed alike."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def measure(scheme: str, method: str, seed: int, sets: dict[str, TokenWindows]) -> dict[str, Any]:
    """Returns the scores of one quantized model on every test set."""
    recipe, uses_data = METHODS[method]
    with tempfile.TemporaryDirectory() as folder:
        quantized = quantize(
            MODEL,
            Path(folder) / "quantized",
            scheme=scheme,
            quality=recipe,
            calibration=CALIBRATION if uses_data else None,
            seed=seed,
            progress=False,
        )
        model, original = load(quantized.path), load(MODEL)
        return {
            "scheme": scheme,
            "method": method,
            "seed": seed if uses_data else None,
            "bits_per_weight": quantized.bits_per_weight,
            **{key: scores(evaluate(model, test, original)) for key, test in sets.items()},
        }


def scores(result: EvaluationResult) -> dict[str, Any]:
    """Returns the part of an evaluation that the table keeps."""
    fields = result.to_dict()
    return {
        "perplexity": fields["perplexity"],
        "perplexity_ratio": fields["perplexity_ratio"],
        "divergence": fields["divergence"],
        "token_digest": fields["token_digest"],
    }


def summary(runs: list[dict[str, Any]], sets: list[str]) -> list[dict[str, Any]]:
    """Returns one row for each scheme, method and test set, over the seeds."""
    rows = []
    for scheme, method, test in ((s, m, t) for t in sets for s in SCHEMES for m in METHODS):
        found = [run for run in runs if (run["scheme"], run["method"]) == (scheme, method)]
        divergences = [run[test]["divergence"] for run in found]
        means = [divergence["mean"]["mean"] for divergence in divergences]
        rows.append(
            {
                "test": test,
                "scheme": scheme,
                "method": method,
                "seeds": len(found),
                "bits_per_weight": found[0]["bits_per_weight"],
                "kl": statistics.fmean(means),
                # The windows are the same for every seed, so their error does not shrink with
                # seeds; the spread over seeds is a separate source and stands beside it.
                "kl_standard_error": statistics.fmean(
                    divergence["mean"]["standard_error"] for divergence in divergences
                ),
                "kl_seed_deviation": statistics.stdev(means) if len(means) > 1 else None,
                "flips": statistics.fmean(d["flips"]["mean"] for d in divergences),
                "perplexity": statistics.fmean(r[test]["perplexity"]["perplexity"] for r in found),
                "perplexity_ratio": statistics.fmean(
                    r[test]["perplexity_ratio"]["ratio"] for r in found
                ),
                "perplexity_ratio_interval": {
                    end: statistics.fmean(
                        r[test]["perplexity_ratio"]["interval"][end] for r in found
                    )
                    for end in ("low", "high")
                },
            }
        )
    return rows


def main() -> None:
    """Runs the command."""
    parser = command_line.parser(__doc__, "python scripts/quality_table.py --seeds 1 --windows 16")
    parser.add_argument("--seeds", type=int, default=3, help="calibration draws: 0, 1, ...")
    parser.add_argument("--windows", type=int, default=48, help="of 512 tokens in each test set")
    parser.add_argument("--json", type=Path, default=RESULTS / "quality.json", help="result")
    command_line.run(parser, _run)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.seeds < 1 or arguments.windows < 2:
        raise LowbitError("needed at least 1 seed and, for intervals, 2 windows")
    quiet_libraries()
    sets = test_sets(arguments.windows)
    cells = [
        (scheme, method, seed)
        for scheme in SCHEMES
        for method, (_, uses_data) in METHODS.items()
        for seed in range(arguments.seeds if uses_data else 1)
    ]
    runs = []
    with RunProgress(True) as bar:
        bar.stage("quality", len(cells))
        original = load(MODEL)
        base = {name: evaluate(original, test).to_dict() for name, test in sets.items()}
        for scheme, method, seed in cells:
            bar.describe(f"{scheme} {method}, seed {seed}")
            runs.append(measure(scheme, method, seed, sets))
            bar.advance(1)
    content = {
        "model": MODEL.name,
        "calibration": {"file": CALIBRATION.name, "samples": 128, "seqlen": SEQLEN},
        "tests": {
            name: {
                "windows": len(test),
                "predictions": base[name]["predictions"],
                "token_digest": test.digest,
                "original_perplexity": base[name]["perplexity"],
            }
            for name, test in sets.items()
        },
        "summary": summary(runs, list(sets)),
        "runs": runs,
    }
    write_result(arguments.json, "python scripts/quality_table.py", content)


if __name__ == "__main__":
    main()
