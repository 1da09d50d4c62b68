"""Figures that are kept in files as they are measured, so that a search goes on where it was cut off."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..comparing.measuring import file_of, kept, write_whole


class Store:
    """Figures of one run of measurements, by the name of a file and a key in it.

    Args:
        results: the directory of the files.
        run: conditions of the measurement, as plain data; what was measured under others counts for nothing.
    """

    def __init__(self, results: Path, run: Mapping[str, Any]) -> None:
        self._results, self._run = results, dict(run)
        self._records: dict[str, dict[str, Any]] = {}

    def figure(self, name: str, key: str, measure: Callable[[], Any]) -> Any:
        """A figure, measured and written if there is none.

        Raises:
            OctavoError: it cannot be measured or written.
        """
        return self.figures(name, [key], lambda _: [measure()])[0]

    def figures(self, name: str, keys: Sequence[str], measure: Callable[[Sequence[str]], Sequence[Any]]) -> list[Any]:
        """Figures of one file; those that are missing are measured together, and written.

        Raises:
            OctavoError: they cannot be measured or written.
        """
        file = file_of(self._results, name)
        if name not in self._records:
            found = kept(file, name, self._run)
            self._records[name] = found or {"name": name, "conditions": self._run, "figures": {}}
        record = self._records[name]
        missing = [key for key in keys if key not in record["figures"]]
        if missing:
            record["figures"] |= dict(zip(missing, measure(missing), strict=True))
            write_whole(file, json.dumps(record, indent=2) + "\n")
        return [record["figures"][key] for key in keys]
