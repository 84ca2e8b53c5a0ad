"""Schemes: the grammar, its errors, and the sizes that a scheme promises."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schemes import every_scheme

from lowbit.errors import LowbitError
from lowbit.scheme import CODEBOOKS, Scheme

any_scheme = st.one_of(
    st.builds(
        Scheme,
        bits=st.sampled_from([2, 3, 4, 8]),
        group_size=st.one_of(st.none(), st.integers(2, 32).map(lambda n: 8 * n)),
        symmetric=st.booleans(),
        scale_dtype=st.sampled_from(["FP16", "BF16", "FP32"]),
        double_quant=st.booleans(),
    ),
    st.builds(
        Scheme,
        codebook=st.sampled_from(sorted(CODEBOOKS)),
        group_size=st.one_of(st.none(), st.integers(2, 32).map(lambda n: 8 * n)),
        scale_dtype=st.sampled_from(["FP16", "BF16", "FP32"]),
        double_quant=st.booleans(),
    ),
)


@settings(deadline=None)
@given(any_scheme)
def test_string_parses_back_to_the_same_scheme(scheme: Scheme) -> None:
    assert Scheme.parse(str(scheme)) == scheme
    assert Scheme.parse(f"  {str(scheme).lower()} ") == scheme


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("W4A16", {}),
        ("W3A16_G64", {"bits": 3, "group_size": 64}),
        ("w4a16_asym_channel", {"symmetric": False, "group_size": None}),
        ("W2A16_BF16_G32", {"bits": 2, "group_size": 32, "scale_dtype": "BF16"}),
        ("W4A16_DQ_FP16", {"double_quant": True}),
        ("NF4", {"codebook": "nf4", "group_size": 64}),
        ("FP4_G128", {"codebook": "fp4", "group_size": 128}),
    ],
)  # fmt: skip
def test_text_means(text: str, fields: dict[str, object]) -> None:
    assert Scheme.parse(text) == dataclasses.replace(Scheme(), **fields)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("W5A16", "5 bits"),
        ("W4A8", "end in A16, for example W4A16"),
        ("NF5", "did you mean 'NF4'"),
        ("W4A16_G100", "group size 100"),
        ("W4A16_G8", "from 16 to 256"),
        ("W4A16_G64_G32", "group_size twice"),
        ("W4A16_CHANNEL_G32", "group_size twice"),
        ("W4A16_FP16_BF16", "scale_dtype twice"),
        ("NF4_ASYM", "without zero points"),
        ("W4A16_ASYMM", "did you mean"),
        ("", "unknown scheme"),
    ],
)
def test_bad_text_is_refused_with_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(LowbitError, match=sentence):
        Scheme.parse(text)


@pytest.mark.parametrize(
    ("text", "bits_per_weight"),
    [
        # codes + scale / group, and the 128 bits of weight_shape over 2^24 weights (not seen here)
        ("W4A16", 4 + 16 / 128),
        ("W3A16_G64", 3 + 16 / 64),
        ("W4A16_ASYM_G64", 4 + (16 + 4) / 64),
        ("W4A16_G64_FP32", 4 + 32 / 64),
        ("NF4_DQ", 4 + 8 / 64 + 32 / (64 * 256)),
        ("W2A16_CHANNEL", 2 + 16 / 4096),
    ],
)
def test_bits_per_weight_counts_scales_and_zero_points(text: str, bits_per_weight: float) -> None:
    assert Scheme.parse(text).bits_per_weight((4096, 4096)) == pytest.approx(
        bits_per_weight, abs=1e-4
    )


@every_scheme
def test_short_last_group_is_counted(scheme: Scheme) -> None:
    width = scheme.group_width(1000)
    assert (scheme.groups(1000) - 1) * width < 1000 <= scheme.groups(1000) * width


def test_small_matrix_is_one_group() -> None:
    assert Scheme.parse("W4A16_G128").groups(40) == 1
