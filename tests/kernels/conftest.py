"""Fixtures of the kernel tests."""

from __future__ import annotations

import ctypes
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_cases import ISA_NAMES
from fragment_weights import DEVICE


@pytest.fixture(scope="session")
def library() -> Any:
    """The native kernels that ../conftest.py compiled."""
    path = Path(os.environ["LOWBIT_CPU_LIBRARY"])
    if not path.exists():
        pytest.skip("there are no native kernels: there is no C++ compiler")
    loaded = ctypes.CDLL(str(path))
    assert loaded.lowbit_abi() == 2
    return loaded


@pytest.fixture(params=range(3), ids=ISA_NAMES)
def isa(request: pytest.FixtureRequest, library: Any) -> int:
    """The number of an instruction set that this processor has."""
    if request.param > library.lowbit_best_isa():
        pytest.skip(f"this processor has no {ISA_NAMES[request.param]}")
    return int(request.param)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A number of its own for every test, the same in every run, so that a failure repeats."""
    return zlib.crc32(request.node.nodeid.encode())


@pytest.fixture
def exact_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds bfloat16 in Triton's interpreter as a GPU does; nothing where there is a GPU."""
    if DEVICE == "cpu":
        from interpreter import round_bf16

        round_bf16(monkeypatch)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fills what `new_empty` returns with NaN, and fails if something beyond its end is written."""
    guarded: list[torch.Tensor] = []
    new_empty, guard = torch.Tensor.new_empty, 4096

    def poison(self: torch.Tensor, *size: Any, **options: Any) -> torch.Tensor:
        result = new_empty(self, *size, **options)
        if not result.is_floating_point() or type(result) is not torch.Tensor:
            return result
        whole = result.new_full((result.numel() + guard,), float("nan"))
        guarded.append(whole[result.numel() :])
        return whole[: result.numel()].view(result.shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", poison)
    yield
    assert all(bool(tail.isnan().all()) for tail in guarded)
