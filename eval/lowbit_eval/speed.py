"""Speed and memory of an evaluation, measured on its own forward passes.

Prefill only: full windows, batch 1, logits of every token. It says nothing about decoding, where
the weights are read once a token.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Speed:
    """Measured while evaluating.

    Args:
        prefill_tokens_per_second: of the model alone, median over windows after the first, which
            warms caches up (the first itself where it is the only one).
        peak_rss_bytes: largest resident set of the process so far, the baseline included; None
            where the system does not tell.
        peak_device_bytes: largest memory that torch held on the GPU; None on a CPU.
    """

    prefill_tokens_per_second: float
    peak_rss_bytes: int | None
    peak_device_bytes: int | None


class SpeedMeter:
    """Collects the time of each forward pass."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rates: list[float] = []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def measure(self, tokens: int) -> Iterator[None]:
        """Times the block, which processes `tokens`."""
        self._synchronize()
        start = time.perf_counter()
        yield
        self._synchronize()
        self._rates.append(tokens / (time.perf_counter() - start))

    def result(self) -> Speed:
        """Returns what was measured so far; at least one block must have been."""
        rates = sorted(self._rates[1:] or self._rates)
        on_gpu = self._device.type == "cuda"
        return Speed(
            prefill_tokens_per_second=rates[len(rates) // 2],
            peak_rss_bytes=peak_rss_bytes(),
            peak_device_bytes=torch.cuda.max_memory_allocated(self._device) if on_gpu else None,
        )

    def _synchronize(self) -> None:
        # Kernels run behind Python's back; without this the clock stops at their launch.
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def peak_rss_bytes() -> int | None:
    """Returns the largest resident set of this process so far; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
