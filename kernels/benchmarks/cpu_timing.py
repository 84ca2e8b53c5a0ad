"""Times of CPU work: candidates in turns, weights cold.

*In turns*: every candidate makes a few calls, then all of them again, so that clocks, neighbours
and temperature meet all alike. Medians are compared.
*Cold*: a candidate has several copies of its weight and takes the next one at every call. Together
they are twice as large as the last cache, and the other candidates' weights pass through it too.
*The clock*: with one thread, the processor time of the whole process, all its threads included; it
does not grow while somebody else has the core. With more threads it would add up what runs at the
same time, so the wall clock is read, after a pause in which OpenMP's waiting threads go to sleep.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from timing import Timing

from lowbit.errors import LowbitError

Call = Callable[[], Any]

CACHE_MULTIPLE = 2
# Enough: small weights are evicted by the other candidates as well.
MAX_COPIES = 24
TURNS = (3, 25)
# One turn of one candidate is about this long, if it has enough copies to call.
TURN_SECONDS = 0.02
# Longer than libgomp's and TBB's threads wait for work before they sleep.
PAUSE_SECONDS = 0.004
# Waking threads takes microseconds; calls longer than this need no call before them for that.
LONG_CALL_SECONDS = 0.01
_SYSTEM = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def cache_bytes(system: Path = _SYSTEM) -> int:
    """Returns the size of the last-level cache that this processor says it has.

    Raises:
        LowbitError: the system does not tell.
    """
    sizes = []
    for file in system.glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) * _UNITS[text[-1]] if text[-1] in _UNITS else int(text))
    if not sizes:
        raise LowbitError(
            f"{system} does not say how large the last-level cache is; give it with --cache-mib"
        )
    return max(sizes)


def copies_of(weight_bytes: int, cache: int, memory: int) -> int:
    """Returns how many copies of a weight to rotate over: two at least.

    Args:
        weight_bytes: of one copy.
        cache: bytes of the last-level cache.
        memory: bytes that all copies may take.
    """
    wanted = math.ceil(CACHE_MULTIPLE * cache / max(weight_bytes, 1)) + 1
    return max(2, min(wanted, MAX_COPIES, memory // max(weight_bytes, 1)))


def clock(threads: int) -> tuple[str, Callable[[], float]]:
    """Returns the clock for a number of threads: its name, and what reads it in seconds."""
    if threads == 1:
        return "process CPU time", time.process_time
    return "wall clock", time.perf_counter


def measure(
    candidates: Mapping[str, Sequence[Call]], threads: int, seconds: float
) -> dict[str, Timing]:
    """Returns the time of one call of each candidate, measured in turns.

    Args:
        candidates: name -> one call per copy of the weight; each has run once before.
        threads: that the calls run on, which decides about the clock.
        seconds: to spend on each candidate, roughly.
    """
    _, now = clock(threads)
    following = {name: cycle(calls) for name, calls in candidates.items()}
    counts, short = {}, set()
    turns = TURNS[1]
    for name, calls in candidates.items():
        once = max(_timed(following[name], 2, now) / 2, 1e-7)
        if once < LONG_CALL_SECONDS:
            short.add(name)
        counts[name] = max(1, min(len(calls), int(TURN_SECONDS / once)))
        turns = min(turns, int(seconds / (once * counts[name])))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(max(turns, TURNS[0])):
        for name, count in counts.items():
            if threads > 1:
                time.sleep(PAUSE_SECONDS)
                if name in short:
                    next(following[name])()  # wakes the threads again
            samples[name].append(_timed(following[name], count, now) / count)
    return {name: summary(each) for name, each in samples.items()}


def summary(seconds: Sequence[float]) -> Timing:
    """Returns the median of `seconds`, with the tenth and the ninetieth percentile."""
    ordered = sorted(seconds)
    tenth = len(ordered) // 10
    middle = statistics.median(ordered)
    return Timing(middle, ordered[tenth], ordered[-1 - tenth], len(ordered))


def _timed(calls: cycle[Call], count: int, now: Callable[[], float]) -> float:
    each = [next(calls) for _ in range(count)]
    begin = now()
    for call in each:
        call()
    return now() - begin
