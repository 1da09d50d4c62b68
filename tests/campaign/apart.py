"""The process that `sanitized.py` starts: numbers of tries on stdin, a line of JSON for each result in a file."""

import json
import sys
from pathlib import Path

from .outcomes import Result
from .sanitized import make_tries

if __name__ == "__main__":
    seed, folder, found = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    folder.mkdir()
    with found.open("w", buffering=1) as out:

        def save(result: Result) -> None:
            out.write(json.dumps(result.to_dict()) + "\n")

        make_tries(json.load(sys.stdin), seed, folder, save)
