"""The schemes that tests are parametrised over: a new one is covered by adding it here."""

from __future__ import annotations

import pytest

from lowbit.scheme import Scheme

NAMES = (
    "W2A16_G16", "W2A16_G64", "W2A16_ASYM_G32", "W2A16_G64_DQ",
    "W3A16_G32", "W3A16_G64", "W3A16_ASYM_G64", "W3A16_CHANNEL",
    "W4A16", "W4A16_G32", "W4A16_G64_BF16", "W4A16_G64_FP32", "W4A16_G64_DQ", "W4A16_CHANNEL",
    "W4A16_ASYM_G64", "W4A16_ASYM_CHANNEL", "W4A16_ASYM_G64_DQ", "W4A16_ASYM_G32_BF16",
    "W8A16", "W8A16_CHANNEL", "W8A16_ASYM_G64", "W8A16_G64_DQ",
    "NF4", "NF4_DQ", "NF4_CHANNEL", "NF4_G32_BF16", "NF4_FP32_DQ",
    "FP4", "FP4_DQ", "FP4_G32_FP32", "FP4_CHANNEL_BF16", "FP4BNB_FP32",
)  # fmt: skip

every_scheme = pytest.mark.parametrize("scheme", [Scheme.parse(name) for name in NAMES], ids=str)
