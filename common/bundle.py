"""The two self-contained files that travel beside weights: a modeling file and the runtime it needs.

The runtime is the closure of what the modeling file imports from this tree, in the order of those imports, as one file:
relative imports of this tree removed, texts (C sources, presets) embedded, and the namespace of the ops replaced by one
that carries the digest of the code. transformers loads remote code as flat files, so packages cannot travel.
"""

import argparse
import ast
import hashlib
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from ..ops.library import NAMESPACE
from .architecture import REPOSITORY, Architecture
from .errors import OctavoError

RUNTIME = "octavo_runtime"
TEXTS = ("common/presets/*.json", "ops/**/*.c", "ops/**/*.h")
CODE = ("common/**/*.py", "ops/**/*.py", "ops/**/*.[ch]", "models/**/*.py")
_NAMESPACE_LINE = f'NAMESPACE = "{NAMESPACE}"\n'
_EMBEDDED_LINE = "EMBEDDED: dict[str, str] = {}\n"


@dataclass(frozen=True)
class Module:
    """One module of the tree.

    Attributes:
        path: relative to the root, as `common/cache.py`.
        body: its source without docstring and without imports.
        imports: its imports of anything outside this tree, as source lines.
        needs: paths of the modules of this tree that it imports, in order.
        names: what it defines at top level.
    """

    path: str
    body: str
    imports: list[str]
    needs: list[str]
    names: list[str]


def _resolve(path: str, node: ast.ImportFrom) -> str:
    """The path of the module that a relative import names."""
    base = Path(path).parent
    for _ in range(node.level - 1):
        base = base.parent
    target = base.joinpath(*(node.module or "").split(".")) if node.module else base
    for candidate in (target.with_suffix(".py"), target / "__init__.py"):
        if (REPOSITORY / candidate).is_file():
            return candidate.as_posix()
    raise OctavoError(
        f"{path}:{node.lineno}: 'from {'.' * node.level}{node.module or ''}' names no module of this tree"
    )


def _defined_names(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
    return []


def read_module(path: str) -> Module:
    """Take a module of the tree apart.

    Raises:
        OctavoError: it imports in a way that a flat file cannot: `from . import x`, or under another name.
    """
    source = (REPOSITORY / path).read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    imports, needs, names, dropped = [], [], [], set()
    for index, node in enumerate(ast.parse(source).body):
        span = range(node.lineno - 1, node.end_lineno)
        is_docstring = index == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.module is None or any(alias.asname for alias in node.names):
                raise OctavoError(f"{path}:{node.lineno}: write 'from .module import name', which can be flattened")
            needs.append(_resolve(path, node))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            imports.append("".join(lines[number] for number in span))
        elif not is_docstring:
            names += _defined_names(node)
            continue
        dropped.update(span)
    body = "".join(line for number, line in enumerate(lines) if number not in dropped).strip("\n")
    return Module(path, body, imports, needs, [name for name in names if name != "__all__"])


def _closure(path: str, found: dict[str, Module]) -> dict[str, Module]:
    """Modules that `path` needs and then itself, dependencies first."""
    if path not in found:
        module = read_module(path)
        for need in module.needs:
            _closure(need, found)
        found[path] = module
    return found


def _check_names(modules: list[Module]) -> None:
    owner: dict[str, str] = {}
    for module in modules:
        for name in dict.fromkeys(module.names):
            if name in owner:
                raise OctavoError(
                    f"{module.path} and {owner[name]} both define {name!r}; a flat file needs one name each"
                )
            owner[name] = module.path


def _embedded(modules: list[Module]) -> str:
    """The texts that the modules read, as the literal of a dict."""
    folders = {Path(module.path).parent for module in modules}
    files = sorted(file for pattern in TEXTS for file in REPOSITORY.glob(pattern))
    texts = {
        name.as_posix(): file.read_text(encoding="utf-8")
        for file in files
        if {(name := file.relative_to(REPOSITORY)).parent, name.parent.parent} & folders
    }
    entries = "".join(f'    "{name}": r"""{text}""",\n' for name, text in texts.items())
    return f"EMBEDDED: dict[str, str] = {{\n{entries}}}\n"


def commit() -> str:
    """The commit of this tree, or "unknown" outside a checkout of its own."""
    if not (REPOSITORY / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def code_digest() -> str:
    """What tells one version of this tree's code from another."""
    files = sorted(file for part in CODE for file in REPOSITORY.glob(part))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _runtime_source(modules: list[Module]) -> str:
    """The runtime with the plain namespace, from which the digest is taken."""
    imports = sorted({line.strip() for module in modules for line in module.imports})
    bodies = [f"# {module.path}\n\n{module.body}\n" for module in modules if module.body]
    source = "\n".join([*imports, "", "", "\n\n".join(bodies)])
    return source.replace(_EMBEDDED_LINE, _embedded(modules), 1)


def bundle(architecture: Architecture) -> dict[str, str]:
    """The two files of an architecture: name to text.

    Raises:
        OctavoError: the code cannot be flattened; the message says where and how to mend it.
    """
    entry = architecture.source.relative_to(REPOSITORY).as_posix()
    modules = list(_closure(entry, {}).values())[:-1]
    _check_names(modules)
    source = _runtime_source(modules)
    modeling = architecture.source.read_text(encoding="utf-8")
    digest = hashlib.sha256((source + modeling).encode()).hexdigest()
    if source.count(_NAMESPACE_LINE) != 1:
        raise OctavoError("ops/library.py: the line that sets NAMESPACE must stand there once")
    source = source.replace(_NAMESPACE_LINE, f'NAMESPACE = "{NAMESPACE}_{digest[:12]}"\n')
    header = f"# Generated by octavo.common.bundle from commit {commit()}; do not edit.\n# sha256 {digest}\n\n"
    return {
        f"{architecture.module}.py": header + _rewrite_imports(entry, modeling),
        f"{RUNTIME}.py": header
        + '"""What the modeling file beside this one needs of Octavo, in one file."""\n\n'
        + source,
    }


def _rewrite_imports(path: str, source: str) -> str:
    """The modeling file with its imports of this tree pointing at the runtime."""
    lines = source.splitlines(keepends=True)
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            names = ", ".join(alias.name for alias in node.names)
            lines[node.lineno - 1 : node.end_lineno] = [f"from .{RUNTIME} import {names}\n"] + [""] * (
                node.end_lineno - node.lineno
            )
    return "".join(lines)


def load_architecture(name: str) -> Architecture:
    """The architecture of a folder under `models/`.

    Raises:
        OctavoError: there is no such folder; the message lists those there are.
    """
    known = sorted(file.parent.name for file in REPOSITORY.glob("models/*/modeling_*_fa3.py"))
    if name not in known:
        raise OctavoError(f"--arch {name}: is none of {', '.join(known)}")
    return import_module(f"..models.{name}", __package__).ARCHITECTURE


def main(argv: list[str] | None = None) -> int:
    """Write the two files of `--arch` into `--out`."""
    parser = argparse.ArgumentParser(prog="python -m octavo.common.bundle", description=main.__doc__)
    parser.add_argument("--arch", required=True, help="folder under models/, as llama3")
    parser.add_argument("--out", required=True, type=Path, help="directory to write into; made if missing")
    arguments = parser.parse_args(argv)
    try:
        files = bundle(load_architecture(arguments.arch))
        arguments.out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (arguments.out / name).write_text(text, encoding="utf-8")
            print(arguments.out / name)
    except (OctavoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
