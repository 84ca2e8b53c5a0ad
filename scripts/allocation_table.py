"""Measures what bit allocation gives at equal bytes: uniform schemes beside chosen ones.

    uniform     one scheme for every layer; its bits per weight are the budget of the others
    allocated   what `lowbit quantize --target-bits` does: gradient-weighted errors of block outputs
    by KL       the same knapsack on divergences of the logits, measured by quantizing one group of
                layers at a time; the model is whole in memory and runs once for each option

A seed draws the calibration windows, of which sensitivities are measured on the first. All are
quantized by plain GPTQ.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lowbit_eval import evaluate
from torch import Tensor, nn

from lowbit import quantize
from lowbit.algorithms import GPTQ
from lowbit.algorithms.base import Statistics
from lowbit.allocation.allocate import OPTIONS, Allocation, Sizes, allocate, dynamic_rules
from lowbit.allocation.fusion import fusion_groups
from lowbit.calibration.statistics import HessianAccumulator
from lowbit.calibration.tokens import load_calibration
from lowbit.errors import LowbitError
from lowbit.hf.loading import quiet_libraries
from lowbit.nn.replace import restore_modules
from lowbit.progress import RunProgress
from lowbit.scheme import Scheme
from scripts import command_line
from scripts.provenance import RESULTS, write_result
from scripts.quality_table import CALIBRATION, MODEL, SEQLEN, load, test_sets

UNIFORM = ("W3A16_CHANNEL", "W3A16_G32", "W4A16_G64")
METHODS = ("uniform", "allocated", "by KL")
# For divergences: the first windows, which are run once for every option of every group.
KL_WINDOWS = 3
# With the uniform schemes themselves among them, so that a choice can always be as good.
CHOICES = tuple(dict.fromkeys((*OPTIONS, *UNIFORM)))
LAYERS = "model.layers"


class Divergences:
    """Divergences of the logits, for one group of layers quantized at a time.

    Args:
        seed: draws the calibration windows.
        samples: of them.
        options: schemes.
    """

    def __init__(self, seed: int, samples: int, options: tuple[Scheme, ...]) -> None:
        self.model, self.options = load(MODEL), options
        vocab_size = self.model.config.vocab_size
        tokens = load_calibration(str(CALIBRATION), None, vocab_size, samples, SEQLEN, seed)
        self.ids = tokens.ids[:KL_WINDOWS]
        self.modules: dict[str, nn.Linear] = {
            name: module
            for name, module in self.model.named_modules()
            if name.startswith(LAYERS) and isinstance(module, nn.Linear)
        }
        self.statistics = self._statistics(tokens.ids[: Allocation(target_bits=4.0).samples])

    @torch.no_grad()
    def _statistics(self, ids: Tensor) -> dict[str, Statistics]:
        meters = {n: HessianAccumulator(m.in_features) for n, m in self.modules.items()}
        handles = [
            module.register_forward_pre_hook(lambda _, args, n=name: meters[n].add(args[0]))
            for name, module in self.modules.items()
        ]
        for batch in ids.split(4):
            self.model(batch, use_cache=False)
        for handle in handles:
            handle.remove()
        return {name: meter.statistics() for name, meter in meters.items()}

    @torch.no_grad()
    def measure(self) -> dict[str, dict[str, float]]:
        """Returns the first module of each group -> scheme -> KL."""
        losses: dict[str, dict[str, float]] = {}
        base = self.model(self.ids, use_cache=False).logits.log_softmax(-1)
        for group in fusion_groups(self.modules):
            losses[group[0]] = {}
            for scheme in self.options:
                with self._quantized(group, scheme):
                    log_q = self.model(self.ids, use_cache=False).logits.log_softmax(-1)
                kl = float((base.exp() * (base - log_q)).sum(-1).mean())
                losses[group[0]][str(scheme)] = kl
        return losses

    @contextmanager
    def _quantized(self, group: list[str], scheme: Scheme) -> Iterator[None]:
        kept = {name: self.modules[name].weight.data for name in group}
        for name, weight in kept.items():
            result = GPTQ(refit=False).quantize(weight, scheme, self.statistics[name])
            self.modules[name].weight.data = result.grid.dequantize(result.codes)
        yield
        for name, weight in kept.items():
            self.modules[name].weight.data = weight


def rules_by_divergence(
    bits: float, losses: dict[str, dict[str, float]], shapes: dict[str, tuple[int, int]]
) -> list[tuple[str, Scheme]]:
    """Returns the rules that meet `bits` with the least sum of measured divergences."""
    weights = sum(rows * columns for rows, columns in shapes.values())
    sizes = Sizes(lambda name, scheme: scheme.stored_bytes(shapes[name]), 0, weights)
    groups = fusion_groups(shapes)
    found = [losses[group[0]] for group in groups]
    chosen = allocate(Allocation(bits, options=CHOICES), groups, found, sizes)
    return dynamic_rules(chosen.schemes, Scheme.parse("W4A16_G64"), LAYERS)


def run_seed(
    seed: int, samples: int, sets: dict[str, Any], bar: RunProgress
) -> list[dict[str, Any]]:
    """Returns the scores of every budget and method for one draw of calibration windows."""
    bar.describe(f"seed {seed}: divergences")
    divergences = Divergences(seed, samples, Allocation(4.0, options=CHOICES).schemes)
    shapes = {n: (m.out_features, m.in_features) for n, m in divergences.modules.items()}
    losses = divergences.measure()
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sensitivities.json"
        for scheme in UNIFORM:
            bits = 0.0
            for method in METHODS:
                bar.describe(f"seed {seed}: {scheme} {method}")
                options: dict[str, Any] = {"scheme": scheme}
                if method == "by KL":
                    options = {"dynamic": dict(rules_by_divergence(bits, losses, shapes))}
                elif method == "allocated":
                    options = {"allocation": Allocation(bits, options=CHOICES, sensitivities=file)}
                name = f"{scheme}-{method}".replace(" ", "-")
                run = measure(Path(folder) / name, seed, samples, sets, options)
                bits = bits or run["bits_per_weight"]
                runs.append({"budget": scheme, "method": method, "seed": seed, **run})
                bar.advance(1)
    return runs


def measure(
    output: Path, seed: int, samples: int, sets: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    """Returns bits and divergences of the model quantized with `options`."""
    quantized = quantize(
        MODEL,
        output,
        algorithm=GPTQ(),
        calibration=CALIBRATION,
        samples=samples,
        seed=seed,
        progress=False,
        **options,
    )
    model, original = load(quantized.path), load(MODEL)
    restore_modules(model, torch.float32)
    allocation = quantized.manifest.get("allocation")
    return {
        "bits_per_weight": quantized.bits_per_weight,
        "predicted_loss": None if allocation is None else allocation["predicted_loss"],
        "layers": None if allocation is None else allocation["modules"],
        "divergence": {
            key: evaluate(model, test, original).to_dict()["divergence"]["mean"]
            for key, test in sets.items()
        },
    }


def summary(runs: list[dict[str, Any]], sets: list[str]) -> list[dict[str, Any]]:
    """Returns one row for each budget, method and test set, over the seeds."""
    rows = []
    for test, scheme, method in ((t, s, m) for t in sets for s in UNIFORM for m in METHODS):
        found = [run for run in runs if (run["budget"], run["method"]) == (scheme, method)]
        means = [run["divergence"][test]["mean"] for run in found]
        rows.append(
            {
                "test": test,
                "budget": scheme,
                "method": method,
                "seeds": len(found),
                "bits_per_weight": max(run["bits_per_weight"] for run in found),
                "kl": statistics.fmean(means),
                "kl_standard_error": statistics.fmean(
                    run["divergence"][test]["standard_error"] for run in found
                ),
                "kl_seed_deviation": statistics.stdev(means) if len(means) > 1 else None,
            }
        )
    return rows


def main() -> None:
    """Runs the command."""
    parser = command_line.parser(__doc__, "python scripts/allocation_table.py --seeds 1")
    parser.add_argument("--seeds", type=int, default=3, help="calibration draws: 0, 1, ...")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--windows", type=int, default=16, help="of 512 tokens to test on")
    parser.add_argument("--json", type=Path, default=RESULTS / "allocation.json", help="result")
    command_line.run(parser, _run)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.seeds < 1 or arguments.windows < 2:
        raise LowbitError("needed at least 1 seed and, for standard errors, 2 windows")
    quiet_libraries()
    sets = {"sampled": test_sets(arguments.windows)["sampled"]}
    runs = []
    with RunProgress(True) as bar:
        bar.stage("allocation", arguments.seeds * len(UNIFORM) * len(METHODS))
        for seed in range(arguments.seeds):
            runs += run_seed(seed, arguments.samples, sets, bar)
    content = {
        "model": MODEL.name,
        "calibration": {"file": CALIBRATION.name, "samples": arguments.samples, "seqlen": SEQLEN},
        "tests": {
            name: {"windows": len(test), "token_digest": test.digest} for name, test in sets.items()
        },
        "summary": summary(runs, list(sets)),
        "runs": runs,
    }
    write_result(arguments.json, "python scripts/allocation_table.py", content)


if __name__ == "__main__":
    main()
