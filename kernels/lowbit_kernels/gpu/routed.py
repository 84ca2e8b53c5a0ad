"""Launches of the kernels for routed rows: their tables, their tiles, their grids."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from lowbit_kernels.gpu import configs, matmul
from lowbit_kernels.gpu.configs import Tile
from lowbit_kernels.gpu.dequantize import BLOCK_K, TRITON_DTYPES, exact_constants
from lowbit_kernels.gpu.grouped import grouped_grad_kernel, grouped_linear_kernel
from lowbit_kernels.gpu.stacked import SPLIT_ROWS, StackedWeight
from lowbit_kernels.gpu.weight import CHUNK

# Up to so many rows, programs find theirs themselves.
FEW_ROWS = 256
# Wider tiles scale weights, not products, which makes wgmma wait (ptxas C7515). And they spill on
# sm_100: rows from anywhere cost more registers than rows that follow each other.
MAX_BLOCK_M = 64
# float32 is multiplied without tensor cores, and must fit the registers all the same.
FLOAT32_TILE = Tile(block_m=16, block_n=64, warps=4, stages=1, split=1)


@dataclass(frozen=True)
class Tables:
    """Where the tiles are, see `grouped.tile_rows`; all None for few rows but `expert_of_row`.

    Args:
        tiles: upper bound of the tiles.
        expert_of_row: int `[R]`.
        order: int64 `[R]`, the rows by expert, those of none last.
        starts: int32 `[E + 2]`: the rows of expert e are `order[starts[e] : starts[e + 1]]`.
        tile_ends: int32 `[E + 1]`, tiles of the experts up to e.
        constants: compile-time arguments.
    """

    tiles: int
    expert_of_row: Tensor | None
    order: Tensor | None
    starts: Tensor | None
    tile_ends: Tensor | None
    constants: dict[str, int]

    @staticmethod
    def make(expert_of_row: Tensor, experts: int, block_m: int) -> Tables:
        """Returns the tables of `expert_of_row` for tiles of `block_m` rows."""
        rows = expert_of_row.shape[0]
        if rows <= FEW_ROWS:
            block_r = SPLIT_ROWS if rows <= SPLIT_ROWS else FEW_ROWS
            sizes = {"BLOCK_R": block_r, "BLOCK_E": 1}
            return Tables(rows, expert_of_row, None, None, None, sizes)
        known = (expert_of_row >= 0) & (expert_of_row < experts)
        key = torch.where(known, expert_of_row, experts).to(torch.int32)
        key, order = torch.sort(key, stable=True)
        bounds = torch.arange(experts + 2, dtype=torch.int32, device=key.device)
        starts = torch.searchsorted(key, bounds, out_int32=True)
        tiles = (starts.diff() + (block_m - 1)) // block_m
        # Every expert but those without rows may have one tile that is not full.
        bound = (rows + min(experts + 1, rows) * (block_m - 1)) // block_m
        sizes = {"BLOCK_R": 1, "BLOCK_E": triton.next_power_of_2(experts + 1)}
        return Tables(bound, None, order, starts, tiles.cumsum(0, dtype=torch.int32), sizes)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What kernels take."""
        return self.expert_of_row, self.order, self.starts, self.tile_ends


def tile_for(x: Tensor, weight: StackedWeight, rows: int) -> Tile:
    """Returns the tile for R = `rows` routed rows: BLOCK_M holds an expert's share of them."""
    if x.dtype == torch.float32:
        return FLOAT32_TILE
    share = triton.next_power_of_2(triton.cdiv(rows, weight.experts))
    tile = configs.choose_for_experts(
        x.device.index or 0,
        matmul._kind(weight.weight.format),
        min(max(16, share), MAX_BLOCK_M),
        weight.rows,
        weight.weight.words.shape[1] * CHUNK,
        min(rows, weight.experts),
    )
    return tile if rows <= SPLIT_ROWS else dataclasses.replace(tile, split=1)


def run_experts(
    x: Tensor,
    weight: StackedWeight,
    expert_of_row: Tensor,
    token_of_row: Tensor | None,
    row_scale: Tensor | None,
    tile: Tile,
) -> Tensor:
    """Returns `experts_linear` by tiles of a given size; last dimension of x contiguous, R > 0.

    Raises:
        ValueError: if K is split for more than SPLIT_ROWS rows, or block_n does not divide those
            of an expert.
    """
    R, rows = expert_of_row.shape[0], weight.rows
    if rows % tile.block_n or (tile.split > 1 and R > SPLIT_ROWS):
        raise ValueError(
            f"{tile} does not fit {R} rows and {rows} stored rows of an expert: block_n must "
            f"divide the latter, and K is split for {SPLIT_ROWS} rows at most"
        )
    whole = weight.weight
    tables = Tables.make(expert_of_row, weight.experts, tile.block_m)
    out = x.new_empty((R, weight.out_features))
    partial = None
    if tile.split > 1:
        partial = x.new_empty((tile.split, R, rows), dtype=torch.float32)
    grouped_linear_kernel[(rows // tile.block_n, tile.split, tables.tiles)](
        x,
        whole.words,
        whole.plane,
        whole.scale,
        whole.zero,
        whole.table,
        *tables.tensors,
        token_of_row,
        row_scale,
        out,
        partial,
        whole.counters,
        R,
        x.shape[0],
        weight.out_features,
        weight.in_features,
        weight.experts,
        rows,
        whole.words.shape[1],
        whole.scale.shape[0],
        x.stride(0),
        whole.scale.stride(0),
        **matmul.tile_constants(x, whole, tile),
        **tables.constants,
    )
    return out


def run_grad(
    grad: Tensor,
    weight: StackedWeight,
    expert_of_row: Tensor,
    row_scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Returns `row_scale[r] * grad[r] W[expert_of_row[r]]`, `[R, K]` in `dtype`; R > 0."""
    R, K = grad.shape[0], weight.in_features
    share = triton.next_power_of_2(triton.cdiv(R, weight.experts))
    block_m = min(max(16, share), MAX_BLOCK_M) if grad.dtype != torch.float32 else 16
    whole = weight.weight
    tables = Tables.make(expert_of_row, weight.experts, block_m)
    out = grad.new_empty((R, K), dtype=dtype)
    grouped_grad_kernel[(triton.cdiv(K, BLOCK_K), tables.tiles)](
        grad,
        whole.words,
        whole.plane,
        whole.scale,
        whole.zero,
        whole.table,
        *tables.tensors,
        row_scale,
        out,
        R,
        weight.out_features,
        K,
        weight.experts,
        weight.rows,
        whole.words.shape[1],
        whole.scale.shape[0],
        grad.stride(0),
        whole.scale.stride(0),
        **exact_constants(whole),
        DTYPE=TRITON_DTYPES[grad.dtype],
        BLOCK_M=block_m,
        BLOCK_N=32,
        **tables.constants,
        num_warps=4,
        num_stages=1,  # more in flight makes wgmma wait for each product (ptxas C7515)
    )
    return out
