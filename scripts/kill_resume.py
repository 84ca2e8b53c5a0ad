"""Kills quantization runs at random moments and compares what resuming leaves with a clean run.

    python scripts/kill_resume.py --runs 25

Every run quantizes the bundled model with GPTQ in a process of its own, gets SIGKILL once to three
times at moments drawn from the seed, is resumed with `--resume` until it is through, and must then
have exactly the files of an uninterrupted run, byte for byte.

Moments are drawn over the time of a whole run, counted from when it claims its directory: before,
it only imports and checks, and there is nothing to lose. A run that is through before its first
moment comes is thrown away and begun anew.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from lowbit.errors import LowbitError
from lowbit.progress import RunProgress
from scripts import command_line
from scripts.provenance import RESULTS, ROOT, write_result

ASSETS = ROOT / "tests" / "assets"
MODEL = ASSETS / "books-4m"
CALIBRATION = ASSETS / "books-4m-calibration.safetensors"
MAX_KILLS = 3


@dataclass
class Trial:
    """What happened to one run.

    Args:
        kills: times it was killed.
        shards_at_kill: finished shards on disk at each kill.
        differing: files that are missing, superfluous or different in the end.
    """

    kills: int
    shards_at_kill: list[int]
    differing: list[str]


@dataclass(frozen=True)
class Task:
    """What is quantized in every run.

    Args:
        scheme: of all linears.
        samples: calibration windows of 512 tokens; they set how long a block takes.
        threads: of torch.
    """

    scheme: str
    samples: int
    threads: int

    def start(self, output: Path) -> subprocess.Popen[bytes]:
        """Returns the running process; it resumes what is in its directory."""
        command = [sys.executable, "-m", "lowbit.cli", "quantize", str(MODEL), str(output)]
        command += ["--scheme", self.scheme, "--algorithm", "gptq"]
        command += ["--calibration", str(CALIBRATION), "--samples", str(self.samples)]
        if output.exists() and any(output.iterdir()):
            command.append("--resume")
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        return subprocess.Popen(
            command,
            env=environment,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def finish(self, process: subprocess.Popen[bytes]) -> None:
        """Waits for a run that nobody kills.

        Raises:
            RuntimeError: it failed, with what it printed.
        """
        _, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"exit {process.returncode}: {errors.decode()[-2000:]}")


def uninterrupted(task: Task, output: Path) -> float:
    """Runs to the end; returns the seconds of work, without those of importing."""
    process = task.start(output)
    _await_work(process, output, None)
    begin = time.monotonic()
    task.finish(process)
    return time.monotonic() - begin


def interrupted(
    task: Task, output: Path, seconds: float, generator: random.Random
) -> tuple[Trial, float]:
    """Kills a run once to `MAX_KILLS` times and lets it finish; returns also how long it works.

    Args:
        task: what to run.
        output: its directory.
        seconds: an upper estimate of how long a run works.
        generator: of the moments.
    """
    trial = Trial(0, [], [])
    wanted = generator.randint(1, MAX_KILLS)
    while trial.kills < wanted:
        moment = generator.random() * seconds
        process = task.start(output)
        if _kill_after(process, output, moment):
            trial.kills += 1
            trial.shards_at_kill.append(len(list(output.glob("*.safetensors"))))
            continue
        if process.returncode:
            raise RuntimeError(f"a run that was not killed gave exit {process.returncode}")
        if trial.kills:
            return trial, seconds
        # Through before its moment, so nothing was tried: again, with the better estimate.
        seconds = moment
        shutil.rmtree(output)
    task.finish(task.start(output))
    return trial, seconds


def _kill_after(process: subprocess.Popen[bytes], output: Path, seconds: float) -> bool:
    """Sends SIGKILL after `seconds` of work; False where the run was through before."""
    before = _claimed(output)
    _await_work(process, output, before)
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def _await_work(process: subprocess.Popen[bytes], output: Path, before: int | None) -> None:
    """Waits until a run has changed something on disk: before that it has only been importing."""
    while process.poll() is None and _claimed(output) == before:
        time.sleep(0.002)


def _claimed(output: Path) -> int | None:
    """Returns the time, ns, at which a file in `output` was last made; None without `output`."""
    return output.stat().st_mtime_ns if output.exists() else None


def digests(directory: Path) -> dict[str, str]:
    """Returns the SHA-256 of every file by its name."""
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def difference(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Returns the names of files that are missing, superfluous or different."""
    names = expected.keys() | found.keys()
    return sorted(name for name in names if expected.get(name) != found.get(name))


def main() -> None:
    """Runs the command."""
    parser = command_line.parser(__doc__, "python scripts/kill_resume.py --runs 5 --samples 128")
    parser.add_argument("--runs", type=int, default=25, help="runs to kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--scheme", default="W4A16_G64", help="of the quantized model")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--threads", type=int, default=1, help="of torch in each run")
    parser.add_argument("--json", type=Path, default=RESULTS / "kill_resume.json", help="result")
    command_line.run(parser, _run)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.runs < 1:
        raise LowbitError(f"--runs must be at least 1, got {arguments.runs}")
    task = Task(arguments.scheme, arguments.samples, arguments.threads)
    generator = random.Random(arguments.seed)
    trials = []
    with tempfile.TemporaryDirectory() as folder, RunProgress(True) as bar:
        bar.stage("uninterrupted run", arguments.runs)
        clean = Path(folder) / "clean"
        seconds = uninterrupted(task, clean)
        expected, limit = digests(clean), seconds
        for run in range(arguments.runs):
            bar.describe(f"run {run + 1} of {arguments.runs}")
            output = Path(folder) / f"run-{run}"
            trial, limit = interrupted(task, output, limit, generator)
            trial.differing = difference(expected, digests(output))
            trials.append(trial)
            bar.advance(1)
    identical = sum(not trial.differing for trial in trials)
    content = {
        "model": MODEL.name,
        "algorithm": "gptq",
        **asdict(task),
        "seed": arguments.seed,
        "seconds_uninterrupted": round(seconds, 2),
        "runs": len(trials),
        "kills": sum(trial.kills for trial in trials),
        "runs_with_identical_files": identical,
        "files_compared": len(expected),
        "trials": [asdict(trial) for trial in trials],
    }
    write_result(arguments.json, "python scripts/kill_resume.py", content)
    print(f"{identical} of {len(trials)} runs left identical files after {content['kills']} kills")
    if identical != len(trials):
        sys.exit(1)


if __name__ == "__main__":
    main()
