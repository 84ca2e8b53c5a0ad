"""What Triton's interpreter lacks, for tests: bfloat16 that rounds, and inline PTX.

As it is, the interpreter keeps bfloat16 as its bits in uint16, which matrix products and
conversions from integers take for numbers, and truncates where float32 becomes bfloat16. Inline
assembly it refuses; here it goes through a function that emulates it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from lowbit_kernels.gpu.ptx import PER_LANE_ASM
from triton.runtime import interpreter

Array = np.ndarray


def bf16_bits(values: Array) -> Array:
    """Returns the bits of float32 `values` rounded to nearest even, uint16."""
    rounded = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).bfloat16()
    return rounded.view(torch.int16).numpy().view(np.uint16)


def bf16_values(bits: Array) -> Array:
    """Returns what the uint16 `bits` stand for, float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes loads, conversions, products and stores of bfloat16 right, each rounding once."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_bf16(self: Any, source: Any, target: Any) -> Any:
        kind = target.scalar
        if source.dtype.scalar == kind:
            return source
        if source.dtype.scalar == tl.bfloat16:
            source = handle(bf16_values(source.data), tl.float32)
            return source if kind == tl.float32 else cast(self, source, target)
        if kind == tl.bfloat16:
            return handle(bf16_bits(source.data.astype(np.float32)), kind)
        return cast(self, source, target)

    def convert(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        return cast_bf16(self, source, target)

    def dot_bf16(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (handle(bf16_values(side.data), tl.float32) for side in (a, b))
        return dot(self, a, b, *rest)

    monkeypatch.setattr(builder, "cast_impl", cast_bf16)
    monkeypatch.setattr(builder, "create_fp_to_fp", convert)
    monkeypatch.setattr(builder, "create_dot", dot_bf16)


def emulate_inline_asm(
    monkeypatch: pytest.MonkeyPatch, run: Callable[[str, list[Array], int], list[Array]]
) -> list[str]:
    """Makes inline assembly run through `run(asm, inputs, outputs)`; returns what ran.

    `PER_LANE_ASM` exists for the register allocator only: it returns its input.
    """
    seen: list[str] = []

    def create(
        self: Any, asm: str, constraints: str, values: list[Any], types: list[Any], *_: Any
    ) -> Any:
        # Operands may come as one element that stands for all lanes.
        shape = np.broadcast_shapes(*(value.data.shape for value in values))
        inputs = [np.broadcast_to(value.data, shape) for value in values]
        inputs = [np.ascontiguousarray(value).view(np.uint32) for value in inputs]
        assert constraints.count("=") == len(types)
        assert len(constraints.split(",")) == len(types) + len(values)
        if asm == PER_LANE_ASM:
            outputs = inputs
        else:
            seen.append(asm)
            flat = run(asm, [value.ravel() for value in inputs], len(types))
            outputs = [value.reshape(shape) for value in flat]
        kinds = [kind.scalar for kind in types]
        handles = [
            interpreter.TensorHandle(value.view(interpreter._get_np_dtype(kind)), kind)
            for value, kind in zip(outputs, kinds, strict=True)
        ]
        return SimpleNamespace(get_result=lambda i: handles[i])

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", create)
    return seen
