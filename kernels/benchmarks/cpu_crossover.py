"""Measures which way of a product is fastest from how many tokens on; writes `crossover.json`.

    python kernels/benchmarks/cpu_crossover.py            the instruction set of this processor
    python kernels/benchmarks/cpu_crossover.py --isa avx2

One thread, one [2048, 4096] weight of each kind, rotating past the cache, all ways in turns. An
instruction set below the processor's is measured in a process where oneDNN, MKL and ATen are held
to it as well. Entries of other processors stay as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lowbit_kernels.cpu import dispatch, matmul
from lowbit_kernels.cpu.library import ISAS, library
from lowbit_kernels.cpu.weight import StripWeight

from lowbit import backends
from lowbit.quant import QuantizedWeight
from lowbit.scheme import Scheme

TABLE = Path(dispatch.__file__).with_name("crossover.json")
KINDS = {
    "int2": "W2A16_G64",
    "int3": "W3A16_G64",
    "int4": "W4A16",
    "int8": "W8A16",
    "codebook": "NF4",
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512)
# Up to here reading the weight counts, so that it must come from memory.
COLD_TOKENS = 16
SHAPE = (2048, 4096)
CACHE_BYTES = 64 << 20
REPEATS = 5
# What holds the libraries under torch to an instruction set.
LIMITS = {
    "portable": {},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
             "ATEN_CPU_CAPABILITY": "avx2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "avx512bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "amx": {},
}  # fmt: skip


def main() -> None:
    """Measures in one process per instruction set, and writes the table once at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", choices=ISAS, action="append", help="default: the best one here")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measure()))
        return
    table = json.loads(TABLE.read_text())
    for isa in arguments.isa or [library().isa_name]:
        environment = {**os.environ, **LIMITS[isa], "LOWBIT_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, __file__, "--here"],
            env=environment, stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        table["ways"][isa], table["milliseconds"][isa] = json.loads(done.stdout)
        table["measured"][isa] = f"{processor()}, torch {torch.__version__}"
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


def measure() -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (ways, milliseconds): activations -> kind -> steps, and the times behind them."""
    ways: dict[str, Any] = {}
    times: dict[str, Any] = {}
    for kind, scheme in KINDS.items():
        weights = copies(Scheme.parse(scheme))
        for name, dtype in DTYPES.items():
            measured = {m: measure_one(weights, m, dtype, candidates(dtype)) for m in TOKENS}
            ways.setdefault(name, {})[kind] = steps(measured)
            times.setdefault(name, {})[kind] = measured
            print(f"{kind} {name}: {ways[name][kind]}", file=sys.stderr, flush=True)
        ways.setdefault("int8", {})[kind] = [[None, "one_plane"]]
    return ways, times


def candidates(dtype: torch.dtype) -> dict[str, int]:
    """Returns the ways that keep the accuracy of `dtype`, and exist on this instruction set."""
    found = {"two_planes": dispatch.TWO_PLANES, "decode": dispatch.DECODE}
    if dtype == torch.bfloat16 and library().isa >= ISAS.index("avx512bf16"):
        found["bf16"] = dispatch.BFLOAT
    return found


def copies(scheme: Scheme) -> list[StripWeight]:
    """Returns as many copies of a random weight as pass the cache together."""
    from lowbit.algorithms import RTN

    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.02
    quantized = RTN().quantize(weight, scheme, None)
    qweight = QuantizedWeight.from_codes(quantized.codes, quantized.grid)
    count = max(2, CACHE_BYTES // scheme.stored_bytes(SHAPE))
    prepared = [backends.prepare(qweight, torch.float32) for _ in range(count)]
    return [one.weight for one in prepared]  # type: ignore[union-attr]


def measure_one(
    weights: list[StripWeight], tokens: int, dtype: torch.dtype, ways: dict[str, int]
) -> dict[str, float]:
    """Returns way -> median milliseconds of one product, the ways in turns."""
    x = torch.randn(tokens, SHAPE[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    if tokens > COLD_TOKENS:
        weights = weights[:2]
    for repeat in range(REPEATS + 1):
        for way, mode in ways.items():
            call = product(x, mode)
            start = time.perf_counter()
            for weight in weights:
                call(weight)
            if repeat:
                seconds[way].append((time.perf_counter() - start) / len(weights))
    return {way: round(1e3 * statistics.median(all_), 3) for way, all_ in seconds.items()}


def product(x: torch.Tensor, mode: int) -> Callable[[StripWeight], Any]:
    """Returns the product of `x` and a weight in one way."""
    if mode == dispatch.DECODE:
        return lambda weight: matmul.decoded_linear(x, weight, None)
    return lambda weight: matmul.native_linear(x, weight, None, mode)


def steps(measured: dict[int, dict[str, float]]) -> list[tuple[int | None, str]]:
    """Returns (most tokens, way) in ascending order; a way stays until another is 3% faster."""
    found: list[tuple[int | None, str]] = []
    way = ""
    for times in measured.values():
        best = min(times, key=lambda name: times[name])
        if not way or times[best] < 0.97 * times[way]:
            way = best
        found.append((None, way))
    counts = list(measured)
    merged: list[tuple[int | None, str]] = []
    for i, (_, name) in enumerate(found):
        last = i + 1 == len(found)
        if last or found[i + 1][1] != name:
            # Between two counts that were measured, the way of the smaller one.
            merged.append((None if last else counts[i + 1] - 1, name))
    return merged


def processor() -> str:
    """Returns the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
