"""A process that works with the scripts of a tree: `python -m tests.comparison.converts IN OUT`."""

import contextlib
import importlib
import io
import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, logging

from ..support import TEXTS, with_cache
from .conversions import FOLDER, INPUTS
from .logits import Model, logits_of
from .sources import SOURCES

_NOT_COMPARED = (
    (re.compile(r"^(checkpoint, MB +\S+) +\S+$", re.MULTILINE), r"\1 (not compared)"),  # the code counts, too
    (re.compile(r"[0-9.]+ tokens/s"), "(not compared) tokens/s"),
    (re.compile(r"^took .*\n?", re.MULTILINE), ""),
)


def _check_imports(tree: Path) -> None:
    """Raise an `AssertionError` unless Octavo comes from the tree."""
    for path in importlib.import_module("octavo.common").__path__:
        assert Path(path).resolve().is_relative_to(tree), f"octavo.common is {path}, not of {tree}"


def _two_lines() -> tuple[Any, Any]:
    """`QuantizedCache` and `prepare`, from where the tree has them."""
    try:
        from octavo import QuantizedCache, prepare
    except ImportError:
        from octavo.common.cache import QuantizedCache
        from octavo.common.folds import prepare
    return QuantizedCache, prepare


class Work:
    """What is asked of a tree, in a folder.

    Args:
        tree: root of a checkout, with no link in its path.
        folder: for sources, inputs and outputs.
    """

    def __init__(self, tree: Path, folder: Path) -> None:
        self.tree, self.folder = tree, folder

    def make_sources(self, names: list[str]) -> None:
        """Write sources, and the files that flags name."""
        for name in names:
            SOURCES[name].save(self.folder / "sources" / name)
        for name, text in INPUTS.items():
            (self.folder / name).write_text(text, encoding="utf-8")
        (self.folder / "outputs").mkdir()

    def _ran(self, program: str, arguments: list[str], work: Callable[[], int]) -> dict[str, Any]:
        """Exit code and words of a program that runs in this process; an exception takes the place of the code."""
        sys.argv = [program, *arguments]
        torch.manual_seed(0)  # so that it does the same whatever ran before it
        words = io.StringIO()
        with contextlib.redirect_stdout(words), contextlib.redirect_stderr(words):
            try:
                code = work()
            except SystemExit as stop:
                code = stop.code
            except Exception as error:
                code = f"{type(error).__name__}: {error}"
        said = words.getvalue().replace(str(self.folder), FOLDER)
        for pattern, instead in _NOT_COMPARED:
            said = pattern.sub(instead, said)
        return {"code": code, "said": said.splitlines()}

    def _script(self, folder: str, name: str, arguments: list[str]) -> dict[str, Any]:
        parts = runpy.run_path(str(self.tree / "models" / folder / name), run_name="a script")
        return self._ran(name, arguments, lambda: parts["main"](parts["ARCHITECTURE"], arguments))

    def doctor(self, source: str, *flags: str) -> dict[str, Any]:
        """What the doctor says of a source."""
        arguments = ["--model_path", str(self.folder / "sources" / source), *flags]
        return self._ran("doctor", arguments, lambda: runpy.run_module("octavo.common.doctor", run_name="__main__"))

    def convert(self, conversion: dict[str, Any]) -> dict[str, Any]:
        """Convert, run what was written, and run the stock model with a quantized cache if a scheme is named."""
        source = self.folder / "sources" / conversion["source"]
        target = self.folder / "outputs" / conversion["name"]
        statistics = target.with_name(f"{target.name}.statistics.safetensors")
        flags = [flag.replace(FOLDER, str(self.folder)) for flag in conversion["flags"]]
        texts = ["--calib_texts", *TEXTS] if conversion["has_texts"] else []
        kept = ["--save_statistics", str(statistics)] if conversion["scheme"] else []
        arguments = ["--model_path", str(source), "--save_directory", str(target), *texts, *flags, *kept]
        found = self._script(conversion["folder"], "convert_quant_weights.py", arguments)
        if not target.is_dir():
            return found
        prompt = ["--model_path", str(target), "--prompt", "Rain fell on", "--max_new_tokens", "4"]
        found["run"] = self._script(conversion["folder"], "run.py", prompt)
        if conversion["scheme"]:
            found["doctor"] = self.doctor(conversion["source"], "--statistics", str(statistics))
            found["logits of the stock model"] = logits_of(lambda: _stock(source, conversion["scheme"], statistics))
        return found


def _stock(source: Path, scheme: str, statistics: Path) -> Model:
    """A stock model and what makes its quantized cache."""
    cache_class, prepare = _two_lines()
    model = prepare(AutoModelForCausalLM.from_pretrained(source).eval())
    return model, lambda: with_cache(cache_class(model.config, scheme=scheme, statistics=statistics))


def main(task: Path, answer: Path) -> None:
    """Do the conversions of the task, and write what came of them, and what the doctor says of their sources."""
    asked = json.loads(task.read_text(encoding="utf-8"))
    tree = Path(asked["tree"])
    work = Work(tree, Path(asked["folder"]))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    sources = sorted({conversion["source"] for conversion in asked["conversions"]})
    work.make_sources(sources)
    _check_imports(tree)
    found = {
        "sources": {name: {"doctor": work.doctor(name), "as data": work.doctor(name, "--json")} for name in sources},
        "conversions": {conversion["name"]: work.convert(conversion) for conversion in asked["conversions"]},
    }
    answer.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
