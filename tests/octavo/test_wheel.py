"""A wheel of the tree, in an environment without it, does what the commands say, in a directory with a space."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import torch
from transformers.utils.import_utils import is_serve_available

from ..support import REPOSITORY, TEXTS, files_below
from .server import SECONDS, serving

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


@pytest.mark.slow
def test_a_wheel_serves(environment: Path, source: Path, tmp_path: Path) -> None:
    """Of what it comes with nothing is asked but transformers' own extra, `serving`."""
    if not is_serve_available():
        pytest.skip("needs what transformers' server does: pip install 'transformers[serving]'")
    shutil.copytree(source, tmp_path / "my models" / "tiny llama")
    words = ("tiny llama", "--scheme", "int8-token")
    with serving([environment / "bin" / "octavo"], *words, cwd=tmp_path / "my models") as (address, lines):
        body = {"model": "tiny llama", "prompt": "Rain fell", "max_tokens": 4}
        asked = Request(f"{address}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urlopen(asked, timeout=SECONDS) as answer:
            found = json.load(answer)
    assert found["choices"][0]["text"] and found["usage"]["completion_tokens"] <= 4
    assert any(" tokens read, " in line and "KV cache of" in line for line in lines)
