"""What the compilers make of a kernel, for GPUs that are not here.

Triton compiles for a target without a driver, and its wheel carries NVIDIA's assembler and
disassembler. What matters on a GPU can be read off the result: registers, spills, which tensor core
instruction runs and where its left operand comes from, and how many instructions the main loop
spends per weight.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class KernelCase:
    """One way to compile a kernel.

    Args:
        name: for the report.
        kernel: the function under `triton.jit`.
        types: argument -> Triton's type ("*bf16", "i32"); pointers count as aligned to 16 bytes.
        constants: argument -> compile-time value; None for an absent tensor.
        options: num_warps, num_stages.
        aligned: integer arguments that are multiples of 16.
        weights_per_step: weights that one program takes per step of its main loop; 0 where there is
            no main loop over weights.
        budget: the most instructions per weight on sm_90.
        register_operand: whether sm_90 must take the weights from registers (wgmma).
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    aligned: Sequence[str] = ()
    weights_per_step: int = 0
    budget: float = float("inf")
    register_operand: bool = False


@dataclass(frozen=True)
class Code:
    """What one target got.

    Args:
        registers: per thread.
        spilled: bytes of registers kept in memory (registers, on AMD).
        shared: bytes of shared memory.
        loop: instructions of the main loop, in order; empty on AMD.
        instructions_per_weight: of the main loop, per thread; None without a loop over weights.
        warnings: of the assembler.
    """

    registers: int
    spilled: int
    shared: int
    loop: tuple[str, ...] = field(repr=False, default=())
    instructions_per_weight: float | None = None
    warnings: tuple[str, ...] = ()

    @property
    def histogram(self) -> Counter[str]:
        """Opcode -> occurrences in the main loop."""
        return Counter(opcode(line) for line in self.loop)

    @property
    def multiplies_from_registers(self) -> bool:
        """True if every wgmma takes its left operand from registers, and there is one."""
        products = [line for line in self.loop if opcode(line).startswith(("HGMMA", "IGMMA"))]
        # HGMMA.64x16x16.F32.BF16 R24, R32, gdesc[UR12], R24: the second operand is the weight.
        left = [line.split(None, 1)[1].split(",")[1].strip() for line in products]
        return bool(left) and all(operand.startswith("R") for operand in left)

    @property
    def stores_to_shared(self) -> int:
        """Stores to shared memory in the main loop, copies from global memory not counted."""
        return sum(count for name, count in self.histogram.items() if name.startswith("STS"))


def opcode(line: str) -> str:
    """Returns the opcode of a line of SASS, without its predicate."""
    return re.sub(r"^@!?U?P\w+\s+", "", line).split()[0]


def compile_case(case: KernelCase, target: str) -> Code:
    """Returns what `target` makes of `case`."""
    names = case.kernel.arg_names
    signature = {
        name: "constexpr" if name in case.constants else case.types[name] for name in names
    }
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*")
        or (name in case.aligned and signature[name] != "constexpr")
    }
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    source = ASTSource(case.kernel, signature, constexprs=constants, attrs=attributes)
    compiled, report = _compile(source, target, dict(case.options))
    return _amd(compiled) if target.startswith("gfx") else _nvidia(compiled, report, case)


def _compile(source: Any, target: str, options: dict[str, Any]) -> tuple[Any, str]:
    """Returns the compiled kernel and what the assembler said while it made this very code.

    Assembling the PTX once more would not do: which assembler Triton takes and with which options
    depends on the target and the version, and spills come and go with them.
    """
    with (
        knobs.nvidia.scope(),
        knobs.compilation.scope(),
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True  # nothing is said about cached code
        compiled = triton.compile(source, target=TARGETS[target], options=options)
    return compiled, printed.getvalue()


def _amd(compiled: Any) -> Code:
    text = compiled.asm["amdgcn"]
    numbers = {
        name: int(re.search(rf"\.{name}:\s*(\d+)", text)[1])  # type: ignore[index]
        for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    }
    spilled = numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"]
    return Code(numbers["vgpr_count"], spilled, compiled.metadata.shared)


def _nvidia(compiled: Any, report: str, case: KernelCase) -> Code:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        sass = _run("nvdisasm", "-c", str(cubin))
    registers = re.findall(r"Used (\d+) registers", report)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    if len(registers) != 1 or len(spills) != 1:
        raise RuntimeError(f"ptxas reported on no kernel, or on several: {report!r}")
    loop = main_loop(sass)
    per_weight = None
    if case.weights_per_step:
        threads = 32 * case.options["num_warps"]
        per_weight = len(loop) * threads / case.weights_per_step
    warnings = tuple(line for line in report.splitlines() if "warning" in line or "(C" in line)
    return Code(
        registers=int(registers[0]),
        spilled=sum(map(int, spills[0])),
        shared=compiled.metadata.shared,
        loop=tuple(loop),
        instructions_per_weight=per_weight,
        warnings=warnings,
    )


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run(
        [NVIDIA_TOOLS / tool, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr.strip()}")
    return done.stdout + done.stderr


def main_loop(sass: str) -> list[str]:
    """Returns the instructions of the loop with tensor core products, or of the longest loop."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in sass.splitlines():
        label = re.match(r"(\.L[\w.]+):", line.strip())
        instruction = re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line)
        if label:
            labels[label[1]] = len(instructions)
        elif instruction:
            instructions.append(instruction[1].strip())
    loops: list[list[str]] = []
    for i, text in enumerate(instructions):
        branch = re.search(r"BRA.*?`\((\.L[\w.]+)\)", text)
        if branch and labels.get(branch[1], i + 1) <= i:
            loops.append(instructions[labels[branch[1]] : i + 1])
    products = [loop for loop in loops if any("MMA" in opcode(line) for line in loop)]
    return max(products or loops or [[]], key=len)
