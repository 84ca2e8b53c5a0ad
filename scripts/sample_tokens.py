"""Samples token sequences from a decoder and stores them as safetensors.

Sequences drawn from a model P itself are the cleanest calibration and test data there is: no text
has to be chosen, no domain is missing, and they can be made for any model. On them the mean of
log P - log Q over whole sequences is an unbiased estimate of the sequences' KL(P || Q), so what an
evaluation prints as "mean log P/Q" is then a divergence and not merely a difference of
perplexities. That holds only for plain sampling, so there is no temperature, top-k or stop at an
end token here: every sequence has the same length, and its law is P's own.

File: `input_ids` [sequences, length], uint16 where the vocabulary fits, else int32; each row begins
with the BOS token. The metadata has one key, `sampling`: JSON with model, seed, temperature and the
SHA-256 of the weights (one key, because the order of several is not fixed in the file).
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor, nn

from lowbit.checkpoint.writer import write_bytes
from lowbit.errors import LowbitError
from lowbit.progress import RunProgress
from scripts import command_line


def sample(
    model: nn.Module,
    first_token: int,
    shape: tuple[int, int],
    seed: int,
    batch_size: int,
    progress: bool = True,
) -> tuple[Tensor, float]:
    """Returns ids int64 `[sequences, length]` drawn from `model`, and its entropy.

    The entropy is the mean of the exact entropies of the conditional distributions that were drawn
    from, nats per token: the model's own loss on these sequences estimates the same number.

    Args:
        model: a Hugging Face decoder in float32 and evaluation mode.
        first_token: column 0 of every sequence, usually BOS.
        shape: sequences and tokens in each, the first one included.
        seed: of the draws. One uniform number a token decides, taken on the CPU.
        batch_size: sequences drawn together; it changes which numbers go to which sequence.
        progress: show a bar on standard error.
    """
    sequences, length = shape
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    drawn: list[Tensor] = []
    entropy = 0.0
    with RunProgress(progress) as bar, torch.inference_mode():
        bar.stage("sampling", sequences * (length - 1))
        for start in range(0, sequences, batch_size):
            rows = min(batch_size, sequences - start)
            uniform = torch.rand(rows, length - 1, generator=generator, dtype=torch.float64)
            ids = torch.full((rows, length), first_token, device=device)
            cache: Any = None
            for position in range(1, length):
                step = model(
                    input_ids=ids[:, position - 1 : position],
                    past_key_values=cache,
                    use_cache=True,
                )
                cache = step.past_key_values
                # float64: a sum over the vocabulary in float32 misplaces rare tokens.
                log_p = step.logits[:, -1].double().log_softmax(-1)
                entropy -= float((log_p.exp() * log_p).sum())
                ids[:, position] = _draw(log_p, uniform[:, position - 1].to(device))
                bar.advance(rows)
            drawn.append(ids.cpu())
    return torch.cat(drawn), entropy / (sequences * (length - 1))


def _draw(log_p: Tensor, uniform: Tensor) -> Tensor:
    """Returns one token id a row by inverting the distribution function.

    Args:
        log_p: float64 `[rows, vocabulary]`.
        uniform: float64 `[rows]` in [0, 1).
    """
    cumulative = log_p.exp().cumsum(-1)
    # The total is 1 only up to rounding; scaling the number keeps the index inside the vocabulary.
    targets = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0]


def save_samples(file: Path, ids: Tensor, vocab_size: int, sampling: dict[str, Any]) -> None:
    """Writes int64 `ids` `[sequences, length]` with their description, atomically."""
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.int32
    content = safetensors.numpy.save(
        {"input_ids": ids.numpy().astype(dtype)}, {"sampling": json.dumps(sampling)}
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(file, content)


def weights_digest(directory: Path) -> str:
    """Returns the SHA-256 of a checkpoint's safetensors files, one after the other by name."""
    digest = hashlib.sha256()
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb") as handle:
            while chunk := handle.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def sample_checkpoint(
    directory: Path,
    output: Path,
    shape: tuple[int, int],
    seed: int = 0,
    batch_size: int = 64,
    device: str = "cpu",
    progress: bool = True,
) -> float:
    """Samples the decoder in `directory` to `output`; returns its entropy in nats per token.

    Raises:
        LowbitError: there is no decoder, it has no BOS token, or `shape` does not suit it.
    """
    model = _load(directory).to(device)
    config = model.config.get_text_config()
    sequences, length = shape
    if sequences < 1 or batch_size < 1 or length < 2:
        raise LowbitError(
            f"got {sequences} sequences of {length} tokens in batches of {batch_size}; needed at "
            "least 1 of 2 tokens in batches of 1"
        )
    if length > config.max_position_embeddings:
        raise LowbitError(
            f"length {length} is beyond the model's {config.max_position_embeddings} positions; "
            "lower --length"
        )
    if config.bos_token_id is None:
        raise LowbitError(f"{directory}: config.json names no bos_token_id to start from; add one")
    ids, entropy = sample(model, config.bos_token_id, shape, seed, batch_size, progress)
    sampling = {
        "model": directory.resolve().name,
        "seed": seed,
        "temperature": 1.0,
        "batch_size": batch_size,
        "dtype": "float32",
        "entropy_nats_per_token": round(entropy, 6),
        "weights_sha256": weights_digest(directory),
    }
    save_samples(output, ids, config.vocab_size, sampling)
    return entropy


def _load(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    if not (directory / "config.json").is_file():
        raise LowbitError(f"{directory}: no decoder here (config.json is missing); give its folder")
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise LowbitError(f"{directory}: transformers cannot load it ({reason})") from error
    return model.eval()


def main() -> None:
    """Runs the command."""
    parser = command_line.parser(
        __doc__, "python scripts/sample_tokens.py ./llama --output tokens.safetensors"
    )
    parser.add_argument("model", type=Path, help="folder of a Hugging Face decoder")
    parser.add_argument("--output", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--sequences", type=int, default=384, help="sequences to draw")
    parser.add_argument("--length", type=int, default=512, help="tokens in each, BOS included")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--batch-size", type=int, default=64, help="sequences drawn together")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    command_line.run(parser, _run)


def _run(arguments: argparse.Namespace) -> None:
    entropy = sample_checkpoint(
        arguments.model,
        arguments.output,
        (arguments.sequences, arguments.length),
        arguments.seed,
        arguments.batch_size,
        arguments.device,
    )
    print(f"{arguments.output}: entropy {entropy:.4f} nats per token")


if __name__ == "__main__":
    main()
