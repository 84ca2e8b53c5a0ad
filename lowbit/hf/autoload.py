"""Makes transformers and PEFT know lowbit's models without anyone importing lowbit.

transformers has no entry points for quantizers, but torch runs the group `torch.backends` at the
end of `import torch`. `install` runs there, so it must stay cheap: it puts a finder on
`sys.meta_path`, and once transformers' tables of quantizers exist, they are replaced by ones that
import lowbit when "lowbit" is looked up. Nothing else of transformers is changed. PEFT is told of
our layers once its tuners exist, see `lowbit/adapters/registration.py`.

torch may first be imported from inside `transformers.quantizers.auto`, whose tables do not exist
yet and whose import no finder will see again. `transformers.modeling_utils`, which every
`from_pretrained` needs, is then imported later: the finder watches both.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_METHOD = "lowbit"
_TABLES_MODULE = "transformers.quantizers.auto"
_REGISTRATION = "lowbit.adapters.registration"
_PEFT = ("peft.tuners.tuners_utils", "peft.peft_model")
# table -> (module, class) of our entry
_ENTRIES = {
    "AUTO_QUANTIZER_MAPPING": ("lowbit.hf.quantizer", "LowbitHfQuantizer"),
    "AUTO_QUANTIZATION_CONFIG_MAPPING": ("lowbit.hf.config", "LowbitConfig"),
}


def install() -> None:
    """Does what is to be done, now or when it can be; again and again does nothing."""
    done = [act() for act in dict.fromkeys(_WATCHED.values())]
    if not all(done) and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _LazyTable(dict[str, Any]):
    """A table with one more entry, whose class is imported when it is first looked up."""

    def __init__(self, entries: dict[str, Any], module: str, name: str) -> None:
        super().__init__(entries)
        self._module, self._name = module, name

    def __contains__(self, key: object) -> bool:
        return key == _METHOD or super().__contains__(key)

    def __missing__(self, key: str) -> Any:
        if key != _METHOD:
            raise KeyError(key)
        self[key] = getattr(importlib.import_module(self._module), self._name)
        return self[key]


class _Finder(MetaPathFinder):
    """Finds the watched modules as every other finder does, and acts once they have run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _WATCHED:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                _run_after(spec, _WATCHED[fullname])
                return spec
        return None


def _run_after(spec: ModuleSpec, act: Callable[[], bool]) -> None:
    """Wraps the loader of `spec`, so that `act` is called after the module has run."""
    loader: Any = spec.loader
    execute = loader.exec_module

    def execute_and_look(module: ModuleType) -> None:
        execute(module)
        act()

    loader.exec_module = execute_and_look


def _make_tables_lazy() -> bool:
    """Replaces the tables if they exist; returns whether they are lazy now."""
    module = sys.modules.get(_TABLES_MODULE)
    # A module that is being imported has some of its names only.
    if module is None or not all(hasattr(module, table) for table in _ENTRIES):
        return False
    for table, entry in _ENTRIES.items():
        if not isinstance(getattr(module, table), _LazyTable):
            setattr(module, table, _LazyTable(getattr(module, table), *entry))
    return True


def _register_adapters() -> bool:
    """Tells PEFT of our layers if its classes exist; returns whether all of them do."""
    if not any(name in sys.modules for name in _PEFT):
        return False
    registered: bool = importlib.import_module(_REGISTRATION).register()
    return registered


# module -> what to do after it has run; False if there is nothing to be done yet
_WATCHED: dict[str, Callable[[], bool]] = {
    _TABLES_MODULE: _make_tables_lazy,
    "transformers.modeling_utils": _make_tables_lazy,
    **dict.fromkeys(_PEFT, _register_adapters),
}
