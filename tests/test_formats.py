"""Layouts of other tools: against their own bytes, and against oracles of what they say."""

from __future__ import annotations

from pathlib import Path

import formats_oracles as oracle
import gguf_oracles as gguf_oracle
import numpy as np
import pytest
import torch
from format_files import checkpoint_of
from safetensors.torch import load_file
from schemes import NAMES

from lowbit.errors import LowbitError
from lowbit.formats.base import StoredAs, readable_group, revived
from lowbit.formats.bnb import TABLES
from lowbit.formats.gptq import Gptq
from lowbit.formats.regrid import regrid, requantized
from lowbit.formats.table import LAYOUTS, layout_named
from lowbit.quant import Grid, QuantizedWeight
from lowbit.scheme import INT8_STATIC, Scheme

GOLDEN = Path(__file__).parent / "golden"
# Those that store codes.
STORING = [name for name in LAYOUTS if name != "bf16"]
SHAPES = ((32, 96), (40, 168), (33, 192), (64, 256))
SCHEMES = [Scheme.parse(name) for name in (*NAMES, "W8A8", "W8A8_STATIC", "W4A16_G24")]


def golden(name: str) -> dict[str, dict[str, torch.Tensor]]:
    """Returns case -> tensors of a golden file."""
    cases: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(GOLDEN / f"{name}.safetensors").items():
        case, _, suffix = key.partition(".")
        cases.setdefault(case, {})[suffix] = tensor
    return cases


def random_weight(scheme: Scheme, shape: tuple[int, int], name: str = "") -> QuantizedWeight:
    """Returns fresh codes of the whole range on a fresh grid, which the format `name` holds."""
    rows, columns = shape
    size = (rows, scheme.groups(columns))
    codes = torch.randint(scheme.code_min, scheme.code_max + 1, shape, dtype=torch.int8)
    sign = torch.where(torch.rand(size) < 0.5, -1.0, 1.0) if scheme.signed_scales else 1.0
    scales = sign * (torch.rand(size) + 0.1) * 0.01
    if name == "gguf" and not scheme.symmetric:
        # Seven bits, so that a scale times a zero point is exact in fp16.
        mantissa, exponent = torch.frexp(scales)
        scales = torch.ldexp((mantissa * 128).round() / 128, exponent)
    zeros = None
    if not scheme.symmetric:
        # Zero, which version 1 of GPTQ has no way to store, aside.
        zeros = torch.randint(scheme.code_min + 1, scheme.code_max + 1, size).float()
    grid = Grid.storable(scheme, columns, scales, zeros)
    static = scheme.activations == INT8_STATIC
    return QuantizedWeight.from_codes(codes, grid, torch.tensor([0.02]) if static else None)


def stored(name: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """Returns the tensors of a module `m` by suffix, after rereading them as a reader would."""
    layout = LAYOUTS[name]
    held = regrid(weight, layout.held_as(weight.scheme))
    assert held is not None
    made = layout.tensors("m", held)
    again = layout.read("m", layout.stored_as("m", held.scheme, held.shape, made), made)
    assert torch.equal(again.dequantize(), weight.dequantize())
    return {key.removeprefix("m."): tensor for key, tensor in made.items()}


def decoded_by_oracle(name: str, tensors: dict[str, torch.Tensor], scheme: Scheme) -> np.ndarray:
    """Returns the weight that the specification of a format makes of its tensors."""
    if name.startswith("gptq"):
        return oracle.gptq_weight(tensors, scheme.bits, 1 if name == "gptq" else 2)
    if name == "gguf":
        kind = "Q8_0" if scheme.bits == 8 else "Q4_0" if scheme.symmetric else "Q4_1"
        return gguf_oracle.decode(kind, tensors["weight"].numpy())
    if name == "awq":
        width = scheme.group_width(tensors["qweight"].shape[0])
        return oracle.awq_weight(tensors, width)
    if name == "bnb":
        kind = next(theirs for theirs, ours in TABLES.items() if ours == scheme.codebook)
        return oracle.bnb_weight(tensors, kind)
    return oracle.compressed_weight(tensors, scheme.bits, scheme.group_size)


@pytest.mark.parametrize("name", [name for name in STORING if name != "lowbit"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_is_written_means_the_same_by_the_specification(scheme: Scheme, name: str) -> None:
    held = 0
    for shape in SHAPES[:2]:
        weight = random_weight(scheme, shape, name)
        if LAYOUTS[name].refusal(scheme, shape) or not regrid(
            weight, LAYOUTS[name].held_as(scheme)
        ):
            continue
        held += 1
        expected = decoded_by_oracle(name, stored(name, weight), scheme)
        # The oracle computes in float64; ours is one float32 product of the same numbers.
        assert np.array_equal(expected.astype(np.float32), weight.dequantize().numpy())
    plain = scheme.codebook is None and not scheme.double_quant and scheme.scale_dtype == "FP16"
    if plain and scheme.bits == 4 and scheme.group_size in (None, 32, 64):
        assert held or name == "bnb" or scheme.group_size == 64


@pytest.mark.parametrize("name", STORING)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_scheme_is_held_or_refused_with_one_that_is(scheme: Scheme, name: str) -> None:
    layout = LAYOUTS[name]
    for shape in SHAPES:
        weight = random_weight(scheme, shape, name)
        if layout.refusal(scheme, shape) is None:
            if regrid(weight, layout.held_as(scheme)) is not None:
                stored(name, weight)
            continue
        nearest = layout.nearest(scheme, shape)
        if nearest is None:
            assert shape[0] % 8 or shape[1] % 32  # words or blocks that rows do not fill
            continue
        assert layout.refusal(nearest, shape) is None
        made, error = requantized(weight, layout.held_as(nearest))
        assert error < 1 / 2 ** (made.scheme.bits - 2)
        zeros = made.grid().zeros
        # Rounding may choose the zero point that version 1 refuses, and a scale that times a zero
        # point is not exact in fp16.
        if name == "gguf" and zeros is not None:
            continue
        if name != "gptq" or zeros is None or not bool((zeros == made.scheme.code_min).any()):
            stored(name, made)


@pytest.mark.parametrize("version", [1, 2])
def test_gptq_bytes_are_those_of_gptqmodel(version: int) -> None:
    layout = Gptq(version)
    cases = golden("gptq")
    assert len(cases) == 12
    for case, found in cases.items():
        bits, kind = int(case[1]), case.partition("_")[2]
        tensors = {name: found[name] for name in ("qweight", "scales", "g_idx")}
        tensors["qzeros"] = found[f"{layout.name}.qzeros"]
        group = found["g_idx"].long()
        zeros = found["zeros"].double()[:, group]
        expected = (found["codes"].double() - zeros) * found["scales"].T.double()[:, group]
        assert np.array_equal(oracle.gptq_weight(tensors, bits, version), expected.numpy())
        order = torch.argsort(group, stable=True) if kind == "ordered" else None
        scheme = Scheme(bits=bits, group_size=32, symmetric=kind == "sym")
        shape = tuple(found["codes"].shape)
        named = {f"m.{name}": tensor for name, tensor in tensors.items()}
        as_stored = StoredAs(scheme, shape, tuple(named), order, {"repeats": 1})
        weight = layout.read("m", as_stored, named)
        decoded = weight.dequantize()
        natural = decoded if order is None else decoded[:, torch.argsort(order)]
        assert torch.equal(natural, expected.float())
        assert torch.equal(natural.half(), found["decoded"])
        again = layout.tensors("m", weight, order)
        assert again.keys() == named.keys()
        assert all(torch.equal(again[name], named[name]) for name in named)


def test_awq_bytes_are_those_of_its_packer() -> None:
    (found,) = golden("awq").values()
    tensors = {name: found[name] for name in ("qweight", "qzeros", "scales")}
    group = torch.arange(96) // 32
    codes, zeros = found["codes"].double(), found["zeros"].double()[:, group]
    expected = (codes - zeros) * found["scales"].T.double()[:, group]
    assert np.array_equal(oracle.awq_weight(tensors, 32), expected.numpy())
    layout = LAYOUTS["awq"]
    named = {f"m.{name}": tensor for name, tensor in tensors.items()}
    scheme = Scheme(group_size=32, symmetric=False)
    weight = layout.read("m", layout.stored_as("m", scheme, (32, 96), named), named)
    assert torch.equal(weight.dequantize(), expected.float())
    assert torch.equal(weight.dequantize().half(), found["decoded"])
    again = layout.tensors("m", weight)
    assert all(torch.equal(again[name], named[name]) for name in named)


@pytest.mark.parametrize("case", ["nf4", "nf4_nested", "fp4", "fp4_nested"])
def test_bitsandbytes_bytes_decode_to_its_own_values(case: str, tmp_path: Path) -> None:
    kind = case[:3]
    found = golden("bitsandbytes")[case]
    tensors = {name: tensor for name, tensor in found.items() if name != "decoded"}
    named = {f"m.{name}": tensor for name, tensor in tensors.items()}
    checkpoint = checkpoint_of(
        tmp_path, named, {"quant_method": "bitsandbytes", "load_in_4bit": True}
    )
    layout = layout_named("bnb", "float32")
    as_stored = layout.modules(checkpoint)["m"]
    weight = layout.read("m", as_stored, named)
    assert str(weight.scheme) == {"nf4": "NF4_FP32", "fp4": "FP4BNB_FP32"}[kind]
    assert torch.equal(weight.dequantize(), found["decoded"])
    exact = oracle.bnb_weight(tensors, kind)
    assert np.allclose(weight.dequantize().numpy(), exact, rtol=1e-6, atol=1e-9)
    if "nested" not in case:
        again = layout.tensors("m", weight)
        assert again.keys() == named.keys()
        assert all(torch.equal(again[name], named[name]) for name in named)


@pytest.mark.parametrize("scheme", ["W4A16_G64_DQ", "NF4_DQ", "W2A16_ASYM_G64_DQ"])
def test_scales_that_were_quantized_are_written_out_exactly(scheme: str) -> None:
    weight = random_weight(Scheme.parse(scheme), (32, 128))
    plain, error = requantized(weight, Scheme.parse(scheme.removesuffix("_DQ")))
    assert error == 0.0
    assert not plain.scheme.double_quant
    assert torch.equal(plain.dequantize(), weight.dequantize())


def test_a_grid_is_exchanged_only_for_one_with_all_its_values() -> None:
    def to(source: str, target: str, shape: tuple[int, int] = (8, 128)) -> bool:
        weight = random_weight(Scheme.parse(source), shape)
        made = regrid(weight, Scheme.parse(target))
        if made is not None:
            assert made.scheme == Scheme.parse(target)
            assert torch.equal(made.dequantize(), weight.dequantize())
        return made is not None

    assert to("W4A16_G64", "W4A16_G32")  # scales repeated
    assert not to("W4A16_G32", "W4A16_G64")
    assert not to("W4A16_G48", "W4A16_G32")  # columns 32-63 have two scales
    assert to("W4A16_G48", "W4A16_G24")
    assert to("W4A16", "W4A16_CHANNEL")  # one group of 128
    assert to("W3A16_G64", "W4A16_ASYM_G64")
    assert not to("W4A16_G64", "W3A16_G64")
    assert not to("W4A16_ASYM_G64", "W4A16_G64")
    assert to("W4A16_G64_BF16", "W4A16_G64")  # 8 bits of mantissa in 11
    assert not to("W4A16_G64_FP32", "W4A16_G64")
    assert to("NF4_DQ", "NF4_FP32")
    assert not to("NF4", "FP4")
    assert to("W8A8", "W8A16_CHANNEL")
    assert not to("W8A16_CHANNEL", "W8A8")


def test_version_1_of_gptq_refuses_the_zero_point_that_it_cannot_store() -> None:
    scheme = Scheme.parse("W4A16_ASYM_G32")
    zeros = torch.full((32, 3), -8.0)  # 0, unsigned
    grid = Grid.storable(scheme, 96, torch.full((32, 3), 0.01), zeros)
    weight = QuantizedWeight.from_codes(torch.zeros(32, 96, dtype=torch.int8), grid)
    with pytest.raises(LowbitError, match=r"m: has the zero point 0.*use --to gptq_v2"):
        LAYOUTS["gptq"].tensors("m", weight)
    made = LAYOUTS["gptq_v2"].tensors("m", weight)
    assert int(made["m.qzeros"].abs().max()) == 0
    wrapped = {**made, "m.qzeros": torch.full_like(made["m.qzeros"], -1)}
    as_stored = LAYOUTS["gptq"].stored_as("m", scheme, (32, 96), made)
    with pytest.raises(LowbitError, match=r"'m.qzeros' holds the zero point 15.*ambiguous"):
        LAYOUTS["gptq"].read("m", as_stored, wrapped)


@pytest.mark.parametrize("name", ["W4A16_G32", "W4A16_ASYM_G32", "NF4_G32"])
def test_groups_of_zeros_get_a_scale_and_stay_zeros(name: str) -> None:
    scheme = Scheme.parse(name)
    weight = random_weight(scheme, (4, 80))
    grid, codes = weight.grid(), weight.codes()
    scales = grid.scales.clone()
    scales[1, 0] = scales[3, 2] = 0.0
    expected = Grid(scheme, 80, scales, grid.zeros).dequantize(codes)
    alive = revived(codes, scales, grid.zeros, scheme)
    assert bool((alive != 0).all())
    assert torch.equal(Grid(scheme, 80, alive, grid.zeros).dequantize(codes), expected)
    assert not bool(expected[1, :32].any())
    assert not bool(expected[3, 64:].any())


@pytest.mark.parametrize(
    ("declared", "columns", "expected"),
    [(-1, 64, None), (128, 64, (128, 1)), (512, 768, (256, 2)), (1024, 512, (None, 1))],
)
def test_wide_groups_become_several_with_one_scale(
    declared: int, columns: int, expected: tuple[int | None, int] | None
) -> None:
    size = None if declared < 0 else declared
    assert readable_group(size, columns) == (expected or (None, 1))
    with pytest.raises(LowbitError, match="groups of 521"):
        readable_group(521, 4096)
