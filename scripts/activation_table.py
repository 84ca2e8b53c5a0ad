"""Measures what int8 activations cost the bundled model, and which calibrated scale is best.

The weights are the same int8 everywhere; `W8A16_CHANNEL` is what they cost alone. For `W8A8_STATIC`
the scale of a layer covers the largest magnitude that calibration saw, a percentile of all, or is
the one of least squared error, which is what `lowbit quantize` takes. The test tokens are those of
`quality_table.py`, sampled from the original.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lowbit_eval import evaluate
from torch import Tensor

from lowbit import quantize
from lowbit.calibration.ranges import InputRange
from lowbit.calibration.tokens import TokenWindows, load_windows
from lowbit.hf.loading import quiet_libraries
from lowbit.progress import RunProgress
from scripts import command_line
from scripts.provenance import RESULTS, write_result
from scripts.quality_table import CALIBRATION, MODEL, SEQLEN, TEST, load, scores

# Algorithm, scheme, percentile that a calibrated scale covers: 100 is the largest magnitude.
CASES: tuple[tuple[str, str, float | None], ...] = (
    ("rtn", "W8A16_CHANNEL", None),
    ("rtn", "W8A8", None),
    ("rtn", "W8A8_STATIC", None),
    ("rtn", "W8A8_STATIC", 100.0),
    ("rtn", "W8A8_STATIC", 99.999),
    ("rtn", "W8A8_STATIC", 99.99),
    ("gptq", "W8A16_CHANNEL", None),
    ("gptq", "W8A8", None),
    ("gptq", "W8A8_STATIC", None),
)


class PercentileRange(InputRange):
    """Covers a percentile of the magnitudes instead.

    Args:
        percentile: of all values that calibration saw.
    """

    def __init__(self, percentile: float) -> None:
        super().__init__()
        self.percentile = percentile
        self._parts: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Keeps every magnitude: the model is small."""
        self._parts.append(x.detach().abs().flatten())

    def scale(self) -> Tensor:
        """Returns the scale, float32 `[1]`."""
        values = torch.cat(self._parts)
        beyond = round(values.numel() * (1 - self.percentile / 100))
        return (values.topk(max(1, beyond)).values[-1] / 127)[None]


def measure(
    algorithm: str, scheme: str, percentile: float | None, test: TokenWindows
) -> dict[str, Any]:
    """Returns the scores of one quantized model."""
    ranges: Any = InputRange if percentile is None else lambda: PercentileRange(percentile)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch("lowbit.calibration.capture.InputRange", ranges),
    ):
        quantized = quantize(
            MODEL,
            Path(folder) / "quantized",
            scheme=scheme,
            algorithm=algorithm,
            calibration=CALIBRATION,
            progress=False,
        )
        found = scores(evaluate(load(quantized.path), test, load(MODEL)))
    static = scheme.startswith("W8A8_STATIC")
    covers = ("least squared error" if percentile is None else percentile) if static else None
    return {"algorithm": algorithm, "scheme": scheme, "scale": covers, **found}


def main() -> None:
    """Runs the command."""
    parser = command_line.parser(__doc__, "python scripts/activation_table.py --windows 16")
    parser.add_argument("--windows", type=int, default=48, help="of 512 tokens")
    parser.add_argument("--json", type=Path, default=RESULTS / "activations.json", help="result")
    command_line.run(parser, _run)


def _run(arguments: argparse.Namespace) -> None:
    quiet_libraries()
    torch.set_num_threads(1)
    test = load_windows(str(TEST), None, load(MODEL).config.vocab_size, SEQLEN)
    test = test.first(arguments.windows)
    runs = []
    with RunProgress(True) as progress:
        progress.stage("models", len(CASES))
        for algorithm, scheme, percentile in CASES:
            runs.append(measure(algorithm, scheme, percentile, test))
            progress.advance(1)
    content = {"model": MODEL.name, "windows": arguments.windows, "runs": runs}
    write_result(arguments.json, "python scripts/activation_table.py", content)


if __name__ == "__main__":
    main()
