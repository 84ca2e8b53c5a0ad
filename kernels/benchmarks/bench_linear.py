"""Linear layers: every shape x number of tokens x scheme, beside cuBLAS bf16 and every peer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import timing
import torch
import torch.nn.functional as F
from lowbit_kernels.gpu import matmul
from model_shapes import (
    BACKWARD_TOKENS,
    Shape,
    activation_dtype,
    bytes_of,
    copy_of,
    random_weight,
    shapes,
    token_counts,
)
from parts import OutOfTimeError, Part, Settings
from peers import PEERS, Prepared
from random_tensors import normal
from timing import Replay, significant
from torch import Tensor

BASELINE = "bf16"
# Peers are made for decoding; some of them tune themselves for seconds per number of tokens.
MAX_PEER_TOKENS = 64
# A peer that took this long to prepare and to run for the first time is given up.
MAX_PEER_SECONDS = 60.0
# What one shape and number of tokens takes, roughly; what does not fit is left out and listed.
SECONDS_PER_POINT = 0.4


@dataclass(frozen=True)
class Machine:
    """What was measured of the machine: bytes per second of a copy, and of cuBLAS bf16 FLOP/s."""

    bandwidth: float
    flops: float

    def floor(self, shape: Shape, tokens: int, moved: int) -> float:
        """Returns the least seconds of a product: its bytes or its operations."""
        return max(moved / self.bandwidth, 2.0 * tokens * shape.rows * shape.columns / self.flops)


def run(settings: Settings, part: Part, tuning_peers: bool = False) -> None:
    """Measures the forward pass; sets `rows`, `peers`, `left_out` and what the machine can do.

    Args:
        settings: of the run.
        part: takes the results.
        tuning_peers: measure only the peers that tune themselves, and what compares with them.
    """
    part.results |= {"rows": [], "peers": {}, "left_out": []}
    schemes = [name for name in settings.schemes if name not in settings.refused]
    peers = _available_peers(part, settings, tuning_peers)
    if tuning_peers:
        comparable = {peer.comparable for peer in PEERS if peer.name in peers}
        schemes = [scheme for scheme in schemes if scheme in comparable]
        if not peers:
            return
    timing.warm_up()
    bandwidth = timing.copy_bandwidth(settings.smoke)
    machine = Machine(bandwidth, timing.matmul_rate(settings.smoke))
    part.set("matmul_tflops", significant(machine.flops / 1e12))
    part.set("copy_bandwidth_gbps", significant(bandwidth / 1e9))
    part.set("l2_bytes", timing.l2_bytes())
    todo = [shape for shape in shapes(settings.smoke) if shape.key not in settings.skipped]
    part.results["done"] = []
    try:
        for shape in list(todo):
            part.need(SECONDS_PER_POINT * 4, shape.key)
            part.set("current", shape.key)
            with part.guarded(shape.key):
                _measure_shape(shape, schemes, peers, machine, settings, part)
            todo.remove(shape)
            part.results["done"].append(shape.key)
            part.save()
            if timing.on_gpu():
                torch.cuda.empty_cache()
    except OutOfTimeError as out:
        part.say(str(out))
        part.set("left_out", [shape.key for shape in todo])
    part.set("copy_bandwidth_after_gbps", significant(timing.copy_bandwidth(settings.smoke) / 1e9))


def run_backward(settings: Settings, part: Part) -> None:
    """Measures the gradient of the input for many tokens, scales as they are in training."""
    tokens = 32 if settings.smoke else BACKWARD_TOKENS
    dtype = activation_dtype(settings.smoke)
    for shape in [s for s in shapes(settings.smoke) if "smoke" in s.name or s.name[:2] == "8B"][:3]:
        grad = normal((tokens, shape.rows), settings.device, dtype)
        weight_16 = normal((shape.rows, shape.columns), settings.device, dtype)
        for scheme in [s for s in settings.schemes if s not in settings.refused]:
            part.need(SECONDS_PER_POINT, f"backward of {shape.key}")
            with part.guarded(f"backward of {scheme} {shape.key}"):
                weight = random_weight(scheme, shape.rows, shape.columns, settings.device)
                weight = weight.with_coded_scales()
                times = timing.measure(
                    {
                        scheme: timing.capture([partial(matmul.grad_input, grad, weight)] * 2),
                        BASELINE: timing.capture([partial(torch.mm, grad, weight_16)] * 2),
                    }
                )
                ratio = times[scheme].seconds / times[BASELINE].seconds
                entry = {"shape": shape.key, "scheme": scheme, "tokens": tokens}
                entry |= {**times[scheme].to_dict(), "bf16_us": times[BASELINE].to_dict()["us"]}
                part.add("backward", {**entry, "times_bf16": significant(ratio)})
        part.save()


def _available_peers(
    part: Part, settings: Settings, tuning: bool
) -> dict[str, Callable[..., Prepared]]:
    """Returns the peers that can run; why others cannot is recorded."""
    found = {}
    for peer in [peer for peer in PEERS if peer.tunes == tuning]:
        reason = peer.refusal() if not settings.smoke or peer.on_cpu else "needs a GPU"
        entry: dict[str, Any] = {"available": reason is None, "comparable": peer.comparable}
        entry |= {"version": peer.version()} if reason is None else {"reason": reason}
        part.results["peers"][peer.name] = entry
        if reason is None:
            found[peer.name] = peer.prepare
        part.say(f"peer {peer.name}: " + (reason or "measured"))
    return found


def _measure_shape(
    shape: Shape,
    schemes: list[str],
    peers: dict[str, Callable[..., Prepared]],
    machine: Machine,
    settings: Settings,
    part: Part,
) -> None:
    part.say(f"{shape.key} ({shape.name})")
    candidates = {BASELINE: _plain(shape, settings)}
    for scheme in schemes:
        candidates[scheme] = _ours(scheme, shape, settings)
    for name, prepare in peers.items():
        with _on_its_account(name, part), part.guarded(f"{name} {shape.key}"):
            candidates[name] = prepare(shape.rows, shape.columns, _copies(shape), settings.device)
    # Of its own for each: a capture that fails leaves its pool unusable.
    pools = {n: torch.cuda.graph_pool_handle() if timing.on_gpu() else None for n in candidates}
    for tokens in token_counts(settings.smoke):
        part.need(SECONDS_PER_POINT, f"{shape.key}, {tokens} tokens")
        replays = {}
        for name, candidate in candidates.items():
            if name in peers and tokens > MAX_PEER_TOKENS:
                continue
            with _on_its_account(name, part), part.guarded(f"{name} {shape.key} M={tokens}"):
                replays[name] = _captured(candidate, shape, tokens, settings.device, pools[name])
        times = timing.measure(replays)
        for name, result in times.items():
            entry = {"shape": shape.key, "layer": shape.name, "M": tokens, "name": name}
            moved = _bytes_moved(candidates[name], shape, tokens)
            rate, floor = moved / result.seconds, machine.floor(shape, tokens, moved)
            entry |= {"peer": name in peers, **result.to_dict(), "gbps": significant(rate / 1e9)}
            entry["weight_bytes"] = candidates[name].weight_bytes
            entry["copy_fraction"] = significant(rate / machine.bandwidth)
            entry["roofline_fraction"] = significant(floor / result.seconds)
            if BASELINE in times:
                entry["vs_bf16"] = significant(times[BASELINE].seconds / result.seconds)
            part.add("rows", entry)
        for name in [name for name in peers if _account(name, part)["seconds"] > MAX_PEER_SECONDS]:
            _account(name, part)["given_up_at"] = f"{shape.key}, {tokens} tokens"
            candidates.pop(name, None)
            del peers[name]


def _captured(candidate: Prepared, shape: Shape, tokens: int, device: str, pool: Any) -> Replay:
    """Returns the graph of a candidate's launches on fresh activations."""
    x = normal((tokens, shape.columns), device, candidate.dtype)
    flops = 2.0 * tokens * shape.rows * shape.columns
    moved = _bytes_moved(candidate, shape, tokens)
    total = timing.launches(len(candidate.calls), moved, flops)
    each = [partial(call, x) for call in candidate.calls]
    return timing.capture([each[i % len(each)] for i in range(total)], pool)


def _bytes_moved(candidate: Prepared, shape: Shape, tokens: int) -> int:
    """Returns the fewest bytes of a product: the weight, activations in, activations out."""
    return candidate.weight_bytes + 2 * tokens * (shape.rows + shape.columns)


def _account(name: str, part: Part) -> dict[str, Any]:
    account: dict[str, Any] = part.results["peers"].setdefault(name, {})
    account.setdefault("seconds", 0.0)
    return account


@contextmanager
def _on_its_account(name: str, part: Part) -> Iterator[None]:
    """Adds the time of the block to what a peer has taken so far; free for what is no peer."""
    begin = time.monotonic()
    try:
        yield
    finally:
        if name in part.results["peers"]:
            account = _account(name, part)
            account["seconds"] = round(account["seconds"] + time.monotonic() - begin, 2)


def _copies(shape: Shape) -> int:
    """Returns the copies for a weight of four bits, what peers have."""
    return timing.copies_needed(shape.rows * shape.columns // 2)


def _plain(shape: Shape, settings: Settings) -> Prepared:
    dtype = activation_dtype(settings.smoke)
    size = (shape.rows, shape.columns)
    number = timing.copies_needed(2 * math.prod(size))
    weights = [normal(size, settings.device, dtype) for _ in range(number)]
    calls = [partial(_linear_16, weight) for weight in weights]
    return Prepared(calls, 2 * math.prod(size), dtype)


def _linear_16(weight: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, weight)


def _ours(scheme: str, shape: Shape, settings: Settings) -> Prepared:
    first = random_weight(scheme, shape.rows, shape.columns, settings.device)
    number = timing.copies_needed(bytes_of(first))
    weights = [first, *(copy_of(first) for _ in range(number - 1))]
    calls = [partial(_linear_ours, weight) for weight in weights]
    return Prepared(calls, bytes_of(first), activation_dtype(settings.smoke))


def _linear_ours(weight: Any, x: Tensor) -> Tensor:
    return matmul.linear(x, weight)
