"""What all architectures share; the public names, each imported when it is first asked for.

`from octavo import NAME` and `from octavo.common import NAME` give the same objects, but for `convert`, which is the
package here. Modules go on being found by the names that they had in earlier versions.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import resolve_name, spec_from_loader
from types import CodeType, ModuleType
from typing import Any

PUBLIC = {
    "OctavoError": "errors",
    "QuantizedCache": "runtime.cache.quantized_cache",
    "kv_bits_per_element": "runtime.cache.sizes",
    "kept_kv_bytes": "runtime.cache.sizes",
    "kv_bytes_per_token": "runtime.cache.sizes",
    "prepare": "stock_model",
    "LinearScheme": "runtime.schemes.linear_scheme",
    "Scheme": "runtime.schemes.kv_scheme",
    "PRESETS": "runtime.schemes.kv_scheme",
    "load_scheme": "runtime.schemes.kv_scheme",
    "Codec": "runtime.schemes.tensor_codec",
    "Statistics": "runtime.static_scales",
    "load_statistics": "runtime.static_scales",
    "ConversionReport": "convert.report",
    "ConvertRequest": "convert.request",
    "convert": "convert.api",
    "load_quantized": "convert.load",
    "diagnose": "doctor.report",
}
"""Public names, and the modules that define them."""


MOVED = {
    "bundle": ("convert.output.bundle", "architecture"),
    "cache": ("runtime.cache.quantized_cache", "runtime.cache.sizes", "runtime.model_sizes"),
    "calibration": ("convert.calibration.texts",),
    "codec": ("runtime.schemes.tensor_codec",),
    "evaluate": ("convert.measure.fidelity",),
    "folds": ("stock_model", "runtime.bias_fold"),
    "generate": (".generate",),
    "run": (".generate",),
    "scheme": ("runtime.schemes.kv_scheme",),
    "statistics": ("runtime.static_scales",),
}
"""Import paths of earlier versions within this package, which README and examples showed, and where that stands now.

A point in front leads out of this package, into the one that holds it.
"""


def public_name(name: str, asked: str) -> Any:
    """The object of a public name.

    Args:
        name: what is asked for.
        asked: the package that was asked, for the message.

    Raises:
        AttributeError: there is no such public name.
    """
    if name not in PUBLIC:
        raise AttributeError(f"module {asked!r} has no attribute {name!r}")
    return getattr(import_module(f".{PUBLIC[name]}", __name__), name)


def __getattr__(name: str) -> Any:
    return public_name(name, __name__)


def __dir__() -> list[str]:
    return sorted(PUBLIC)


class _OldName(Loader):
    """A module under an old name: what is asked of it is looked up in the modules that took its place."""

    def __init__(self, targets: Sequence[str]) -> None:
        self._targets = targets

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its lookup."""

        def lookup(name: str) -> Any:
            # `inspect` asks every loaded module for `__file__`, also while what is behind is being imported
            is_special = name.startswith("__")
            for target in () if is_special else map(import_module, self._targets):
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
        return spec_from_loader(name, _OldName([resolve_name(f".{part}", package) for part in MOVED[old]]))


sys.meta_path.append(_OldNames(__name__))
