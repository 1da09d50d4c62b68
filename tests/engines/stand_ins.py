"""Stand-ins for what an engine's package imports and cannot be had here, so that the rest of it is imported as it is.

stand_in(("vllm", "torch_npu"), is_real=lambda name: False, known={"QuantizationConfig": object})
"""

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any


def nothing(*_: Any, **__: Any) -> None:
    """A function of a stand-in."""
    return None


class StandIn(types.ModuleType):
    """A module that has whatever it is asked for: what is known, else empty classes and functions that do nothing."""

    def __init__(self, name: str, known: dict[str, Any]) -> None:
        super().__init__(name)
        self.__dict__["_known"] = known

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        known = self.__dict__["_known"]
        if name == "logger":
            return StandIn("logger", known)
        if name not in known:
            known[name] = type(name, (), {}) if name[:1].isupper() else nothing
        return known[name]


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds stand-ins for all modules of some packages but the real ones."""

    def __init__(
        self, packages: Collection[str], is_real: Callable[[str], bool], known: dict[str, Any], root: str
    ) -> None:
        self._packages, self._is_real, self._known, self._root = packages, is_real, known, root

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The place of a stand-in; None of what is imported as it is."""
        if name.partition(".")[0] not in self._packages or self._is_real(name):
            return None
        spec = importlib.machinery.ModuleSpec(name, self, is_package=True)
        spec.submodule_search_locations = [str(Path(self._root, *name.split(".")))]
        return spec

    def create_module(self, spec: Any) -> types.ModuleType:
        """A stand-in."""
        return StandIn(spec.name, self._known)

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing to run."""


def stand_in(root: str, packages: Collection[str], is_real: Callable[[str], bool], known: dict[str, Any]) -> None:
    """From now on, import stand-ins, and real modules below them from a folder.

    Args:
        root: where the wheel was unpacked.
        packages: top-level names.
        is_real: whether a module, by its whole name, is imported as it is.
        known: what is more than an empty class or a function that does nothing, by its name, in any module.
    """
    sys.meta_path.insert(0, _Finder(packages, is_real, known, root))
    sys.path.insert(0, root)
