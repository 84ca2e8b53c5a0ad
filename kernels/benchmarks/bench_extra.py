"""Linear layers that are not weight-only products of one matrix: int8 activations, experts."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import timing
import torch
import torch.nn.functional as F
from lowbit_kernels.gpu import matmul
from model_shapes import activation_dtype, bytes_of, random_weight, shapes
from parts import Part, Settings
from random_tensors import integers, normal, uniform
from torch import Tensor

W8A8_MS, SMOKE_MS = (1, 16, 64, 256, 1024, 2048), (1, 17)
W8A8_SHAPES = 4
# A mixture of Qwen3-30B-A3B's size: 128 experts, 8 of which see each token.
EXPERTS, TOP_K, EXPERT_ROWS, EXPERT_COLUMNS = 128, 8, 1536, 2048
SMOKE_EXPERTS, SMOKE_TOP_K, SMOKE_ROWS, SMOKE_COLUMNS = 3, 2, 64, 128
EXPERT_BATCHES, SMOKE_BATCHES = (1, 4, 16), (2,)
ROUTES = 16
EXPERT_SCHEMES = ("W4A16_G128", "NF4_DQ")


def run(settings: Settings, part: Part) -> None:
    """Measures W8A8 and expert layers where their kernels are there; sets `w8a8`, `experts`."""
    part.results |= {"w8a8": [], "experts": [], "absent": []}
    if not _there("w8a8", part):
        part.save()
    else:
        for shape in shapes(settings.smoke)[:W8A8_SHAPES]:
            part.need(2.0, f"W8A8 of {shape.key}")
            with part.guarded(f"W8A8 {shape.key}"):
                _measure_w8a8(shape.rows, shape.columns, settings, part)
            part.save()
    if _there("experts", part):
        for scheme in EXPERT_SCHEMES:
            part.need(2.0, f"experts of {scheme}")
            if scheme in settings.schemes and scheme not in settings.refused:
                with part.guarded(f"experts {scheme}"):
                    _measure_experts(scheme, settings, part)
    part.save()


def _there(module: str, part: Part) -> bool:
    found = importlib.util.find_spec(f"lowbit_kernels.gpu.{module}") is not None
    if not found:
        part.add("absent", module)
    return found


def _measure_w8a8(rows: int, columns: int, settings: Settings, part: Part) -> None:
    from lowbit_kernels.gpu.w8a8 import w8a8_linear

    dtype, device = activation_dtype(settings.smoke), settings.device
    number = timing.copies_needed(rows * columns)
    codes = [_random_int8((rows, columns), device) for _ in range(number)]
    scale = uniform((rows,), device) * 0.01
    weights = [normal((rows, columns), device, dtype) for _ in range(number)]
    for tokens in SMOKE_MS if settings.smoke else W8A8_MS:
        x = normal((tokens, columns), device, dtype)
        _assert_close(w8a8_linear(x, codes[0], scale), x, codes[0], scale)
        times = timing.measure(
            {
                "W8A8": timing.capture([partial(w8a8_linear, x, c, scale) for c in codes]),
                "bf16": timing.capture([partial(F.linear, x, weight) for weight in weights]),
            }
        )
        entry: dict[str, Any] = {"shape": f"{rows}x{columns}", "M": tokens}
        entry |= {**times["W8A8"].to_dict(), "bf16_us": times["bf16"].to_dict()["us"]}
        ratio = times["bf16"].seconds / times["W8A8"].seconds
        part.add("w8a8", {**entry, "vs_bf16": timing.significant(ratio)})


def _assert_close(found: Tensor, x: Tensor, codes: Tensor, scale: Tensor) -> None:
    """Raises AssertionError if W8A8 is further off than rounding x to 8 bits explains."""
    exact = x.double() @ (codes.double() * scale.double()[:, None]).T
    error = float((found - exact).norm() / exact.norm())
    assert error < 0.02, f"W8A8: relative error {error:.4f}"


def _measure_experts(scheme: str, settings: Settings, part: Part) -> None:
    """Times the experts of one batch's tokens beside one bf16 product per token and expert.

    Each launch in a graph has other tokens with other experts, so that weights come from memory.
    """
    from lowbit_kernels.gpu.experts import experts_linear
    from lowbit_kernels.gpu.stacked import stack

    smoke, device = settings.smoke, settings.device
    number, top_k = (SMOKE_EXPERTS, SMOKE_TOP_K) if smoke else (EXPERTS, TOP_K)
    rows, columns = (SMOKE_ROWS, SMOKE_COLUMNS) if smoke else (EXPERT_ROWS, EXPERT_COLUMNS)
    dtype = activation_dtype(smoke)
    parts = [random_weight(scheme, rows, columns, device) for _ in range(number)]
    weights = torch.stack([matmul.dequantize(one, dtype) for one in parts])
    stacked, stored = stack(parts), bytes_of(parts[0])
    del parts
    for batch in SMOKE_BATCHES if smoke else EXPERT_BATCHES:
        x = normal((batch * top_k, columns), device, dtype)
        routes = [_route(number, batch, top_k) for _ in range(2 if smoke else ROUTES)]
        on_device = [torch.tensor(route, dtype=torch.int32, device=device) for route in routes]
        exact = torch.einsum("tk,tnk->tn", x.double(), weights[on_device[0].long()].double())
        error = (experts_linear(x, stacked, on_device[0]) - exact).norm() / exact.norm()
        assert float(error) < 0.01, f"experts {scheme}: relative error {float(error):.4f}"
        each = [
            partial(F.linear, x[row : row + 1], weights[expert])
            for route in routes
            for row, expert in enumerate(route)
        ]
        times = timing.measure(
            {
                "ours": timing.capture([partial(experts_linear, x, stacked, e) for e in on_device]),
                "bf16": timing.capture(each),
            }
        )
        read = stored * sum(len(set(route)) for route in routes) / len(routes)
        bf16_us = 1e6 * times["bf16"].seconds * len(each) / len(routes)
        entry: dict[str, Any] = {"scheme": scheme, "experts": number, "tokens": batch}
        entry |= {"shape": f"{rows}x{columns}", "top_k": top_k, **times["ours"].to_dict()}
        entry |= {"gbps": timing.significant(read / times["ours"].seconds / 1e9)}
        part.add("experts", {**entry, "bf16_one_by_one_us": timing.significant(bf16_us)})


def _route(experts: int, tokens: int, top_k: int) -> list[int]:
    """Returns the experts of each token's rows, at random."""
    return [int(e) for _ in range(tokens) for e in torch.randperm(experts)[:top_k]]


def _random_int8(size: tuple[int, int], device: str) -> Tensor:
    return integers(-127, 128, size, device, torch.int8)
