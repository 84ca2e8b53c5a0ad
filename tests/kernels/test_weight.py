"""Fragment order: where every code lies, and the way back to the tensors of a checkpoint."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from fragment_weights import DEVICE, format_of, fragment, random_fragment, random_qweight, unsigned
from lowbit_kernels.format import Format
from lowbit_kernels.gpu import weight as weight_module
from lowbit_kernels.gpu.weight import FragmentWeight, concatenate
from schemes import every_scheme

from lowbit.scheme import NF4_LEVELS, Scheme

FORMATS = [Format(bits, 16) for bits in (2, 3, 4, 8)] + [Format(4, 16, NF4_LEVELS)]
every_format = pytest.mark.parametrize("form", FORMATS, ids=["int2", "int3", "int4", "int8", "nf4"])
SHAPES = [(1, 1), (64, 128), (65, 129), (7, 200), (130, 63)]
DQ_SCHEMES = ["W4A16_G64_DQ", "W8A16_G64_DQ", "W4A16_ASYM_G64_DQ", "NF4_DQ", "NF4_FP32_DQ"]

# The bit of each half of `plane` that holds the top bit of slot 2 s + h of a 3-bit code.
TOP_BITS = (2, 4, 6, 1, 3, 5, 0, 7)


def weight_of(form: Format, codes: torch.Tensor) -> FragmentWeight:
    """Returns `codes` in fragment order under scales of one."""
    ones = torch.ones(codes.shape[0], form.groups(codes.shape[1]), dtype=torch.float16)
    return FragmentWeight.from_codes(form, codes.to(DEVICE), ones.to(DEVICE))


def random_codes(form: Format, shape: tuple[int, int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**form.bits, shape, generator=generator, dtype=torch.uint8)


@every_format
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_come_back(form: Format, shape: tuple[int, int], seed: int) -> None:
    codes = random_codes(form, shape, seed)
    weight = weight_of(form, codes)
    assert torch.equal(weight.codes().cpu(), codes)
    rows = torch.randint(0, shape[0], (5,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(weight.codes(rows.to(DEVICE)).cpu(), codes[rows])


@every_format
@pytest.mark.parametrize("shape", SHAPES)
def test_storage_is_padded_to_64_rows_and_128_columns(
    form: Format, shape: tuple[int, int], seed: int
) -> None:
    weight = weight_of(form, random_codes(form, shape, seed))
    strips, chunks = 4 * math.ceil(shape[0] / 64), 2 * math.ceil(shape[1] / 128)
    words = {2: 1, 3: 1, 4: 2, 8: 4}[form.bits]
    assert weight.words.shape == (strips, chunks, 16, 4, words)
    assert weight.words.dtype == torch.int32
    assert weight.words.is_contiguous()  # kernels compute addresses from the shape
    assert weight.padded_rows == 16 * strips
    assert weight.counters.tolist() == [0] * (strips // 4)
    if form.bits == 3:
        assert weight.plane is not None
        assert weight.plane.shape == (strips, chunks, 16, 4)
        assert weight.plane.is_contiguous()
    else:
        assert weight.plane is None


def places_of(form: Format, row: int, column: int, code: int) -> dict[tuple[str, int, int], int]:
    """Returns (tensor, element, bit) -> value of all set bits of one code, from the description.

    Elements are counted in [strips, chunks, 16 rows, 4 lanes, words] of a weight of four chunks.
    """
    inside = column % 64
    s, h, t, e = inside // 16, inside // 8 % 2, inside % 8 // 2, inside % 2
    lane = ((row // 16 * 4 + column // 64) * 16 + row % 16) * 4 + t
    width = 2 if form.bits == 3 else form.bits
    word, slot = divmod(2 * s + h, 16 // width)
    stored = code ^ 0x80 if form.bits == 8 else code
    bit = width * slot + 16 * e if form.codebook is None else 8 * slot + 4 * e
    element = lane * (width // 2) + word
    places = {("words", element, bit + i): 1 for i in range(width) if stored >> i & 1}
    if form.bits == 3 and stored & 4:
        places["plane", lane, 8 * e + TOP_BITS[2 * s + h]] = 1
    return places


@every_format
def test_a_code_lies_where_the_description_says(form: Format, seed: int) -> None:
    shape = (64, 256)  # four chunks, no padding
    # All bits are clear but those of one code.
    empty = torch.full(shape, 0x80 if form.bits == 8 else 0, dtype=torch.uint8)
    places = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).flatten().topk(60)
    for place in [0, shape[0] * shape[1] - 1, *places.indices.tolist()]:
        row, column = divmod(place, shape[1])
        code = (place * 37 + 1) % 2**form.bits or 1
        codes = empty.clone()
        codes[row, column] = code
        weight = weight_of(form, codes)
        found = {}
        for name, tensor in (("words", weight.words), ("plane", weight.plane)):
            stored = [] if tensor is None else tensor.flatten().tolist()
            for element, bits in enumerate(stored):
                width = 32 if name == "words" else 16
                found.update({(name, element, bit): 1 for bit in range(width) if bits >> bit & 1})
        assert found == places_of(form, row, column, code), (row, column, code)


@every_format
def test_rearranging_in_steps_gives_the_same_bits(
    form: Format, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = random_codes(form, (200, 100), seed)
    whole = weight_of(form, codes)
    monkeypatch.setattr(weight_module, "ROWS_PER_STEP", 64)
    stepped = weight_of(form, codes)
    assert torch.equal(stepped.words, whole.words)
    assert whole.plane is None or torch.equal(stepped.plane, whole.plane)
    assert torch.equal(stepped.codes(), whole.codes())


@every_scheme
def test_scales_and_zero_points_are_transposed_and_come_back(scheme: Scheme, seed: int) -> None:
    qweight = random_qweight(scheme, (70, 200), seed)
    weight = fragment(qweight)
    groups = scheme.groups(200)
    assert weight.scale.shape == (groups, 128)
    assert torch.equal(weight.scale[:, :70].T.cpu(), qweight.scale)
    assert not weight.scale[:, 70:].any()
    assert torch.equal(weight.group_values(weight.scale).cpu(), qweight.scale)
    rows = torch.tensor([69, 0, 13])
    picked = weight.group_values(weight.scale, rows.to(DEVICE)).cpu()
    assert torch.equal(picked, qweight.scale[rows])
    zeros = qweight.grid().zeros
    assert (weight.zero is None) == (zeros is None)
    if weight.zero is not None and zeros is not None:
        assert weight.zero.dtype == torch.uint8
        assert torch.equal(weight.group_values(weight.zero).cpu(), unsigned(zeros, scheme.bits))


@pytest.mark.parametrize("scheme", DQ_SCHEMES)
@pytest.mark.parametrize("shape", [(70, 200), (33, 1000), (1, 64)])
def test_decoded_scales_equal_those_of_double_quant(
    scheme: str, shape: tuple[int, int], seed: int
) -> None:
    qweight = random_qweight(scheme, shape, seed)
    coded = fragment(qweight)
    decoded = coded.with_decoded_scales()
    assert decoded.scale.dtype == qweight.scheme.torch_scale_dtype
    found = decoded.group_values(decoded.scale).float().cpu()
    assert torch.equal(found, qweight.grid().scales)
    again = decoded.with_coded_scales()
    assert again.scale is coded.scale
    assert again.scale_codes is None
    assert decoded.with_decoded_scales() is decoded
    assert coded.with_coded_scales() is coded


@pytest.mark.parametrize("scheme", ["W3A16_ASYM_G64", "W4A16_G32", "NF4", "W8A16_CHANNEL"])
def test_concatenated_weights_are_found_again_as_rows(scheme: str, seed: int) -> None:
    sizes = (70, 64, 1)
    parts = [random_fragment(scheme, (n, 200), seed + i) for i, n in enumerate(sizes)]
    whole = concatenate(parts)
    assert (whole.out_features, whole.padded_rows, whole.in_features) == (256, 256, 200)
    assert whole.words.is_contiguous()
    all_codes = whole.codes()
    start = 0
    for part in parts:
        stop = start + part.padded_rows
        view = whole.rows(start, stop, part.out_features)
        assert view.words.data_ptr() == whole.words[start // 16].data_ptr()  # no copy
        assert view.counters.numel() == part.padded_rows // 64
        assert torch.equal(view.codes(), part.codes())
        assert torch.equal(all_codes[start : start + part.out_features], part.codes())
        assert torch.equal(view.group_values(view.scale), part.group_values(part.scale))
        if part.zero is not None:
            assert view.zero is not None
            assert torch.equal(view.group_values(view.zero), part.group_values(part.zero))
            # Kernels read zero points with the stride of the scales.
            assert view.zero.stride(0) == view.scale.stride(0)
        start = stop


def test_parts_of_a_decoded_weight_do_not_take_codes_of_other_blocks(seed: int) -> None:
    """Blocks of 256 scales are counted from a weight's first row: a part cannot read its codes."""
    weight = random_fragment("W4A16_ASYM_G64_DQ", (128, 1024), seed).with_decoded_scales()
    for start in (0, 64):
        part = weight.rows(start, start + 64, 64)
        assert part.scale_codes is None
        back = part.with_coded_scales().with_decoded_scales()
        expected = weight.scale[:, start : start + 64]
        assert torch.equal(back.scale, expected)
        assert back.zero is not None
        assert back.zero.stride(0) == back.scale.stride(0)


def test_what_cannot_be_one_weight_is_refused(seed: int) -> None:
    four, wide = (
        random_fragment("W4A16_G32", (64, 128), seed),
        random_fragment("W4A16_G32", (64, 256), 1),
    )
    with pytest.raises(ValueError, match="different format or width"):
        concatenate([four, wide])
    with pytest.raises(ValueError, match="different format or width"):
        concatenate([four, random_fragment("W4A16_G64", (64, 128), seed)])
    coded = random_fragment("NF4_DQ", (128, 128), seed)
    with pytest.raises(ValueError, match="decode double-quantized scales"):
        concatenate([coded, coded])
    for start in (0, 64):
        with pytest.raises(ValueError, match="decode them first"):
            coded.rows(start, start + 64, 64)
    assert concatenate([coded.with_decoded_scales()] * 2).padded_rows == 256


def test_concatenation_starts_with_counters_of_its_own(seed: int) -> None:
    parts = [random_fragment("W4A16_G32", (64, 128), seed + i) for i in range(2)]
    whole = concatenate(parts)
    whole.counters.add_(1)
    assert not parts[0].counters.any()


@every_scheme
def test_a_format_survives_as_text(scheme: Scheme) -> None:
    form = format_of(scheme)
    parsed = Format.parse(form.text)
    assert parsed == form
    assert parsed.text == form.text
    if form.codebook is not None:
        assert parsed.codebook is not None
        # -0.0 == 0.0, but the sign is a bit of the table.
        assert [v.hex() for v in parsed.codebook] == [v.hex() for v in form.codebook]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"bits": 5}, "5 bits"),
        ({"codebook": (0.0,) * 8}, "16 values"),
        ({"bits": 3, "codebook": NF4_LEVELS}, "16 values"),
        ({"scale_dtype": "fp64"}, "fp64"),
    ],
)
def test_formats_without_kernels_are_refused(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(Format(4, 64), **fields)


CODED = {
    "scale": torch.ones(4, 2, dtype=torch.uint8),
    "scale_offset": torch.zeros(1, dtype=torch.bfloat16),
    "scale_step": torch.zeros(1, dtype=torch.bfloat16),
}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"codes": torch.zeros(4, 64, dtype=torch.int8)}, "uint8"),
        ({"codes": torch.zeros(64, dtype=torch.uint8)}, r"\[64\], needed: uint8 \[N, K\]"),
        ({"codes": torch.zeros(0, 64, dtype=torch.uint8)}, r"\[0, 64\]"),
        ({"scale": torch.ones(4, 3, dtype=torch.float16)}, r"\(4, 2\)"),
        ({"scale": torch.ones(4, 2)}, "float16"),
        ({"scale": torch.ones(4, 2, dtype=torch.uint8)}, "float16"),
        ({"zero": torch.zeros(4, 2, dtype=torch.uint8)}, "zero is .* needed for this format: None"),
        ({"scale_offset": torch.zeros(1, dtype=torch.bfloat16)}, "scale is .*needed.*uint8"),
        ({**CODED, "scale_step": None}, "scale_step is None, needed.*bfloat16, .1,"),
        (
            {**CODED, "scale_offset": torch.zeros(2).bfloat16()},
            "scale_offset is .*2.*bfloat16, .1,",
        ),
        ({**CODED, "scale_offset": torch.zeros(1)}, "scale_offset is .torch.float32"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    change: dict[str, torch.Tensor | None], sentence: str
) -> None:
    arguments: dict[str, Any] = {
        "codes": torch.zeros(4, 64, dtype=torch.uint8),
        "scale": torch.ones(4, 2, dtype=torch.float16),
    }
    FragmentWeight.from_codes(Format(4, 32), **arguments)
    FragmentWeight.from_codes(Format(4, 32), **{**arguments, **CODED})
    with pytest.raises(ValueError, match=sentence):
        FragmentWeight.from_codes(Format(4, 32), **{**arguments, **change})


@pytest.mark.parametrize(
    ("zero", "sentence"),
    [
        (None, "zero is None, needed for this format: .torch.uint8, .4, 2."),
        (torch.zeros(4, 2, dtype=torch.int8), "zero is .torch.int8"),
        (torch.zeros(2, 4, dtype=torch.uint8), r"zero is .*\(2, 4\).*\(4, 2\)"),
    ],
)
def test_wrong_zero_points_are_refused(zero: torch.Tensor | None, sentence: str) -> None:
    codes, scale = torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 2, dtype=torch.float16)
    with pytest.raises(ValueError, match=sentence):
        FragmentWeight.from_codes(Format(4, 32, symmetric=False), codes, scale, zero)
