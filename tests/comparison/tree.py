"""Processes that import Octavo from a tree of one's choice, or that cannot import it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import tomllib

from ..support import REPOSITORY


def import_root(tree: Path, scratch: Path) -> Path:
    """A folder that holds the package `octavo` of a tree, laid out as its pyproject.toml says.

    The package is a regular one and so hides the one that is installed, which may be a namespace.
    """
    settings = tomllib.loads((tree / "pyproject.toml").read_text(encoding="utf-8"))
    places: dict[str, str] = settings["tool"]["setuptools"]["package-dir"]
    package = scratch / "import" / "octavo"
    package.mkdir(parents=True)
    parts = {name.partition(".")[2]: tree / place for name, place in places.items() if name.count(".") == 1}
    if "octavo" in places:
        inside = (tree / places["octavo"]).glob("[!.]*")
        parts = {file.name: file for file in inside if file.name != "__pycache__"} | parts
    for name, place in parts.items():
        (package / name).symlink_to(place)
    if not (package / "__init__.py").exists():
        (package / "__init__.py").touch()
    return package.parent


def environment(scratch: Path, *roots: Path) -> dict[str, str]:
    """Of a process that is offline, computes on one thread, and imports from these folders first."""
    settings = {
        "PYTHONPATH": os.pathsep.join(map(str, (*roots, REPOSITORY))),
        "PYTHONWARNINGS": "ignore",  # they name lines of the code
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(scratch / "hub"),
        "HF_MODULES_CACHE": str(scratch / "modules"),
        "OMP_NUM_THREADS": "1",
        "TQDM_DISABLE": "1",
        "COLUMNS": "120",
    }
    return {**os.environ, **settings}


def run_module(name: str, task: dict[str, Any], scratch: Path, *roots: Path) -> Any:
    """What a module of this package writes for a task, in a process of its own.

    Raises:
        RuntimeError: it failed; the message is what it said.
    """
    given, answer = scratch / f"{name}.task.json", scratch / f"{name}.answer.json"
    given.write_text(json.dumps(task), encoding="utf-8")
    command = [sys.executable, "-m", f"{__package__}.{name}", str(given), str(answer)]
    # in a folder without code, since the working directory comes before PYTHONPATH
    room = scratch / "room"
    room.mkdir(exist_ok=True)
    done = subprocess.run(command, cwd=room, env=environment(scratch, *roots), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
    return json.loads(answer.read_text(encoding="utf-8"))
