"""The public door, and import paths of earlier versions."""

import subprocess
import sys
from importlib import import_module

import pytest

import octavo
from octavo.common import MOVED, PUBLIC
from octavo.common.runtime.cache.quantized_cache import QuantizedCache

SHOWN = {
    "octavo.common.cache": ("QuantizedCache", "kv_bytes_per_token", "kv_bits_per_element"),
    "octavo.common.calibration": ("default_texts", "hold_back", "tokenize", "read_calibration_file"),
    "octavo.common.codec": ("Codec",),
    "octavo.common.convert": ("main",),
    "octavo.common.doctor": (),
    "octavo.common.evaluate": ("compare", "windows", "Fidelity"),
    "octavo.common.folds": ("prepare",),
    "octavo.common.generate": ("main",),
    "octavo.common.run": ("main",),
    "octavo.common.scheme": ("PRESETS", "Scheme", "load_scheme"),
    "octavo.common.statistics": ("Statistics", "load_statistics", "scales_of"),
}
"""What README and examples of earlier versions imported."""


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_names_are_what_their_modules_define(name: str) -> None:
    module = import_module(f"octavo.common.{PUBLIC[name]}")
    assert getattr(octavo, name) is getattr(module, name)
    assert name in dir(octavo) and name in octavo.__all__


@pytest.mark.parametrize("path", sorted(SHOWN))
def test_import_paths_that_were_shown_go_on_working(path: str) -> None:
    module = import_module(path)
    assert all(getattr(module, name) is not None for name in SHOWN[path])


def test_old_paths_can_be_imported_before_what_is_behind_them() -> None:
    """In a process that has loaded nothing: inspecting all modules, as torch does, loads nothing in between."""
    code = f"import {', '.join(sorted(SHOWN))}, octavo.common.convert.api"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_old_path_gives_the_same_object() -> None:
    assert import_module("octavo.common.cache").QuantizedCache is QuantizedCache is octavo.QuantizedCache


@pytest.mark.parametrize("old", sorted(MOVED))
def test_what_is_not_there_is_missed_by_its_name(old: str) -> None:
    with pytest.raises(AttributeError, match=f"octavo.common.{old}.*'nothing'"):
        import_module(f"octavo.common.{old}").nothing  # noqa: B018
    with pytest.raises(ImportError):
        import_module(f"octavo.common.{old}s")


def test_the_door_opens_without_loading_what_is_behind() -> None:
    code = "import octavo, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="'octavo' has no attribute 'nothing'"):
        octavo.nothing  # noqa: B018


@pytest.mark.parametrize(
    "module", ["octavo.common.bundle", "octavo.common.doctor", "octavo.common.convert.output.bundle", "octavo.refresh"]
)
def test_commands_run_by_old_and_new_names(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage:"), done.stderr
