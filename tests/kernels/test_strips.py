"""Stored weights in strips: the operators of the native kernels, and modules that hold them."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from fragment_weights import random_qweight
from hypothesis import given, settings
from hypothesis import strategies as st
from lowbit_kernels.cpu import dispatch, matmul
from lowbit_kernels.cpu import weight as weight_module
from lowbit_kernels.cpu.library import ISAS, library, unavailable_reason
from schemes import NAMES, every_scheme
from torch import Tensor, nn

from lowbit import backends, prepare_model
from lowbit.backends.dequantize import DequantizeBackend
from lowbit.backends.strips import StripPrepared
from lowbit.errors import LowbitError
from lowbit.nn import QuantEmbedding, QuantLinear, TiedQuantLinear
from lowbit.quant import Grid, QuantizedWeight
from lowbit.scheme import Scheme

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason="no native kernels")

SHAPES = [(40, 64), (33, 75), (130, 168)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
# Every kind of code, scale and zero point.
few_schemes = pytest.mark.parametrize(
    "scheme", ["W2A16_ASYM_CHANNEL", "W3A16_ASYM_G16_DQ", "W4A16_G32", "NF4_DQ", "W8A16_G64_BF16"]
)


@pytest.fixture(params=range(len(ISAS)), ids=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Forces each instruction set of this processor in turn."""
    if request.param > library().isa:
        pytest.skip(f"this processor has no {ISAS[request.param]}")
    monkeypatch.setattr(library(), "isa", request.param)
    return ISAS[request.param]


def normal(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(found: Tensor, exact: Tensor, scale: Tensor) -> float:
    """Returns the largest error in units of what the terms of each sum amount to."""
    return float(((found.double() - exact).abs() / scale).max())


def assert_close(found: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None) -> None:
    """Asserts that errors are no larger than those of torch with weights in x's dtype."""
    exact = x.double() @ dense.double().T + (0 if bias is None else bias.double())
    size = x.double().norm(dim=1)[:, None] * dense.double().norm(dim=1) + 1e-30
    plain = F.linear(x, dense.to(x.dtype), None if bias is None else bias.to(x.dtype))
    allowed = 2.0**-14 if x.dtype == torch.float32 else error(plain, exact, size) + 2.0**-14
    assert error(found, exact, size) <= allowed


@every_scheme
@every_shape
def test_there_and_back_is_the_same_bit_for_bit(scheme: Scheme, shape: tuple[int, int]) -> None:
    qweight = random_qweight(scheme, shape, 1)
    restored = StripPrepared.of(qweight).canonical()
    expected = qweight.tensors()
    assert restored.tensors().keys() == expected.keys()
    for name, tensor in restored.tensors().items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(NAMES), st.integers(1, 70), st.integers(1, 300), st.integers(0, 2**31))
def test_any_shape_comes_back(name: str, rows: int, columns: int, seed: int) -> None:
    qweight = random_qweight(name, (rows, columns), seed)
    restored = StripPrepared.of(qweight).canonical()
    for key, tensor in qweight.tensors().items():
        assert torch.equal(restored.tensors()[key], tensor)


def test_rows_are_rearranged_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    qweight = random_qweight("W3A16_ASYM_G64", (130, 168), 1)
    whole = StripPrepared.of(qweight)
    monkeypatch.setattr(weight_module, "CODES_PER_STEP", 168 * 32)
    parts = StripPrepared.of(qweight)
    for name, tensor in whole.tensors().items():
        assert torch.equal(parts.tensors()[name], tensor)
    assert torch.equal(parts.canonical().packed, qweight.packed)


@every_scheme
@every_shape
@every_dtype
def test_decoding_is_exact(
    isa: str, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    qweight = random_qweight(scheme, shape, 2)
    prepared = StripPrepared.of(qweight)
    assert torch.equal(prepared.dequantize(dtype), qweight.dequantize(dtype))
    assert torch.equal(prepared.dequantize(torch.float64), qweight.dequantize(torch.float64))
    rows = torch.tensor([shape[0] - 1, 0, 17, 17])
    for of in (dtype, torch.float64):
        assert torch.equal(prepared.dequantize_rows(rows, of), qweight.dequantize_rows(rows, of))
    assert prepared.dequantize_rows(rows[:0], dtype).shape == (0, shape[1])
    for wrong in (-1, shape[0]):
        with pytest.raises(IndexError, match=str(wrong)):
            prepared.dequantize_rows(torch.tensor([0, wrong]), dtype)


@every_scheme
@every_dtype
def test_products(isa: str, scheme: Scheme, dtype: torch.dtype) -> None:
    shape = (130, 168)
    qweight = random_qweight(scheme, shape, 3)
    prepared, dense = StripPrepared.of(qweight), qweight.dequantize(torch.float64)
    for tokens in (1, 3, 6, 20, 300):
        x, bias = normal(tokens, 168, dtype=dtype, seed=tokens), normal(130, dtype=dtype)
        assert_close(prepared.linear(x, bias), x, dense, bias)
        grad = normal(tokens, 130, dtype=dtype)
        expected = grad.double() @ dense
        size = grad.double().norm(dim=1)[:, None] * dense.norm(dim=0)
        plain = grad @ dense.to(dtype)
        assert (
            error(prepared.grad_input(grad), expected, size)
            <= 1.01 * error(plain, expected, size) + 1e-5
        )


@few_schemes
def test_large_weights_are_decoded_in_blocks(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    qweight = random_qweight(scheme, (130, 168), 4)
    prepared = StripPrepared.of(qweight)
    x, bias, grad = normal(9, 168), normal(130), normal(9, 130)
    monkeypatch.setattr(dispatch, "choose", lambda *_: dispatch.DECODE)
    whole = prepared.linear(x, bias), prepared.grad_input(grad)
    monkeypatch.setattr(matmul, "BLOCK_BYTES", 48 * 168 * 4)
    assert torch.allclose(prepared.linear(x, bias), whole[0], atol=1e-4)
    assert torch.allclose(prepared.grad_input(grad), whole[1], atol=1e-4)


@every_dtype
def test_activations_of_any_layout(isa: str, dtype: torch.dtype) -> None:
    qweight = random_qweight("W4A16_ASYM_G64", (33, 75), 5)
    prepared = StripPrepared.of(qweight)
    wide = normal(2, 5, 160, dtype=dtype)
    for x in (wide[..., 3:78], wide[..., ::2][..., :75], wide[:, 1::2, :75], wide[0, 0, 7:82]):
        out = prepared.linear(x, None)
        assert out.shape == (*x.shape[:-1], 33)
        assert out.dtype == dtype
        assert torch.equal(out, prepared.linear(x.contiguous(), None))
        many = x.expand(40, *x.shape)
        assert torch.equal(prepared.linear(many, None), prepared.linear(many.contiguous(), None))
    assert prepared.linear(wide[:0, :, :75], None).shape == (0, 5, 33)
    assert prepared.grad_input(wide[:0, :, :33]).shape == (0, 5, 75)
    assert prepared.linear(wide[:, :0, :75], None).shape == (2, 0, 33)


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_neither_batch_nor_threads_change_a_token(isa: str, activations: str) -> None:
    qweight = random_qweight("W4A16_G64", (300, 520), 6)
    prepared = StripPrepared.of(qweight).with_activations(activations)
    x = normal(40, 520, dtype=torch.bfloat16)
    whole = prepared.linear(x[:12], None)
    for rows in (slice(0, 1), slice(3, 7), slice(2, 11)):
        assert torch.equal(prepared.linear(x[rows], None), whole[rows])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(prepared.linear(x, None)[:12], prepared.linear(x.clone(), None)[:12])
        assert torch.equal(prepared.linear(x[:12], None), whole)
    finally:
        torch.set_num_threads(threads)


def test_int8_activations_are_coarser_and_only_on_request() -> None:
    qweight = random_qweight("W4A16_G64", (64, 512), 7)
    prepared, dense = StripPrepared.of(qweight), qweight.dequantize(torch.float64)
    x = normal(5, 512)
    exact = x.double() @ dense.T
    errors = {
        name: float((prepared.with_activations(name).linear(x, None) - exact).norm() / exact.norm())
        for name in ("float", "int8")
    }
    assert errors["float"] < 1e-4 < 2e-3 < errors["int8"] < 2e-2
    with pytest.raises(LowbitError, match="int4"):
        prepared.with_activations("int4")


@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_one_unit_per_token_or_for_all(isa: str, tokens: int) -> None:
    qweight = random_qweight("W8A16_CHANNEL", (40, 520), 7)
    weight, dense = StripPrepared.of(qweight).weight, qweight.dequantize(torch.float64)
    x = normal(tokens, 520)
    x[0] *= 100
    x[-1, 5:] = 0
    step = torch.tensor([0.013])
    for activations, unit in (
        ("int8_token", x.abs().amax(1, keepdim=True) / 127),
        ("int8_static", step),
    ):
        codes = (x / unit).round().clamp(-127, 127)
        exact = (codes * unit).double() @ dense.T
        found = matmul.linear(x, weight, None, activations, step)
        assert (found - exact).norm() <= 3e-4 * exact.norm()
    x[0, 3], x[-1, 4] = torch.nan, torch.inf
    found = matmul.linear(x, weight, None, "int8_static", step)
    assert not found[0].isfinite().any()
    assert tokens == 1 or found[1:].isfinite().all()
    assert not matmul.linear(x, weight, None, "int8_token")[-1].isfinite().any()
    with pytest.raises(ValueError, match="input_scale"):
        matmul.linear(x, weight, None, "int8_static")


@pytest.mark.parametrize("name", ["W8A8", "W8A8_STATIC"])
@every_dtype
def test_w8a8_is_what_the_reference_computes(name: str, dtype: torch.dtype) -> None:
    scheme = Scheme.parse(name)
    grid = Grid.storable(scheme, 168, torch.rand(40, 1) * 0.02 + 0.001, None)
    codes = torch.randint(-127, 128, (40, 168), dtype=torch.int8)
    scale = torch.tensor([0.021]) if "STATIC" in name else None
    qweight = QuantizedWeight.from_codes(codes, grid, scale)
    prepared = backends.prepare(qweight, dtype)
    assert prepared is not None
    for key, tensor in qweight.tensors().items():
        assert torch.equal(prepared.canonical().tensors()[key], tensor)
    x, bias = normal(9, 168, dtype=dtype), normal(40, dtype=dtype)
    expected = DequantizeBackend().linear(x, qweight, bias)
    found = prepared.linear(x, bias)
    limit = {torch.float32: 1e-3, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    assert (found - expected).float().norm() <= limit * expected.float().norm()
    # As far from float activations as the scheme says.
    plain = F.linear(x.float(), qweight.dequantize(), bias.float())
    assert (found - plain).norm() > 3e-3 * plain.norm()
    joined = prepared.join([backends.prepare(qweight, dtype)])
    assert joined is not None
    assert torch.equal(joined.weight.linear(x, None)[:, :40], prepared.linear(x, None))


def test_gradients_are_those_of_the_decoded_weight() -> None:
    qweight = random_qweight("NF4_DQ", (40, 64), 8)
    prepared, dense = StripPrepared.of(qweight), qweight.dequantize()
    x, bias = normal(2, 3, 64).requires_grad_(), normal(40).requires_grad_()
    prepared.linear(x, bias).square().sum().backward()
    found = x.grad, bias.grad
    x.grad = bias.grad = None
    F.linear(x, dense, bias).square().sum().backward()
    for mine, theirs in zip(found, (x.grad, bias.grad), strict=True):
        assert mine is not None
        assert torch.allclose(mine, theirs, rtol=2e-3, atol=1e-3)


@few_schemes
def test_operators_pass_torchs_own_checks(scheme: str) -> None:
    held = StripPrepared.of(random_qweight(scheme, (33, 75), 9)).weight
    rest = (*matmul.stored(held),)
    x, bias = normal(3, 75).requires_grad_(), normal(33).requires_grad_()
    shape = matmul.shape(held)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    ops = torch.ops.lowbit_cpu
    torch.library.opcheck(ops.linear, (x, *rest, bias, None, *shape, "float"), test_utils=checks)
    torch.library.opcheck(ops.linear_grad_input, (normal(3, 33), *rest, *shape), test_utils=checks)
    torch.library.opcheck(ops.dequantize, (*rest, *shape, torch.bfloat16), test_utils=checks)
    rows = torch.tensor([1, 0])
    torch.library.opcheck(
        ops.dequantize_rows, (rows, *rest, *shape, torch.float32), test_utils=checks
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiles_without_graph_breaks(dtype: torch.dtype) -> None:
    layer = QuantLinear.from_quantized(
        random_qweight("W4A16_G32", (40, 64), 1), normal(40), compute_dtype=dtype
    )
    assert layer.eval().prepare()
    x = normal(3, 64, dtype=dtype)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


@few_schemes
def test_a_state_dict_is_canonical(scheme: str) -> None:
    qweight = random_qweight(scheme, (48, 96), 2)
    layer = QuantLinear.from_quantized(qweight, normal(48))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert layer.prepare()
    after = layer.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor)
    held = {name for name, _ in [*layer.named_buffers(), *layer.named_parameters()]}
    assert not held & set(qweight.tensors())  # never both forms
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    layer.load_state_dict(torch.load(file))
    assert layer._prepared is not None
    layer.restore()
    assert torch.equal(layer.weight_packed, before["weight_packed"])


def test_a_float64_layer_goes_back_to_canonical_tensors() -> None:
    layer = QuantLinear.from_quantized(random_qweight("W4A16_G32", (40, 64), 3))
    assert layer.prepare()
    layer.double()
    assert layer._prepared is None
    assert layer(normal(2, 64, dtype=torch.float64)).dtype == torch.float64
    layer.bfloat16()
    assert layer._prepared is not None


def test_a_tied_head_multiplies_and_its_embedding_looks_up() -> None:
    qweight = random_qweight("W8A16_G64", (70, 64), 4)
    embedding = QuantEmbedding.from_quantized(qweight)
    head = TiedQuantLinear(embedding, None)
    model = nn.ModuleList([embedding, head])
    assert prepare_model(model) == 2
    ids, dense = torch.tensor([[3, 69], [0, 3]]), qweight.dequantize(torch.bfloat16)
    assert torch.equal(embedding(ids), dense[ids])
    x = normal(2, 64, dtype=torch.bfloat16)
    assert_close(head(x), x, dense, None)
    with pytest.raises(IndexError):
        embedding(torch.tensor([70]))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
            rows = (40, 20, 33)[index]
            layer = QuantLinear.from_quantized(random_qweight("W4A16_G32", (rows, 64), index))
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


def test_siblings_are_one_product() -> None:
    attention = Attention().eval()
    x = normal(1, 64, dtype=torch.bfloat16)
    assert prepare_model(attention) == 3
    with torch.inference_mode():
        alone = torch.cat([backends.prepare(m.quantized_weight, x.dtype).linear(x, None)
                           for m in attention.children()], -1)  # fmt: skip
        assert torch.equal(attention(x), alone)
    siblings = attention.q_proj._siblings
    assert siblings is not None
    assert siblings[0].weight is not None
    clone = copy.deepcopy(attention)
    with torch.inference_mode():
        assert torch.equal(clone(x), alone)


def test_int8_activations_of_a_whole_model_are_switched_and_not_stored() -> None:
    attention = Attention().eval()
    x = normal(3, 64, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in attention.state_dict().items()}
    prepare_model(attention)
    with torch.inference_mode():
        exact = attention(x)
        prepare_model(attention, activations="int8")
        rounded = attention(x)
        assert 1e-4 < float((rounded - exact).norm() / exact.norm()) < 2e-2
        prepare_model(attention, activations="float")
        assert torch.equal(attention(x), exact)
    prepare_model(attention, activations="int8")
    for name, tensor in attention.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_int8_activations_without_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    qweight = random_qweight("W4A16_G32", (40, 64), 3)
    with pytest.raises(LowbitError, match="float64"):
        backends.prepare(qweight, torch.float64, "int8")
    monkeypatch.setattr(backends.BACKENDS[1], "unavailable_reason", lambda: "none compiled")
    backends.select.cache_clear()
    try:
        with pytest.raises(LowbitError, match="none compiled"):
            backends.prepare(qweight, torch.float32, "int8")
    finally:
        backends.select.cache_clear()


def test_padding_bits_that_would_be_lost_stay_canonical() -> None:
    qweight = random_qweight("W3A16_G32", (40, 33), 3)
    packed = qweight.packed.clone()
    packed[0, -1] |= 1 << 30
    odd = QuantizedWeight(qweight.scheme, 33, packed, qweight.scale)
    assert backends.prepare(odd, torch.float32) is None
