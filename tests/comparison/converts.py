"""A process that converts by the scripts of a tree: `python -m tests.comparison.converts IN OUT`."""

import contextlib
import importlib
import io
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, logging

from ..support import convert_flags
from .logits import logits_or_error
from .sources import SOURCES

_SIZE = re.compile(r"^(checkpoint, MB +\S+) +\S+$", re.MULTILINE)
"""The size of an output counts the code in it, which may differ."""


def _check_imports(tree: Path) -> None:
    """Raise an `AssertionError` unless Octavo comes from the tree."""
    for path in importlib.import_module("octavo.common").__path__:
        assert Path(path).resolve().is_relative_to(tree.resolve()), f"octavo.common is {path}, not of {tree}"


def _two_lines() -> tuple[Any, Any]:
    """`QuantizedCache` and `prepare`, from where the tree has them."""
    try:
        from octavo import QuantizedCache, prepare
    except ImportError:
        from octavo.common.cache import QuantizedCache
        from octavo.common.folds import prepare
    return QuantizedCache, prepare


def _stock(source: Path, scheme: str, statistics: Path) -> dict[str, str]:
    """Digests of logits of a stock model with a quantized cache."""
    cache_class, prepare = _two_lines()

    def make() -> tuple[Any, Any]:
        model = prepare(AutoModelForCausalLM.from_pretrained(source).eval())
        return model, cache_class(model.config, scheme=scheme, statistics=statistics)

    return logits_or_error(make)


def _run(script: Path, arguments: list[str]) -> tuple[int, str]:
    """Exit code and words of a script."""
    said = io.StringIO()
    sys.argv = [script.name, *arguments]
    torch.manual_seed(0)  # so that a conversion is the same whatever ran before it
    parts = runpy.run_path(str(script), run_name="a script")
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = parts["main"](parts["ARCHITECTURE"], arguments)
        except SystemExit as stop:
            code = stop.code
    return code, said.getvalue()


def _convert(conversion: dict[str, Any], tree: Path, folder: Path) -> dict[str, Any]:
    source, target = folder / "sources" / conversion["source"], folder / "outputs" / conversion["name"]
    statistics = folder / "outputs" / f"{conversion['name']}.statistics.safetensors"
    flags = convert_flags(source, target, *conversion["flags"])
    if conversion["scheme"]:
        flags += ["--save_statistics", str(statistics)]
    code, said = _run(tree / "models" / conversion["folder"] / "convert_quant_weights.py", flags)
    said = _SIZE.sub(r"\1 (not compared)", said.replace(str(folder), "FOLDER"))
    stock = _stock(source, conversion["scheme"], statistics) if conversion["scheme"] and code == 0 else {}
    return {"code": code, "said": said.splitlines(), "logits of the stock model": stock}


def main(task: Path, answer: Path) -> None:
    """Make the sources of the task, do its conversions, and write what each said and its stock model computes."""
    work = json.loads(task.read_text(encoding="utf-8"))
    tree, folder = Path(work["tree"]), Path(work["folder"])
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    for name in {conversion["source"]: None for conversion in work["conversions"]}:
        SOURCES[name].save(folder / "sources" / name)
    (folder / "outputs").mkdir()
    _check_imports(tree)
    found = {conversion["name"]: _convert(conversion, tree, folder) for conversion in work["conversions"]}
    answer.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
