"""Where and with what a result was measured; every committed JSON result begins with this."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lowbit.checkpoint.writer import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
PACKAGES = ("torch", "transformers", "safetensors", "numpy", "triton")


def provenance() -> dict[str, Any]:
    """Returns device, versions, commit and date."""
    return {
        "device": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "ram_gib": round(_total_memory() / 2**30, 1),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {
            "python": platform.python_version(),
            **{p: package_version(p) for p in PACKAGES},
        },
        "commit": _commit(),
        "date": date.today().isoformat(),
    }


def write_result(file: Path, command: str, content: dict[str, Any]) -> None:
    """Writes a result with the command that makes it and its provenance."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"command": command, "provenance": provenance(), **content})
    print(f"wrote {file}")


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def package_version(package: str) -> str | None:
    """Returns what is installed of a package, None if it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Returns the commit, marked where the package or the evaluation differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "lowbit", "eval", "kernels")
        return git("rev-parse", "HEAD") + ("-modified" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
