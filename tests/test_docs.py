"""Every command and every program of README and docs/ runs, in order, in a directory with a space in its name.

A page says MODEL for a model, which is a tiny random Llama here, or the one that `OCTAVO_DOCS_MODEL` names, and
texts.txt for texts. What cannot run has `<!-- not run: REASON -->` above it, and skips with that reason; a JSON block
below `<!-- file: NAME -->` is that file.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from octavo.__main__ import main

from .support import REPOSITORY, TEXTS

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
RUN = ("bash", "python")
SHOWN = ("json", "text")
_BLOCK = re.compile(r"(?:<!-- (not run|file): ([^\n]*) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        where: page and number.
        note, about: what the comment above it says: "not run" and why, "file" and its name, or nothing.
        language, text: of the block.
    """

    where: str
    note: str
    about: str
    language: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found = _BLOCK.findall(page.read_text(encoding="utf-8"))
    return [Block(f"{page.name}, block {number}", *parts) for number, parts in enumerate(found, 1)]


BLOCKS = {page.name: blocks_of(page) for page in PAGES}
SKIPPED = [block for blocks in BLOCKS.values() for block in blocks if block.note == "not run"]


@pytest.fixture
def place(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of somebody who follows a page."""
    work = tmp_path / "my models"
    work.mkdir()
    model = os.environ.get("OCTAVO_DOCS_MODEL")
    shutil.copytree(Path(model).expanduser() if model else source, work / "MODEL")
    (work / "texts.txt").write_text("\n".join(TEXTS * 4) + "\n", encoding="utf-8")
    monkeypatch.chdir(work)
    monkeypatch.syspath_prepend(str(work))
    return work


def run_bash(block: Block, capfd: pytest.CaptureFixture[str]) -> None:
    """Run the commands of a block; those of octavo in this process, which has imported torch already."""
    for line in filter(str.strip, block.text.splitlines()):
        words = shlex.split(line, comments=True)
        if words[:1] == ["octavo"]:
            code = main(words[1:])
            assert code == 0, f"{block.where}: {line}\n{capfd.readouterr().err[-2000:]}"
        elif words:
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            done = subprocess.run(
                ["bash", "-ec", line], env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, f"{block.where}: {line}\n{done.stderr[-2000:]}"


def run_block(block: Block, capfd: pytest.CaptureFixture[str]) -> None:
    """Do what a block says."""
    if block.note == "file":
        Path(block.about).write_text(block.text, encoding="utf-8")
    elif block.language == "bash":
        run_bash(block, capfd)
    elif block.language == "python":
        exec(compile(block.text, block.where, "exec"), {"__name__": "__main__"})


@pytest.mark.slow
@pytest.mark.usefixtures("place", "one_thread")
@pytest.mark.parametrize("page", [name for name, blocks in BLOCKS.items() if blocks])
def test_what_a_page_says_runs(page: str, capfd: pytest.CaptureFixture[str]) -> None:
    for block in BLOCKS[page]:
        if block.note != "not run":
            run_block(block, capfd)


@pytest.mark.parametrize("block", SKIPPED, ids=[block.where for block in SKIPPED])
def test_what_does_not_run_says_why(block: Block) -> None:
    assert len(block.about.split()) > 2, block.where
    pytest.skip(f"{block.where}: {block.about}")


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_every_block_of_a_page_is_understood(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert 2 * len(BLOCKS[page.name]) == len(re.findall(r"^```", text, re.MULTILINE)), "a fence is not closed"
    for block in BLOCKS[page.name]:
        assert block.language in RUN or block.language in SHOWN, f"{block.where}: {block.language or 'no language'}"
    assert not re.search(r"^    (\.venv|octavo|make|pip|python) ", text, re.MULTILINE), "a command outside of a fence"


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing
