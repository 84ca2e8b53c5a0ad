"""GPTQModel: GPTQ with its group-aware order (the default), in file order, or in act-order."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from scripts.peers.driver import Job, Outcome, Stopwatch, gptq_outcome, parse_job, report

PACKAGES = ("gptqmodel",)
ORDERS: dict[str, dict[str, Any]] = {
    "group_aware": {"desc_act": False, "act_group_aware": True},
    "plain": {"desc_act": False, "act_group_aware": False},
    "act_order": {"desc_act": True, "act_group_aware": False},
}


def run(job: Job) -> Outcome:
    """Returns the outcome of GPTQ in the order `job.method`."""
    # Its thread pool wants two workers, whatever the number of cores.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import GPTQModel, QuantizeConfig

    options = ORDERS[job.method]
    ids = job.input_ids()
    mask = [1] * ids.shape[1]
    rows = [{"input_ids": row, "attention_mask": mask} for row in ids.tolist()]
    config = QuantizeConfig(
        bits=job.bits,
        group_size=job.group_size,
        sym=job.symmetric,
        device="cpu",
        **options,
    )
    model = GPTQModel.load(str(job.model), config)
    with tempfile.TemporaryDirectory() as folder:
        with Stopwatch() as watch:
            model.quantize(rows, batch_size=8)
        model.save(folder)
        return gptq_outcome(Path(folder), job, options, watch)


def main() -> None:
    """Runs one job."""
    job = parse_job()
    report(job, run(job), PACKAGES)


if __name__ == "__main__":
    main()
