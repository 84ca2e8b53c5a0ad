"""The inspection of compiled code itself: what it must find in kernels that are known to be bad."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

BENCHMARKS = Path(__file__).parents[2] / "kernels/benchmarks"
sys.path.append(str(BENCHMARKS))

from inspect_code import Code, main_loop, opcode  # noqa: E402 - after the path

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E R2, desc[UR4][R2.64] ;
        /*0020*/                   FADD R4, R2, R4 ;
        /*0030*/                   FADD R4, R2, R5 ;
        /*0040*/                   FADD R4, R2, R6 ;
        /*0050*/               @P0 BRA `(.L_x_1) ;
        /*0060*/               @P1 BRA `(.L_x_3) ;
.L_x_2:
        /*0070*/                   HGMMA.64x16x16.F32.BF16 R24, R32, gdesc[UR12], R24 ;
        /*0080*/             @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;
        /*0090*/               @P2 BRA `(.L_x_2) ;
.L_x_3:
        /*00a0*/                   EXIT ;
.L_x_4:
        /*00b0*/                   BRA `(.L_x_4);
"""


@pytest.fixture(scope="module")
def controls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What was found in each control kernel, compiled in a process that interprets nothing."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    paths = [str(BENCHMARKS), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    script = Path(__file__).with_name("control_kernels.py")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


def test_a_left_operand_from_registers_is_told_from_one_in_shared_memory(
    controls: dict[str, dict[str, Any]],
) -> None:
    """A copied weight goes from global to shared memory, which is no store of a register."""
    expected = {
        "copied, left": (False, 0),
        "computed, left": (True, 0),
        "computed, right": (False, 8),  # 128 x 64 values of two bytes, 16 bytes per lane and store
        "few registers": (True, 0),
    }
    assert {
        name: (code["from_registers"], code["stores"]) for name, code in controls.items()
    } == expected


def test_serialised_products_are_reported(controls: dict[str, dict[str, Any]]) -> None:
    assert controls["computed, left"]["serialised"]
    assert not controls["copied, left"]["serialised"]
    assert not controls["computed, right"]["serialised"]


def test_spills_are_reported(controls: dict[str, dict[str, Any]]) -> None:
    for name, code in controls.items():
        assert (code["spilled"] > 0) == (code["local"] > 0) == (name == "few registers"), name
    assert controls["few registers"]["registers"] == 64
    assert controls["copied, left"]["registers"] > 64


def test_the_main_loop_is_one_step_of_the_kernel(controls: dict[str, dict[str, Any]]) -> None:
    """Else instructions per weight would be those of several steps, or of a part of one."""
    for name, code in controls.items():
        # 128 x 64 weights, 64 x 16 in a product; on the right, a product takes all 128 rows.
        assert code["products"] == (4 if name == "computed, right" else 8), name
        assert code["per_weight"] == code["loop"] * 4 * 32 / (128 * 64)


def test_the_loop_with_products_is_taken_before_a_longer_one() -> None:
    loop = main_loop(SASS)
    assert [opcode(line) for line in loop] == ["HGMMA.64x16x16.F32.BF16", "UIADD3", "BRA"]
    without = "\n".join(line for line in SASS.splitlines() if "HGMMA" not in line)
    assert [opcode(line) for line in main_loop(without)] == ["LDG.E", *["FADD"] * 3, "BRA"]
    assert main_loop("/*0000*/ EXIT ;") == []


@pytest.mark.parametrize(
    ("products", "expected"),
    [
        (["R24, R32, gdesc[UR12], R24"], True),
        (["R24, R32.reuse, gdesc[UR12], R24, gsb0"], True),
        (["R24, gdesc[UR20], R24"], False),
        (["R24, R32, gdesc[UR12], R24", "R24, gdesc[UR20], R24, gsb0"], False),
        ([], False),
    ],
)
def test_one_product_from_shared_memory_is_one_too_many(
    products: list[str], expected: bool
) -> None:
    loop = tuple(f"@P0 HGMMA.64x16x16.F32.BF16 {operands}" for operands in products)
    code = Code(registers=1, spilled=0, shared=0, loop=(*loop, "STS [R1], R2", "BRA `(.L_x_1)"))
    assert code.multiplies_from_registers == expected
    assert code.stores_to_shared == 1
