"""A decoder of 1B's shape: tokens per second beside bf16 and llama.cpp, all with the same weights.

The weights are random: what they say changes no time. The model is saved, quantized to W4A16 by RTN
(embedding and head too), and written to GGUF as Q4_0 without rounding anything again, see
`cpu_gguf.py`. Logits of all are compared before anything is timed.
"""

from __future__ import annotations

import ctypes
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cpu_gguf import write
from cpu_linear import Journal, reason
from cpu_llama import Library
from cpu_timing import clock
from cpu_units import BF16, Settings
from lowbit_eval.latency import Session
from timing import significant
from torch import Tensor

import lowbit
from lowbit.algorithms import RTN
from lowbit.errors import LowbitError
from lowbit.hf.loading import load_model, quiet_libraries
from lowbit.nn import kernels_of

SCHEME = "W4A16"
# Llama-3.2-1B, with a plain rotation.
SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
}
TINY_SHAPE = {
    **SHAPE,
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PROMPT, NEW = 512, 64
TINY_PROMPT, TINY_NEW = 24, 4
CHECKED_TOKENS = 16
# Sixteen layers of random weights: bf16 is 0.02 from float32, 8-bit activations 0.1.
WRONG = 0.4
A16, A8, LLAMA = "lowbit A16", "lowbit A8", "llama.cpp q4_0"


def make_models(folder: Path, shape: dict[str, Any], seed: int = 0) -> tuple[Path, Path]:
    """Returns the folders of a random model in bf16 and of the same quantized; made if missing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    original, quantized = folder / "bf16", folder / SCHEME
    if not (original / "config.json").exists():
        partial = folder / "bf16.partial"
        shutil.rmtree(partial, ignore_errors=True)
        torch.manual_seed(seed)
        config = LlamaConfig(**shape, dtype="bfloat16")
        LlamaForCausalLM(config).bfloat16().save_pretrained(partial)
        partial.rename(original)
    if not (quantized / "lowbit_manifest.json").exists():
        shutil.rmtree(quantized, ignore_errors=True)
        lowbit.quantize(
            original,
            quantized,
            scheme=SCHEME,
            algorithm=RTN(search=False),
            quantize_embeddings=True,
            progress=False,
        )
    return original, quantized


class LlamaSession:
    """A sequence in a llama.cpp context, with the interface of `lowbit_eval.latency.Session`.

    Args:
        library: the shim.
        context: from `bench_model`; only one session of it may be used at a time.
        vocabulary: number of tokens.
        threads: to compute with.
    """

    def __init__(self, library: Library, context: int, vocabulary: int, threads: int) -> None:
        self._call, self._context, self._vocabulary = library.call, context, vocabulary
        self._call["forget"](context)
        self._call["threads"](context, threads)

    def run(self, ids: Tensor) -> Tensor:
        """Returns the logits `[vocabulary]` behind the last of `ids`, int32 `[n]`."""
        logits = self._call["step"](self._context, ids.data_ptr(), len(ids))
        if not logits:
            raise LowbitError(f"llama.cpp refused {len(ids)} tokens")
        content = bytearray(ctypes.string_at(logits, 4 * self._vocabulary))
        return torch.frombuffer(content, dtype=torch.float32)

    def step(self, tokens: int) -> None:
        """Runs `tokens` random tokens."""
        self.run(torch.randint(self._vocabulary, (tokens,), dtype=torch.int32)).argmax()


@dataclass
class Player:
    """A model to measure.

    Args:
        start: threads -> a new sequence, whose `step(n)` runs n random tokens.
        logits: token ids int64 `[n]` -> float32 logits behind the last, `[vocabulary]`.
        note: what else is worth knowing.
    """

    start: Callable[[int], Any]
    logits: Callable[[Tensor], Tensor]
    note: str = ""


def run(settings: Settings, journal: Journal, folder: Path) -> None:
    """Measures every number of threads that is not done.

    Args:
        settings: of the run; `tiny` takes a small model and few tokens.
        journal: of the process.
        folder: for the models, which are kept for the next run.
    """
    missing = [threads for threads in settings.threads if key(threads) not in settings.done]
    if not missing:
        return
    quiet_libraries()
    torch.manual_seed(0)
    original, quantized = make_models(folder, TINY_SHAPE if settings.tiny else SHAPE)
    prompt, new = (TINY_PROMPT, TINY_NEW) if settings.tiny else (PROMPT, NEW)
    refused: dict[str, str] = {}
    players = _players(original, quantized, settings, prompt + new, journal, refused)
    errors = _compare(players, quantized, settings)
    for name, error in errors.items():
        if not error < WRONG:
            refused[name] = f"wrong logits: relative error {error:.2g} against float32"
            del players[name]
    for threads in missing:
        if time.time() > settings.until:
            return
        row = {"threads": threads, "prompt": prompt, "new": new, "scheme": SCHEME}
        row |= {"clock": clock(threads)[0], "refused": refused}
        times = _measure(players, prompt, new, threads, settings.rounds, journal)
        entries = {name: _summary(prompt, *both) for name, both in times.items()}
        for name, entry in entries.items():
            entry |= {"logit_error": significant(errors[name]), "note": players[name].note}
            for kind in ("prefill", "decode"):
                speed = f"{kind}_tokens_per_second"
                for other, field in ((BF16, f"{kind}_vs_bf16"), (LLAMA, f"{kind}_vs_llama")):
                    if other in entries:
                        entry[field] = significant(entry[speed] / entries[other][speed])
        journal.add({**row, "candidates": entries})


def key(threads: int) -> str:
    """Returns what tells a case of the decoder from all others."""
    return f"decoder threads={threads}"


def _players(
    original: Path,
    quantized: Path,
    settings: Settings,
    length: int,
    journal: Journal,
    refused: dict[str, str],
) -> dict[str, Player]:
    torch.set_num_threads(max(settings.threads))
    device = torch.device("cpu")
    plain: Any = load_model(str(original), "bfloat16", device)
    ours: Any = load_model(str(quantized), "bfloat16", device)
    kernels = ", ".join(f"{count} weights by {name}" for name, count in kernels_of(ours).items())
    players = {
        BF16: _torch_player(plain, length, None),
        A16: _torch_player(ours, length, "float", kernels),
        A8: _torch_player(ours, length, "int8", kernels),
    }
    journal.begin(LLAMA, 0, 0)
    crashed = {name: why for name, *_, why in settings.crashed}
    try:
        if LLAMA in crashed:
            raise LowbitError(crashed[LLAMA])
        players[LLAMA] = _llama_player(quantized, settings, length, ours.config.vocab_size)
    except Exception as error:  # a peer may raise anything; it is on record
        refused[LLAMA] = reason(error)
    return players


def _torch_player(model: Any, length: int, activations: str | None, note: str = "") -> Player:
    def ready(threads: int) -> None:
        torch.set_num_threads(threads)
        if activations is not None:
            lowbit.prepare_model(model, activations)

    def start(threads: int) -> Session:
        ready(threads)
        return Session(model, 1, length, torch.Generator().manual_seed(0))

    def logits(ids: Tensor) -> Tensor:
        ready(torch.get_num_threads())
        return _logits(model, ids)

    return Player(start, logits, note)


def _llama_player(quantized: Path, settings: Settings, length: int, vocabulary: int) -> Player:
    file = quantized.parent / "q4_0.gguf"
    if not file.exists():
        partial = file.with_suffix(".partial")
        write(quantized, partial)
        partial.replace(file)
    library, threads = Library.load(settings.llama), max(settings.threads)
    context = library.call["model"](str(file).encode(), length, threads)
    if not context:
        raise LowbitError(f"llama.cpp cannot load {file.name}")

    def start(threads: int) -> LlamaSession:
        return LlamaSession(library, context, vocabulary, threads)

    return Player(start, lambda ids: start(threads).run(ids.int()))


def _compare(players: dict[str, Player], quantized: Path, settings: Settings) -> dict[str, float]:
    """Returns the relative error of each player's logits against the quantized model in float32.

    bf16 is compared with nothing: it has other weights.
    """
    exact: Any = load_model(str(quantized), "float32", torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(exact.config.vocab_size, (CHECKED_TOKENS,), generator=generator)
    wanted = _logits(exact, ids)
    errors = {BF16: 0.0}
    for name, player in players.items():
        if name != BF16:
            errors[name] = float((player.logits(ids) - wanted).norm() / wanted.norm())
    return errors


def _logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids[None], use_cache=False, logits_to_keep=1).logits
    return logits[0, -1].float()


def _measure(
    players: dict[str, Player],
    prompt: int,
    new: int,
    threads: int,
    rounds: int,
    journal: Journal,
) -> dict[str, tuple[list[float], list[float]]]:
    """Returns name -> (seconds of each prompt, seconds of each step), the models in turns."""
    _, now = clock(threads)
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in players}
    for number in range(rounds + 1):
        for name, player in players.items():
            journal.begin(name, 1, threads)
            session = player.start(threads)
            # The round that warms up is a short one.
            for tokens in (prompt, *(1,) * (new if number else 2)):
                begin = now()
                session.step(tokens)
                if number:
                    times[name][0 if tokens == prompt else 1].append(now() - begin)
    return times


def _summary(prompt: int, prefills: Sequence[float], steps: Sequence[float]) -> dict[str, Any]:
    read, step = statistics.median(prefills), statistics.median(steps)
    return {
        "prefill_tokens_per_second": significant(prompt / read),
        "decode_tokens_per_second": significant(1 / step),
        "prefill_seconds": [significant(value) for value in prefills],
        "step_ms": significant(1e3 * step),
        "step_low_ms": significant(1e3 * sorted(steps)[len(steps) // 10]),
        "step_high_ms": significant(1e3 * sorted(steps)[-1 - len(steps) // 10]),
    }
