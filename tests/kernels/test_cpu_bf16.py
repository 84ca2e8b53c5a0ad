"""Products of bfloat16 activations and weights rounded to bfloat16; and all products by AMX.

Where there is no AMX, its code runs with the tile instructions in plain C++ (src/amx_emulated.h).
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_cases import KINDS, TYPES, linear, random_weight, relative
from lowbit_kernels.cpu import build
from torch import Tensor

BFLOATS = 3  # of `planes`
AVX512, AVX512_BF16, AMX = 2, 3, 4
# Rows, columns, group: of one block and strip and of several, whole and with a rest; groups that
# end within a block of 256 columns and that last longer than one.
SIZES = [(70, 200, 64), (33, 328, 24), (128, 512, 128), (100, 700, 700), (20, 40, 128), (1, 1, 16)]
# Around the numbers of tokens that are multiplied at once: 6, 16 and 32.
TOKENS = (1, 2, 3, 4, 5, 6, 7, 13, 16, 17, 32, 33, 47, 70)


@dataclass(frozen=True)
class Native:
    """A library and the instruction set to use of it."""

    library: Any
    isa: int

    def linear(self, weight: Any, x: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        """Returns `x W^T + bias` by bfloat16 products."""
        return linear(self.library, weight, x, bias, BFLOATS, self.isa, **options)


@pytest.fixture(scope="module")
def emulating_library() -> Any:
    """The library with AMX in plain C++."""
    # At -O3 it compiles for a minute.
    flags = ("-DLOWBIT_EMULATE_AMX", "-DLOWBIT_POISON", "-O1")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LD_PRELOAD", raising=False)  # a sanitizer's, not meant for the compiler
        path = build.build(Path(tempfile.gettempdir()) / "lowbit-test-kernels", flags)
    return ctypes.CDLL(str(path))


def native_of(name: str, request: pytest.FixtureRequest) -> Native:
    library = request.getfixturevalue("library")
    isa = AVX512_BF16 if name == "avx512bf16" else AMX
    if name == "emulated amx" and library.lowbit_best_isa() >= AVX512_BF16:
        library = request.getfixturevalue("emulating_library")
    if library.lowbit_best_isa() < isa:
        pytest.skip(f"this processor has no {name}")
    return Native(library, isa)


@pytest.fixture(params=["avx512bf16", "amx", "emulated amx"])
def native(request: pytest.FixtureRequest) -> Native:
    """Every way that this processor can multiply bfloat16."""
    return native_of(request.param, request)


@pytest.fixture(params=["amx", "emulated amx"])
def amx(request: pytest.FixtureRequest) -> Native:
    """Tiles of this processor, and those in plain C++."""
    return native_of(request.param, request)


def random_bfloats(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("kind", "bits", "asym"), KINDS)
def test_one_hot_activations_give_the_weights_rounded_once(
    native: Native, kind: str, bits: int, asym: bool, size: tuple[int, int, int]
) -> None:
    weight = random_weight(kind, bits, asym, size, seed=3)
    found = native.linear(weight, torch.eye(size[1]).bfloat16())
    assert torch.equal(found, weight.dense.T.bfloat16())


@pytest.mark.parametrize("scale_dtype", list(TYPES))
def test_scales_of_every_dtype(native: Native, scale_dtype: torch.dtype) -> None:
    weight = random_weight("int3", 3, True, (50, 160, 32), 2, scale_dtype)
    found = native.linear(weight, torch.eye(160).bfloat16())
    assert torch.equal(found, weight.dense.T.bfloat16())


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("kind", "bits", "asym"), KINDS)
def test_errors_are_those_of_torch_with_the_decoded_weight(
    native: Native, kind: str, bits: int, asym: bool, size: tuple[int, int, int]
) -> None:
    weight = random_weight(kind, bits, asym, size, seed=4)
    bias = torch.randn(size[0], generator=torch.Generator().manual_seed(5)).bfloat16()
    for tokens in TOKENS:
        x = random_bfloats(tokens, size[1], seed=tokens)
        exact = x.double() @ weight.dense.double().T + bias.double()
        plain = torch.nn.functional.linear(x, weight.dense.bfloat16(), bias)
        found = native.linear(weight, x, bias.float())
        # Both round the same weights and the result; a few results lie across a rounding boundary.
        assert relative(found, exact) <= 1.01 * relative(plain, exact) + 1e-5, tokens


def test_more_tokens_than_one_pass_takes(native: Native) -> None:
    weight = random_weight("int4", 4, True, (80, 96, 32), seed=6)
    x = random_bfloats(1100, 96)
    exact = x.double() @ weight.dense.bfloat16().double().T
    out = torch.full((1100, 80), torch.nan)
    assert relative(native.linear(weight, x, out=out), exact) < 1e-6


@pytest.mark.parametrize("out_dtype", list(TYPES))
def test_results_of_every_dtype(native: Native, out_dtype: torch.dtype) -> None:
    weight = random_weight("nf4", 4, False, (75, 300, 64), seed=6)
    x, bias = random_bfloats(9, 300), torch.randn(75)
    exact = x.double() @ weight.dense.bfloat16().double().T + bias.double()
    out = torch.full((9, 75), torch.nan, dtype=out_dtype)
    rounding = relative(exact.to(out_dtype), exact)
    assert relative(native.linear(weight, x, bias, out=out), exact) < 1.1 * rounding + 1e-6


def test_neither_threads_nor_neighbours_change_a_result(native: Native) -> None:
    weight = random_weight("int4", 4, False, (200, 520, 64), seed=5)
    x = random_bfloats(70, 520)
    whole = native.linear(weight, x)
    assert torch.equal(whole, native.linear(weight, x, threads=3))
    for rows in (slice(5, 8), slice(0, 70, 7), slice(20, 53)):
        assert torch.equal(native.linear(weight, x[rows].contiguous()), whole[rows])


def test_rows_of_x_may_be_apart_and_unaligned(native: Native) -> None:
    weight = random_weight("int8", 8, False, (40, 96, 32), seed=8)
    wide = random_bfloats(6, 131)
    x = wide[:, 3:99]
    assert torch.equal(native.linear(weight, x), native.linear(weight, x.contiguous()))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_reaches_its_own_row_alone(native: Native, value: float) -> None:
    # 40 and 100 columns: groups end in columns that are padding.
    weight = random_weight("int4", 4, False, (33, 100, 40), seed=9)
    x = random_bfloats(20, 100)
    x[2, 70] = value
    found = native.linear(weight, x)
    assert not found[2].isfinite().any()
    assert found[torch.arange(20) != 2].isfinite().all()


def test_a_scale_that_is_not_finite_reaches_its_own_column_alone(native: Native) -> None:
    weight = random_weight("int2", 2, True, (70, 100, 40), seed=9)
    scale = weight.tensors[2]
    assert scale is not None
    scale[1, 2, 3] = torch.inf  # row 16 + 3
    found = native.linear(weight, random_bfloats(20, 100))
    assert not found[:, 19].isfinite().any()
    assert found[:, torch.arange(70) != 19].isfinite().all()


def test_zeros_and_tiny_values(native: Native) -> None:
    weight = random_weight("int4", 4, False, (16, 64, 64), seed=9)
    x = torch.zeros(2, 64).bfloat16()
    x[1] = 1e-39  # not a normal number: counts as zero, or as itself
    found = native.linear(weight, x)
    assert torch.equal(found[0], torch.zeros(16).bfloat16())
    assert (found[1].abs() < 1e-36).all()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("kind", "bits", "asym"), KINDS)
def test_integer_products_by_tiles_are_those_of_avx512(
    amx: Native, library: Any, kind: str, bits: int, asym: bool, size: tuple[int, int, int]
) -> None:
    weight = random_weight(kind, bits, asym, size, seed=6)
    bias = torch.randn(size[0], generator=torch.Generator().manual_seed(5))
    for tokens in (*TOKENS, 64, 65):
        x = torch.randn(tokens, size[1], generator=torch.Generator().manual_seed(tokens))
        for planes in (1, 2):
            found = linear(amx.library, weight, x, bias, planes, amx.isa)
            assert torch.equal(found, linear(library, weight, x, bias, planes, AVX512)), tokens


def test_integer_products_by_tiles_do_not_depend_on_threads_or_neighbours(amx: Native) -> None:
    weight = random_weight("nf4", 4, False, (200, 520, 64), seed=5)
    x = torch.randn(70, 520, generator=torch.Generator().manual_seed(1))
    x[40, 3] = torch.nan
    fine = torch.arange(70) != 40
    for planes in (1, 2):
        whole = linear(amx.library, weight, x, None, planes, amx.isa)
        assert not whole[40].isfinite().any()
        again = linear(amx.library, weight, x, None, planes, amx.isa, threads=3)
        assert torch.equal(whole[fine], again[fine])
        part = linear(amx.library, weight, x[20:33], None, planes, amx.isa)
        assert torch.equal(part, whole[20:33])


def test_without_bfloat16_the_product_is_refused(library: Any) -> None:
    weight = random_weight("int4", 4, False, (16, 64, 64), seed=9)
    not_offered = 2

    def status(x: Tensor, isa: int) -> int:
        out = torch.empty(2, 16, dtype=x.dtype)
        return int(
            library.lowbit_linear(
                ctypes.byref(weight.c), ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(64),
                TYPES[x.dtype], 2, None, ctypes.c_void_p(out.data_ptr()), TYPES[x.dtype], BFLOATS,
                ctypes.c_float(0), 1, isa,
            )
        )  # fmt: skip

    best = library.lowbit_best_isa()
    for isa in range(min(best + 1, AVX512_BF16)):
        assert status(random_bfloats(2, 64), isa) == not_offered
    for isa in range(best + 1):
        assert status(torch.ones(2, 64), isa) == not_offered
        assert status(torch.ones(2, 64).half(), isa) == not_offered


@pytest.mark.skipif("amx.cpp" not in build.files(), reason="not an x86 processor")
@pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")
def test_an_older_compiler_leaves_out_what_it_does_not_know(tmp_path: Path) -> None:
    found = build.find_compiler()
    assert found is not None
    older = tmp_path / "older"
    older.write_text(f'#!/bin/sh\ncase "$*" in *amx*) exit 1;; esac\nexec {" ".join(found)} "$@"\n')
    older.chmod(0o755)
    oldest = tmp_path / "oldest"
    oldest.write_text(older.read_text().replace("*amx*", "*amx*|*avx512bf16*"))
    oldest.chmod(0o755)
    assert build.left_out(found) == ()
    assert build.left_out((str(older),)) == ("amx.cpp",)
    assert build.left_out((str(oldest),)) == ("amx.cpp", "avx512bf16.cpp")
    # What is left then needs no function of those files.
    for names in ((), ("amx.cpp",), ("amx.cpp", "avx512bf16.cpp")):
        compiled = tmp_path / "api.o"
        flags = (*build.FLAGS, *(build.OPTIONAL[name] for name in names), "-Wall", "-Werror")
        command = (*found, *flags, "-c", str(build.SOURCES / "api.cpp"), "-o", str(compiled))
        subprocess.run((*command, "-Wno-unknown-pragmas"), check=True)
        for name in build.OPTIONAL:
            symbol = f"{name.removesuffix('.cpp')}_kernels".encode()
            assert (symbol in compiled.read_bytes()) == (name not in names)
