"""What is pinned, what is admitted and what is said to be tested are the same."""

import re

import tomllib
from packaging.requirements import Requirement
from packaging.version import Version

from octavo.common.runtime.compatibility import TESTED_TRANSFORMERS

from .support import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
ADMITTED = {
    found.name: found for found in map(Requirement, PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"])
}


def pins(file: str) -> dict[str, str]:
    """Version by name of what a requirements file pins, which must be all that it names."""
    lines = [line.split("#")[0].strip() for line in (REPOSITORY / file).read_text().splitlines()]
    found = [Requirement(line) for line in lines if line and not line.startswith("-r ")]
    for requirement in found:
        assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)), f"{file}: {requirement} is no pin"
    names = [requirement.name.replace("-", "_") for requirement in found]
    assert len(names) == len(set(names))
    return {name: str(requirement.specifier)[2:] for name, requirement in zip(names, found, strict=True)}


PINNED = {**pins("requirements.txt"), **pins("requirements-test.txt")}


def test_what_is_pinned_is_admitted() -> None:
    for name, requirement in ADMITTED.items():
        assert requirement.specifier.contains(PINNED[name.replace("-", "_")]), requirement


def test_the_versions_that_errors_name_are_the_floor_and_the_pin() -> None:
    floor = next(part.version for part in ADMITTED["transformers"].specifier if part.operator == ">=")
    assert Version(TESTED_TRANSFORMERS[0]) == Version(floor)
    assert TESTED_TRANSFORMERS[1] == PINNED["transformers"]


def test_the_floor_of_the_contract_is_that_of_the_project() -> None:
    from .versions.environments import floor_requirements

    found = floor_requirements(REPOSITORY / "pyproject.toml")
    assert "transformers==5.17" in found and not any(name.startswith("torch") for name in found)
    assert len(found) == len(PROJECT["dependencies"]) - 1


def test_every_package_of_the_tree_is_installed() -> None:
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    roots = [
        file.parent
        for root in ("common", "models", "ops", "octavo")
        for file in REPOSITORY.glob(f"{root}/**/__init__.py")
    ]
    found = {folder.relative_to(REPOSITORY).as_posix().replace("/", ".") for folder in roots}
    wanted = {name if name.split(".")[0] == "octavo" else f"octavo.{name}" for name in found}
    assert set(settings["packages"]) == wanted
    models = {f"octavo.{name}" for name in found if name.startswith("models.")}
    assert models <= set(settings["package-dir"])
