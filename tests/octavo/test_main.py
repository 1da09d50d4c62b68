"""The command `octavo`: its list, its errors, and that it waits for nothing it does not need."""

import argparse
import os
import subprocess
import sys
from importlib import import_module

import pytest

from octavo.__main__ import main, overview
from octavo.commands import COMMANDS
from octavo.common.command import PIPE_CLOSED, OneLineParser
from octavo.common.runtime.version import VERSION

from ..support import REPOSITORY, assert_one_error_line

WIDTH, HEIGHT = 80, 60


def said(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    try:
        code = main(argv)
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_every_module_of_a_subcommand_is_listed_and_keeps_to_the_form() -> None:
    files = {file.stem for file in (REPOSITORY / "octavo" / "commands").glob("*.py")} - {"__init__"}
    assert files == set(COMMANDS)
    for name in COMMANDS:
        command = import_module(f"octavo.commands.{name}")
        assert command.add_flags(OneLineParser(prog=name)) is None and callable(command.run)


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_the_list_is_printed_by_help_and_without_a_word(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert said(argv, capsys) == (0, overview() + "\n", "")
    assert all(f"  {name} " in overview() for name in COMMANDS)
    assert max(map(len, overview().splitlines())) <= WIDTH


def test_the_list_waits_for_no_library() -> None:
    code = (
        "import sys; from octavo.__main__ import main; main([]); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'octavo.commands.doctor')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_it_runs_as_a_module_and_tells_its_version() -> None:
    done = subprocess.run([sys.executable, "-m", "octavo", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"octavo {VERSION}\n"), done.stderr


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["schemes"], ["plan", "--help"], ["docter"]])
def test_where_nobody_reads_it_ends_quietly(argv: list[str]) -> None:
    """As `octavo ... 2>&1 | head -0` does, with the exit code of what SIGPIPE ends."""
    env, (read, write) = {**os.environ, "PYTHONUNBUFFERED": ""}, os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        stderr = closed if argv == ["docter"] else subprocess.PIPE
        done = subprocess.run([sys.executable, "-m", "octavo", *argv], stdout=closed, stderr=stderr, env=env)
    assert (done.returncode, done.stderr or b"") == (PIPE_CLOSED, b"")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_help_fits_a_screen(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    code, out, _ = said([name, "--help"], capsys)
    lines = out.splitlines()
    assert code == 0 and lines[0].startswith(f"usage: octavo {name} ")
    assert max(map(len, lines)) <= WIDTH and len(lines) <= HEIGHT


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["docter"], ("docter: no such command; did you mean doctor?",)),
        (["zzz"], ("zzz: no such command (--help lists them)",)),
        (["doctor"], ("MODEL",)),
        (["doctor", "a", "--model_path", "b"], ("not allowed with argument MODEL",)),
        (["doctor", "a", "--statistic", "b"], ("--statistic b; did you mean --statistics?",)),
        (["rewrite", "a", "--format", "guff", "--save_directory", "b"], ("'guff'", "did you mean gguf?")),
        (["doctor", "/nowhere"], ("/nowhere: no such directory",)),
    ],
)
def test_what_is_mistyped_ends_in_one_line(
    argv: list[str], parts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = said(argv, capsys)
    assert code in (1, 2) and out == ""
    assert_one_error_line(err, *parts)


def test_a_subcommand_hears_the_words_as_they_were_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[argparse.Namespace] = []
    monkeypatch.setattr("octavo.commands.doctor.run", heard.append)
    assert main(["doctor", "MODEL", "--json"]) == 0
    assert (heard[0].model_path, heard[0].json, heard[0].words) == ("MODEL", True, ["MODEL", "--json"])
