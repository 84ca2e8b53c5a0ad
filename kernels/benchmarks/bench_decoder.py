"""A whole decoder of 8B's shape: tokens per second with CUDA graphs, and the prompt, beside bf16.

Decoding is measured twice: with the model's code as it is, every small operation a kernel of its
own, and with `torch.compile`, which fuses what lies between the matrix products. A CUDA graph holds
one step either way, so that neither waits for Python. Both models take the same way.
"""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import timing
import torch
from decoder_model import Decoding, build
from parts import Part, Settings
from random_tensors import integers
from timing import Replay, significant

BASELINE = "bf16"
SCHEME = "W4A16_G128"
BATCHES = (1, 16)
PROMPT, LENGTH, PREFILL = 512, 640, 2048
SMOKE_PROMPT, SMOKE_LENGTH, SMOKE_PREFILL = 8, 64, 16
# What compiling one model for one batch takes, roughly.
COMPILE_SECONDS = 60.0


def run(settings: Settings, part: Part, compiled: bool = False) -> None:
    """Sets `memory_gb` and `decode`, and `prefill` of the model that is not compiled."""
    part.results |= {"scheme": SCHEME, "memory_gb": {}, "decode": [], "left_out": []}
    if SCHEME in settings.refused:
        raise RuntimeError(f"{SCHEME} is not right on this device: {settings.refused[SCHEME]}")
    models: dict[str, Any] = {}
    for name, scheme in ((SCHEME, SCHEME), (BASELINE, None)):
        before = _allocated()
        models[name] = build(scheme, settings.device, settings.smoke)
        part.results["memory_gb"][name] = round((_allocated() - before) / 1e9, 3)
        part.say(f"built {name}")
    part.set("peak_memory_gb", round(_peak() / 1e9, 3))
    part.set("layers_prepared", _prepared(models[SCHEME]))
    timing.warm_up()
    part.set("copy_bandwidth_gbps", significant(timing.copy_bandwidth(settings.smoke) / 1e9))
    if not compiled:
        with part.guarded("prefill"):
            _measure_prefill(models, settings, part)
    for batch in BATCHES:
        what = f"decoding, batch {batch}" + (", compiled" if compiled else "")
        if part.remaining < (2 * COMPILE_SECONDS if compiled and timing.on_gpu() else 3.0):
            part.add("left_out", what)
            part.say(f"no time left for {what}")
            continue
        with part.guarded(what):
            _measure_decoding(models, batch, compiled, settings, part)
    part.save()


def _measure_prefill(models: dict[str, Any], settings: Settings, part: Part) -> None:
    tokens = SMOKE_PREFILL if settings.smoke else PREFILL
    ids = integers(0, 100, (1, tokens), settings.device)
    replays = {}
    for name, model in models.items():
        read = partial(_read, model, ids)
        logits = read()
        assert bool(logits.isfinite().all()), f"{name}: logits are not finite"
        replays[name] = Replay(read, 1)
    times = timing.measure(replays)
    entry: dict[str, Any] = {"tokens": tokens, "batch": 1}
    for name, result in times.items():
        entry[name] = {
            **result.to_dict(),
            "tokens_per_second": significant(tokens / result.seconds),
        }
    entry["vs_bf16"] = significant(times[BASELINE].seconds / times[SCHEME].seconds)
    part.say(f"prefill {entry['vs_bf16']} x bf16")
    part.set("prefill", entry)


def _read(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    return logits


def _measure_decoding(
    models: dict[str, Any], batch: int, compiled: bool, settings: Settings, part: Part
) -> None:
    entry: dict[str, Any] = {"batch": batch, "compiled": compiled, "prompt": PROMPT}
    replays, sessions = {}, []
    for name, model in models.items():
        session = _session(model, batch, compiled, settings.smoke)
        sessions.append(session)
        replays[name], reason = _step(session)
        entry[name] = {"cuda_graph": reason is None and timing.on_gpu(), "no_graph": reason}
        part.say(f"batch {batch}: {name} is ready" + (" (compiled)" if compiled else ""))
    times = timing.measure(replays)
    for name, result in times.items():
        entry[name] |= {
            **result.to_dict(),
            "tokens_per_second": significant(batch / result.seconds),
        }
    entry["vs_bf16"] = significant(times[BASELINE].seconds / times[SCHEME].seconds)
    part.say(f"decoding, batch {batch}: {entry['vs_bf16']} x bf16")
    part.add("decode", entry)
    part.save()
    del replays, sessions
    gc.collect()


def _session(model: Any, batch: int, compiled: bool, smoke: bool) -> Decoding:
    prompt, length = (SMOKE_PROMPT, SMOKE_LENGTH) if smoke else (PROMPT, LENGTH)
    session = Decoding.start(model, batch, prompt, length)
    if compiled:
        torch._dynamo.reset()
        session.forward = torch.compile(model, dynamic=False)
    for _ in range(3):  # compiles, and makes what is made at the first call
        session.step()
    return session


def _step(session: Decoding) -> tuple[Replay, str | None]:
    """Returns a decoding step as a graph, or as it is with the reason why it is none."""
    try:
        return timing.capture([session.step]), None
    except RuntimeError as error:
        return Replay(session.step, 1), str(error)


def _prepared(model: Any) -> dict[str, int]:
    """Returns how many quantized layers hold a prepared weight, and which backends those are of."""
    from lowbit.nn.stored import StoredWeight

    counts: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, StoredWeight):
            backend = "canonical" if module._prepared is None else module._prepared.backend
            counts[backend] = counts.get(backend, 0) + 1
    return counts


def _allocated() -> int:
    return torch.cuda.memory_allocated() if timing.on_gpu() else 0


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if timing.on_gpu() else 0
