"""The examples run as their docstrings say."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from octavo.common.bundle import main as bundle_main

from ..support import REPOSITORY

EXAMPLES = REPOSITORY / "examples"


def run(*arguments: str, standard_input: str = "", **settings: object) -> str:
    """Standard output of a script that must succeed."""
    done = subprocess.run(
        [sys.executable, *arguments], input=standard_input, capture_output=True, text=True, timeout=300, **settings
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The template copied out of the tree, with the two generated files in it."""
    copy = tmp_path / "a project"
    shutil.copytree(EXAMPLES / "minimal_project", copy, ignore=shutil.ignore_patterns("__pycache__", "*_fa3.py"))
    assert bundle_main(["--arch", "llama3", "--out", str(copy / "my_model")]) == 0
    return copy


@pytest.mark.parametrize("scheme", ["int8-token", "float"])
def test_the_minimal_project_runs_without_octavo(project: Path, source: Path, scheme: str) -> None:
    settings = project / "settings.json"
    settings.write_text(settings.read_text().replace("int8-token", scheme))
    hide = project / "octavo"
    hide.mkdir()
    (hide / "__init__.py").write_text("raise ImportError('octavo is not installed here')\n")

    printed = run("main.py", "--model_path", str(source), cwd=project)

    assert f"scheme {scheme}" in printed
    assert "The capital of France is" in printed


def test_the_minimal_project_loads_a_converted_checkpoint_too(project: Path, converted: Callable[..., Path]) -> None:
    directory = converted("--use_kvcache_quant", "True")
    assert "scheme ascend-c8" in run("main.py", "--model_path", str(directory), cwd=project)


def test_two_lines_quantize_the_cache_of_a_stock_model(source: Path) -> None:
    printed = run(str(EXAMPLES / "two_lines.py"), "--model_path", str(source))
    # The tokens fit the smallest storage: 64 of them, in 3 layers, 2 heads, K and V, of 16 codes and 4 bytes of scale.
    assert f"{64 * 3 * 2 * 2 * (16 + 4):,} allocated" in printed


def test_chat_answers_until_an_empty_line(converted: Callable[..., Path], tmp_path: Path) -> None:
    directory = converted("--use_fa_quant", "True")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub")}
    printed = run(
        str(EXAMPLES / "chat.py"), "--model_path", str(directory), standard_input="Hello\n\n", env=environment
    )
    assert printed.startswith("> ") and len(printed) > len("> > ")
