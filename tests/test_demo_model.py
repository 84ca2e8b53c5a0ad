"""The demo model: its logits are those of Hugging Face; training and sampling do what they say."""

from __future__ import annotations

import lzma
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from lowbit.errors import LowbitError
from scripts.demo_llama import Llama, Shape
from scripts.sample_tokens import sample
from scripts.train_demo_model import (
    BOS,
    Training,
    encode,
    held_out_loss,
    largest_logit_difference,
    learning_rate_share,
    save,
    split_tokens,
    train,
    train_tokenizer,
)

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "tests" / "assets"
SMALL = Shape(320, hidden_size=48, intermediate_size=80, blocks=2, heads=6, kv_heads=2, context=32)


@pytest.fixture(scope="module")
def text() -> str:
    """Returns prose that every clone has: the licence, blank lines and odd spaces included."""
    return (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_hugging_face_gives_our_logits(text: str, tmp_path: Path) -> None:
    tokenizer = train_tokenizer([text], SMALL.vocab_size)
    torch.manual_seed(0)
    model = Llama(SMALL)
    # Initial weights of 0.02 give logits near zero, which agree whatever the formula.
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * (0.3 if weight.ndim == 2 else 1.0))
    save(model, tokenizer, tmp_path)
    ids = torch.randint(SMALL.vocab_size, (3, SMALL.context))
    spread = float(model(ids).detach().std())
    assert spread > 1
    assert largest_logit_difference(model, tmp_path, ids) < 1e-5 * spread


def test_training_lowers_the_loss_and_is_reproducible(text: str) -> None:
    tokenizer = train_tokenizer([text], SMALL.vocab_size)
    tokens, held_out = split_tokens(encode(tokenizer, text), SMALL.context)
    training = Training(steps=60, batch_size=8, learning_rate=1e-2, progress=False)
    bos = tokenizer.token_to_id(BOS)
    model, first, last = train(SMALL, training, tokens, bos)
    # A model that knows nothing costs log(320) = 5.77.
    assert first == pytest.approx(5.77, abs=0.15)
    assert last < first - 1
    assert held_out_loss(model, held_out) < first - 0.5
    again, _, _ = train(SMALL, training, tokens, bos)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_paragraphs_encode_as_the_whole_text(text: str) -> None:
    tokenizer = train_tokenizer([text], 400)
    mixed = text[:5000] + "\n\n\n  indented\n\n \n12345 don't\t\n\nend \n\n"
    assert encode(tokenizer, mixed).tolist() == tokenizer.encode(mixed).ids
    assert tokenizer.decode(tokenizer.encode(mixed).ids) == mixed


def test_samples_follow_the_model(text: str) -> None:
    torch.manual_seed(0)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=5,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=1.0,
    )
    model = LlamaForCausalLM(config).eval()
    ids, entropy = sample(model, 3, (4000, 3), seed=0, batch_size=1000, progress=False)
    assert torch.equal(ids[:, 0], torch.full((4000,), 3))
    with torch.inference_mode():
        expected = model(torch.tensor([[3]])).logits[0, 0].softmax(-1)
        loss = torch.nn.functional.cross_entropy(
            model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        )
    observed = torch.bincount(ids[:, 1], minlength=5) / 4000
    # Four standard deviations of a binomial share.
    assert (
        (observed - expected).abs().lt(4 * (expected * (1 - expected) / 4000).sqrt() + 1e-4).all()
    )
    assert float(loss) == pytest.approx(entropy, abs=0.05)
    again, _ = sample(model, 3, (4000, 3), seed=0, batch_size=1000, progress=False)
    assert torch.equal(ids, again)


def test_schedule_warms_up_and_ends_at_a_tenth() -> None:
    shares = [learning_rate_share(step, 1000) for step in range(1000)]
    assert shares[0] == pytest.approx(0.01)
    assert max(shares) == pytest.approx(1.0)
    assert shares[-1] == pytest.approx(0.1, abs=1e-4)


def test_command_trains_saves_and_samples(text: str, tmp_path: Path) -> None:
    source = tmp_path / "licence.txt.xz"
    source.write_bytes(lzma.compress(text.encode()))
    sizes = "--vocab 320 --hidden 32 --intermediate 48 --blocks 1 --heads 2 --kv-heads 1"
    amount = "--context 16 --steps 3 --batch-size 2 --sequences 4"
    done = run("train_demo_model", str(source), "--output", str(tmp_path / "m"), sizes, amount)
    assert done.returncode == 0, done.stderr
    assert "held-out loss" in done.stdout
    assert "same logits" in done.stdout
    samples = load_file(tmp_path / "m-calibration.safetensors")["input_ids"]
    assert samples.shape == (4, 16)
    assert samples.dtype == "uint16"


@pytest.mark.parametrize(
    ("content", "options", "expected"),
    [
        (None, "", "cannot be read"),
        (b"\xff\xfe text", "", "not UTF-8"),
        (b" \n", "", "blank"),
        (b"too short", "", "too short for a vocabulary"),
        (b"text", "--heads 3", "multiple of"),
    ],
)
def test_bad_input_is_one_sentence(
    content: bytes | None, options: str, expected: str, tmp_path: Path
) -> None:
    source = tmp_path / "text.txt"
    if content is not None:
        source.write_bytes(content)
    done = run("train_demo_model", str(source), "--output", str(tmp_path / "m"), options)
    assert done.returncode == 2
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_bundled_samples_name_the_bundled_weights() -> None:
    from scripts.sample_tokens import weights_digest

    for name in ("calibration", "test"):
        with safe_open(ASSETS / f"books-4m-{name}.safetensors", framework="numpy") as file:
            assert weights_digest(ASSETS / "books-4m") in file.metadata()["sampling"]


def test_shape_refuses_what_hugging_face_could_not_load() -> None:
    with pytest.raises(LowbitError, match="no room"):
        Shape(vocab_size=259)


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a script as a user would; each argument may hold several words."""
    words = [word for argument in arguments for word in argument.split()]
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
