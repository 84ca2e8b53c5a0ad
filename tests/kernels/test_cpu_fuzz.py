"""The native CPU kernels on random cases, against float64 and an error bound per element.

Every run draws new cases. One that fails prints its seed, and `LOWBIT_FUZZ_SEED=<seed>` runs it
again, first. LOWBIT_FUZZ_SECONDS is how long to go on.

Results lie between guard zones and begin as NaN; activations and bias lie amid NaN, so that what is
read beside them shows. The scratch memory is NaN at the start of every call (LOWBIT_POISON).
"""

from __future__ import annotations

import ctypes
import os
import random
import secrets
import time
from dataclasses import dataclass
from typing import Any

import torch
from cpu_cases import ISA_NAMES, KINDS, LARGEST, TYPES, Packed, linear, random_weight
from torch import Tensor

SECONDS = float(os.environ.get("LOWBIT_FUZZ_SECONDS", "8"))
GUARD = 4096
SEGMENT = 256  # columns that share one scale of the activations
# Half a unit in the last place, relative, and the smallest result's.
ROUNDING = {
    torch.float32: (2.0**-24, 2.0**-150),
    torch.float16: (2.0**-11, 2.0**-25),
    torch.bfloat16: (2.0**-8, 2.0**-134),
}


@dataclass(frozen=True)
class Case:
    """What one seed draws."""

    kind: tuple[str, int, bool]
    size: tuple[int, int, int]
    scale_dtype: torch.dtype
    x_dtype: torch.dtype
    out_dtype: torch.dtype
    tokens: int
    around: tuple[int, int]  # elements before and after each row of x
    magnitude: float
    outliers: bool
    broken: bool  # a token has values that are not finite
    bias: bool
    planes: int
    threads: int
    isa: int

    @staticmethod
    def draw(seed: int, best_isa: int) -> Case:
        """Returns the case of `seed`, on an instruction set up to `best_isa`."""
        choose = random.Random(seed)
        columns = choose.choice([choose.randint(1, 80), choose.randint(1, 700), 256, 512])
        groups = [16, 24, 32, 64, 128, 300, columns, choose.randint(8, 8 + columns)]
        return Case(
            kind=choose.choice(KINDS),
            size=(choose.choice([choose.randint(1, 40), choose.randint(1, 200)]), columns,
                  choose.choice(groups)),
            scale_dtype=choose.choice(list(TYPES)),
            x_dtype=choose.choice(list(TYPES)),
            out_dtype=choose.choice(list(TYPES)),
            tokens=choose.choice([choose.randint(1, 8), choose.randint(1, 150), 63, 64, 65]),
            around=(choose.randint(0, 20), choose.randint(0, 20)),
            magnitude=10.0 ** choose.uniform(-3, 2),
            outliers=choose.random() < 0.3,
            broken=choose.random() < 0.1,
            bias=choose.random() < 0.5,
            planes=choose.choice([0, 1, 2]),
            threads=choose.choice([1, 1, 1, 1, 3]),
            isa=choose.randint(0, min(best_isa, len(ISA_NAMES) - 1)),
        )  # fmt: skip


def test_random_cases(library: Any) -> None:
    chosen = os.environ.get("LOWBIT_FUZZ_SEED")
    seed = secrets.randbits(32) if chosen is None else int(chosen)
    deadline = time.monotonic() + SECONDS
    while True:
        case = Case.draw(seed, library.lowbit_best_isa())
        try:
            check(library, case, torch.Generator().manual_seed(seed))
        except AssertionError as error:
            raise AssertionError(f"LOWBIT_FUZZ_SEED={seed} draws {case}: {error}") from error
        if time.monotonic() > deadline:
            return
        seed += 1


def check(library: Any, case: Case, generator: torch.Generator) -> None:
    """Fails unless decoding is exact, and products are as near as their arithmetic allows."""
    weight = random_weight(
        *case.kind,
        case.size,
        int(torch.randint(1 << 30, (), generator=generator)),
        case.scale_dtype,
    )
    decoded = guarded(weight.dense.shape, case.out_dtype)
    pointer = ctypes.c_void_p(decoded.data_ptr())
    header, kind = ctypes.byref(weight.c), TYPES[case.out_dtype]
    assert library.lowbit_decode(header, pointer, kind, case.threads, case.isa) == 0
    assert torch.equal(decoded, weight.dense.to(case.out_dtype)), "decoding"
    assert_guards_hold(decoded)

    x, bias = activations(case, generator), None
    if case.bias:
        bias = amid_nan(torch.randn(1, case.size[0], generator=generator), (3, 5))[0]

    def product(x: Tensor, threads: int) -> Tensor:
        out = guarded((x.shape[0], case.size[0]), case.out_dtype)
        linear(library, weight, x, bias, case.planes, case.isa, threads, out)
        assert_guards_hold(out)
        return out

    found = product(x, case.threads)
    exact = x.double() @ weight.dense.double().T
    if bias is not None:
        exact += bias.double()
    bound = error_bound(case, weight, x, exact)
    # A token that is not finite is so in every result of its own, and in no other; larger results
    # may be infinite.
    broken = ~x.isfinite().all(1)
    assert not found[broken].isfinite().any(), "what is not finite was lost"
    counted = ~broken[:, None] & (exact.abs() + bound < torch.finfo(case.out_dtype).max)
    worst = float(torch.where(counted, (found.double() - exact).abs() / bound, 0.0).max())
    assert worst <= 1, f"{worst:.3g} times the error bound"  # NaN fails
    some = int(torch.randint(case.tokens, (), generator=generator))
    alone = product(x[some : some + 1], 1)
    assert torch.equal(alone[0], found[some]) or broken[some], f"token {some} alone"


def activations(case: Case, generator: torch.Generator) -> Tensor:
    """Returns x `[tokens, K]`, its rows apart from each other, with NaN between them."""
    x = torch.randn(case.tokens, case.size[1], generator=generator) * case.magnitude
    if case.outliers:
        x[:, torch.randint(case.size[1], (3,), generator=generator)] *= 100
        x[torch.randint(case.tokens, (), generator=generator)] = 0
    if case.broken:
        token = torch.randint(case.tokens, (), generator=generator)
        x[token, torch.randint(case.size[1], (3,), generator=generator)] = torch.tensor(
            [torch.inf, torch.nan, -torch.inf]
        )
    return amid_nan(x.to(case.x_dtype), case.around)


def amid_nan(values: Tensor, around: tuple[int, int]) -> Tensor:
    """Returns a copy of `values`, with `around` elements of NaN before and after each row."""
    return torch.nn.functional.pad(values, around, value=torch.nan)[
        :, around[0] : around[0] + values.shape[1]
    ]


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Returns NaN of `shape` between two guard zones, at an odd multiple of its element size."""
    out = torch.empty(shape, dtype=dtype)
    whole = torch.full((2 * GUARD + out.numel(),), 1.25, dtype=dtype)
    inside = whole[GUARD - 1 : GUARD - 1 + out.numel()]
    return inside.fill_(torch.nan).view(shape)


def assert_guards_hold(out: Tensor) -> None:
    """Fails if something was written before or after `out`, which `guarded` made."""
    size = 2 * GUARD + out.numel()
    whole = torch.as_strided(out, (size,), (1,), 0)
    before, after = whole[: GUARD - 1], whole[GUARD - 1 + out.numel() :]
    assert bool((before == 1.25).all()), "wrote before the result"
    assert bool((after == 1.25).all()), "wrote after the result"


def error_bound(case: Case, weight: Packed, x: Tensor, exact: Tensor) -> Tensor:
    """Returns the largest error that the arithmetic allows, float64 `[tokens, N]`.

    Half a unit of the activations' integers and of the codebook's, the product of their low bytes
    (which is left out), the float32 sums, and the rounding of the result.
    """
    name, bits, _ = case.kind
    rows, columns, _ = case.size
    _, _, scale, _, _, _ = weight.tensors
    assert scale is not None
    strips, groups, _ = scale.shape
    per_row = scale.double().permute(0, 2, 1).reshape(strips * 16, groups)[:rows]
    scales = per_row.repeat_interleave(weight.c.group, 1)[:, :columns]
    size = x.double().abs()
    largest = torch.zeros_like(size)
    for start in range(0, columns, weight.c.group):
        group = slice(start, min(start + weight.c.group, columns))
        for part, out in zip(
            size[:, group].split(SEGMENT, 1), largest[:, group].split(SEGMENT, 1), strict=True
        ):
            out.copy_(part.amax(1, keepdim=True).expand_as(part))
    units = largest / {0: torch.inf, 1: 127.0, 2: LARGEST}[case.planes]
    bound = 0.5 * units @ weight.dense.double().abs().T
    codebook = name == "nf4"
    if codebook and case.planes == 2:
        bound += weight.c.table_unit * (0.5 * size + 127 * 127 * units) @ scales.T
    if codebook and case.planes == 1:
        bound += weight.c.table_unit * 127.5 * (size + units) @ scales.T
    terms = 8 + groups + columns / SEGMENT + (columns if case.planes == 0 else 0)
    span = 4.0 if codebook else 2.0**bits
    bound += terms * 2.0**-24 * (size + units) @ (span * scales).T
    relative, smallest = ROUNDING[case.out_dtype]
    return bound * 1.001 + relative * (exact.abs() + bound) + smallest
