"""Measure what a process needs: memory, through a long prompt, or the time from its start to the first token.

python benchmarks/memory.py --model_path DIR --text FILE --work DIR            appends rows to results/memory.csv
python benchmarks/memory.py --model_path DIR --text FILE --work DIR --start    appends rows to results/start.csv

Each case is a process of its own (`memory_case.py`), which loads the model as a user does and generates. Cases: the
float checkpoint in float32 and bfloat16; the same made ready in two lines, by scheme; directories converted as in the
README's quickstart and by each recipe, without the treatments that change values alone. `--work` keeps them.

Peak and end are of resident memory, in MB of 1e6 bytes; mapped weights count once they are read. The time to the first
token is that of imports, tokenizer, load and a pass over a short prompt, with all files in the page cache.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from conversions import convert_quietly
from rows import RESULTS, Row, append_rows
from transformers import AutoConfig, AutoTokenizer

from octavo import ConvertRequest
from octavo.common.architecture import architecture_names, load_architecture
from octavo.common.convert.flags import recipe_fields
from octavo.common.convert.output.bundle import commit, write_bundle
from octavo.common.convert.presets import RECIPES
from octavo.machine import device_name

CASE = Path(__file__).parent / "memory_case.py"
FLOAT, TWO_LINES, QUICKSTART = "float", "two lines, ", "quickstart"
TEXTS = ("The lighthouse keeper wrote down the weather every morning, and the sea wrote back at night.",)
"""Enough to calibrate on where values do not matter."""
QUICKSTART_FIELDS: dict[str, Any] = {"scheme": "ascend-c8", "linear": "w8a8_dynamic", "float_head": False}
CONVERTED = (QUICKSTART, *(name for name in RECIPES if not name.startswith("ascend")))
CASES = (FLOAT, f"{FLOAT}, bfloat16", f"{TWO_LINES}int8-token", f"{TWO_LINES}octavo-4", *CONVERTED)
CONDITIONS = ("commit", "torch", "transformers", "machine", "threads", "model", "case")
MEMORY_COLUMNS = (*CONDITIONS, "prompt", "new", "weights_mb", "cache_mb", "torch_mb", "loaded_mb", "peak_mb", "end_mb",
                  "end_anonymous_mb")  # fmt: skip
STEPS = ("python", "torch", "transformers", "tokenizer", "load", "first pass")
START_COLUMNS = (*CONDITIONS, *STEPS, "seconds")
TEXT_BYTES = 16
"""Of a text for each token of a prompt, more than any of these tokenizers needs."""


def _converted(case: str, source: Path, work: Path) -> Path:
    """The directory of a case, made if it is not there, with the code of this tree."""
    target = work / f"{source.name}-{case}"
    kind = AutoConfig.from_pretrained(source).model_type
    architectures = map(load_architecture, architecture_names())
    architecture = next(found for found in architectures if found.model_type == kind)
    if not (target / "config.json").exists():
        fields = QUICKSTART_FIELDS if case == QUICKSTART else {**recipe_fields(case), "anti_method": ""}
        if isinstance(fields["linear"], str):
            linear = fields["linear"]
        else:
            linear = dataclasses.replace(fields["linear"], w_method="MinMax")
        convert_quietly(ConvertRequest(source, target, **{**fields, "linear": linear}, calibration=TEXTS))
    write_bundle(architecture, target)
    return target


def _arguments(case: str, source: Path, work: Path) -> tuple[Path, list[str]]:
    """The directory that a case loads, and the flags of its process."""
    if case in CONVERTED:
        return _converted(case, source, work), ["--converted"]
    name, _, detail = case.partition(", ")
    if name == FLOAT:
        return source, ["--dtype", detail or "float32"]
    return source, ["--scheme", detail]


def _run(directory: Path, arguments: list[str]) -> dict[str, Any]:
    """What the process of a case found.

    Raises:
        SystemExit: it failed; with what it said.
    """
    command = [sys.executable, str(CASE), "--model_path", str(directory), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CASE.parents[1])
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _weights_mb(directory: Path) -> float:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors")) / 1e6


def _memory(directory: Path, arguments: list[str], ids: list[int], new: int) -> Row:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(ids, file)
        file.flush()
        found = _run(directory, [*arguments, "--ids", file.name, "--new", str(new)])
    numbers = {
        "weights_mb": _weights_mb(directory),
        "cache_mb": found["cache"],
        "torch_mb": found["of_torch"],
        "loaded_mb": found["loaded"]["peak"],
        "peak_mb": found["end"]["peak"],
        "end_mb": found["end"]["now"],
        "end_anonymous_mb": found["end"]["anonymous"],
    }
    return {"prompt": str(len(ids)), "new": str(new), **{name: f"{value:.1f}" for name, value in numbers.items()}}


def _start(directory: Path, arguments: list[str], repeats: int) -> Row:
    """The quickest of some starts."""
    found = min((_run(directory, arguments)["seconds"] for _ in range(repeats)), key=lambda steps: sum(steps.values()))
    return {**{step: f"{found[step]:.2f}" for step in STEPS}, "seconds": f"{sum(found.values()):.2f}"}


def measure(flags: argparse.Namespace) -> Iterator[Row]:
    """A row for each case."""
    tree, source = commit(), flags.model_path  # before the results make it dirty
    text = flags.text.read_text(encoding="utf-8")[: TEXT_BYTES * flags.prompt]
    ids = AutoTokenizer.from_pretrained(source)(text)["input_ids"][: flags.prompt]
    machine = device_name(torch.device("cpu"))
    for case in flags.cases:
        values = (tree, torch.__version__, transformers.__version__, machine, str(flags.threads), source.name, case)
        directory, arguments = _arguments(case, source, flags.work)
        arguments += ["--threads", str(flags.threads)]
        if flags.start:
            row = _start(directory, arguments, flags.repeats)
        else:
            row = _memory(directory, arguments, ids, flags.new)
        print(f"{source.name}, {case}: " + ", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        yield dict(zip(CONDITIONS, values, strict=True)) | row


def main() -> int:
    """Measure, print and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", required=True, type=Path, help="float checkpoint")
    parser.add_argument("--text", required=True, type=Path, help="what the long prompt is taken from")
    parser.add_argument("--work", required=True, type=Path, help="directory for those that are converted")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--start", action="store_true", help="time starts, and no memory")
    parser.add_argument("--repeats", type=int, default=3, help="starts of each case, of which the quickest counts")
    parser.add_argument("--prompt", type=int, default=6000, help="tokens of the long prompt")
    parser.add_argument("--new", type=int, default=200, help="tokens generated behind it")
    parser.add_argument("--threads", type=int, default=2)
    flags = parser.parse_args()
    file, columns = ("start.csv", START_COLUMNS) if flags.start else ("memory.csv", MEMORY_COLUMNS)
    append_rows(RESULTS / file, columns, measure(flags))
    return 0


if __name__ == "__main__":
    sys.exit(main())
