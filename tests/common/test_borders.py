"""What the folders promise: runtime/ travels, rooms are few, and models/ alone names modules of architectures."""

import ast
import re
from pathlib import Path

import pytest

from octavo.common.architecture import load_architecture
from octavo.common.convert.output.bundle import modules_of

from ..support import REPOSITORY

ARCHITECTURES = sorted(file.parent.name for file in REPOSITORY.glob("models/*/convert_quant_weights.py"))
MOST_ROOMS, MOST_FLOORS = 8, 5
NAMES = r"self_attn|\b[qkvo]_proj|layernorm|(gate|up|down|qkv|gate_up)_proj|embed_tokens|rotary_emb|[qk]_norm"
"""Names of modules that differ between architectures."""
OF_A_DIALECT = {
    "common/runtime/checkpoint/ascend.py": 2,
    "common/convert/dialects/gguf.py": 1,
    "common/convert/dialects/modelopt.py": 1,
}
"""Files that may name modules, since a format on disk or a set of flags names them, and on how many lines at most."""


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_travels_is_runtime_and_ops_alone(name: str) -> None:
    paths = modules_of(load_architecture(name))
    outside = [
        path
        for path in paths
        if not path.startswith(("ops/", "common/runtime/", f"models/{name}/")) and path != "common/errors.py"
    ]
    assert not outside and len(paths) > 30


def test_all_of_runtime_travels() -> None:
    travelling = {path for name in ARCHITECTURES for path in modules_of(load_architecture(name))}
    files = {file.relative_to(REPOSITORY).as_posix() for file in (REPOSITORY / "common" / "runtime").rglob("*.py")}
    assert {file for file in files if not file.endswith("__init__.py")} <= travelling


def imported_rooms(file: Path, room: str) -> set[str]:
    """The rooms at the top of common/ that a file of one of them imports."""
    common = (REPOSITORY / "common").parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = file.parent.parts[: len(file.parent.parts) - node.level + 1]
            target = (*base, *(node.module or "").split(".")) if node.module else base
            if target[: len(common)] == common and len(target) > len(common):
                found.add(target[len(common)])
    return found - {room}


def test_rooms_are_few_and_stand_on_few_floors() -> None:
    top = REPOSITORY / "common"
    rooms = {
        path.stem: [path] if path.is_file() else sorted(path.rglob("*.py"))
        for path in top.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    rooms.pop("__init__")
    below = {room: {r for file in files for r in imported_rooms(file, room)} for room, files in rooms.items()}
    floors: dict[str, int] = {}
    while len(floors) < len(rooms):
        ready = [room for room in rooms if room not in floors and below[room] <= set(floors)]
        assert ready, f"rooms import one another in a circle: {sorted(set(rooms) - set(floors))}"
        floors |= {room: 1 + max((floors[other] for other in below[room]), default=0) for room in ready}
    assert len(rooms) <= MOST_ROOMS, sorted(rooms)
    assert max(floors.values()) <= MOST_FLOORS, floors


def test_common_and_ops_name_no_module_of_an_architecture() -> None:
    found = {}
    for folder in ("common", "ops"):
        for file in sorted((REPOSITORY / folder).rglob("*")):
            if file.suffix in (".py", ".json", ".c", ".h"):
                path = file.relative_to(REPOSITORY).as_posix()
                lines = [line for line in file.read_text().splitlines() if re.search(NAMES, line)]
                if len(lines) > OF_A_DIALECT.get(path, 0):
                    found[path] = lines
    assert not found
