"""What importing costs, and which way imports point."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lowbit

PACKAGE = Path(lowbit.__file__).parent
# room -> rooms of lowbit that it may import from. What is not listed here may import anything
# below the command line.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "scheme": {"errors"},
    "quant": {"errors", "scheme"},
    "algorithms": {"errors", "scheme", "quant"},
    "calibration": {"errors", "scheme", "quant", "algorithms"},
    "checkpoint": {"errors", "scheme", "quant"},
    "backends": {"errors", "scheme", "quant"},
    "ops": {"errors", "scheme", "quant", "backends"},
    "memory": set(),
    "patterns": {"errors"},
    "nn": {"errors", "memory", "scheme", "quant", "backends", "ops"},
    "models": {"errors", "patterns", "scheme", "quant", "calibration", "checkpoint", "nn"},
    "allocation": {
        "errors",
        "memory",
        "progress",
        "scheme",
        "algorithms",
        "calibration",
        "nn",
        "models",
    },
    "engines": {"errors", "scheme", "allocation", "checkpoint", "nn", "models", "formats"},
    "hf": {
        "errors",
        "memory",
        "scheme",
        "quant",
        "algorithms",
        "calibration",
        "checkpoint",
        "models",
        "nn",
        "formats",  # where a path is dispatched; nothing of it is imported with the room
    },
}
# The rooms that must stay free of Hugging Face and of kernels.
PURE = ("errors", "scheme", "quant", "algorithms", "backends", "ops")
FOREIGN = ("transformers", "accelerate", "peft", "triton", "lowbit_kernels", "lowbit_eval")


def imported_modules(file: Path) -> set[str]:
    """Returns the dotted name of everything that `file` imports, at any depth."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


# The files of pure rooms that may import kernels; they are imported when a device asks for them.
KERNEL_USERS = (
    "algorithms/ldlq.py",
    *(f"backends/{name}.py" for name in ("cpu", "formats", "fragment", "int8", "strips", "triton")),
)


def rooms() -> dict[str, set[str]]:
    """Returns room -> dotted names that its files import."""
    found: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        found.setdefault(room, set()).update(imported_modules(file))
    return found


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_one_way(room: str) -> None:
    own = {name.split(".")[1] for name in rooms()[room] if name.startswith("lowbit.")}
    assert own - {room} <= ALLOWED[room]


@pytest.mark.parametrize("room", PURE)
def test_numerics_import_no_hugging_face_and_no_kernels(room: str) -> None:
    found: set[str] = set()
    for file in PACKAGE.rglob("*.py"):
        path = file.relative_to(PACKAGE)
        if path.parts[0].removesuffix(".py") == room:
            kernels = {"lowbit_kernels"} if path.as_posix() in KERNEL_USERS else set()
            found |= {name.split(".")[0] for name in imported_modules(file)} - kernels
    assert not found & set(FOREIGN)


def test_only_the_command_line_and_merges_import_the_evaluation() -> None:
    users = {
        room
        for room, names in rooms().items()
        if any(name.split(".")[0] == "lowbit_eval" for name in names)
    }
    # A merge and a release gate measure, whoever asks for them.
    assert users <= {"cli", "merging", "verification"}
    importers = {room for room, names in rooms().items() if "lowbit.cli" in str(names)}
    assert importers <= {"cli"}


def run_python(code: str) -> str:
    """Returns what `code` prints in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_importing_lowbit_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "peft", "triton", "accelerate", "numpy")
    code = f"import sys, lowbit; print([name for name in {heavy} if name in sys.modules])"
    assert run_python(code) == "[]"


def test_quantized_layers_need_no_transformers() -> None:
    code = (
        "import sys; from lowbit import QuantLinear, QuantEmbedding, QuantizedWeight, Scheme;"
        "print([name for name in ('transformers', 'triton') if name in sys.modules])"
    )
    assert run_python(code) == "[]"


def test_every_public_name_exists() -> None:
    for name in lowbit.__all__:
        assert getattr(lowbit, name) is not None
    assert set(dir(lowbit)) == set(lowbit.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        lowbit.no_such_name  # noqa: B018


def test_the_version_is_the_distributions() -> None:
    project = (PACKAGE.parent / "pyproject.toml").read_text()
    assert f'version = "{lowbit.__version__}"' in project.splitlines()
