"""The environments of the engines, which `make test-engines` makes, and scripts that run in them."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ..support import REPOSITORY

ENVIRONMENTS = Path(os.environ.get("OCTAVO_ENGINES", REPOSITORY / ".cache" / "engines"))
SECONDS = 600


def python_of(engine: str) -> Path:
    """The interpreter of an engine's environment; skips the test where there is none."""
    python = ENVIRONMENTS / engine / "bin" / "python"
    if not python.exists() or not (ENVIRONMENTS / engine / ".installed").exists():
        pytest.skip(f"no environment {ENVIRONMENTS / engine}; make test-engines makes it")
    return python


def run_in(engine: str, script: str, *arguments: Any, **variables: str) -> Any:
    """Run a script that lies here in an engine's environment; returns what it prints last, read as JSON."""
    command = [str(python_of(engine)), str(Path(__file__).parent / script), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, env={**os.environ, **variables}, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
