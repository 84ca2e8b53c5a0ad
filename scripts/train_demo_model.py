"""Trains a small Llama from scratch on any text, tokenizer included.

    python scripts/train_demo_model.py books.txt.xz more.txt --output ./my-model

The result is a Hugging Face checkpoint. `AutoModelForCausalLM` gives the logits of our own forward
pass; that is checked after every training, before the samples are drawn.

    tokens   byte-level BPE, so every text can be written; <s> opens a text
    model    `demo_llama.py`: RMSNorm, RoPE, grouped-query attention, SwiGLU, tied embedding
    windows  random places of the text; half of them begin with <s>, because sampling starts there
             while an evaluation cuts a text anywhere
    step     AdamW, linear warm-up, then a cosine to a tenth of the peak; bf16 autocast on a GPU

`--sequences 0` leaves out that check and the samples, and with them the need for transformers.
"""

from __future__ import annotations

import argparse
import lzma
import math
import re
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from lowbit.checkpoint.writer import write_bytes, write_json
from lowbit.errors import LowbitError
from lowbit.progress import RunProgress
from scripts import command_line
from scripts.demo_llama import Llama, Shape

BOS, EOS, UNKNOWN = "<s>", "</s>", "<unk>"

# Words with their leading blank, numbers of up to three digits, runs of signs, runs of blanks.
WORD_PATTERN = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

HELD_OUT_SHARE = 0.01


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Args:
        steps: optimizer steps.
        batch_size: windows in a step.
        learning_rate: peak of the schedule.
        seed: of the initial weights and the windows.
        device: cpu or cuda.
        progress: show a bar on standard error.
    """

    steps: int = 4000
    batch_size: int = 32
    learning_rate: float = 2e-3
    seed: int = 0
    device: str = "cpu"
    progress: bool = True


def read_texts(files: list[Path]) -> list[str]:
    """Returns the text of each .txt or .txt.xz file.

    Raises:
        LowbitError: a file is missing, damaged, not UTF-8, or blank.
    """
    texts = []
    for file in files:
        try:
            content = file.read_bytes()
            text = (lzma.decompress(content) if file.suffix == ".xz" else content).decode()
        except (OSError, EOFError, lzma.LZMAError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise LowbitError(f"text {str(file)!r} cannot be read ({reason})") from error
        except UnicodeDecodeError as error:
            raise LowbitError(
                f"text {str(file)!r} is not UTF-8 (offset {error.start}); convert it"
            ) from error
        if not text.strip():
            raise LowbitError(f"text {str(file)!r} is blank; give a text with words in it")
        texts.append(text)
    return texts


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Returns a byte-level BPE tokenizer of exactly `vocab_size` entries that puts <s> in front.

    Raises:
        LowbitError: the text repeats too little for so many merges.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, UNKNOWN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Whole books as single strings would be copied again and again; lines train the same merges,
    # save those across line ends.
    lines = (line for text in texts for line in text.splitlines(keepends=True))
    tokenizer.train_from_iterator(lines, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise LowbitError(
            f"the text is too short for a vocabulary of {vocab_size}: it gave only "
            f"{tokenizer.get_vocab_size()} entries; give more text or lower --vocab"
        )
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, bos)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> Tensor:
    """Returns the ids of `text`, <s> first, int32 `[n]`.

    Paragraph by paragraph, because an encoding holds a hundred bytes a token besides the id. A cut
    right before a blank line is always between two words of `WORD_PATTERN`, so the ids are those of
    the whole text.
    """
    paragraphs = re.split(r"(?<=\S)(?=\n\n)", text)
    parts = [torch.tensor([tokenizer.token_to_id(BOS)], dtype=torch.int32)]
    for start in range(0, len(paragraphs), 1024):
        batch = tokenizer.encode_batch_fast(
            paragraphs[start : start + 1024], add_special_tokens=False
        )
        parts += [torch.tensor(encoding.ids, dtype=torch.int32) for encoding in batch]
    return torch.cat(parts)


def split_tokens(tokens: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Returns the ids (int32) to train on, and held-out windows int64 `[windows, context]`.

    The end of the text is held out, at least one window of it.

    Raises:
        LowbitError: there is not enough text for that.
    """
    windows = max(1, int(len(tokens) * HELD_OUT_SHARE) // context)
    cut = len(tokens) - windows * context
    if cut <= context:
        raise LowbitError(
            f"the text has {len(tokens)} tokens, too few to train on windows of {context} and hold "
            "one out; give more text or lower --context"
        )
    return tokens[:cut], tokens[cut:].long().view(windows, context)


def train(shape: Shape, training: Training, tokens: Tensor, bos: int) -> tuple[Llama, float, float]:
    """Returns a trained model with the loss of its first and last steps, nats per token.

    Args:
        shape: of the model.
        training: steps, batch, rate, seed, device.
        tokens: int32 `[n]`.
        bos: id of <s>.
    """
    torch.manual_seed(training.seed)
    generator = torch.Generator().manual_seed(training.seed)
    model = Llama(shape).to(training.device)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}],
        lr=training.learning_rate,
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_share(step, training.steps)
    )
    on_gpu = torch.device(training.device).type == "cuda"
    first = average = float("nan")
    with RunProgress(training.progress) as bar:
        bar.stage("training", training.steps)
        for step in range(training.steps):
            ids = draw_windows(tokens, shape.context, training.batch_size, bos, generator)
            with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
                loss = next_token_loss(model, ids.to(training.device))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            first, average = (
                (loss.item(), loss.item())
                if step == 0
                else (first, average + 0.05 * (loss.item() - average))
            )
            bar.describe(f"training, loss {average:.3f}")
            bar.advance(1)
    return model, first, average


def learning_rate_share(step: int, steps: int) -> float:
    """Returns the learning rate of `step` as a share of its peak."""
    warmup = max(1, min(200, steps // 10))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2


def draw_windows(
    tokens: Tensor, context: int, count: int, bos: int, generator: torch.Generator
) -> Tensor:
    """Returns int64 windows `[count, context]` from random places, every other one behind a <s>."""
    starts = torch.randint(len(tokens) - context + 1, (count,), generator=generator)
    windows = tokens.unfold(0, context, 1)[starts].long()
    windows[::2, 0] = bos
    return windows


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Returns the mean negative log-likelihood of all tokens but the first of each row, nats."""
    logits = model(ids)[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def held_out_loss(model: nn.Module, windows: Tensor) -> float:
    """Returns the loss on int64 `windows` `[windows, context]`, nats per token."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        parts = [next_token_loss(model, part.to(device)) * len(part) for part in windows.split(16)]
    return float(sum(parts)) / len(windows)


def save(model: Llama, tokenizer: Tokenizer, directory: Path) -> None:
    """Writes a Hugging Face checkpoint in bfloat16; the model is left as it will be read back."""
    directory.mkdir(parents=True, exist_ok=True)
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    state = {name: tensor.detach().cpu().bfloat16() for name, tensor in model.state_dict().items()}
    model.float().load_state_dict(state)
    content = safetensors.torch.save(state, {"format": "pt"})
    write_bytes(directory / "model.safetensors", content)
    write_bytes(directory / "tokenizer.json", (tokenizer.to_str(pretty=True) + "\n").encode())
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNKNOWN,
    }
    write_json(directory / "tokenizer_config.json", tokenizer_config)
    write_json(directory / "config.json", model.shape.config(bos, eos))


def largest_logit_difference(model: Llama, directory: Path, ids: Tensor) -> float:
    """Returns the largest difference between our logits and those of transformers, both in float32.

    Args:
        model: as `save` left it.
        directory: what it wrote.
        ids: int64 `[batch, tokens]`.
    """
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ours = model.cpu().eval()
    with torch.inference_mode():
        return float((theirs(ids).logits - ours(ids)).abs().max())


def main() -> None:
    """Runs the command."""
    parser = command_line.parser(
        __doc__, "python scripts/train_demo_model.py books.txt.xz --output ./my-model --steps 2000"
    )
    shape, training = Shape(), Training()
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT", help=".txt or .txt.xz")
    parser.add_argument("--output", type=Path, required=True, help="folder of the model")
    parser.add_argument("--vocab", type=int, default=shape.vocab_size, help="tokens")
    parser.add_argument("--hidden", type=int, default=shape.hidden_size, help="width")
    parser.add_argument("--intermediate", type=int, default=shape.intermediate_size, help="of MLPs")
    parser.add_argument("--blocks", type=int, default=shape.blocks, help="decoder blocks")
    parser.add_argument("--heads", type=int, default=shape.heads, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=shape.kv_heads, help="key-value heads")
    parser.add_argument("--context", type=int, default=shape.context, help="tokens in a window")
    parser.add_argument("--steps", type=int, default=training.steps, help="optimizer steps")
    parser.add_argument(
        "--batch-size", type=int, default=training.batch_size, help="windows a step"
    )
    parser.add_argument("--learning-rate", type=float, default=training.learning_rate, help="peak")
    parser.add_argument("--seed", type=int, default=0, help="of weights, windows and samples")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--sequences", type=int, default=384, help="samples to draw; 0 for none")
    command_line.run(parser, _run)


def _run(arguments: argparse.Namespace) -> None:
    shape = Shape(
        arguments.vocab,
        arguments.hidden,
        arguments.intermediate,
        arguments.blocks,
        arguments.heads,
        arguments.kv_heads,
        arguments.context,
    )
    training = Training(
        arguments.steps,
        arguments.batch_size,
        arguments.learning_rate,
        arguments.seed,
        arguments.device,
    )
    if training.steps < 1 or training.batch_size < 1:
        raise LowbitError("training needs at least 1 step of at least 1 window")
    texts = read_texts(arguments.texts)
    tokenizer = train_tokenizer(texts, shape.vocab_size)
    ids = torch.cat([encode(tokenizer, text) for text in texts])
    tokens, held_out = split_tokens(ids, shape.context)
    print(f"{len(tokens):,} tokens to train on, {held_out.numel():,} held out")
    bos = tokenizer.token_to_id(BOS)
    model, first, last = train(shape, training, tokens, bos)
    save(model, tokenizer, arguments.output)
    print(f"training loss {first:.4f} -> {last:.4f} nats per token")
    print(
        f"held-out loss {held_out_loss(model, held_out):.4f} nats per token (weights in bfloat16)"
    )
    if arguments.sequences:
        _sample(model, arguments, held_out[:1])


def _sample(model: Llama, arguments: argparse.Namespace, ids: Tensor) -> None:
    """Checks the checkpoint against transformers, then draws calibration tokens from it."""
    from scripts.sample_tokens import sample_checkpoint

    difference = largest_logit_difference(model, arguments.output, ids)
    # Same weights, same formulas, float32: only the order of the sums differs.
    if difference > 1e-3:
        raise AssertionError(f"transformers' logits differ from ours by {difference:.2e}")
    print(f"transformers gives the same logits (largest difference {difference:.1e})")
    file = arguments.output.with_name(arguments.output.name + "-calibration.safetensors")
    entropy = sample_checkpoint(
        arguments.output,
        file,
        (arguments.sequences, arguments.context),
        arguments.seed,
        device=arguments.device,
    )
    print(f"{file}: entropy {entropy:.4f} nats per token")


if __name__ == "__main__":
    main()
