"""Packing: against compressed-tensors' own bytes, and against one big integer per row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.quant import pack, unpack

GOLDEN: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "golden" / "packing.json").read_text()
)
every_golden = pytest.mark.parametrize(
    "case", GOLDEN, ids=lambda c: f"{c['bits']}bit-dim{c['packed_dim']}-{len(c['codes'][0])}"
)
bits_and_rows = st.sampled_from([2, 3, 4, 8]).flatmap(
    lambda bits: st.tuples(
        st.just(bits),
        st.integers(1, 90).flatmap(
            lambda columns: st.lists(
                st.lists(
                    st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1),
                    min_size=columns,
                    max_size=columns,
                ),
                min_size=1,
                max_size=3,
            )
        ),
    )
)


@every_golden
def test_words_are_those_of_compressed_tensors(case: dict[str, Any]) -> None:
    codes = torch.tensor(case["codes"], dtype=torch.int8)
    expected = torch.tensor(case["packed"], dtype=torch.int32)
    if case["packed_dim"] == 0:  # zero points are packed along out_features
        assert torch.equal(pack(codes.T, case["bits"]).T, expected)
        assert torch.equal(unpack(expected.T, case["bits"], codes.shape[0]).T, codes)
    else:
        assert torch.equal(pack(codes, case["bits"]), expected)
        assert torch.equal(unpack(expected, case["bits"], codes.shape[1]), codes)


def test_golden_cases_cover_every_width_and_both_dimensions() -> None:
    assert {(c["bits"], c["packed_dim"]) for c in GOLDEN} == {
        (bits, dim) for bits in (2, 3, 4, 8) for dim in (0, 1)
    }


@settings(deadline=None)
@given(bits_and_rows)
def test_any_row_packs_as_a_bit_stream_and_comes_back(drawn: tuple[int, list[list[int]]]) -> None:
    bits, rows = drawn
    codes = torch.tensor(rows, dtype=torch.int8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.tolist() == [oracles.pack_row(row, bits) for row in rows]
    unpacked = unpack(packed, bits, codes.shape[1])
    assert unpacked.dtype == torch.int8
    assert unpacked.tolist() == [
        oracles.unpack_row(words, bits, codes.shape[1]) for words in packed.tolist()
    ]
    assert torch.equal(unpacked, codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_leading_dimensions_and_strides_do_not_matter(bits: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, (37, 5, 2), dtype=torch.int8)
    batched = codes.permute(2, 1, 0)  # not contiguous
    one_by_one = torch.stack([pack(matrix.contiguous(), bits) for matrix in batched])
    assert torch.equal(pack(batched, bits), one_by_one)
    assert torch.equal(unpack(one_by_one, bits, 37), batched)
