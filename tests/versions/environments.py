"""Run the contract (`test_contract.py`) with other versions of transformers and torch than those of this environment.

    .venv/bin/python tests/versions/environments.py [NAME ...] [--report NAME]

An environment is a venv in .cache/versions that sees all packages of the one that runs this script, behind its own, so
that it costs no more than the packages that differ. `floor` has the oldest versions that pyproject.toml admits, but for
torch; `pinned` is the environment that runs this script; `newest` has the newest transformers and what that needs;
`newest-torch` the newest torch (which on Linux brings some GB of CUDA). A failure in one that `--report` names is a
line of the output and no failure of this script.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import sysconfig
import time
import venv
from dataclasses import dataclass
from pathlib import Path

import tomllib

REPOSITORY = Path(__file__).parents[2]
FOLDER = Path(".cache") / "versions"
CONTRACT = Path("tests") / "versions" / "test_contract.py"
LONGEST = 900
"""Seconds after which a run of the contract is taken for one that hangs."""
VERSIONS = "import torch, transformers; print(f'transformers {transformers.__version__}, torch {torch.__version__}')"
NEWEST = ("--upgrade", "--upgrade-strategy", "eager", "transformers")
NEWEST_TORCH = ("--upgrade", "torch")
NAMES = ("floor", "pinned", "newest", "newest-torch")


class EnvironmentFailure(RuntimeError):
    """An environment that could not be made, or whose contract is broken, in one line."""


@dataclass(frozen=True)
class Outcome:
    """What came of an environment: what it has, and what is wrong with it, if anything is."""

    name: str
    versions: str
    failure: str | None
    seconds: float


def floor_requirements(pyproject: Path) -> list[str]:
    """The lowest versions that pyproject.toml admits, as requirements; torch is left as it is, for its size."""
    dependencies = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
    pairs = [requirement.split(",")[0].split(">=") for requirement in dependencies]
    return [f"{name}=={version}" for name, version in pairs if name != "torch"]


def packages_of(name: str) -> list[str]:
    """Arguments of pip for an environment; none for the one that runs this."""
    chosen = {"pinned": (), "newest": NEWEST, "newest-torch": NEWEST_TORCH}
    return floor_requirements(Path("pyproject.toml")) if name == "floor" else list(chosen[name])


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _stamp(arguments: list[str]) -> str:
    """What an environment was made of: if it is the same again, nothing has to be installed."""
    parts = [*arguments, sys.version, sysconfig.get_path("purelib"), Path("requirements-test.txt").read_text()]
    parts.append(Path("requirements.txt").read_text())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def make_environment(name: str) -> Path:
    """The interpreter of an environment, which is made if it is not there or not of these requirements.

    Raises:
        EnvironmentFailure: pip cannot install it.
    """
    arguments = packages_of(name)
    if not arguments:
        return Path(sys.executable)
    folder = FOLDER / name
    stamp, stamp_file = _stamp(arguments), folder / "made-of"
    is_same = stamp_file.is_file() and stamp_file.read_text() == stamp
    if is_same and "--upgrade" not in arguments:  # what is newest changes by itself
        return _python(folder)
    if not is_same:
        print(f"{name}: making {folder}", flush=True)
        venv.create(folder, clear=True, with_pip=True, symlinks=True)
        own = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
        # not the folder's name alone: .pth files that lie there, as of editable installs, count too
        line = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
        (own / "octavo_base.pth").write_text(line, encoding="utf-8")
    print(f"{name}: pip install {' '.join(arguments)}", flush=True)
    pip = [str(_python(folder)), "-m", "pip", "install", "--disable-pip-version-check", "--no-warn-conflicts"]
    done = subprocess.run([*pip, "--progress-bar", "off", *arguments], capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["ERROR: no message"]
        raise EnvironmentFailure(f"pip cannot install it ({errors[-1].removeprefix('ERROR: ')})")
    stamp_file.write_text(stamp)
    return _python(folder)


def run_contract(name: str, python: Path, is_reported: bool) -> None:
    """Run the contract; its output is shown, or of one that is only reported kept in a file.

    Raises:
        EnvironmentFailure: a test failed.
    """
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CONTRACT)]
    log = FOLDER / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as opened:
        try:
            done = subprocess.run(command, stdout=opened, stderr=subprocess.STDOUT, timeout=LONGEST)
        except subprocess.TimeoutExpired:
            raise EnvironmentFailure(f"the contract did not end within {LONGEST} s, see {log}") from None
    text = log.read_text(encoding="utf-8")
    if not (done.returncode and is_reported):
        print(text, flush=True)
    if done.returncode:
        failed = [line for line in text.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        first = failed[0] if failed else (text.strip().splitlines() or ["no output"])[-1]
        raise EnvironmentFailure(f"{len(failed)} tests of the contract fail, see {log}: {first}")


def try_out(name: str, is_reported: bool) -> Outcome:
    """Make an environment and run the contract in it."""
    started, versions, failure = time.monotonic(), "no versions", None
    try:
        python = make_environment(name)
        done = subprocess.run([str(python), "-c", VERSIONS], capture_output=True, text=True)
        if done.returncode:
            raise EnvironmentFailure(f"it cannot be imported ({done.stderr.strip().splitlines()[-1]})")
        versions = done.stdout.strip()
        print(f"{name}: {versions}", flush=True)
        run_contract(name, python, is_reported)
    except EnvironmentFailure as error:
        failure = str(error)
    return Outcome(name, versions, failure, time.monotonic() - started)


def main() -> int:
    """Run the contract in each environment, and say in a line for each what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", metavar="NAME", nargs="*", default=NAMES, help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--report", metavar="NAME", choices=NAMES, action="append", default=[],
        help="an environment whose failure is reported only")  # fmt: skip
    flags = parser.parse_args()
    if unknown := set(flags.names) - set(NAMES):
        parser.error(f"{sorted(unknown)[0]!r} is none of {', '.join(NAMES)}")
    os.chdir(REPOSITORY)
    outcomes = [try_out(name, name in flags.report) for name in flags.names]
    for outcome in outcomes:
        said = f"FAILED: {outcome.failure}" if outcome.failure else "the contract holds"
        note = " (reported only)" if outcome.failure and outcome.name in flags.report else ""
        print(f"versions: {outcome.name}: {outcome.versions}: {said}{note} [{outcome.seconds:.0f} s]", flush=True)
    return any(outcome.failure and outcome.name not in flags.report for outcome in outcomes)


if __name__ == "__main__":
    sys.exit(main())
