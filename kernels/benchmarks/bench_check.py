"""Before anything is timed: does each scheme compute the right thing, in every kernel it will use?

The same process compiles the kernels that the measurements launch, so that they are in Triton's
cache on disk when the clock runs; several processes do this side by side.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
import triton
from lowbit_kernels.gpu import configs, matmul
from lowbit_kernels.gpu.configs import Tile
from lowbit_kernels.gpu.weight import CHUNK
from model_shapes import activation_dtype, random_weight, shapes, token_counts
from parts import Part, Settings
from random_tensors import normal
from torch import Tensor

from lowbit.backends.formats import format_of
from lowbit.backends.fragment import FragmentPrepared
from lowbit.quant import Grid, QuantizedWeight
from lowbit.scheme import Scheme

# Times the error of plain torch with the decoded weight, which rounds the same product differently.
# Beyond the first the result is reported as an error; beyond the second it is not rounding.
ALLOWED, WRONG = 2.0, 8.0
# Rows and columns that no tile divides; K has a last group and a last chunk that are not full.
CHECKED_SHAPE, SMOKE_SHAPE = (1000, 4160), (72, 328)
CHECKED_MS, SMOKE_MS = (1, 5, 16, 17, 33, 64, 65, 128, 300, 1024), (1, 17)


def run(settings: Settings, part: Part, share: tuple[int, int] = (0, 1)) -> None:
    """Checks and compiles every scheme of `settings`.

    Args:
        settings: of the run.
        part: takes `results`: scheme -> largest error over that of plain torch, per product.
        share: (i, n): compiles every n-th kernel from the i-th on; 0 also checks.
    """
    results: dict[str, Any] = {}
    for scheme in settings.schemes:
        if share[0] == 0:
            with part.guarded(scheme):
                results[scheme] = check(scheme, settings)
                part.set("results", results)
                worst = max(results[scheme].values())
                if worst > ALLOWED:
                    text = f"{worst} times the error of plain torch; {ALLOWED} are allowed"
                    part.results["errors"][f"{scheme}: rounding"] = text
                part.say(f"{scheme}: at most {worst} times the error of plain torch")
        with part.guarded(f"compiling {scheme}"):
            compiled = compile_kernels(scheme, settings, part, share)
            part.say(f"{scheme}: {compiled} kernels compiled")
    part.save()


def compile_kernels(scheme: str, settings: Settings, part: Part, share: tuple[int, int]) -> int:
    """Launches every kernel of `scheme` that the measurements need on a small weight, once each."""
    tiles = tiles_needed(scheme, settings.smoke)[share[0] :: share[1]]
    weight = random_weight(scheme, 256, 512 if settings.smoke else 4096, settings.device)
    dtype = activation_dtype(settings.smoke)
    for tile in tiles:
        part.need(0.0, f"compiling {scheme}")
        x = normal((16, weight.in_features), settings.device, dtype)
        matmul.run_fused(x, weight, None, tile)
    matmul.dequantize(weight, dtype)
    return len(tiles)


def tiles_needed(scheme: str, smoke: bool) -> list[Tile]:
    """Returns the tiles that are chosen for any shape and number of tokens of the benchmark."""
    kind = matmul._kind(format_of(Scheme.parse(scheme)))
    found: dict[Tile, None] = {}
    for shape in shapes(smoke):
        weight_columns = -(-shape.columns // 128) * 2 * CHUNK
        weight_rows = -(-shape.rows // 64) * 64
        for tokens in token_counts(smoke):
            holds = max(16, triton.next_power_of_2(tokens))
            tile = configs.choose(0, kind, holds, weight_rows, weight_columns)
            if tile is not None:
                found[tile] = None
    return list(found)


def check(scheme: str, settings: Settings) -> dict[str, float]:
    """Returns the largest error of each product over that of plain torch with the decoded weight.

    Raises:
        AssertionError: a decoded weight differs from the reference, a product is not finite or
            further off than rounding explains.
    """
    smoke, device = settings.smoke, settings.device
    dtype = activation_dtype(smoke)
    qweight = random_qweight(scheme, SMOKE_SHAPE if smoke else CHECKED_SHAPE)
    reference = qweight.dequantize(torch.float32).to(device)
    weight = FragmentPrepared.of(_moved(qweight, device)).for_mode(training=False).weight
    decoded = matmul.dequantize(weight, torch.float32)
    # Equal to the bit is what the tests want; an ulp is no reason not to time it.
    close = torch.isclose(decoded, reference, rtol=1e-6, atol=0).all()
    assert bool(close), f"{scheme}: a decoded weight is not the stored one"
    plain_weight = reference.to(dtype)
    errors = {}
    for tokens in SMOKE_MS if smoke else CHECKED_MS:
        generator = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, reference.shape[1], generator=generator).to(device, dtype)
        exact, plain = x.double() @ reference.double().T, F.linear(x, plain_weight)
        found = matmul.linear(x, weight)
        errors[f"M={tokens}"] = _ratio(found, plain, exact, f"{scheme}, {tokens} tokens")
    grad = torch.randn(64, reference.shape[0], generator=generator).to(device, dtype)
    exact, plain = grad.double() @ reference.double(), grad @ plain_weight
    found = matmul.grad_input(grad, weight)
    errors["backward"] = _ratio(found, plain, exact, f"{scheme}, backward")
    return errors


def random_qweight(scheme: str, shape: tuple[int, int]) -> QuantizedWeight:
    """Returns a weight on the CPU with random codes, signs and zero points, as a file holds it."""
    parsed = Scheme.parse(scheme)
    generator = torch.Generator().manual_seed(len(scheme))
    scales = torch.exp(torch.randn(shape[0], parsed.groups(shape[1]), generator=generator) / 2 - 4)
    if parsed.signed_scales:
        scales *= torch.randint(2, scales.shape, generator=generator) * 2 - 1
    low, high = parsed.code_min, parsed.code_max + 1
    zeros = None
    if not parsed.symmetric:
        zeros = torch.randint(low, high, scales.shape, generator=generator).float()
    codes = torch.randint(low, high, shape, generator=generator, dtype=torch.int8)
    return QuantizedWeight.from_codes(codes, Grid.storable(parsed, shape[1], scales, zeros))


def _moved(qweight: QuantizedWeight, device: str) -> QuantizedWeight:
    names = ("packed", "scale", "zero_point", "scale_offset", "scale_step", "input_scale")
    held = {name: getattr(qweight, name) for name in names}
    return dataclasses.replace(
        qweight, **{name: tensor.to(device) for name, tensor in held.items() if tensor is not None}
    )


def _ratio(found: Tensor, plain: Tensor, exact: Tensor, what: str) -> float:
    assert found.shape == exact.shape, f"{what}: {list(found.shape)}, not {list(exact.shape)}"
    assert bool(found.isfinite().all()), f"{what}: not finite"
    ratio = float((found - exact).abs().max() / (plain - exact).abs().max())
    assert ratio <= WRONG, f"{what}: {ratio:.2f} times the error of plain torch"
    return round(ratio, 3)
