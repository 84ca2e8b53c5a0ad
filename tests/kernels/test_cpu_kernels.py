"""The native CPU kernels through their C interface: every kind, instruction set and odd size."""

from __future__ import annotations

import ctypes
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_cases import KINDS, TYPES, linear, random_weight, relative
from lowbit_kernels.cpu.build import BuildError, build, find_compiler

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler")

SIZES = [(70, 200, 64), (33, 328, 24), (128, 512, 128), (40, 700, 700), (20, 40, 128), (1, 1, 16)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("kind", "bits", "asym"), KINDS)
def test_products_and_decoding(
    library: Any, isa: int, kind: str, bits: int, asym: bool, size: tuple[int, int, int]
) -> None:
    weight = random_weight(
        kind, bits, asym, size, seed=zlib.crc32(repr((kind, size)).encode()) % 1000
    )
    out = torch.full(weight.dense.shape, torch.nan)
    pointer = ctypes.c_void_p(out.data_ptr())
    assert library.lowbit_decode(ctypes.byref(weight.c), pointer, 0, 1, isa) == 0
    assert torch.equal(out, weight.dense)
    generator = torch.Generator().manual_seed(7)
    for tokens in (1, 2, 3, 4, 5, 13, 70):
        x = torch.randn(tokens, size[1], generator=generator)
        bias = torch.randn(size[0], generator=generator)
        exact = x.double() @ weight.dense.double().T + bias.double()
        # Float32 activations, 16 bits in two planes, 8 bits in one.
        for planes, limit in ((0, 1e-5), (2, 2e-4), (1, 3e-2)):
            found = linear(library, weight, x, bias, planes, isa)
            assert relative(found, exact) < limit, (tokens, planes)


# In fp16 both come down to the rounding of the result.
@pytest.mark.parametrize(("dtype", "times"), [(torch.bfloat16, 1.0), (torch.float16, 1.05)])
@pytest.mark.parametrize(("kind", "bits", "asym"), KINDS)
def test_16_bit_activations_err_no_more_than_torch(
    library: Any,
    isa: int,
    kind: str,
    bits: int,
    asym: bool,
    dtype: torch.dtype,
    times: float,
) -> None:
    weight = random_weight(kind, bits, asym, (96, 384, 64), seed=3)
    for tokens in (1, 4, 9):
        x = torch.randn(tokens, 384, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        exact = x.double() @ weight.dense.double().T
        plain = torch.nn.functional.linear(x, weight.dense.to(dtype))
        found = linear(library, weight, x, None, 2, isa)
        assert relative(found, exact) <= times * relative(plain, exact)


@pytest.mark.parametrize(("kind", "bits"), [("int2", 2), ("int3", 3), ("int8", 8), ("nf4", 4)])
def test_neither_threads_nor_neighbours_change_a_result(
    library: Any, isa: int, kind: str, bits: int
) -> None:
    weight = random_weight(kind, bits, False, (200, 512, 64), seed=5)
    x = torch.randn(70, 512, generator=torch.Generator().manual_seed(1))
    for planes in (0, 1, 2):
        whole = linear(library, weight, x, None, planes, isa)
        assert torch.equal(whole, linear(library, weight, x, None, planes, isa, threads=3))
        # Few tokens are multiplied in ways of their own, and more are divided into tiles.
        for rows in (slice(0, 70, 7), *(slice(5, 5 + count) for count in range(1, 18))):
            part = linear(library, weight, x[rows].contiguous(), None, planes, isa)
            assert torch.equal(part, whole[rows])


@pytest.mark.parametrize(("kind", "bits", "asym"), KINDS)
@pytest.mark.parametrize("byte", [0, 255])
def test_the_largest_sums_fit_their_integers(
    library: Any, isa: int, kind: str, bits: int, asym: bool, byte: int
) -> None:
    # All codes and all activations are as large as they can be, for whole segments.
    weight = random_weight(kind, bits, asym, (32, 1024, 1024), seed=6)
    for codes in weight.tensors[:2]:
        if codes is not None:
            codes.fill_(byte)
    dense = torch.empty(32, 1024)
    pointer = ctypes.c_void_p(dense.data_ptr())
    assert library.lowbit_decode(ctypes.byref(weight.c), pointer, 0, 1, isa) == 0
    for sign in (1.0, -1.0):
        x = torch.full((7, 1024), sign)
        exact = x.double() @ dense.double().T
        for planes in (1, 2):
            for tokens in (1, 7):
                found = linear(library, weight, x[:tokens], None, planes, isa)
                # Zero points are subtracted from sums of codes that may be 256 times the result.
                error = (found - exact[:tokens]).abs() / (exact[:tokens].abs() + dense.abs().max())
                assert float(error.max()) < 5e-3, (planes, tokens)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_scales_of_every_dtype(library: Any, isa: int, scale_dtype: torch.dtype) -> None:
    weight = random_weight("int3", 3, True, (50, 160, 32), 2, scale_dtype)
    x = torch.randn(3, 160, generator=torch.Generator().manual_seed(1))
    exact = x.double() @ weight.dense.double().T
    assert relative(linear(library, weight, x, None, 2, isa), exact) < 2e-4


def test_rows_of_x_may_be_apart_and_unaligned(library: Any, isa: int) -> None:
    weight = random_weight("int8", 8, False, (40, 96, 32), seed=8)
    wide = torch.randn(6, 131, generator=torch.Generator().manual_seed(1))
    x = wide[:, 3:99]
    exact = x.double() @ weight.dense.double().T
    assert relative(linear(library, weight, x, None, 2, isa), exact) < 2e-4


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_its_own_row_alone(library: Any, isa: int, value: float) -> None:
    weight = random_weight("int4", 4, False, (33, 128, 64), seed=9)
    x = torch.randn(6, 128, generator=torch.Generator().manual_seed(1))
    x[2, 70] = value
    for planes in (0, 1, 2):
        found = linear(library, weight, x, None, planes, isa)
        assert not found[2].isfinite().any()
        assert found[[0, 1, 3, 4, 5]].isfinite().all()


def test_zeros_and_tiny_values(library: Any, isa: int) -> None:
    weight = random_weight("int4", 4, False, (16, 64, 64), seed=9)
    x = torch.zeros(2, 64)
    x[1] = 1e-42
    for planes in (0, 1, 2):
        found = linear(library, weight, x, None, planes, isa)
        assert torch.equal(found[0], torch.zeros(16))
        assert found[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_as_torch_rounds(library: Any, isa: int, dtype: torch.dtype) -> None:
    weight = random_weight("int4", 4, True, (37, 64, 32), seed=4)
    out = torch.empty(37, 64, dtype=dtype)
    pointer = ctypes.c_void_p(out.data_ptr())
    assert library.lowbit_decode(ctypes.byref(weight.c), pointer, TYPES[dtype], 2, isa) == 0
    assert torch.equal(out, weight.dense.to(dtype))


def test_a_failed_build_says_what_the_compiler_says(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no-such-flag"):
        build(tmp_path, ("-fno-such-flag",))
    assert not list(tmp_path.iterdir())


def test_without_a_compiler_the_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match="install g"):
        build(tmp_path)
