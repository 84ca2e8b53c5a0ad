"""Grids: nearest codes by brute force, storable scales, decoding."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from schemes import every_scheme

from lowbit.quant import Grid, decode, nearest_code
from lowbit.scheme import CODEBOOKS, Scheme


def random_grid(scheme: Scheme, rows: int, columns: int, seed: int = 0) -> Grid:
    """Returns a storable grid with scales of varied size (and sign where the scheme has one)."""
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.groups(columns)
    scales = torch.exp(torch.randn(rows, groups, generator=generator) - 4)
    if scheme.signed_scales:
        scales *= torch.where(torch.rand(rows, groups, generator=generator) < 0.5, -1.0, 1.0)
    zeros = None
    if not scheme.symmetric:
        low, high = scheme.code_min, scheme.code_max
        zeros = torch.randint(low, high + 1, (rows, groups), generator=generator).float()
    return Grid.storable(scheme, columns, scales, zeros)


def oracle_values(grid: Grid, weight: torch.Tensor) -> np.ndarray:
    """Returns the nearest representable values in float64, by trying every code."""
    group = np.arange(weight.shape[1]) // grid.scheme.group_width(weight.shape[1])
    scales = grid.scales.double().numpy()[:, group]
    zeros = np.zeros_like(scales) if grid.zeros is None else grid.zeros.double().numpy()[:, group]
    scheme = grid.scheme
    return oracles.nearest_values(
        weight.double().numpy(), scales, zeros, scheme.bits, scheme.codebook
    )


@every_scheme
@pytest.mark.parametrize("columns", [64, 200, 257])
def test_round_finds_the_nearest_value(scheme: Scheme, columns: int) -> None:
    grid = random_grid(scheme, 5, columns)
    spread = grid.per_column(grid.scales).abs() * 2**scheme.bits
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(1)) * spread / 2
    codes = grid.round(weight)
    assert int(codes.min()) >= scheme.code_min
    assert int(codes.max()) <= scheme.code_max
    weight_64, decoded = weight.double().numpy(), grid.dequantize(codes).double().numpy()
    best = np.abs(weight_64 - oracle_values(grid, weight))
    # Compared by distance: at a tie either neighbour is right.
    assert (np.abs(weight_64 - decoded) <= best + 1e-6 * spread.numpy()).all()


@every_scheme
def test_values_on_the_grid_round_to_themselves(scheme: Scheme) -> None:
    columns = 16 * 2**scheme.bits
    grid = random_grid(scheme, 3, columns)
    codes = torch.arange(scheme.code_min, scheme.code_max + 1, dtype=torch.int8).repeat(3, 16)
    values = grid.dequantize(codes)
    # Compared as values: FP4 has two codes for zero.
    assert torch.equal(grid.dequantize(grid.round(values)), values)


@pytest.mark.parametrize("codebook", sorted(CODEBOOKS))
def test_codebook_levels_are_those_of_the_papers(codebook: str) -> None:
    scheme = Scheme.parse(codebook)
    codes, one = torch.arange(-8, 8), torch.ones(())
    expected = torch.tensor(oracles.table_of(codebook), dtype=torch.float32)
    assert torch.equal(decode(codes, one, None, scheme), expected)
    for value in torch.linspace(-1.3, 1.3, 501) * expected.max():
        found = decode(nearest_code(value, one, None, scheme), one, None, scheme)
        nearest = oracles.nearest_value(float(value), 1.0, 0, 4, codebook)
        assert abs(float(found) - nearest) < 1e-6


@every_scheme
def test_zero_is_on_every_grid(scheme: Scheme) -> None:
    grid = random_grid(scheme, 4, 130)
    zeros = torch.zeros(4, 130)
    assert torch.equal(grid.dequantize(grid.round(zeros)), zeros)


@every_scheme
def test_stored_scales_are_exact_in_their_dtype_and_never_zero(scheme: Scheme) -> None:
    scales = torch.tensor([[1e-12, 3e-5, 0.0123], [0.7, 1e6, 3.0]])
    if scheme.signed_scales:
        scales[1] *= -1
    zeros = None if scheme.symmetric else torch.zeros(2, 3)
    stored = Grid.storable(scheme, 3 * scheme.group_width(768), scales, zeros).scales
    assert torch.equal(stored, stored.to(scheme.torch_scale_dtype).float())
    assert bool((stored != 0).all())
    assert bool(stored.isfinite().all())
    assert torch.equal(stored.sign(), scales.sign())


@every_scheme
def test_rows_of_a_grid_decode_like_the_whole(scheme: Scheme) -> None:
    grid = random_grid(scheme, 6, 100)
    codes = torch.randint(scheme.code_min, scheme.code_max + 1, (6, 100), dtype=torch.int8)
    rows = torch.tensor([4, 0, 4])
    assert torch.equal(grid.rows(rows).dequantize(codes[rows]), grid.dequantize(codes)[rows])
