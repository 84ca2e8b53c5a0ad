"""Everything that is measured on a GPU, in one command; see docs/benchmarks-gpu.md.

    python kernels/benchmarks/gpu.py --out bench-gpu
    python kernels/benchmarks/gpu.py --only check,tune --budget-seconds 420
    python kernels/benchmarks/gpu.py --smoke          the plumbing, without a GPU

Parts run in the order of their worth until the budget is spent. `bench-gpu.json` is written after
each, and while they run. The exit status is 1 if something failed; missed targets are no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
for _path in (Path(__file__).parent, ROOT / "eval", ROOT / "kernels", ROOT):
    if str(_path) not in sys.path:
        sys.path.insert(0, str(_path))
if "--smoke" in sys.argv:
    # Triton reads it when a kernel is defined; parts inherit it.
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch  # noqa: E402 - after the environment
from model_shapes import SCHEMES  # noqa: E402
from parts import DeadDeviceError, OutOfTimeError, Part, Settings, write_json  # noqa: E402
from processes import DEAD_DEVICE_STATUS, Job, merged, run_all  # noqa: E402
from report import tables  # noqa: E402
from roofline import draw  # noqa: E402
from targets import judge_all  # noqa: E402

from scripts.provenance import provenance  # noqa: E402

# Part -> the most it may take, seconds. What one leaves over is there for the next.
LIMITS = {
    "check": 110.0,
    "tests": 150.0,
    "tune": 420.0,
    "linear": 170.0,
    "backward": 20.0,
    "decoder": 70.0,
    "gptq": 220.0,
    "extra": 30.0,
    "peers": 60.0,
    "compiled": 300.0,
}
ON_REQUEST = ("tests", "tune")
BUDGET_SECONDS = 480.0
# Fewer than this are not worth starting a process for.
SHORTEST_PART = 8.0
RESTARTS = 2
COMMAND = "python kernels/benchmarks/gpu.py"


def run_part(name: str, settings: Settings, file: Path, until: float, share: str) -> int:
    """Runs one part in this process and returns its exit status; `until` as of `time.time()`."""
    part = Part(name, file, until - time.time())
    status = 0
    try:
        _run(name, settings, part, share)
    except OutOfTimeError as out:
        part.say(str(out))
        part.add("left_out", str(out))
    except DeadDeviceError as dead:
        part.say(f"the device is lost after {dead}")
        status = DEAD_DEVICE_STATUS
    except Exception:
        part.results["errors"]["part"] = traceback.format_exc()
        traceback.print_exc()
        status = 1
    part.save()
    return status


def _run(name: str, settings: Settings, part: Part, share: str) -> None:
    # Imported late: what one part needs may be missing or broken without harm to the others.
    if name == "check":
        import bench_check

        index, number = (int(text) for text in share.split("/"))
        bench_check.run(settings, part, (index, number))
    elif name == "tests":
        _run_tests(part)
    elif name == "tune":
        import tune

        tune.run(settings, part)
    elif name in ("linear", "peers"):
        import bench_linear

        bench_linear.run(settings, part, tuning_peers=name == "peers")
    elif name == "backward":
        import bench_linear

        bench_linear.run_backward(settings, part)
    elif name == "extra":
        import bench_extra

        bench_extra.run(settings, part)
    elif name in ("decoder", "compiled"):
        import bench_decoder

        bench_decoder.run(settings, part, compiled=name == "compiled")
    else:
        import bench_gptq

        bench_gptq.run(settings, part)


def _run_tests(part: Part) -> None:
    """Runs the kernel tests that need a GPU, and keeps the end of what pytest prints."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "-m", "gpu"]
    limit = max(part.remaining - 5, 1)
    try:
        ran = subprocess.run(
            [*command, "tests/kernels"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit,
            check=False,
        )
        said, failed = ran.stdout, ran.returncode != 0
    except subprocess.TimeoutExpired as late:
        said, failed = (late.stdout or b"") + b"\nnot done in time", True
    output = said.decode(errors="replace").strip()
    part.set("output", output[-4000:])
    part.say(output.splitlines()[-1] if output else "no output")
    if failed:
        part.results["errors"]["pytest"] = output[-4000:]


class Benchmark:
    """One run of the command.

    Args:
        arguments: of the command line.
        work: folder for the files of the parts.
    """

    def __init__(self, arguments: argparse.Namespace, work: Path) -> None:
        self.out: Path = arguments.out
        self.in_process: bool = arguments.in_process
        self.budget: float = arguments.budget_seconds
        self.work = work
        self.begin = time.monotonic()
        self.settings = Settings(arguments.smoke, tuple(arguments.schemes), {}, not arguments.smoke)
        self.files: dict[str, list[Path]] = {}
        self.result: dict[str, Any] = {"command": COMMAND, "provenance": provenance()}
        if arguments.commit:
            self.result["provenance"]["commit"] = arguments.commit
        self.result |= {"gpu": describe_gpu(), "smoke": arguments.smoke, "seconds": {}}
        self.result |= {"budget_seconds": self.budget, "left_out": [], "errors": {}}

    @property
    def remaining(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (time.monotonic() - self.begin)

    def run(self, names: Sequence[str]) -> None:
        """Runs the parts `names` in order, as long as there is time."""
        self.result["checked"] = "check" in names
        for name in names:
            # The last one can have all that is left.
            limit = LIMITS[name] if name != names[-1] else self.budget
            seconds = min(limit, self.remaining)
            if seconds < SHORTEST_PART:
                self.result["left_out"].append(name)
                print(f"no time left for {name}", flush=True)
                continue
            begin = time.monotonic()
            if name == "check":
                self._check(seconds)
            else:
                self._part(name, seconds)
            self.result["seconds"][name] = round(time.monotonic() - begin, 1)
            self.save()

    def save(self) -> None:
        """Collects what the parts have written so far and writes the whole result."""
        for name, files in self.files.items():
            found = [json.loads(file.read_text()) for file in files if file.exists()]
            content = merged(found)
            errors = content.pop("errors", {})
            content.pop("seconds", None)
            if content:
                self.result[name] = content
            if errors:
                self.result["errors"].setdefault(name, {}).update(errors)
        with self._guarded("targets"):
            self.result["targets"] = judge_all(self.result)
        self.result["total_seconds"] = round(time.monotonic() - self.begin, 1)
        write_json(self.out / "bench-gpu.json", self.result)

    def finish(self) -> None:
        """Writes the picture and the tuned tiles, and prints the tables."""
        self.save()
        tuned = self.result.get("tune", {})
        if tuned.get("table", {}).get("kinds"):
            write_json(self.out / tuned["file_name"], tuned["table"])
        if self.result.get("linear", {}).get("rows"):
            with self._guarded("roofline"):
                draw(self.result, self.out / "roofline.png")
            self.save()
        with self._guarded("tables"):
            print(f"\n{tables(self.result)}\n", flush=True)
        print(f"wrote {self.out / 'bench-gpu.json'}", flush=True)

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        """Records an error of the report: measurements must not be lost with their presentation."""
        try:
            yield
        except Exception:
            self.result["errors"].setdefault("report", {})[what] = traceback.format_exc()

    def _check(self, seconds: float) -> None:
        """Checks every scheme in a process of its own, and leaves out what is not right."""
        schemes = self.settings.schemes
        jobs, labels = [], {}
        number = max(1, min(2, (os.cpu_count() or 1) // max(1, len(schemes))))
        groups = [schemes] if self.settings.smoke else [(scheme,) for scheme in schemes]
        for group in groups:
            settings = Settings(self.settings.smoke, tuple(group), {})
            for index in range(1 if self.settings.smoke else number):
                label = f"check {group[0] if len(group) == 1 else 'all'} {index}"
                share = f"{index}/{1 if self.settings.smoke else number}"
                jobs.append(self._job("check", label, settings, seconds, share))
                labels[label] = group
        statuses = self._start(jobs)
        self.save()
        passed = self.result.get("check", {}).get("results", {})
        errors = self.result["errors"].get("check", {})
        for label, group in labels.items():
            for scheme in group:
                if scheme not in passed and label.endswith(" 0"):
                    reason = errors.get(scheme) or f"the check ended with status {statuses[label]}"
                    self.settings.refused[scheme] = reason.strip().splitlines()[-1]
                    self.result["errors"].setdefault("check", {}).setdefault(scheme, reason)
        for scheme, reason in self.settings.refused.items():
            print(f"NOT MEASURED: {scheme}: {reason}", flush=True)
        self.result["refused"] = self.settings.refused

    def _part(self, name: str, seconds: float) -> None:
        """Runs one part; linear layers go on behind the shape that lost the device."""
        skipped: tuple[str, ...] = ()
        for attempt in range(RESTARTS + 1):
            settings = Settings(**{**self.settings.__dict__, "skipped": skipped})
            job = self._job(name, f"{name} {attempt}", settings, seconds, "0/1")
            begin = time.monotonic()
            status = self._start([job])[job.label]
            seconds -= time.monotonic() - begin
            if status != 0:
                self._note(name, job, status)
            if status != DEAD_DEVICE_STATUS or name != "linear" or seconds < SHORTEST_PART:
                return
            written = json.loads(job.file.read_text())
            skipped = (*skipped, *written.get("done", []), written["current"])

    def _note(self, name: str, job: Job, status: int) -> None:
        what = f"signal {-status}" if status < 0 else f"status {status}"
        errors = self.result["errors"].setdefault(name, {})
        errors[job.label] = f"the process ended with {what}"
        print(f"{job.label}: ended with {what}", flush=True)

    def _job(self, name: str, label: str, settings: Settings, seconds: float, share: str) -> Job:
        file = self.work / f"{label.replace(' ', '-')}.json"
        self.files.setdefault(name, []).append(file)
        command = [str(Path(__file__).resolve()), "--part", name, "--settings", settings.to_json()]
        command += ["--file", str(file), "--until", str(time.time() + seconds), "--share", share]
        if settings.smoke:
            command.append("--smoke")
        return Job(label, command, file, seconds)

    def _start(self, jobs: Sequence[Job]) -> dict[str, int]:
        if self.in_process:
            return {job.label: main(job.command[1:]) for job in jobs}
        return run_all(jobs, self.save)


def describe_gpu() -> dict[str, Any]:
    """Returns what the driver says about the GPU, nothing without one."""
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    query = "--query-gpu=driver_version,clocks.max.sm,clocks.max.memory,power.limit"
    try:
        command = ["nvidia-smi", query, "--format=csv,noheader"]
        driver = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        said = driver.stdout.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        said = None
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "l2_mb": round(properties.L2_cache_size / 1e6, 1),
        "cuda": torch.version.cuda,
        "driver, clocks, power limit": said,
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("bench-gpu"), help="folder of the results")
    parser.add_argument("--only", help="parts, with commas between: " + ", ".join(LIMITS))
    parser.add_argument("--budget-seconds", type=float, default=BUDGET_SECONDS)
    parser.add_argument("--tune", action="store_true", help="choose tiles before measuring")
    parser.add_argument("--tests", action="store_true", help="run the tests that need a GPU first")
    parser.add_argument("--schemes", default=",".join(SCHEMES), help="schemes to measure")
    parser.add_argument("--commit", help="recorded where there is no git to ask")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU")
    for internal in ("--part", "--settings", "--share"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    parsed.schemes = parsed.schemes.split(",")
    asked = parsed.only.split(",") if parsed.only else None
    if unknown := set(asked or ()) - set(LIMITS):
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}; there are {', '.join(LIMITS)}")
    wanted = asked or [n for n in LIMITS if n not in ON_REQUEST or getattr(parsed, n)]
    if parsed.smoke and not asked:
        wanted.remove("compiled")  # needs a C++ compiler on a CPU
    parsed.parts = [name for name in LIMITS if name in wanted]
    return parsed


def main(command_line: Sequence[str]) -> int:
    """Runs the command, or one part of it, and returns the exit status."""
    arguments = parse(command_line)
    if arguments.part:
        settings = Settings.from_json(arguments.settings)
        return run_part(arguments.part, settings, arguments.file, arguments.until, arguments.share)
    if not arguments.smoke and not torch.cuda.is_available():
        print(
            "no CUDA device: the benchmark needs a GPU; --smoke tests it without", file=sys.stderr
        )
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    if threading.current_thread() is threading.main_thread():
        # Ends the parts, too, and leaves the results that are there.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as work:
        benchmark = Benchmark(arguments, Path(work))
        try:
            benchmark.run(arguments.parts)
        finally:
            benchmark.finish()
    return 1 if benchmark.result["errors"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
