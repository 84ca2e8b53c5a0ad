"""What is installed with a compiler and without one, and when kernels are compiled again."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from lowbit_kernels.cpu import build, library

ROOT = Path(__file__).parent.parent
LIBRARY = f"lowbit_kernels/cpu/{build.LIBRARY_NAME}"
# Objects hold their command, a library its objects: what it was made from is read from it.
FAKE_COMPILER = f"""#!{sys.executable}
import sys
from pathlib import Path
if "--version" in sys.argv:
    sys.exit(print("fake 1.0"))
if "{build.OPENMP}" in sys.argv and Path(__file__).with_name("no-openmp").exists():
    sys.exit("no OpenMP")
output = Path(sys.argv[sys.argv.index("-o") + 1])
objects = [Path(argument) for argument in sys.argv if argument.endswith(".o")]
made = [" ".join(sys.argv)] if "-c" in sys.argv else [path.read_text() for path in objects]
output.write_text(" ".join(made))
with Path(__file__).with_name("log").open("a") as log:
    log.write(output.name + "\\n")
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that only writes down what it is asked for, in the file `log` beside it."""
    path = tmp_path / "compiler" / "fake-c++"
    path.parent.mkdir()
    path.write_text(FAKE_COMPILER)
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    return path


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the C++ sources that may be changed."""
    copied = tmp_path / "src"
    shutil.copytree(build.SOURCES, copied)
    monkeypatch.setattr(build, "SOURCES", copied)
    return copied


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the package is built from, without what is generated."""
    copied = tmp_path / "checkout"
    copied.mkdir()
    for name in (".gitignore", "LICENSE", "README.md", "hatch_build.py", "pyproject.toml"):
        shutil.copy(ROOT / name, copied)
    generated = shutil.ignore_patterns("__pycache__", "liblowbit.*", ".lowbit-*")
    for name in ("lowbit", "eval/lowbit_eval", "kernels/lowbit_kernels"):
        shutil.copytree(ROOT / name, copied / name, ignore=generated)
    return copied


def built(checkout: Path, target: str) -> tuple[Path, str]:
    """Returns the one file that building `target` makes, and what the build said."""
    output = checkout.parent / "dist"
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(output)]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (made,) = output.iterdir()
    return made, done.stdout + done.stderr


@pytest.mark.usefixtures("compiler")
def test_a_wheel_has_the_kernels_and_fits_this_platform_and_every_python(checkout: Path) -> None:
    wheel, _ = built(checkout, "wheel")
    assert re.fullmatch(r"lowbit-[\d.]+-py3-none-(linux|macosx)_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert LIBRARY in names
    assert "lowbit_kernels/cpu/src/api.cpp" in names  # to compile them again
    assert not (checkout / "kernels" / LIBRARY).exists()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_a_wheel_is_pure_and_the_build_says_what_is_missing(
    checkout: Path,
) -> None:
    wheel, said = built(checkout, "wheel")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert LIBRARY not in zipfile.ZipFile(wheel).namelist()
    assert "without native CPU kernels" in said
    assert "no C++ compiler found" in said


def test_kernels_can_be_left_out(
    checkout: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWBIT_NO_BUILD", "1")
    wheel, _ = built(checkout, "wheel")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not compiler.with_name("log").exists()


@pytest.mark.usefixtures("compiler")
def test_an_editable_install_has_the_kernels_beside_their_sources(checkout: Path) -> None:
    wheel, _ = built(checkout, "wheel:editable")
    assert (checkout / "kernels" / LIBRARY).exists()
    assert LIBRARY not in zipfile.ZipFile(wheel).namelist()


@pytest.mark.usefixtures("compiler")
def test_a_source_distribution_has_sources_and_nothing_compiled(checkout: Path) -> None:
    (checkout / "kernels" / LIBRARY).write_bytes(b"compiled")
    archive, _ = built(checkout, "sdist")
    with tarfile.open(archive) as opened:
        names = [name.split("/", 1)[1] for name in opened.getnames()]
    assert "hatch_build.py" in names
    assert "kernels/lowbit_kernels/cpu/src/api.cpp" in names
    assert f"kernels/{LIBRARY}" not in names


def test_the_library_is_compiled_again_only_if_something_changed(
    compiler: Path, sources: Path, tmp_path: Path
) -> None:
    def compiled() -> int:
        library = build.install(tmp_path / "installed")
        assert library == tmp_path / "installed" / build.LIBRARY_NAME
        return len(compiler.with_name("log").read_text().splitlines())

    first = compiled()
    assert compiled() == first
    with (sources / "weight.h").open("a") as header:
        header.write("// changed\n")
    second = compiled()
    assert second > first
    (tmp_path / "installed" / build.LIBRARY_NAME).write_bytes(b"something else")
    assert compiled() > second
    assert [path.name for path in (tmp_path / "installed").iterdir()] == [build.LIBRARY_NAME]


def test_a_compiler_may_have_arguments_and_lack_openmp(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = {}
    for openmp in (True, False):
        if not openmp:
            compiler.with_name("no-openmp").touch()
        monkeypatch.setenv("CXX", f"{compiler} -m{'with' if openmp else 'without'}")
        commands[openmp] = build.build(tmp_path / "built").read_text()
    assert " -mwith " in commands[True]
    assert f" {build.OPENMP} " in commands[True]
    assert " -mwithout " in commands[False]
    assert f" {build.OPENMP} " not in commands[False]


def test_another_compiler_is_not_taken_for_one_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="CXX is no-such-compiler"):
        build.install(tmp_path)
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(build.BuildError, match="WSL"):
        build.install(tmp_path)


@pytest.mark.usefixtures("no_compiler")
def test_the_command_says_why_there_are_no_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main() == 2
    assert "install g++" in capsys.readouterr().err


def test_files_are_linked_from_the_oldest_instruction_set_to_the_newest() -> None:
    # Of functions that several files define the linker keeps the first. If it were the one of a
    # newer instruction set, an older processor would stop at it.
    names = [name.removesuffix(".cpp") for name in build.files()]
    assert names == ["api", *library.ISAS][: len(names)]
