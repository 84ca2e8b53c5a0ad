"""Times of GPU work: CUDA graph replays over rotating weights, candidates in turns.

*Graphs*, because the launch of a kernel from Python takes longer than many of these kernels run.
*Rotating weights*: a graph holds one launch per copy of the weight, and the copies are together
larger than three times the L2 cache, so that a weight has left the cache when its turn comes again.
*In turns*: every candidate is replayed once, then all of them again, so that whatever clocks and
neighbours do meets all of them. Nothing waits for the GPU between replays.

Without a GPU the same calls are timed by the wall clock, once each: for testing, not for results.
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from random_tensors import integers, normal

Call = Callable[[], Any]

CACHE_MULTIPLE = 3
# A graph is to run about this long: much longer than an event's resolution.
GRAPH_SECONDS = 3e-4
# What one launch is assumed to move per second when a graph is sized; only a guess is needed.
ASSUMED_BANDWIDTH = 4e12
MAX_LAUNCHES = 400
MEASURE_SECONDS = 0.01
REPEATS = (5, 21)
_failed: list[Any] = []


@dataclass(frozen=True)
class Timing:
    """The time of one call.

    Args:
        seconds: the median over the repeats.
        low: a tenth of the repeats were faster.
        high: a tenth of the repeats were slower.
        repeats: replays that were timed.
    """

    seconds: float
    low: float
    high: float
    repeats: int

    def to_dict(self) -> dict[str, float | int]:
        """Returns microseconds for JSON."""
        return {
            "us": significant(1e6 * self.seconds),
            "low_us": significant(1e6 * self.low),
            "high_us": significant(1e6 * self.high),
            "repeats": self.repeats,
        }


@dataclass(frozen=True)
class Replay:
    """Several calls that run as one.

    Args:
        run: starts them.
        calls: how many they are.
        keeps: what has to stay alive with it: activations that a graph reads, for example.
    """

    run: Call
    calls: int
    keeps: Any = None


def significant(value: float) -> float:
    """Returns `value` to five digits: more than a measurement has, whatever its size."""
    return float(f"{value:.5g}")


def on_gpu() -> bool:
    """Returns True where there is a GPU to time."""
    return torch.cuda.is_available()


def l2_bytes() -> int:
    """Returns the size of the L2 cache; a token size without a GPU."""
    if not on_gpu():
        return 4096
    return int(torch.cuda.get_device_properties(0).L2_cache_size)


def copies_needed(weight_bytes: int) -> int:
    """Returns how many copies of a weight are more than the L2 cache can hold, at least two."""
    return max(2, math.ceil(CACHE_MULTIPLE * l2_bytes() / weight_bytes) + 1)


def launches(copies: int, bytes_moved: int, flops: float) -> int:
    """Returns the launches of a graph: a multiple of the copies, enough to be timed."""
    if not on_gpu():
        return 1
    seconds = max(bytes_moved / ASSUMED_BANDWIDTH, flops / 7e14, 2e-6)
    rounds = math.ceil(GRAPH_SECONDS / seconds / copies)
    return min(max(1, rounds) * copies, max(copies, MAX_LAUNCHES))


def capture(calls: Sequence[Call], pool: Any = None) -> Replay:
    """Returns `calls` as one CUDA graph; each has run once before, so that nothing compiles in it.

    `torch.cuda.graph` would collect garbage and empty the allocator's cache at every capture, which
    takes longer than a measurement.
    """
    if not on_gpu():
        for call in calls:
            call()
        return Replay(lambda: [call() for call in calls], len(calls))
    stream = _side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream), torch.no_grad():
        for call in dict.fromkeys(calls):
            call()
        stream.synchronize()
        graph.capture_begin(*([] if pool is None else [pool]))
        try:
            for call in calls:
                call()
        except BaseException:
            # Ends the capture so that the stream can be used again; the first error is the cause.
            with contextlib.suppress(Exception):
                graph.capture_end()
            # The allocator may go on asking this graph whether memory is for it.
            _failed.append(graph)
            raise
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return Replay(graph.replay, len(calls), (graph, list(calls)))


def measure(replays: Mapping[str, Replay]) -> dict[str, Timing]:
    """Returns the time of one call of each, measured in turns."""
    if not replays:
        return {}
    if not on_gpu():
        return {name: _wall_clock(replay) for name, replay in replays.items()}
    probe = {name: _replayed(replay, 2)[-1] for name, replay in replays.items()}
    longest = max(probe.values())
    repeats = min(max(math.ceil(MEASURE_SECONDS / longest), REPEATS[0]), REPEATS[1])
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in replays}
    for _ in range(repeats):
        for name, replay in replays.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            replay.run()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    return {
        name: _summary([b.elapsed_time(e) / 1e3 for b, e in pairs], replays[name].calls)
        for name, pairs in events.items()
    }


def copy_bandwidth(smoke: bool = False) -> float:
    """Returns bytes per second of a large copy on the device, counting reads and writes."""
    device = "cuda" if on_gpu() else "cpu"
    size = 1 << 16 if smoke else 1 << 31
    source = integers(0, 256, (size,), device, torch.uint8)
    target = torch.empty_like(source)
    timing = measure({"copy": capture([lambda: target.copy_(source)])})["copy"]
    return 2 * size / timing.seconds


def matmul_rate(smoke: bool = False) -> float:
    """Returns floating-point operations per second of a large cuBLAS bf16 product."""
    size, dtype = (64, torch.float32) if smoke else (8192, torch.bfloat16)
    device = "cuda" if on_gpu() else "cpu"
    x, y = (normal((size, size), device, dtype) for _ in range(2))
    timing = measure({"mm": capture([lambda: torch.mm(x, y)])})["mm"]
    return 2.0 * size**3 / timing.seconds


def warm_up(seconds: float = 1.0) -> None:
    """Keeps the GPU busy until its clocks have left the idle state."""
    if not on_gpu():
        return
    x = normal((4096, 4096), "cuda", torch.bfloat16)
    begin = time.monotonic()
    while time.monotonic() - begin < seconds:
        for _ in range(20):
            torch.mm(x, x)
        torch.cuda.synchronize()


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    """Returns the stream that captures: one, because the allocator keeps memory per stream."""
    return torch.cuda.Stream()


def _replayed(replay: Replay, times: int) -> list[float]:
    seconds = []
    for _ in range(times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay.run()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return seconds


def _wall_clock(replay: Replay) -> Timing:
    begin = time.perf_counter()
    replay.run()
    return _summary([time.perf_counter() - begin], replay.calls)


def _summary(seconds: Sequence[float], calls: int) -> Timing:
    each = sorted(value / calls for value in seconds)
    tenth = len(each) // 10
    return Timing(statistics.median(each), each[tenth], each[-1 - tenth], len(each))
