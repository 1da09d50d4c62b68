"""The environments of the engines, which `make test-engines` makes, and scripts that run in them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ..support import REPOSITORY

ENVIRONMENTS = Path(os.environ.get("OCTAVO_ENGINES", REPOSITORY / ".cache" / "engines"))
SECONDS = 600


def _installed(engine: str) -> Path:
    folder = ENVIRONMENTS / engine
    if not (folder / ".installed").exists():
        pytest.skip(f"no environment {folder}; make test-engines makes it")
    return folder


def python_of(engine: str) -> Path:
    """The interpreter of an engine's environment; skips the test where there is none."""
    python = _installed(engine) / "bin" / "python"
    assert python.exists(), f"{python.parent.parent} is no environment; remove it"
    return python


def packages_of(engine: str) -> Path:
    """The folder of an engine's packages, which this environment's go with; skips the test where there is none."""
    return _installed(engine)


def run_with(packages: Path, *arguments: Any, folder: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """Run this interpreter in a process of its own, in a folder or here, that finds an engine's packages, too."""
    command, variables = [sys.executable, *map(str, arguments)], {**os.environ, "PYTHONPATH": str(packages.resolve())}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, env=variables, cwd=folder, check=False
    )


def run_in(engine: str, script: str, *arguments: Any, **variables: str) -> Any:
    """Run a script that lies here in an engine's environment; returns what it prints last, read as JSON."""
    command = [str(python_of(engine)), str(Path(__file__).parent / script), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, env={**os.environ, **variables}, check=False
    )
    return said_by(done)


def said_by(done: "subprocess.CompletedProcess[str]") -> Any:
    """What a process that went well printed last, read as JSON."""
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
