"""Fixtures of the kernel tests."""

from __future__ import annotations

import zlib

import pytest


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A number of its own for every test, the same in every run, so that a failure repeats."""
    return zlib.crc32(request.node.nodeid.encode())
