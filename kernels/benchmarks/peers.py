"""Other people's kernels for 4-bit weights, each behind a small adapter.

A peer that is not installed, or cannot run here, says why; nothing is fetched. Weights are random
in the peer's own layout, which is enough to time it. What a peer computes is not checked.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from random_tensors import integers, normal, uniform
from torch import Tensor

GROUP = 128
BLOCK = 64
# Tiles of 16 columns that tinygemm keeps together.
INNER_TILES = 8


@dataclass(frozen=True)
class Prepared:
    """Something to time.

    Args:
        calls: one function of the activations per copy of the weight.
        weight_bytes: what one call has to read of the weight, scales included.
        dtype: of the activations.
    """

    calls: Sequence[Callable[[Tensor], Any]]
    weight_bytes: int
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Peer:
    """A library that multiplies by 4-bit weights.

    Args:
        name: in results.
        package: the distribution whose version is recorded.
        module: what has to be importable.
        comparable: the scheme of ours that stores about the same.
        prepare: (rows, columns, copies, device) -> what to time.
        reason: why it cannot run although it is installed, or None.
        on_cpu: whether the smoke test runs it.
        tunes: whether it tunes itself when called, for seconds to minutes: it is measured apart.
    """

    name: str
    package: str
    module: str
    comparable: str
    prepare: Callable[[int, int, int, str], Prepared]
    reason: Callable[[], str | None] = lambda: None
    on_cpu: bool = False
    tunes: bool = False

    def refusal(self) -> str | None:
        """Returns why the peer is not measured, or None."""
        if importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed"
        try:
            return self.reason()
        except Exception as error:  # a package that does not import is a peer that is not there
            return f"{type(error).__name__}: {error}"

    def version(self) -> str | None:
        """Returns the version of the peer's package."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None


def _prepare_bitsandbytes(rows: int, columns: int, copies: int, device: str) -> Prepared:
    """NF4, blocks of 64, float32 absmax: `bitsandbytes::gemm_4bit`."""
    import bitsandbytes  # type: ignore[import-not-found]  # noqa: F401 - registers gemm_4bit

    absmax = uniform((rows * columns // BLOCK,), device) * 0.01
    packed = [_bytes((rows * columns // 2, 1), device) for _ in range(copies)]
    scales = [absmax.clone() for _ in range(copies)]

    def multiply(weight: Tensor, scale: Tensor, x: Tensor) -> Any:
        shape = [rows, columns]
        return torch.ops.bitsandbytes.gemm_4bit(x, weight, shape, scale, BLOCK, "nf4")

    calls = [partial(multiply, w, s) for w, s in zip(packed, scales, strict=True)]
    return Prepared(calls, packed[0].nbytes + absmax.nbytes)


def _bitsandbytes_reason() -> str | None:
    import bitsandbytes

    if hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        return None
    return f"bitsandbytes {bitsandbytes.__version__} has no gemm_4bit"


def _prepare_tinygemm(rows: int, columns: int, copies: int, device: str) -> Prepared:
    """4 bits with zero points in groups of 128: torch's `_weight_int4pack_mm` (tinygemm)."""
    aten = torch.ops.aten
    pairs = uniform((columns // GROUP, rows, 2), device).to(torch.bfloat16) * 0.01
    packed = []
    for _ in range(copies):
        packed.append(
            aten._convert_weight_to_int4pack(_bytes((rows, columns // 2), device), INNER_TILES)
        )
    scales = [pairs.clone() for _ in range(copies)]

    def multiply(weight: Tensor, scale: Tensor, x: Tensor) -> Any:
        return aten._weight_int4pack_mm(x, weight, GROUP, scale)

    calls = [partial(multiply, w, s) for w, s in zip(packed, scales, strict=True)]
    return Prepared(calls, packed[0].nbytes + pairs.nbytes)


def _prepare_gemlite(rows: int, columns: int, copies: int, device: str) -> Prepared:
    """4 bits with zero points in groups of 128; Triton kernels that tune themselves when called."""
    import gemlite  # type: ignore[import-not-found]

    half = torch.float16
    size = (rows, columns // GROUP)
    layers = []
    for _ in range(copies):
        layer = gemlite.GemLiteLinear(
            4,
            group_size=GROUP,
            in_features=columns,
            out_features=rows,
            input_dtype=gemlite.DType.FP16,
            output_dtype=gemlite.DType.FP16,
        )
        codes = integers(0, 16, (rows, columns), device, torch.uint8)
        scale = (uniform(size, device) * 0.01).to(half)
        zero = torch.full(size, 8, dtype=half, device=device)
        layer.pack(codes, scale, zero, None)
        layers.append(layer)
    stored = rows * columns // 2 + 2 * 2 * rows * columns // GROUP
    return Prepared(layers, stored, half)


def _prepare_marlin(rows: int, columns: int, copies: int, device: str) -> Prepared:
    """Symmetric 4 bits in groups of 128, float16: IST-DASLab's Marlin."""
    import marlin  # type: ignore[import-not-found]

    half = torch.float16
    scale = uniform((columns // GROUP, rows), device).to(half) * 0.01
    size = (columns // 16, rows * 16 // 8)
    packed = [_bytes((size[0], 4 * size[1]), device).view(torch.int32) for _ in range(copies)]
    scales = [scale.clone() for _ in range(copies)]
    workspace = torch.zeros(rows // 128 * 16, dtype=torch.int32, device=device)

    def multiply(weight: Tensor, scale: Tensor, x: Tensor) -> Any:
        out = x.new_empty((x.shape[0], rows))
        marlin.mul(x, weight, out, scale, workspace)
        return out

    calls = [partial(multiply, w, s) for w, s in zip(packed, scales, strict=True)]
    return Prepared(calls, packed[0].nbytes + scale.nbytes, half)


def _prepare_plain_cpu(rows: int, columns: int, copies: int, device: str) -> Prepared:
    """Stands for a peer in the smoke test, where none of the real ones runs."""
    weights = [normal((rows, columns), device) for _ in range(copies)]
    calls = [partial(torch.nn.functional.linear, weight=weight) for weight in weights]
    return Prepared(calls, weights[0].nbytes, torch.float32)


def _bytes(size: tuple[int, ...], device: str) -> Tensor:
    return integers(0, 256, size, device, torch.uint8)


def _not_smoke() -> str | None:
    return "only in the smoke test" if torch.cuda.is_available() else None


PEERS = (
    Peer(
        "bitsandbytes NF4",
        "bitsandbytes",
        "bitsandbytes",
        "NF4_DQ",
        _prepare_bitsandbytes,
        _bitsandbytes_reason,
    ),
    Peer("torch int4pack", "torch", "torch", "W4A16_G128", _prepare_tinygemm),
    Peer("gemlite", "gemlite", "gemlite", "W4A16_G128", _prepare_gemlite, tunes=True),
    Peer("marlin", "marlin", "marlin", "W4A16_G128", _prepare_marlin),
    Peer(
        "plain float32",
        "torch",
        "torch",
        "W4A16_G128",
        _prepare_plain_cpu,
        _not_smoke,
        on_cpu=True,
    ),
)
