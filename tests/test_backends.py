"""The priority list: who runs, who refuses and why, and what is said about it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from lowbit_kernels.cpu import library

from lowbit import backends
from lowbit.backends import Request
from lowbit.errors import LowbitError
from lowbit.scheme import Scheme

CPU = Request(Scheme.parse("W4A16"), torch.device("cpu"), torch.bfloat16, 256, 128)
CUDA = Request(Scheme.parse("W4A16"), torch.device("cuda"), torch.bfloat16, 256, 128)


@dataclass
class FakeBackend:
    """Refuses with `reason`, counts how often it was asked."""

    name: str
    reason: str | None
    asked: int = 0

    def refusal(self, request: Request) -> str | None:
        self.asked += 1
        return self.reason


@pytest.fixture(autouse=True)
def _fresh_caches() -> Iterator[None]:
    backends.select.cache_clear()
    backends._warn_once.cache_clear()
    yield
    backends.select.cache_clear()
    backends._warn_once.cache_clear()


def use(monkeypatch: pytest.MonkeyPatch, *fakes: FakeBackend) -> None:
    monkeypatch.setattr(backends, "BACKENDS", list(fakes))


def test_first_that_does_not_refuse_runs_and_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing, willing, later = (
        FakeBackend("a", "no"),
        FakeBackend("b", None),
        FakeBackend("c", None),
    )
    use(monkeypatch, refusing, willing, later)
    assert backends.select(CPU) is willing
    assert backends.select(CPU) is willing
    assert (refusing.asked, willing.asked, later.asked) == (1, 1, 0)


def test_explain_returns_every_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeBackend("a", "no"), FakeBackend("b", None), FakeBackend("c", "never"))
    assert backends.explain(CPU) == {"a": "no", "b": None, "c": "never"}


def test_error_lists_every_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeBackend("a", "too old"), FakeBackend("b", "too small"))
    with pytest.raises(LowbitError, match=r"a: too old; b: too small"):
        backends.select(CPU)


def test_falling_to_the_reference_on_cuda_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeBackend("fast", "wrong device"), FakeBackend("dequantize", None))
    other = Request(Scheme.parse("NF4"), CUDA.device, CUDA.dtype, 256, 128)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for request in (CUDA, CUDA, other, CPU):
            backends.select(request)
    said = [str(w.message) for w in caught if "on cuda" in str(w.message)]
    assert [message.count("fast: wrong device") for message in said] == [1]


def test_the_reference_runs_on_cpu_without_a_warning_beside_native_kernels() -> None:
    if (reason := library.unavailable_reason()) is not None:
        pytest.skip(reason)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select(CPU).name == "dequantize"
    assert "CUDA" in (backends.explain(CPU)["triton"] or "")


def test_the_reference_refuses_integer_activations() -> None:
    request = Request(CPU.scheme, CPU.device, torch.int32, 256, 128)
    with pytest.raises(LowbitError, match=r"triton: .*; dequantize: activations are torch.int32"):
        backends.select(request)
