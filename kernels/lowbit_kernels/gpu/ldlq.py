"""GPTQ's inner loop: one block of columns of all rows in one launch.

Reference: Chee et al. 2023, "QuIP", theorem 6; the recursion and its names are those of the solver
that calls this, see `lowbit.algorithms.ldlq`. In eager mode every column of a block is half a dozen
small launches; here a program keeps the residuals of a few output rows in registers and walks
through the columns of the block.

Shapes: B columns of a block in reversed order of visiting (the last one is visited first), R output
rows, neighbouring in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.gpu.support import on_device_of_first

MAX_BLOCK = 128
# The latency of one column decides, so programs are many and small: 8 rows are 8 registers of
# residuals a thread, and 4096 rows are 512 programs. With 16, sm_100 spills.
ROWS = 8
WARPS = 4
# A fused multiply-add would not round `code * scale` before it is subtracted, as the eager loop
# does; on every target it saves a few instructions of several hundred per column.
FUSION = False

_library = torch.library.Library("lowbit_kernels", "FRAGMENT")
_library.define(
    "ldlq_block(Tensor(a!) target, Tensor(b!) residual, Tensor(c!) codes, Tensor(d!) errors, "
    "Tensor inner, "
    "Tensor group, Tensor scale, Tensor? zero, Tensor? levels, Tensor? boundaries, "
    "Tensor? level_codes, int code_min, int code_max) -> ()"
)


@triton.jit(do_not_specialize=["B", "R"])
def ldlq_block_kernel(
    target,
    residual,
    codes,
    errors,
    inner,
    group,
    scale,
    zero,
    levels,
    boundaries,
    level_codes,
    B,
    R,
    CODE_MIN: tl.constexpr,
    CODE_MAX: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """See `solve_block`. Grid: (R / ROWS,)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = row < R
    column = tl.arange(0, BLOCK)
    # Rows that are not visited yet are zero and add nothing to the feedback.
    visited = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in range(B):
        i = B - 1 - step
        at = i.to(tl.int64) * R + row
        feedback = tl.load(inner + i * B + column, mask=column < B, other=0.0)
        wanted = tl.load(target + at, mask=in_rows, other=0.0)
        wanted += tl.sum(visited * feedback[None, :], axis=1)
        at_group = tl.load(group + i) * R + row
        s = tl.load(scale + at_group, mask=in_rows, other=1.0)
        # The reference divides; a reciprocal would move ties.
        scaled = tl.div_rn(wanted, s)
        if boundaries is not None:
            # The number of boundaries below is the index of the nearest of the sorted levels.
            edges = tl.load(boundaries + tl.arange(0, 16))
            index = tl.sum((scaled[:, None] > edges[None, :]).to(tl.int32), axis=1)
            code = tl.load(level_codes + index)
            value = tl.load(levels + index) * s
        else:
            if zero is not None:
                z = tl.load(zero + at_group, mask=in_rows, other=0.0)
                scaled += z
            # Adding 1.5 * 2^23 rounds to the nearest even integer; beyond 2^22 it rounds coarsely,
            # but there the code is clamped anyway.
            code = (scaled + 12582912.0) - 12582912.0
            code = tl.minimum(tl.maximum(code, CODE_MIN), CODE_MAX)
            if zero is not None:
                value = (code - z) * s
            else:
                value = code * s
        error = tl.load(residual + at, mask=in_rows, other=0.0) - value
        tl.store(target + at, wanted, mask=in_rows)
        tl.store(errors + at, wanted - value, mask=in_rows)
        tl.store(residual + at, error, mask=in_rows)
        tl.store(codes + at, code.to(tl.int8), mask=in_rows)
        visited = tl.where(column[None, :] == i, error[:, None], visited)


def solve_block(
    target: Tensor,
    residual: Tensor,
    codes: Tensor,
    errors: Tensor,
    inner: Tensor,
    group: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    table: tuple[Tensor, Tensor, Tensor] | None,
    code_range: tuple[int, int],
) -> None:
    """Visits the columns of a block, the last one first; writes the first four.

    Column i becomes target_i += sum over j > i of residual_j * inner[i, j], codes_i = the nearest
    code, residual_i -= its value: the arithmetic of the eager loop but for the order of the sum. So
    a code differs only where a target lies within that sum's rounding of a tie; given the codes and
    targets, residuals and errors are equal bit for bit. Two runs on one device are identical.

    Args:
        target: float32 `[B, R]`, weights plus the feedback of all blocks before; B at most 128.
        residual: float32 `[B, R]`, the weights.
        codes: int8 `[B, R]`.
        errors: float32 `[B, R]`, gets the distance of each target from the value of its code.
        inner: float32 `[B, B]`, row i holding the factors of column i's feedback.
        group: int32 `[B]`, the group of each column.
        scale: float32 `[groups, R]`, none zero.
        zero: float32 integers `[groups, R]`, or None.
        table: for a codebook, (levels in ascending order, boundaries between neighbours, codes),
            float32 `[16]` each, padded with the last level, infinity and the last code; or None.
        code_range: smallest and largest code.
    """
    levels, boundaries, level_codes = (None, None, None) if table is None else table
    torch.ops.lowbit_kernels.ldlq_block(
        target,
        residual,
        codes,
        errors,
        inner,
        group,
        scale,
        zero,
        levels,
        boundaries,
        level_codes,
        *code_range,
    )


def _solve_block(
    target: Tensor,
    residual: Tensor,
    codes: Tensor,
    errors: Tensor,
    inner: Tensor,
    group: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    levels: Tensor | None,
    boundaries: Tensor | None,
    level_codes: Tensor | None,
    code_min: int,
    code_max: int,
) -> None:
    B, R = target.shape
    if B > MAX_BLOCK:
        raise ValueError(
            f"ldlq: a block of {B} columns, at most {MAX_BLOCK} can be visited at once"
        )
    written = {"target": target, "residual": residual, "codes": codes, "errors": errors}
    for name, tensor in written.items():
        if tensor.shape != target.shape or not tensor.is_contiguous():
            raise ValueError(f"ldlq: {name} is {list(tensor.shape)}, needed: contiguous {[B, R]}")
    ldlq_block_kernel[(triton.cdiv(R, ROWS),)](
        target,
        residual,
        codes,
        errors,
        inner.contiguous(),
        group,
        scale,
        zero,
        levels,
        boundaries,
        level_codes,
        B,
        R,
        CODE_MIN=code_min,
        CODE_MAX=code_max,
        BLOCK=max(16, triton.next_power_of_2(B)),
        ROWS=ROWS,
        num_warps=WARPS,
        enable_fp_fusion=FUSION,
    )


_library.impl("ldlq_block", on_device_of_first(_solve_block), "CompositeExplicitAutograd")
torch.library.register_fake("lowbit_kernels::ldlq_block", lambda *_: None, lib=_library)
