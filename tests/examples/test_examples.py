"""The examples run as their docstrings say."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from octavo.common.convert.output.bundle import main as bundle_main

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


@pytest.mark.parametrize("last", ["Hello\n\n", "Hello\n", ""], ids=["an empty line", "the end", "no input"])
def test_chat_answers_until_an_empty_line_or_the_end_of_input(last: str, converted: Callable[..., Path]) -> None:
    directory = converted("--use_fa_quant", "True")
    printed = run(str(EXAMPLES / "chat.py"), "--model_path", str(directory), standard_input=last)
    assert printed.startswith("> ") and (len(printed) > len("> > \n")) == bool(last)
    assert printed.endswith("> ") == last.endswith("\n\n") and printed.endswith("> \n") != last.endswith("\n\n")


def test_an_interrupt_ends_a_chat_without_a_traceback(converted: Callable[..., Path]) -> None:
    command = [sys.executable, str(EXAMPLES / "chat.py"), "--model_path", str(converted("--use_fa_quant", "True"))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as chat:
        assert chat.stdout.read(2) == "> "
        chat.send_signal(signal.SIGINT)
        said = chat.communicate(timeout=60)
    assert chat.returncode == 0 and said[0] == "\n" and "Traceback" not in said[1]


@pytest.mark.slow
def test_the_demo_prints_bars_and_the_result(source: Path, tmp_path: Path) -> None:
    directory = tmp_path / "a demo"
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--model_path", str(source), "--directory", str(directory)]
    for _ in range(2):  # the second removes what the first wrote
        done = subprocess.run([*command, "--tokens", "520"], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    bars = {line.partition(":")[0] for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()}
    assert bars == {"converting", "float32 reads and writes", "Octavo reads and writes"}
    table, _, last = done.stdout.partition("\nto go on:\n")
    rows = {line.split("  ")[0]: line.split() for line in table.splitlines()}
    assert rows["KV cache of 520 tokens, MB"][-2] == f"{(16 + 4) / (16 * 4):.2f}"  # 16 codes and a scale for 16 floats
    assert float(rows["KL(float || Octavo), nats a token"][-1]) > 0
    assert [line.split()[1] for line in last.splitlines()] == ["chat", "evaluate", "convert"]
    assert f"'{directory}'" in last
