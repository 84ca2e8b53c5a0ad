"""Quantized weights: stored tensors decode to what was chosen, and are checked on the way in."""

from __future__ import annotations

import oracles
import pytest
import torch
from schemes import every_scheme
from test_grid import random_grid

from lowbit.errors import LowbitError
from lowbit.quant import QuantizedWeight
from lowbit.scheme import Scheme


def random_weight(scheme: Scheme, rows: int, columns: int) -> tuple[torch.Tensor, QuantizedWeight]:
    """Returns random codes and their packed form on a random grid."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(
        scheme.code_min, scheme.code_max + 1, (rows, columns), generator=generator, dtype=torch.int8
    )
    return codes, QuantizedWeight.from_codes(codes, random_grid(scheme, rows, columns))


@every_scheme
@pytest.mark.parametrize("shape", [(1, 16), (7, 100), (33, 257)])
def test_stored_tensors_decode_to_the_codes_and_grid(
    scheme: Scheme, shape: tuple[int, int]
) -> None:
    codes, stored = random_weight(scheme, *shape)
    # A file gives back tensors with the strides of their shape, not those they were made with.
    read = {name: torch.tensor(tensor.tolist(), dtype=tensor.dtype).view(tensor.shape)
            for name, tensor in stored.tensors().items()}  # fmt: skip
    loaded = QuantizedWeight.from_tensors(scheme, shape, read)
    grid = random_grid(scheme, *shape)
    assert torch.equal(loaded.codes(), codes)
    assert torch.equal(loaded.grid().scales, grid.scales)
    assert torch.equal(loaded.dequantize(), grid.dequantize(codes))


@every_scheme
def test_dequantized_values_are_those_of_the_definition(scheme: Scheme) -> None:
    rows, columns = 5, 70
    codes, stored = random_weight(scheme, rows, columns)
    values, grid = stored.dequantize(), stored.grid()
    for row in range(rows):
        for column in range(columns):
            group = column // scheme.group_width(columns)
            zero = 0 if grid.zeros is None else int(grid.zeros[row, group])
            code, scale = int(codes[row, column]), float(grid.scales[row, group])
            expected = oracles.decode(code, scale, zero, scheme.codebook)
            assert float(values[row, column]) == pytest.approx(expected, rel=1e-6, abs=0)


@every_scheme
@pytest.mark.parametrize("shape", [(1, 16), (48, 200)])
def test_stored_bytes_are_what_the_scheme_promises(scheme: Scheme, shape: tuple[int, int]) -> None:
    _, stored = random_weight(scheme, *shape)
    tensors = stored.tensors()
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == scheme.stored_bytes(shape)
    assert scheme.bits_per_weight(shape) == 8 * scheme.stored_bytes(shape) / (shape[0] * shape[1])


@every_scheme
def test_chosen_rows_decode_like_the_whole(scheme: Scheme) -> None:
    _, stored = random_weight(scheme, 20, 90)
    rows = torch.tensor([0, 19, 3, 3])
    assert torch.equal(stored.dequantize_rows(rows), stored.dequantize()[rows])


@every_scheme
def test_damaged_tensors_are_named(scheme: Scheme) -> None:
    shape = (12, 96)
    _, stored = random_weight(scheme, *shape)
    for name, tensor in stored.tensors().items():
        missing = {key: value for key, value in stored.tensors().items() if key != name}
        with pytest.raises(LowbitError, match=f"layer.7: .*{name}"):
            QuantizedWeight.from_tensors(scheme, shape, missing, name="layer.7")
        with pytest.raises(LowbitError, match=name):
            QuantizedWeight.from_tensors(scheme, shape, {**missing, name: tensor[:0]})
        with pytest.raises(LowbitError, match=name):
            QuantizedWeight.from_tensors(scheme, shape, {**missing, name: tensor.to(torch.float64)})
