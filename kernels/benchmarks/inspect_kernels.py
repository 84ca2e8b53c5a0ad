"""Compiles every kernel for every target and prints what matters; needs no GPU.

    python kernels/benchmarks/inspect_kernels.py --target sm_90 --json inspect.json

The exit status is 1 if a kernel spills, is over its budget or misses its tensor core instruction.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(Path(__file__).parent)]

from cases import all_cases  # noqa: E402 - after the paths
from inspect_code import TARGETS, Code, KernelCase, compile_case  # noqa: E402

# Bytes of shared memory that one program can have.
SHARED = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}


def faults(case: KernelCase, code: Code, target: str) -> list[str]:
    """Returns what is wrong with `code`, a sentence each."""
    found = []
    if code.spilled:
        found.append(f"spills {code.spilled}")
    if code.shared > SHARED[target]:
        found.append(f"{code.shared} B of shared memory, there are {SHARED[target]}")
    found += [warning for warning in code.warnings if "C7515" in warning]
    if target == "sm_90":
        if case.register_operand and not code.multiplies_from_registers:
            found.append("does not multiply from registers")
        if code.instructions_per_weight and code.instructions_per_weight > case.budget:
            found.append(
                f"{code.instructions_per_weight:.2f} instructions per weight, budget {case.budget}"
            )
        # What is left are a scale or zero point per row on its way to other lanes.
        if case.register_operand and code.stores_to_shared > 8:
            found.append(f"{code.stores_to_shared} stores to shared memory per step")
    return found


def report(target: str) -> list[dict[str, Any]]:
    """Returns one entry per case, with `faults`."""
    entries = []
    for case in all_cases(target):
        code = compile_case(case, target)
        entry = {key: value for key, value in dataclasses.asdict(code).items() if key != "loop"}
        if code.loop:
            entry["loop_instructions"] = len(code.loop)
            entry["stores_to_shared"] = code.stores_to_shared
            entry["multiplies_from_registers"] = code.multiplies_from_registers
        entries.append(
            {"target": target, "case": case.name, **entry, "faults": faults(case, code, target)}
        )
    return entries


def main() -> None:
    """Compiles, prints and optionally writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--target", choices=TARGETS, action="append", help="all by default")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="triton")
    entries: list[dict[str, Any]] = []
    for target in arguments.target or TARGETS:
        for entry in report(target):
            entries.append(entry)
            per_weight = entry["instructions_per_weight"]
            print(
                f"{target:8}{entry['case']:28}{entry['registers']:4} registers"
                f"{entry['shared']:8} B shared"
                + ("" if per_weight is None else f"{per_weight:7.2f} per weight")
                + "".join(f"  {fault}" for fault in entry["faults"])
            )
    if arguments.json:
        from scripts.provenance import write_result

        command = "python kernels/benchmarks/inspect_kernels.py"
        write_result(arguments.json, command, {"kernels": entries})
    if any(entry["faults"] for entry in entries):
        sys.exit(1)


if __name__ == "__main__":
    main()
