"""Fixtures for every test."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers

from .support import REPOSITORY, convert_flags, save_source, tiny_llama

_THEIRS = "Passing `generation_config` together with generation-related arguments"
"""A warning that transformers gives of its own assisted decoding."""


class _Deprecations(logging.Handler):
    """Keeps what is logged of deprecated names."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecated" in message and not message.startswith(_THEIRS):
            self.found.append(message)


@pytest.fixture(autouse=True)
def no_deprecated_name_is_used() -> Iterator[None]:
    """Of some of its old names transformers tells its logger alone, and each only once in a process."""
    handler = _Deprecations()
    transformers.logging.set_verbosity_warning()  # a script that a test ran before sets it to errors
    transformers.logging.add_handler(handler)
    yield
    transformers.logging.remove_handler(handler)
    assert not handler.found


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models are faster on one thread, and the sums of two processes are then equal to the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny float32 Llama checkpoint with a tokenizer; read only."""
    return save_source(tmp_path_factory.mktemp("a source") / "tiny llama", tiny_llama())


@pytest.fixture(scope="session")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`converted(*flags)`: the tiny Llama converted with these flags, once per session; read only."""
    from octavo.common.convert.api import main
    from octavo.models.llama3 import ARCHITECTURE

    made: dict[tuple[str, ...], Path] = {}

    def convert(*flags: str) -> Path:
        if flags not in made:
            target = tmp_path_factory.mktemp("an output") / "tiny quantized"
            assert main(ARCHITECTURE, convert_flags(source, target, *flags)) == 0
            made[flags] = target
        return made[flags]

    return convert


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M as an ordinary checkpoint, fetched by the script that users run."""
    script = REPOSITORY / "examples" / "fetch_smollm2.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"SmolLM2 cannot be had: {done.stderr.strip().splitlines()[-1]}")
    return Path(done.stdout.strip())


@pytest.fixture(scope="session")
def testbed() -> Path:
    """The folder of models and texts that the published figures come from."""
    folder = Path(os.environ.get("OCTAVO_TESTBED") or "~/.cache/octavo-testbed").expanduser()
    for name in ("smollm2-135m", "boolq.jsonl", "wikipedia-eval.txt"):
        if not (folder / name).exists():
            pytest.skip(f"no testbed: {folder / name} is missing; set OCTAVO_TESTBED")
    return folder
