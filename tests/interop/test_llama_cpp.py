"""llama.cpp reads what we write, and we read what it writes.

It rounds the inputs of a product with blocks to 8 bits. So what our model's logits change by when
its inputs are rounded so is what both may differ by; with plain floats that is nothing but sums in
another order.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clients import ASSETS, relative, require
from safetensors.torch import load_file
from tiny_models import make_tiny
from transformers import AutoTokenizer

import lowbit
from lowbit.formats.gguf.architectures import ARCHITECTURES
from lowbit.formats.gguf.header import read_gguf_header
from lowbit.formats.gguf.types import GgmlType
from lowbit.formats.gguf.writing import GgufOptions
from lowbit.pipeline.calibration_run import calibrate

CLIENT = "llama_cpp"
PROGRAM = Path(__file__).with_name("llama_cpp_client.py")
pytestmark = pytest.mark.filterwarnings("ignore:.*has no tokenizer", "ignore:.*no name for how")
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64}
IDS = np.random.default_rng().integers(3, 256, 48)
# Differences of logits, root mean square as a share of their deviation: of sums in another order;
# and how much of the effect of rounded inputs, measured on our side, may be found (of independent
# roundings it would be all of it, give or take a few percent).
SUMS, SHARE = 1e-5, 1.25


def ask(**request: Any) -> Path:
    """Returns the file that llama.cpp wrote."""
    asked = json.dumps({key: str(v) if isinstance(v, Path) else v for key, v in request.items()})
    done = subprocess.run([require(CLIENT), str(PROGRAM), asked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return Path(request["out"])


def their_logits(model: Path, ids: np.ndarray) -> torch.Tensor:
    np.save(model.with_suffix(".ids.npy"), ids)
    out = ask(
        do="logits",
        model=model,
        ids=model.with_suffix(".ids.npy"),
        out=model.with_suffix(".npy"),
    )
    return torch.from_numpy(np.load(out))


def rounded_inputs(model: torch.nn.Module, kinds: dict[str, GgmlType]) -> None:
    """Lets every layer round its inputs as llama.cpp does before it multiplies with blocks.

    To 8 bits, in blocks of 32 beside types of that size (`block_q8_0`, its scale in fp16), of 256
    beside the others (`block_q8_K`).
    """
    arch = ARCHITECTURES["qwen3"]  # its table has all leaves
    for name, module in model.named_modules():
        kind = kinds.get(arch.file_name(f"{name}.weight") or "")
        if name == "lm_head" and kind is None:
            kind = kinds["token_embd.weight"]
        if kind is None or kind.dtype is not None or name == "model.embed_tokens":
            continue

        def rounded(_: Any, inputs: tuple[torch.Tensor], block: int = kind.block) -> Any:
            groups = inputs[0].unflatten(-1, (-1, block))
            scale = groups.abs().amax(-1, keepdim=True) / 127
            codes = (groups / scale.clamp_min(1e-30)).round()
            stored = scale.half().float() if block == 32 else scale
            return ((codes * stored).flatten(-2), *inputs[1:])

        module.register_forward_pre_hook(rounded)


def our_logits(model: Path, ids: np.ndarray, rounds: bool = False) -> torch.Tensor:
    """Returns our logits; with `rounds` of inputs that are rounded as llama.cpp rounds them."""
    loaded = lowbit.load(model, dtype=torch.float32)
    if rounds:
        tensors = read_gguf_header(model).tensors
        rounded_inputs(loaded, {name: tensor.kind for name, tensor in tensors.items()})
    with torch.inference_mode():
        logits: torch.Tensor = loaded(torch.from_numpy(ids)[None].long()).logits
    return logits[0]


def require_agreement(file: Path, ids: np.ndarray) -> torch.Tensor:
    """Returns their logits of a file after comparing them with ours."""
    theirs, ours = their_logits(file, ids), our_logits(file, ids)
    rounding = relative(our_logits(file, ids, rounds=True), ours)
    assert relative(theirs, ours) < SUMS + SHARE * rounding
    return theirs


def perplexity(logits: torch.Tensor, ids: np.ndarray) -> float:
    chosen = torch.from_numpy(ids[1:]).long()[:, None]
    return float(torch.exp(-logits[:-1].double().log_softmax(-1).gather(1, chosen).mean()))


def heldout_ids() -> np.ndarray:
    """Returns tokens that nothing was chosen by, int `[samples, 512]`."""
    (tokens,) = load_file(ASSETS / "books-4m-test.safetensors").values()
    return np.asarray(tokens.numpy())


def tiny(path: Path, family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    if family == "mistral":
        changes["sliding_window"] = None
    make_tiny(family, dtype, **WIDE, **changes).save_pretrained(path)
    return path


@pytest.mark.pair("gguf", "write", CLIENT, "logits within its rounding of inputs")
@pytest.mark.parametrize("family", ["llama", "llama_tied", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"])
def test_it_computes_what_we_compute_of_our_file(tmp_path: Path, family: str, kind: str) -> None:
    require(CLIENT)
    source, options = tiny(tmp_path / "m", family), GgufOptions(kind)
    file = lowbit.convert(source, tmp_path / "x.gguf", "gguf", gguf=options, progress=False).path
    require_agreement(file, IDS)


@pytest.mark.pair("gguf", "write", CLIENT, "perplexity within 0.5%")
@pytest.mark.parametrize("scheme", ["W4A16_G32", "W4A16", "W8A16_G32"])
def test_a_quantized_checkpoint_keeps_its_perplexity_there(tmp_path: Path, scheme: str) -> None:
    require(CLIENT)
    ids = heldout_ids()[0]
    options = {"algorithm": "rtn", "progress": False}
    lowbit.quantize(ASSETS / "books-4m", tmp_path / "q", scheme=scheme, **options)
    file = lowbit.convert(tmp_path / "q", tmp_path / "x.gguf", "gguf", progress=False).path
    ours = our_logits(tmp_path / "q", ids)
    assert relative(our_logits(file, ids), ours) < 1e-3  # kernels of other group sizes
    theirs = require_agreement(file, ids)
    assert perplexity(theirs, ids) == pytest.approx(perplexity(ours, ids), rel=5e-3)


@pytest.mark.pair("gguf", "write", CLIENT, "GPTQ on its grid is nearer than its own choice")
@pytest.mark.parametrize(("kind", "number"), [("Q4_0", 2), ("Q4_K", 14)])
def test_gptq_on_its_grid_beats_its_own_choice(tmp_path: Path, kind: str, number: int) -> None:
    require(CLIENT)
    source, folder = ASSETS / "books-4m", tmp_path
    tokens = ASSETS / "books-4m-calibration.safetensors"
    sizes = {"samples": 48, "seqlen": 512, "progress": False}
    calibrate(source, folder / "s", calibration=tokens, **sizes)
    options, plain = GgufOptions(kind, folder / "s"), GgufOptions("BF16")
    ours = lowbit.convert(source, folder / "o.gguf", "gguf", gguf=options, progress=False).path
    wide = lowbit.convert(source, folder / "w.gguf", "gguf", gguf=plain, progress=False).path
    theirs = ask(do="quantize", model=wide, type=number, pure=True, out=folder / "theirs.gguf")

    def divergence(file: Path) -> float:
        found = []
        for row in heldout_ids()[:4]:
            expected = our_logits(source, row).log_softmax(-1)
            logits = our_logits(file, row).log_softmax(-1)
            found.append((expected.exp() * (expected - logits)).sum(-1).mean())
        return float(torch.stack(found).mean())

    assert divergence(ours) < 0.8 * divergence(theirs)


# llama_ftype
TYPES = {
    "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q2_K": 10, "Q3_K_M": 12, "Q4_K_S": 14,
    "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18, "IQ4_NL": 25,
}  # fmt: skip


@pytest.mark.pair("gguf", "read", CLIENT, "equal weights, logits within its rounding of inputs")
@pytest.mark.parametrize("kind", TYPES)
def test_what_it_quantizes_is_read(tmp_path: Path, kind: str) -> None:
    require(CLIENT)
    gguf = pytest.importorskip("gguf")
    source, plain = tiny(tmp_path / "m", "qwen2"), GgufOptions("F32")
    wide = lowbit.convert(source, tmp_path / "w.gguf", "gguf", gguf=plain, progress=False).path
    file = ask(do="quantize", model=wide, type=TYPES[kind], out=tmp_path / "x.gguf")
    require_agreement(file, IDS)
    architecture = ARCHITECTURES["qwen2"]
    modules = dict(lowbit.load(file, dtype=torch.float32).named_modules())
    for tensor in gguf.GGUFReader(file).tensors:
        stem, _, suffix = (architecture.hub_name(tensor.name) or "").rpartition(".")
        if suffix != "weight" or len(tensor.shape) == 1:
            continue
        module = modules[stem]
        expected = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        if hasattr(module, "dequantize"):
            assert torch.equal(module.dequantize(), expected), tensor.name
        else:  # no scheme has its minima
            assert torch.equal(module.weight, expected.bfloat16().float()), tensor.name


@pytest.mark.pair("gguf", "write", CLIENT, "equal tokens")
def test_it_cuts_text_into_our_tokens(tmp_path: Path) -> None:
    require(CLIENT)
    source, options = ASSETS / "books-4m", GgufOptions("Q8_0")
    file = lowbit.convert(source, tmp_path / "x.gguf", "gguf", gguf=options, progress=False).path
    text = "It's  a dark\nand stormy night; 12 o'clock, \u00e9t\u00e9 -- they'll say\u2026 \t x=1."
    found = np.load(ask(do="tokens", model=file, text=text, out=tmp_path / "tokens.npy"))
    assert found.tolist() == AutoTokenizer.from_pretrained(source)(text)["input_ids"]
