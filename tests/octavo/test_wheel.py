"""A wheel of the tree, in an environment without it, does what the commands say, in a directory with a space."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ..support import REPOSITORY, TEXTS, files_below

SOURCES = ("octavo", "common", "models", "ops", "pyproject.toml", "README.md", "LICENSE")
"""What a wheel is built from."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a bare environment that holds the wheel, and sees the libraries that Octavo depends on."""
    place = tmp_path_factory.mktemp("a wheel")
    tree = place / "tree"
    tree.mkdir()
    for name in SOURCES:
        part = REPOSITORY / name
        (shutil.copytree if part.is_dir() else shutil.copy)(part, tree / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(place), str(tree)]
    subprocess.run(build, check=True, cwd=place)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place / "env")], check=True)
    bare = place / "env" / "bin" / "python"
    (wheel,) = place.glob("octavo-*.whl")
    install = [*pip, f"--python={bare}", "install", "--no-deps", "--no-index", "--no-compile", str(wheel)]
    subprocess.run(install, check=True, cwd=place)
    found = next((place / "env").rglob("site-packages"))
    # a path that a .pth file adds is not searched for further .pth files, as that of an editable Octavo
    (found / "libraries.pth").write_text(str(Path(torch.__file__).parents[1]))
    return place / "env"


@pytest.mark.slow
def test_a_wheel_does_all_of_it(environment: Path, source: Path, tmp_path: Path) -> None:
    work = tmp_path / "my models"
    shutil.copytree(source, work / "tiny llama")

    def octavo(*words: str) -> str:
        settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        settings.pop("PYTHONPATH", None)
        command = [str(environment / "bin" / "octavo"), *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=work, env=settings)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = [environment / "bin" / "python", "-c", "import octavo; print(octavo.__file__)"]
    assert str(environment) in subprocess.run(where, capture_output=True, text=True, cwd=work).stdout
    assert octavo("--help").startswith("usage: octavo COMMAND")
    assert "octavo-4" in octavo("schemes") and "eight-bit" in octavo("presets")
    said = octavo("convert", "tiny llama", "--calib_texts", *TEXTS)
    assert "octavo chat 'tiny llama-octavo'" in said and "octavo serve 'tiny llama-octavo'" in said
    assert octavo("run", "tiny llama-octavo", "Rain fell", "--max_new_tokens", "2").startswith("Rain fell")
    assert octavo("run", "tiny llama", "Rain", "--max_new_tokens", "2", "--scheme", "octavo-4").startswith("Rain")
    assert "converted by Octavo" in octavo("info", "tiny llama-octavo")
    assert "layers 0-2" in octavo("doctor", "tiny llama")
    small = ("--windows", "0", "--tasks", "--schemes", "octavo-4")
    assert octavo("compare", "tiny llama", "--out", "a comparison", *small).endswith("index.html\n")
    assert "as it was" in octavo("refresh", "tiny llama-octavo")
    octavo("rewrite", "tiny llama-octavo", "--format", "compressed-tensors")
    assert "config.json" in files_below(work / "tiny llama-octavo-compressed-tensors")
