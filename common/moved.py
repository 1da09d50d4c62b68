"""Import paths of earlier versions, which README and examples showed: they lead to the modules of today."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import CodeType, ModuleType
from typing import Any

MOVED = {
    "bundle": ("convert.output.bundle", "architecture"),
    "cache": ("runtime.cache.quantized_cache", "runtime.cache.sizes", "runtime.model_sizes"),
    "calibration": ("convert.calibration.texts",),
    "codec": ("runtime.schemes.tensor_codec",),
    "evaluate": ("convert.measure.fidelity",),
    "folds": ("prepare", "runtime.bias_fold"),
    "run": ("generate",),
    "scheme": ("runtime.schemes.kv_scheme",),
    "statistics": ("runtime.static_scales",),
}
"""Old names within this package, and the modules that hold what was there."""


class _OldName(Loader):
    """A module under an old name: what is asked of it is looked up in the modules that took its place."""

    def __init__(self, targets: Sequence[str]) -> None:
        self._targets = targets

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its lookup."""

        def lookup(name: str) -> Any:
            for target in map(import_module, self._targets):
                if hasattr(target, name):
                    return getattr(target, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = lookup

    def get_code(self, name: str) -> CodeType:
        """What `python -m` of the old name runs."""
        return compile(f"import sys\nfrom {self._targets[0]} import main\nsys.exit(main())", name, "exec")


class _OldNames(MetaPathFinder):
    """Finds modules of a package by their old names."""

    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, old = name.rpartition(".")
        if package != self._package or old not in MOVED:
            return None
        return spec_from_loader(name, _OldName([f"{package}.{part}" for part in MOVED[old]]))


def serve_old_names(package: str) -> None:
    """Let the modules of a package be imported by their old names, too."""
    sys.meta_path.append(_OldNames(package))
