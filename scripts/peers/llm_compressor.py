"""llm-compressor: GPTQ (static act-order, its default) and AWQ, by `oneshot`.

Both write compressed-tensors' packed files, which are read back with that library's own unpacking:
`weight_packed` (codes minus 2^(bits-1), row by row in int32), `weight_scale`, `weight_zero_point`.
AWQ folds scales into the norms and the layers before, so every other tensor is returned as changed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.peers.driver import (
    Job,
    Outcome,
    Stopwatch,
    parse_job,
    read_tensors,
    report,
    tensor_bytes,
)

PACKAGES = ("llmcompressor", "compressed-tensors")
PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")


def recipe(job: Job) -> list[Any]:
    """Returns the modifiers of a method."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    weights = QuantizationArgs(
        num_bits=job.bits,
        type="int",
        symmetric=job.symmetric,
        strategy="group",
        group_size=job.group_size,
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    if job.method == "gptq":
        return [GPTQModifier(config_groups=groups, ignore=["lm_head"])]
    return [
        AWQModifier(duo_scaling="both"),
        QuantizationModifier(config_groups=groups, ignore=["lm_head"]),
    ]


def decode(tensors: dict[str, Tensor], name: str, job: Job) -> Tensor:
    """Returns the float32 weight `[out_features, in_features]` of a packed layer."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    shape = torch.Size(tensors[f"{name}.weight_shape"].tolist())
    codes = unpack_from_int32(tensors[f"{name}.weight_packed"], job.bits, shape).float()
    scales = tensors[f"{name}.weight_scale"].float()
    grouped = codes.unflatten(1, (scales.shape[1], -1))
    packed_zeros = tensors.get(f"{name}.weight_zero_point")
    if packed_zeros is not None:
        zeros = unpack_from_int32(packed_zeros, job.bits, scales.shape, packed_dim=0)
        grouped = grouped - zeros.float()[:, :, None]
    weight: Tensor = (grouped * scales[:, :, None]).flatten(1)
    return weight


def leave_memory_unpinned() -> None:
    """Lets AWQ run without an accelerator: it pins activations for a copy that never happens."""
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *_, **__: None


def main() -> None:
    """Runs one job."""
    from datasets import Dataset
    from llmcompressor import oneshot

    job = parse_job()
    leave_memory_unpinned()
    ids = job.input_ids()
    rows = Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    )
    model = job.load_model(torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        with Stopwatch() as watch:
            oneshot(
                model=model,
                dataset=rows,
                recipe=recipe(job),
                max_seq_length=ids.shape[1],
                num_calibration_samples=len(ids),
                shuffle_calibration_samples=False,
            )
        model.save_pretrained(folder, save_compressed=True)
        tensors = read_tensors(Path(folder))
    suffix = ".weight_packed"
    names = [key.removesuffix(suffix) for key in tensors if key.endswith(suffix)]
    weights = {f"{name}.weight": decode(tensors, name, job) for name in names}
    scales = [tensors[f"{name}.weight_scale"] for name in names]
    count = sum(weight.numel() for weight in weights.values())
    zeros = 0 if job.symmetric else job.bits * sum(scale.numel() for scale in scales)
    report(
        job,
        Outcome(
            weights=weights,
            stored_bytes=tensor_bytes(tensors.get(f"{n}.{part}") for n in names for part in PARTS),
            dense_bits=count * job.bits + 8 * tensor_bytes(scales) + zeros,
            options={"method": job.method, **job.options},
            watch=watch,
            changed={k: t for k, t in tensors.items() if k.rpartition(".")[2] not in PARTS},
        ),
        PACKAGES,
    )


if __name__ == "__main__":
    main()
