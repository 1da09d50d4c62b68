"""Measure what `--anti_method`, `--act_method` and each kind of quantized linears do to a model.

Each case converts the model with the conversion's own script, loads the directory, scores it against the float model,
appends a row to `results/weights.csv`, and deletes the directory. Where a case does not say otherwise K and V are in
float, so that its figures are those of the linears. A case that the results hold already is skipped: of the same code,
model, texts and windows; `--again` measures it again.

python benchmarks/weights.py --model_path M --calib_file TEXTS --eval_file TEXT --windows 2
python benchmarks/weights.py ... --only 'W4A16*'
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path

from conversions import convert_quietly
from rows import RESULTS, Row, append_rows, read_rows
from scoring import Reference, add_scoring_flags, load_float, read_windows
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from octavo.common.architecture import Architecture
from octavo.common.convert.calibration.texts import read_calibration_file
from octavo.common.convert.flags import ACT_METHOD_NAMES, ANTI_METHODS, END_TO_END, parse_flags
from octavo.common.convert.job import chosen_scheme
from octavo.common.convert.output.bundle import code_digest, commit
from octavo.common.runtime.schemes.linear_scheme import W8A8, WEIGHT_METHODS

FILE = "weights.csv"
COLUMNS = ("commit", "code", "model", "case", "kind", "anti_method", "act_method", "w_method", "cache", "linears",
           "megabytes", "seconds", "calibration", "text", "windows", "length", "kl", "perplexity", "float_perplexity",
           "top1")  # fmt: skip
CONDITIONS = ("calibration", "text", "windows", "length")
"""What rows that stand side by side have in common, but for the model."""
PRESET = "preset "
"""How the names of cases begin whose flags are a preset's."""
ONLY_LM_HEAD = ("--disable_names", "lm_head")


@dataclass(frozen=True)
class Setting:
    """A case: its name, and the flags of the conversion that make it."""

    name: str
    flags: tuple[str, ...]


def _anti(method: str) -> tuple[str, tuple[str, ...]]:
    return (f"anti {method}", ("--anti_method", method)) if method else ("anti none", ())


def _static() -> Iterator[Setting]:
    """W8A8: every outlier treatment by minima and maxima, and every rule of ranges for a good one.

    Ascend's recipe with C8, also untreated by every rule; and everything but lm_head, without C8.
    """
    for name, common, treated in (
        ("W8A8 + C8", ("--use_kvcache_quant", "True"), ("", "m2")),
        ("W8A8 all but lm_head", ONLY_LM_HEAD, ("m6",)),
    ):
        for method in ANTI_METHODS:
            anti, flags = _anti(method)
            for act in ACT_METHOD_NAMES if method in treated else ("1",):
                yield Setting(f"{name}, {anti}, act {act}", (*common, *flags, "--act_method", act))


def _weight_only() -> Iterator[Setting]:
    yield Setting("W8A16, anti none", ("--a_bit", "16"))
    yield Setting("W8A16 g32, anti none, MSE", ("--a_bit", "16", "--group_size", "32", "--w_method", "MSE"))
    for group, methods in ((128, ("", "m3", "m6")), (64, ("",))):
        common = ("--w_bit", "4", "--a_bit", "16", "--group_size", str(group))
        for method in methods:
            anti, flags = _anti(method)
            for rule in WEIGHT_METHODS:
                yield Setting(f"W4A16 g{group}, {anti}, {rule}", (*common, *flags, "--w_method", rule))
        for method, rule in (("", "MinMax"), ("", "GPTQ"), ("m3", "GPTQ")):
            anti, flags = _anti(method)
            affine = (*common, *flags, "--w_method", rule, "--w_sym", "False")
            yield Setting(f"W4A16 g{group} affine, {anti}, {rule}", affine)
    best = ("--w_bit", "4", "--a_bit", "16", "--group_size", "128", "--w_sym", "False", "--anti_method", "m3")
    left = ("--w_method", "GPTQ", "--disable_names", "*.down_proj", "*.v_proj")
    yield Setting("W4A16 g128 affine, anti m3, GPTQ, down and v in float", (*best, *left))


def grid() -> list[Setting]:
    """Every case, in the order of the tables."""
    every_linear = ("--is_dynamic", "True", "--disable_last_linear", "False")
    found = list(_static())
    for method in ANTI_METHODS:
        anti, flags = _anti(method)
        found.append(Setting(f"W8A8_DYNAMIC all, {anti}", (*every_linear, *flags)))
    gptq = (*every_linear, "--anti_method", "m3", "--w_method", "GPTQ")
    found.append(Setting("W8A8_DYNAMIC all, anti m3, GPTQ", gptq))
    found += _weight_only()
    for kind in ("wfp8afp8", "wfp8afp8_dynamic", "w8a8_mixed"):
        for method in ("", "m6"):
            anti, flags = _anti(method)
            found.append(Setting(f"{kind.upper()}, {anti}", ("--quantization", kind, *flags)))
    return found + [Setting(f"{PRESET}{name}", ("--preset", name)) for name in END_TO_END]


def described(architecture: Architecture, setting: Setting) -> Row:
    """The columns that follow from the flags of a case."""
    flags = parse_flags(architecture.name, ["--model_path", "M", "--save_directory", "D", *setting.flags])
    linear = flags.linear
    groups = f", groups of {linear.group_size}" if linear.group_size else ""
    is_recipe = linear.label == W8A8 and not flags.disable_names
    last = ["lm_head"] if flags.disable_last_linear else []
    in_float = ", ".join(dict.fromkeys([*(flags.disable_names or ()), *last])) or "none"
    return {
        "case": setting.name,
        "kind": f"{linear.label}{groups}{'' if linear.symmetric else ', affine'}",
        "anti_method": flags.anti_method,
        "act_method": flags.act_method if linear.is_static else "",
        "w_method": linear.w_method,
        "cache": chosen_scheme(flags).name,
        "linears": "recipe" if is_recipe else in_float,
    }


class Bench:
    """The float model's logits, and what all rows of a run have in common."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self.architecture: Architecture = import_module(f"octavo.models.{flags.arch}").ARCHITECTURE
        self.source, self.texts = Path(flags.model_path), flags.calib_file
        count = len(read_calibration_file(self.texts))
        self.common = {
            "commit": commit(),  # before the results make the tree dirty
            "code": code_digest()[:12],
            "model": self.source.name,
            "calibration": f"{count} texts of {self.texts.name}",
            "text": flags.eval_file.name,
            "windows": str(flags.windows),
            "length": str(flags.length),
        }
        self._flags = flags
        self._reference: Reference | None = None

    @property
    def reference(self) -> Reference:
        """The float logits; computed when they are first asked for."""
        if self._reference is None:
            model, tokenizer = load_float(self._flags.model_path)
            self._reference = Reference(model, read_windows(self._flags, tokenizer))
        return self._reference

    def has(self, setting: Setting, rows: list[Row]) -> bool:
        """Whether a row of this case, code, model, texts and windows is there; the commit may be another."""
        wanted = {name: value for name, value in self.common.items() if name != "commit"} | {"case": setting.name}
        return any(all(row[name] == value for name, value in wanted.items()) for row in rows)

    def row(self, setting: Setting) -> Row:
        """Convert, load and score.

        Raises:
            RuntimeError: the conversion failed; its error line.
        """
        reference = self.reference
        with tempfile.TemporaryDirectory() as directory:
            target = Path(directory, "quantized")
            began = time.perf_counter()
            flags = (*setting.flags, "--calib_file", str(self.texts))
            convert_quietly(self.architecture, self.source, target, flags)
            seconds = time.perf_counter() - began
            nbytes = sum(file.stat().st_size for file in target.glob("*.safetensors"))
            model = self.architecture.model_class.from_pretrained(target).eval()
            facts = {"megabytes": f"{nbytes / 1e6:.1f}", "seconds": f"{seconds:.1f}"}
            scores = reference.score(setting.name, lambda ids: model(ids).logits)
            return self.common | described(self.architecture, setting) | facts | scores


def measure(bench: Bench, settings: list[Setting], failed: list[str]) -> Iterator[Row]:
    """A row for each case that can be converted; of the others a line in `failed`."""
    bar = tqdm(settings, unit="case")
    for setting in bar:
        bar.set_postfix_str(setting.name)
        try:
            row = bench.row(setting)
        except Exception as error:
            failed.append(f"{setting.name}: {type(error).__name__}: {error}")
            continue
        tqdm.write(f"{setting.name}: KL {row['kl']}, perplexity {row['perplexity']}, {row['seconds']} s")
        yield row


def main(argv: list[str] | None = None) -> int:
    """Measure and append; exit code 1 if a case could not be converted, 2 if none is chosen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_scoring_flags(parser)
    parser.add_argument("--calib_file", required=True, type=Path, help="calibration texts")
    parser.add_argument("--arch", default="llama3", help="folder under models/ that converts the model")
    parser.add_argument("--only", default="*", metavar="GLOB", help="cases by name")
    parser.add_argument("--again", action="store_true", help="also cases that the results hold already")
    parser.add_argument("--results", type=Path, default=RESULTS / FILE, help="file to append to")
    parser.add_argument("--list", action="store_true", help="print the cases that would be measured")
    flags = parser.parse_args(argv)
    chosen = [setting for setting in grid() if fnmatchcase(setting.name, flags.only)]
    if not chosen:
        parser.error(f"--only {flags.only}: no case is named so; --list prints them")
    bench = Bench(flags)
    rows = [] if flags.again else read_rows(flags.results)
    left = [setting for setting in chosen if not bench.has(setting, rows)]
    if flags.list:
        print("\n".join(setting.name for setting in left))
        return 0
    disable_progress_bar()
    failed: list[str] = []
    append_rows(flags.results, COLUMNS, measure(bench, left, failed))
    for line in failed:
        print(f"not measured: {line}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
