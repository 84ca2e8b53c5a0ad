"""Kernels that are known to be good or bad, and what `inspect_code` says about each, as JSON.

Run as a script, without TRITON_INTERPRET and with kernels/benchmarks on the path.
"""

# Device code, as in pyproject.toml for the kernels that are shipped.
# ruff: noqa: N803, SIM108

from __future__ import annotations

import json
import warnings

import triton
import triton.language as tl
from inspect_code import KernelCase, compile_case

ROWS, TOKENS, STEP = 128, 64, 64


@triton.jit
def product(
    x, w, out, K,
    SCALED: tl.constexpr, RIGHT: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """out = w . x^T, or its transpose; the weight is computed with where SCALED, else only copied.

    A weight that was computed with is in registers. As the left operand it may stay there; as the
    right operand it must go to shared memory.
    """
    row, token, k = tl.arange(0, ROWS), tl.arange(0, TOKENS), tl.arange(0, STEP)
    if RIGHT:
        acc = tl.zeros((TOKENS, ROWS), tl.float32)
    else:
        acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in tl.range(0, K, STEP):
        weight = tl.load(w + row[:, None] * K + first + k[None, :])
        if SCALED:
            weight = (weight.to(tl.float32) * 2.5).to(tl.bfloat16)
        inputs = tl.load(x + token[None, :] * K + first + k[:, None])
        if RIGHT:
            acc = tl.dot(inputs.T, weight.T, acc)
        else:
            acc = tl.dot(weight, inputs, acc)
    if RIGHT:
        tl.store(out + token[:, None] * ROWS + row[None, :], acc)
    else:
        tl.store(out + row[:, None] * TOKENS + token[None, :], acc)


def control(name: str, scaled: bool, right: bool, **options: int) -> KernelCase:
    """Returns the case `name`."""
    sizes = {"ROWS": ROWS, "TOKENS": TOKENS, "STEP": STEP}
    return KernelCase(
        name,
        product,
        {"x": "*bf16", "w": "*bf16", "out": "*fp32", "K": "i32"},
        {"SCALED": scaled, "RIGHT": right, **sizes},
        {"num_warps": 4, "num_stages": 3, **options},
        ("K",),
        weights_per_step=ROWS * STEP,
    )


CONTROLS = [
    control("copied, left", scaled=False, right=False),
    control("computed, left", scaled=True, right=False),
    control("computed, right", scaled=True, right=True),
    control("few registers", scaled=True, right=False, maxnreg=64),
]


def main() -> None:
    """Prints what was found, by case."""
    warnings.filterwarnings("ignore", module="triton")
    found = {}
    for case in CONTROLS:
        code = compile_case(case, "sm_90")
        found[case.name] = {
            "registers": code.registers,
            "spilled": code.spilled,
            "serialised": any("C7515" in line for line in code.warnings),
            "from_registers": code.multiplies_from_registers,
            "stores": code.stores_to_shared,
            "products": sum(n for name, n in code.histogram.items() if name.startswith("HGMMA")),
            "local": sum(n for name, n in code.histogram.items() if name[:3] in ("LDL", "STL")),
            "per_weight": code.instructions_per_weight,
            "loop": len(code.loop),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
