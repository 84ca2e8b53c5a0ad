"""Hatch's build hook: compiles the native CPU kernels into the wheel, or beside their sources.

The library has a C interface without Python's, so a wheel with it fits one platform and every
Python. Without a compiler the wheel is built all the same, for every platform and without kernels:
lowbit then multiplies by decoded weights, and says how to compile them when asked for them.
LOWBIT_NO_BUILD=1 leaves them out.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

PACKAGE = "lowbit_kernels/cpu"
WITHOUT = (
    "lowbit is built without native CPU kernels, and on a CPU decodes weights for every product, "
    "which is slower. To compile them, install a C++ compiler (Debian: apt install g++) and run "
    "`python -m lowbit_kernels.cpu.build`."
)


class KernelsHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the compiled kernels to wheels and to editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles the library: for an editable install in place, else into the wheel."""
        if os.environ.get("LOWBIT_NO_BUILD", "0") not in ("", "0"):
            self.app.display_info("LOWBIT_NO_BUILD is set: the native CPU kernels are left out")
            return
        sources = Path(self.root) / "kernels" / PACKAGE
        build = _load(sources / "build.py")
        try:
            if version == "editable":
                build.install(sources)
            else:
                self._folder = tempfile.TemporaryDirectory()
                library = build.install(Path(self._folder.name))
                build_data["force_include"][str(library)] = f"{PACKAGE}/{library.name}"
        except (build.BuildError, OSError) as error:
            self.app.display_warning(f"{WITHOUT}\nThe build said: {error}")
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform_tag()}"


def platform_tag() -> str:
    """Returns the tag of the platform that the compiler compiles for."""
    if sys.platform == "darwin":  # Python's own may be for two architectures, and an older system
        return next(iter(platform_tags()))
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")


def _load(path: Path) -> Any:
    """Imports one file, without its package: that needs torch, which is not installed here."""
    spec = importlib.util.spec_from_file_location("lowbit_kernels_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
