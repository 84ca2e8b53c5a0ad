"""AutoRound: rounding and clipping learned by signed gradient descent, one block at a time."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from scripts.peers.driver import Job, Outcome, Stopwatch, gptq_outcome, parse_job, report

PACKAGES = ("auto-round",)


def run(job: Job) -> Outcome:
    """Returns the outcome of a tuning with `job.options["iters"]` steps a block."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    ids = job.input_ids()
    options = {"iters": job.options["iters"], "nsamples": len(ids), "seqlen": ids.shape[1]}
    rows: Any = [{"input_ids": row} for row in ids]
    with tempfile.TemporaryDirectory() as folder:
        with Stopwatch() as watch:
            AutoRound(
                job.load_model(),
                tokenizer=AutoTokenizer.from_pretrained(job.model),
                dataset=DataLoader(rows, batch_size=8),
                bits=job.bits,
                group_size=job.group_size,
                sym=job.symmetric,
                device_map="cpu",
                enable_torch_compile=False,
                seed=job.seed,
                **options,
            ).quantize_and_save(folder, format="auto_gptq")
        files = [file.parent for file in Path(folder).rglob("*.safetensors")]
        return gptq_outcome(files[0], job, options, watch)


def main() -> None:
    """Runs one job."""
    job = parse_job()
    report(job, run(job), PACKAGES)


if __name__ == "__main__":
    main()
