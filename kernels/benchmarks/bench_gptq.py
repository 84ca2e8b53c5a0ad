"""GPTQ of an 8B shape, start to finish: `lowbit.quantize` from files to files, on random weights.

The checkpoint is made on the device and written first; that is not timed. A model of two blocks
goes before the whole one: it compiles the kernels, and tells whether 32 blocks fit into the time
that is left. If not, as many blocks are run as fit, and the result says how many.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import timing
import torch
from decoder_model import LLAMA_8B, SMOKE
from parts import Part, Settings
from random_tensors import normal

from lowbit import quantize
from lowbit.checkpoint.reader import INDEX_NAME
from lowbit.checkpoint.writer import ShardWriter, write_json

SCHEME = "W4A16_G128"
SAMPLES, SEQLEN = 128, 2048
SMOKE_SAMPLES, SMOKE_SEQLEN = 2, 16
TRIAL_BLOCKS = 2
# Writing a block's weights to the disk, roughly.
WRITE_SECONDS = 0.6
# Of the time that is left, for what the estimate does not know.
CAUTION = 0.85
STANDARD_DEVIATION = 0.02


def run(settings: Settings, part: Part) -> None:
    """Sets `trial` and `run`: blocks, seconds and the peak of the GPU's memory of each."""
    shape = dict(SMOKE if settings.smoke else LLAMA_8B)
    blocks = int(shape["num_hidden_layers"])
    samples, seqlen = (SMOKE_SAMPLES, SMOKE_SEQLEN) if settings.smoke else (SAMPLES, SEQLEN)
    part.results |= {"scheme": SCHEME, "tokens": [samples, seqlen], "blocks": blocks}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = folder / "tokens.npy"
        generator = np.random.default_rng(0)
        ids = generator.integers(0, int(shape["vocab_size"]), (samples, seqlen), dtype=np.int64)
        np.save(tokens, ids)
        trial = 1 if settings.smoke else TRIAL_BLOCKS
        first = _quantize(shape, trial, tokens, (samples, seqlen), settings, part, folder)
        part.set("trial", first)
        possible = _possible_blocks(first, part.remaining, _free_bytes(folder), shape, blocks)
        if settings.smoke:
            possible = blocks
        if possible <= trial:
            part.set("left_out", f"a run of more than {trial} blocks: {part.remaining:.0f} s left")
            return
        part.set("run", _quantize(shape, possible, tokens, ids.shape, settings, part, folder))


def _possible_blocks(
    trial: dict[str, Any], seconds: float, free: int, shape: dict[str, Any], blocks: int
) -> int:
    """Returns how many blocks fit into the time and on the disk, judged by the trial."""
    # The last block of the trial: what the first one compiled is there.
    per_block = trial["seconds_per_file"][trial["blocks_run"]] + WRITE_SECONDS
    around = trial["seconds"] - trial["blocks_run"] * trial["seconds_per_file"][trial["blocks_run"]]
    in_time = int((CAUTION * seconds - max(around, 0.0)) / per_block)
    fixed = 2 * shape["vocab_size"] * shape["hidden_size"] * 2
    on_disk = 2 * _block_bytes(shape)  # read, and written again in fewer bits
    return min(blocks, in_time, int((free - 3 * fixed) / on_disk))


def _quantize(
    shape: dict[str, Any],
    blocks: int,
    tokens: Path,
    windows: tuple[int, ...],
    settings: Settings,
    part: Part,
    folder: Path,
) -> dict[str, Any]:
    """Returns blocks, seconds, memory and the mean loss of one run; its files are removed."""
    model, output = folder / "model", folder / "output"
    begin = time.monotonic()
    write_random_llama({**shape, "num_hidden_layers": blocks}, model, settings)
    written = time.monotonic() - begin
    part.say(f"{blocks} blocks written in {written:.1f} s")
    if timing.on_gpu():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begin = time.monotonic()
    result = quantize(
        model,
        output,
        scheme=SCHEME,
        algorithm="gptq",
        calibration=tokens,
        samples=windows[0],
        seqlen=windows[1],
        device=settings.device,
        progress=False,
    )
    seconds = time.monotonic() - begin
    peak = torch.cuda.max_memory_allocated() if timing.on_gpu() else 0
    part.say(f"{blocks} blocks quantized in {seconds:.1f} s")
    # A file is finished when its piece is: what is outside the blocks, each block, the head.
    ends = sorted(file.stat().st_mtime for file in output.glob("*.safetensors"))
    shutil.rmtree(model)
    shutil.rmtree(output)
    return {
        "blocks_run": blocks,
        "seconds": round(seconds, 2),
        "seconds_per_file": [0.0, *(round(b - a, 2) for a, b in pairwise(ends))],
        "writing_the_checkpoint_seconds": round(written, 2),
        "peak_gpu_gb": round(peak / 1e9, 3),
        "bits_per_weight": round(result.bits_per_weight, 4),
    }


def write_random_llama(shape: dict[str, Any], directory: Path, settings: Settings) -> None:
    """Writes a checkpoint of random weights that are drawn on the device.

    Args:
        shape: the fields of a LlamaConfig.
        directory: a new folder.
        settings: of the run.
    """
    directory.mkdir()
    weight_map: dict[str, str] = {}
    for index, tensors in enumerate(_shards(shape)):
        file = directory / f"model-{index:05d}.safetensors"
        with ShardWriter(file, ShardWriter.header_bound(list(tensors))) as writer:
            for name, size in tensors.items():
                drawn = torch.ones(size)
                if len(size) > 1:
                    drawn = normal(size, settings.device, torch.bfloat16, STANDARD_DEVIATION)
                writer.add(name, drawn.to("cpu", torch.bfloat16))
                weight_map[name] = file.name
    write_json(directory / INDEX_NAME, {"metadata": {}, "weight_map": weight_map})
    write_json(
        directory / "config.json",
        {
            **shape,
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "dtype": "bfloat16",
        },
    )


def _shards(shape: dict[str, Any]) -> list[dict[str, tuple[int, ...]]]:
    hidden, wide, vocab = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    narrow = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    block: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shards = [
        {f"model.layers.{i}.{name}.weight": size for name, size in block.items()}
        for i in range(shape["num_hidden_layers"])
    ]
    outside: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    return [*shards, outside]


def _block_bytes(shape: dict[str, Any]) -> int:
    one_block = _shards({**shape, "num_hidden_layers": 1})[0]
    return 2 * sum(size[0] * (size[1] if len(size) > 1 else 1) for size in one_block.values())


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free
