"""Writes a Llama checkpoint of any size with random weights, one block in memory at a time.

For measurements of memory, time and disk that do not depend on what the weights say. The default is
the shape of a 7B model: 6.7e9 weights, 13.5 GB in bfloat16, in 33 shards with an index.

Every tensor has a generator of its own, seeded by the run's seed and the tensor's name, so the
files do not depend on the order in which they are written. Weights are N(0, 0.02), norms are 1.
There is no tokenizer: calibrate such a model with a file of token ids.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.reader import INDEX_NAME
from lowbit.checkpoint.writer import ShardWriter, write_json
from lowbit.errors import LowbitError
from lowbit.progress import RunProgress
from scripts import command_line

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
STANDARD_DEVIATION = 0.02
NORM_EPSILON = 1e-5
CONTEXT = 2048


@dataclass(frozen=True)
class RandomLlama:
    """The shape of a random model; `heads` are query and key-value heads alike."""

    hidden: int = 4096
    intermediate: int = 11008
    blocks: int = 32
    heads: int = 32
    vocab: int = 32000
    dtype: str = "bfloat16"
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = (self.hidden, self.intermediate, self.blocks, self.heads, self.vocab)
        if min(sizes) < 1 or self.hidden % (2 * self.heads):
            raise LowbitError(
                f"sizes must be at least 1 and hidden a multiple of twice the heads; got hidden "
                f"{self.hidden}, heads {self.heads}, smallest size {min(sizes)}"
            )

    def config(self) -> dict[str, Any]:
        """Returns the Hugging Face config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": NORM_EPSILON,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "dtype": self.dtype,
        }

    def shards(self) -> Iterator[dict[str, tuple[int, ...]]]:
        """Yields the tensors of each shard by name: the blocks, then what lies around them."""
        square, wide = (self.hidden, self.hidden), (self.intermediate, self.hidden)
        for block in range(self.blocks):
            shapes: dict[str, tuple[int, ...]] = {
                **{f"self_attn.{letter}_proj": square for letter in "qkvo"},
                "mlp.gate_proj": wide,
                "mlp.up_proj": wide,
                "mlp.down_proj": (self.hidden, self.intermediate),
                "input_layernorm": (self.hidden,),
                "post_attention_layernorm": (self.hidden,),
            }
            yield {f"model.layers.{block}.{name}.weight": shape for name, shape in shapes.items()}
        yield {
            "model.embed_tokens.weight": (self.vocab, self.hidden),
            "model.norm.weight": (self.hidden,),
            "lm_head.weight": (self.vocab, self.hidden),
        }

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Returns one tensor of the model."""
        dtype = DTYPES[self.dtype]
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype)
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        drawn = torch.empty(shape, dtype=torch.float32).normal_(generator=generator)
        return drawn.mul_(STANDARD_DEVIATION).to(dtype)


def write_checkpoint(model: RandomLlama, directory: Path, progress: bool = True) -> int:
    """Writes `model` and returns the bytes of its tensors.

    Raises:
        LowbitError: `directory` holds something already.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise LowbitError(f"{directory}: is not empty; choose a new folder")
    directory.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    total_size = 0
    with RunProgress(progress) as bar:
        bar.stage("writing", model.blocks + 1)
        for index, tensors in enumerate(model.shards(), start=1):
            file = directory / f"model-{index:05d}-of-{model.blocks + 1:05d}.safetensors"
            with ShardWriter(file, ShardWriter.header_bound(list(tensors))) as writer:
                for name, shape in tensors.items():
                    tensor = model.tensor(name, shape)
                    writer.add(name, tensor)
                    weight_map[name] = file.name
                    total_size += tensor.numel() * tensor.element_size()
            bar.advance(1)
    index_content = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    write_json(directory / INDEX_NAME, index_content)
    write_json(directory / "config.json", model.config())
    return total_size


def main() -> None:
    """Runs the command."""
    parser = command_line.parser(
        __doc__, "python scripts/make_random_llama.py --output ./random-7b --seed 1"
    )
    shape = RandomLlama()
    parser.add_argument("--output", type=Path, required=True, help="new folder to write")
    parser.add_argument("--hidden", type=int, default=shape.hidden, help="width")
    parser.add_argument("--intermediate", type=int, default=shape.intermediate, help="of the MLPs")
    parser.add_argument("--blocks", type=int, default=shape.blocks, help="decoder blocks")
    parser.add_argument("--heads", type=int, default=shape.heads, help="attention heads")
    parser.add_argument("--vocab", type=int, default=shape.vocab, help="tokens")
    parser.add_argument("--dtype", choices=DTYPES, default=shape.dtype, help="of the weights")
    parser.add_argument("--seed", type=int, default=shape.seed, help="of the weights")
    command_line.run(parser, _run)


def _run(arguments: argparse.Namespace) -> None:
    options = {name: value for name, value in vars(arguments).items() if name != "output"}
    total = write_checkpoint(RandomLlama(**options), arguments.output)
    print(f"{arguments.output}: {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
