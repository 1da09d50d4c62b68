"""What `python -m tests.comparison` does."""

import argparse
import json
import shutil
import subprocess
import tempfile
from collections.abc import Collection
from pathlib import Path

from ..support import REPOSITORY
from .compare import compare, extent
from .layout import LAID_OUT, LAYOUT_FILE, layout_text
from .record import Record, make_record


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.comparison", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    record = commands.add_parser("record", help="write what a tree makes of the tiny sources")
    record.add_argument("--tree", type=Path, default=REPOSITORY)
    record.add_argument("--out", type=Path, required=True)
    pair = commands.add_parser("compare", help="say every difference of two records")
    pair.add_argument("files", type=Path, nargs=2)
    commands.add_parser("layout", help="write layout.json anew")
    since = commands.add_parser("since", help="compare a commit with this tree")
    since.add_argument("commit")
    for each in (record, since):
        each.add_argument("--only", nargs="+", default=("*",), help="globs of the names of conversions")
    return parser


def _say(first: Record, second: Record) -> int:
    """Print the differences; the exit code."""
    found = compare(first, second)
    print("\n".join([*found, f"compared {extent(first, second)}: {len(found)} differences"]))
    return 1 if found else 0


def _record_of_commit(commit: str, only: Collection[str]) -> Record:
    with tempfile.TemporaryDirectory(prefix="comparison-tree-") as place:
        archive, tree = Path(place, "tree.tar"), Path(place, "tree")
        command = ["git", "-C", str(REPOSITORY), "archive", "--output", str(archive), commit]
        if subprocess.run(command).returncode:
            raise SystemExit(f"error: {commit}: is no commit whose files can be had")
        shutil.unpack_archive(archive, tree, filter="data")
        return make_record(tree, only)


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    if arguments.command == "compare":
        first, second = (json.loads(file.read_text(encoding="utf-8")) for file in arguments.files)
        return _say(first, second)
    if arguments.command == "since":
        return _say(_record_of_commit(arguments.commit, arguments.only), make_record(REPOSITORY, arguments.only))
    if arguments.command == "layout":
        LAYOUT_FILE.write_text(layout_text(make_record(REPOSITORY, LAID_OUT)), encoding="utf-8")
        return 0
    record = make_record(arguments.tree, arguments.only)
    arguments.out.write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(f"{arguments.out}: {len(record['conversions'])} conversions")
    return 0
