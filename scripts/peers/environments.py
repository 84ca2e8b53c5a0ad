"""Virtual environments for the peers, made from the package index and used again.

Peers pin versions against each other and against ours, so each lives in an environment of its own
where it must. torch comes first and by the requirement of the caller: a wheel without CUDA saves
gigabytes, and a constraints file keeps later packages from replacing it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from scripts.peers.contenders import Environment

FINISHED = "lowbit-peers.json"
# What source distributions of peers import while they are built, beside torch.
BUILD_TOOLS = ("setuptools", "wheel", "numpy")


@dataclass(frozen=True)
class Ready:
    """An environment that can be used: its interpreter; or the sentence why there is none."""

    python: Path | None
    reason: str = ""


def prepare(environment: Environment, folder: Path, torch_requirement: str) -> Ready:
    """Returns the environment in `folder`, installing it unless that has been done.

    A failed installation is tried again in the next run; its log lies in `<folder>/<name>.log`.

    Args:
        environment: what to install.
        folder: where environments live.
        torch_requirement: for pip, for example "torch==2.13.0".
    """
    home = folder / environment.name
    python = home / "bin" / "python"
    wanted = {"torch": torch_requirement, "requirements": list(environment.requirements)}
    mark = home / FINISHED
    if mark.exists() and json.loads(mark.read_text()) == wanted:
        return Ready(python)
    folder.mkdir(parents=True, exist_ok=True)
    constraints = folder / "constraints.txt"
    constraints.write_text(f"{torch_requirement}\n")
    pip = [str(python), "-m", "pip", "install", "--constraint", str(constraints)]
    isolation = [] if environment.build_isolation else ["--no-build-isolation"]
    steps = [
        [sys.executable, "-m", "venv", str(home)],
        [*pip, torch_requirement, *BUILD_TOOLS],
        [*pip, *isolation, *environment.requirements],
    ]
    with (folder / f"{environment.name}.log").open("w") as log:
        for step in steps:
            status = subprocess.run(step, stdout=log, stderr=subprocess.STDOUT).returncode
            if status:
                return Ready(
                    None,
                    f"not installed: {' '.join(step[1:4])} ... ended with {status}; see {log.name}",
                )
    mark.write_text(json.dumps(wanted))
    return Ready(python)
