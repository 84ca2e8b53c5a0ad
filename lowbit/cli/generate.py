"""`lowbit generate`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.adapted import Adapter, with_adapter
from lowbit.errors import LowbitError

if TYPE_CHECKING:
    from torch import Tensor


def generate_command(
    path: Annotated[str, typer.Argument(help="Folder of a checkpoint, or a hub name.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    adapter: Adapter = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end instead.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")
    ] = "auto",
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; the GPU if there is one.")
    ] = None,
    activations: Annotated[
        str, typer.Option(help="float, or int8: rounded while multiplying, on a CPU.")
    ] = "float",
    threads: Annotated[int | None, typer.Option(help="CPU threads; all cores by default.")] = None,
) -> None:
    """Continue a prompt: text on standard output as it comes, speed on standard error.

    Example: lowbit generate ./llama-w4 "Once upon a time" --temperature 0.8 --seed 1
    """
    from lowbit.hf.loading import (
        choose_device,
        load_config,
        load_model,
        load_tokenizer,
        quiet_libraries,
        use_threads,
    )

    quiet_libraries()
    use_threads(threads)
    if max_new_tokens < 1:
        raise LowbitError(f"--max-new-tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature <= 100:
        raise LowbitError(f"--temperature must be 0 to 100, got {temperature}")
    target = choose_device(device)
    config = load_config(path)
    tokenizer: Any = load_tokenizer(path)
    if tokenizer is None:
        raise LowbitError(f"{path}: has no tokenizer, so a prompt cannot be read; add its files")
    encoded = tokenizer(prompt, return_tensors="pt")
    _check_length(encoded["input_ids"], max_new_tokens, config)
    model = with_adapter(load_model(path, dtype, target, activations), path, adapter)
    streamer = TimedStreamer(tokenizer, show=not json_output)
    _generate(model, encoded, streamer, max_new_tokens, Sampling(temperature, seed))
    streamer.report(prompt, json_output)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedily at temperature 0, else drawn with `seed`."""

    temperature: float
    seed: int


def _generate(
    model: Any,
    encoded: Mapping[str, Tensor],
    streamer: TimedStreamer,
    max_new_tokens: int,
    sampling: Sampling,
) -> None:
    """Runs the model's own `generate`, without the sampling settings of its checkpoint."""
    import torch

    torch.manual_seed(sampling.seed)
    with torch.no_grad():  # in inference mode siblings would run one by one
        model.generate(
            input_ids=encoded["input_ids"].to(model.device),
            attention_mask=encoded["attention_mask"].to(model.device),
            do_sample=sampling.temperature > 0,
            temperature=sampling.temperature or 1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            # A growing cache is copied for every token. On a GPU transformers compiles the model
            # for a static one, and the first token would wait for that.
            cache_implementation="static" if model.device.type == "cpu" else None,
        )


def _check_length(input_ids: Tensor, max_new_tokens: int, config: Any) -> None:
    prompt_tokens = input_ids.shape[1]
    if prompt_tokens == 0:
        raise LowbitError("the prompt is empty and the tokenizer adds no first token; write one")
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and prompt_tokens + max_new_tokens > longest:
        raise LowbitError(
            f"a prompt of {prompt_tokens} tokens and {max_new_tokens} new ones exceed the model's "
            f"{longest}; lower --max-new-tokens or shorten the prompt"
        )


class TimedStreamer:
    """Receives tokens from `generate` as they are made: prints them and takes the time.

    Args:
        tokenizer: turns tokens into text.
        show: print the text; False only keeps it.
    """

    def __init__(self, tokenizer: Any, show: bool) -> None:
        from transformers import TextStreamer

        self._tokenizer = tokenizer
        self._printer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show
        self._tokens: list[int] = []
        self._times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Takes the prompt in the first call, one token in each later one."""
        self._times.append(time.perf_counter())
        if len(self._times) > 1:
            self._tokens.extend(value.reshape(-1).tolist())
        if self._show:
            self._printer.put(value)

    def end(self) -> None:
        """Prints what is left of the last word."""
        if self._show:
            self._printer.end()

    def report(self, prompt: str, as_json: bool) -> None:
        """Prints the speed on standard error, or the whole result as JSON on standard output."""
        # The first token comes out of the prompt's own pass.
        start, first, last = self._times[0], self._times[1], self._times[-1]
        prefill, decoding = first - start, last - first
        rate = (len(self._tokens) - 1) / decoding if len(self._tokens) > 1 else None
        if as_json:
            result = {
                "prompt": prompt,
                "text": self._tokenizer.decode(self._tokens, skip_special_tokens=True),
                "tokens": len(self._tokens),
                "seconds_to_first_token": prefill,
                "tokens_per_second": rate,
            }
            typer.echo(json.dumps(result, indent=2, ensure_ascii=False))
            return
        speed = "" if rate is None else f", then {rate:.1f} tokens/s"
        print(
            f"{len(self._tokens)} tokens, the first after {prefill:.2f} s{speed}", file=sys.stderr
        )
