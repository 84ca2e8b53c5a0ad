"""The native CPU kernels through their C interface: every kind, instruction set and odd size."""

from __future__ import annotations

import ctypes
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lowbit_kernels.cpu.build import BuildError, build, find_compiler
from torch import Tensor

from lowbit.scheme import NF4_LEVELS

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler")

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ISA_NAMES = ("portable", "avx2", "avx512")
RADIX, LARGEST = 254, 254 * 127 + 126
# kind, bits, whether zero points are stored
KINDS = [
    *((f"int{bits}{'_asym' if asym else ''}", bits, asym) for bits in (2, 3, 4, 8)
      for asym in (False, True)),
    ("nf4", 4, False),
]  # fmt: skip
SIZES = [(70, 200, 64), (33, 328, 24), (128, 512, 128), (40, 700, 700), (20, 40, 128), (1, 1, 16)]


class CWeight(ctypes.Structure):
    """`lowbit::Weight` of src/weight.h."""

    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in ("kind", "rows", "columns", "group", "groups", "type")
        ),
        *(
            (name, ctypes.c_void_p)
            for name in ("codes", "high", "scale", "zero", "table", "levels")
        ),
        ("table_unit", ctypes.c_float),
    )


@dataclass
class Packed:
    """A weight in strips, with what it decodes to."""

    c: CWeight
    tensors: tuple[Tensor | None, ...]
    dense: Tensor


@pytest.fixture(scope="session")
def library() -> Any:
    # Shared by the processes of a test run, and by runs: the name holds a hash of the sources.
    directory = Path(tempfile.gettempdir()) / "lowbit-test-kernels"
    loaded = ctypes.CDLL(str(build(directory, ("-Wall", "-Wextra", "-Werror"))))
    assert loaded.lowbit_abi() == 1
    return loaded


@pytest.fixture(params=range(3), ids=ISA_NAMES)
def isa(request: pytest.FixtureRequest, library: Any) -> int:
    if request.param > library.lowbit_best_isa():
        pytest.skip(f"this processor has no {ISA_NAMES[request.param]}")
    return int(request.param)


def in_strips(codes: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor | None]:
    """Returns the bytes of uint8 `codes` `[N, K]`, as src/weight.h draws them."""
    parts = [
        torch.nn.functional.pad(part, (0, -part.shape[1] % 32))
        for part in codes.split(group, dim=1)
    ]
    padded = torch.cat(parts, 1)
    padded = torch.nn.functional.pad(padded, (0, 0, 0, -padded.shape[0] % 16))
    strips, columns = padded.shape[0] // 16, padded.shape[1]
    quads = padded.view(strips, 16, columns // 4, 4)
    if bits == 8:
        return quads.permute(0, 2, 1, 3).contiguous(), None
    field = 4 if bits == 4 else 2
    count = 8 // field
    split = (quads & ((1 << field) - 1)).view(strips, 16, -1, count, 4).permute(0, 2, 3, 1, 4)
    packed = sum(split[:, :, j] << (field * j) for j in range(count))
    high = None
    if bits == 3:
        split = (quads >> 2).view(strips, 16, -1, 8, 4).permute(0, 2, 3, 1, 4)
        high = sum(split[:, :, j] << j for j in range(8)).contiguous()
    return packed.contiguous(), high


def random_weight(
    kind: str, bits: int, asym: bool, size: tuple[int, int, int], seed: int,
    scale_dtype: torch.dtype = torch.float16,
) -> Packed:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    rows, columns, group = size
    group = min(group, columns)
    groups = -(-columns // group)
    codes = torch.randint(1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(rows, groups, generator=generator) * 0.02 + 0.001).to(scale_dtype)
    zero = None
    if asym:
        zero = torch.randint(1 << bits, (rows, groups), generator=generator, dtype=torch.uint8)
    table = levels = None
    unit = 0.0
    if kind == "nf4":
        levels = torch.tensor(NF4_LEVELS)
        unit = float(levels.abs().max()) / LARGEST
        values = (levels / unit).round()
        upper = (values / RADIX).round()
        table = (torch.cat([upper, values - RADIX * upper]) + 128).to(torch.uint8)
        decoded = levels[codes.long()]
    else:
        middle = torch.full((rows, groups), 2.0 ** (bits - 1)) if zero is None else zero.float()
        decoded = codes.float() - middle.repeat_interleave(group, 1)[:, :columns]
    dense = decoded * scale.float().repeat_interleave(group, 1)[:, :columns]

    def transposed(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        padded = torch.nn.functional.pad(values, (0, 0, 0, -rows % 16))
        return padded.view(-1, 16, groups).permute(0, 2, 1).contiguous()

    packed, high = in_strips(codes, bits, group)
    tensors = (packed, high, transposed(scale), transposed(zero), table, levels)
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    number = 16 if kind == "nf4" else bits
    c = CWeight(number, rows, columns, group, groups, TYPES[scale_dtype], *pointers, unit)
    return Packed(c, tensors, dense)


def linear(
    library: Any, weight: Packed, x: Tensor, bias: Tensor | None, planes: int, isa: int,
    threads: int = 1, out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    out = torch.full((x.shape[0], weight.c.rows), torch.nan, dtype=out_dtype or x.dtype)
    status = library.lowbit_linear(
        ctypes.byref(weight.c), ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.stride(0)),
        TYPES[x.dtype], x.shape[0], ctypes.c_void_p(0 if bias is None else bias.data_ptr()),
        ctypes.c_void_p(out.data_ptr()), TYPES[out.dtype], planes, threads, isa,
    )  # fmt: skip
    assert status == 0
    return out


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


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


def test_neither_threads_nor_neighbours_change_a_result(library: Any, isa: int) -> None:
    weight = random_weight("int4", 4, False, (200, 512, 64), seed=5)
    x = torch.randn(70, 512, generator=torch.Generator().manual_seed(1))
    for planes in (0, 1, 2):
        whole = linear(library, weight, x, None, planes, isa)
        assert torch.equal(whole, linear(library, weight, x, None, planes, isa, threads=3))
        for rows in (slice(5, 8), slice(0, 70, 7)):
            part = linear(library, weight, x[rows].contiguous(), None, planes, isa)
            assert torch.equal(part, whole[rows])


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
