"""Measure what `--anti_method`, `--act_method` and each kind of quantized linears do to a model.

Each case converts the model, loads the directory, scores it against the float model,
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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any

from conversions import convert_quietly
from rows import RESULTS, Row, append_rows, read_rows
from scoring import Reference, add_scoring_flags, load_float, read_windows
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from octavo import ConvertRequest, load_scheme
from octavo.common.architecture import Architecture
from octavo.common.convert.calibration.texts import read_calibration_file
from octavo.common.convert.flag_values import ACT_METHOD_NAMES
from octavo.common.convert.flags import recipe_fields
from octavo.common.convert.output.bundle import code_digest, commit
from octavo.common.convert.presets import RECIPES
from octavo.common.convert.request import ANTI_METHODS
from octavo.common.runtime.schemes.linear_scheme import (
    W4A16,
    W4A16_DOUBLE,
    W8A8,
    W8A8_DYNAMIC,
    W8A16,
    WEIGHT_METHODS,
    WEIGHT_ONLY,
    LinearScheme,
)

FILE = "weights.csv"
COLUMNS = ("commit", "code", "model", "case", "kind", "anti_method", "act_method", "w_method", "cache", "linears",
           "megabytes", "seconds", "calibration", "text", "windows", "length", "kl", "perplexity", "float_perplexity",
           "top1", "bits")  # fmt: skip
CONDITIONS = ("calibration", "text", "windows", "length")
"""What rows that stand side by side have in common, but for the model."""
RECIPE = "preset "
"""How the names of cases begin that are a recipe, after the flag that names it."""


@dataclass(frozen=True)
class Setting:
    """A case: its name, and the fields of the request that make it."""

    name: str
    asked: Mapping[str, Any]


def _anti(method: str) -> str:
    return f"anti {method or 'none'}"


def _static() -> Iterator[Setting]:
    """W8A8: every outlier treatment by minima and maxima, and every rule of ranges for a good one.

    Ascend's recipe with C8, also untreated by every rule; and everything but lm_head, without C8.
    """
    for name, common, treated in (
        ("W8A8 + C8", {"scheme": "ascend-c8"}, ("", "m2")),
        ("W8A8 all but lm_head", {"float_linears": ("lm_head",)}, ("m6",)),
    ):
        for method in ANTI_METHODS:
            for act, rule in ACT_METHOD_NAMES.items() if method in treated else (("1", "minmax"),):
                asked = {**common, "anti_method": method, "linear": LinearScheme(act_method=rule)}
                yield Setting(f"{name}, {_anti(method)}, act {act}", asked)


def _weight_only() -> Iterator[Setting]:
    """W8A16 and W4A16: inputs in float, and in groups of 32 in int8 as the CPU multiplies them."""
    for setting in _float_inputs():
        yield Setting(setting.name, {**setting.asked, "cpu_activations": "float"})
    for linear, method in (
        (LinearScheme(W8A16, group_size=32), ""),
        (LinearScheme(W8A16, group_size=32, w_method="GPTQ"), "m3"),
        (LinearScheme(W4A16, group_size=32), ""),
        (_affine(32, "MinMax"), ""),
        (_affine(32, "GPTQ"), "m3"),
        (_double("MinMax"), ""),
        (_double("GPTQ"), ""),
        (_double("GPTQ"), "m3"),
    ):
        is_affine = not linear.symmetric and linear.label != W4A16_DOUBLE
        name = f"{linear.label} g32{' affine' * is_affine}, {_anti(method)}, {linear.w_method}"
        yield Setting(f"{name}, inputs in float", {"linear": linear, "anti_method": method, "cpu_activations": "float"})
        yield Setting(f"{name}, inputs in int8", {"linear": linear, "anti_method": method})
    eight = {"linear": LinearScheme(W8A16, group_size=32), "embeddings": "int8"}
    yield Setting("W8A16 g32, anti none, MinMax, inputs and embeddings in int8", eight)


def _float_inputs() -> Iterator[Setting]:
    yield Setting("W8A16, anti none", {"linear": "w8a16"})
    yield Setting("W8A16 g32, anti none, MSE", {"linear": LinearScheme(W8A16, group_size=32, w_method="MSE")})
    for group, methods in ((128, ("", "m3", "m6")), (64, ("",))):
        for method in methods:
            for rule in WEIGHT_METHODS:
                linear = LinearScheme(W4A16, group_size=group, w_method=rule)
                yield Setting(f"W4A16 g{group}, {_anti(method)}, {rule}", {"linear": linear, "anti_method": method})
        for method, rule in (("", "MinMax"), ("", "GPTQ"), ("m3", "GPTQ")):
            asked = {"linear": _affine(group, rule), "anti_method": method}
            yield Setting(f"W4A16 g{group} affine, {_anti(method)}, {rule}", asked)
    best = {"linear": _affine(128, "GPTQ"), "anti_method": "m3", "float_linears": ("*.down_proj", "*.v_proj")}
    yield Setting("W4A16 g128 affine, anti m3, GPTQ, down and v in float", best)


def _affine(group: int, rule: str) -> LinearScheme:
    return LinearScheme(W4A16, group_size=group, symmetric=False, w_method=rule)


def _double(rule: str) -> LinearScheme:
    return LinearScheme(W4A16_DOUBLE, group_size=32, w_method=rule)


def grid() -> list[Setting]:
    """Every case, in the order of the tables."""
    every_linear = {"linear": "w8a8_dynamic", "float_head": False}
    found = list(_static())
    for method in ANTI_METHODS:
        found.append(Setting(f"W8A8_DYNAMIC all, {_anti(method)}", {**every_linear, "anti_method": method}))
    gptq = LinearScheme(W8A8_DYNAMIC, w_method="GPTQ")
    found.append(Setting("W8A8_DYNAMIC all, anti m3, GPTQ", {**every_linear, "anti_method": "m3", "linear": gptq}))
    found += _weight_only()
    for kind in ("wfp8afp8", "wfp8afp8_dynamic", "w8a8_mixed"):
        for method in ("", "m6"):
            asked = {"linear": kind, "anti_method": method}
            found.append(Setting(f"{kind.upper()}, {_anti(method)}", asked))
    return found + [Setting(f"{RECIPE}{name}", recipe_fields(name)) for name in RECIPES]


def described(setting: Setting) -> Row:
    """The columns that follow from what is asked for."""
    request = ConvertRequest("M", "D", **setting.asked)
    linear = request.linear
    groups = f", groups of {linear.group_size}" if linear.group_size else ""
    is_recipe = linear.label == W8A8 and not request.float_linears
    inputs = ", inputs in int8" if linear.label in WEIGHT_ONLY and request.cpu_activations == "int8" else ""
    embeddings = ", embeddings in int8" if request.embeddings == "int8" else ""
    last = ["lm_head"] if request.float_head is not False and not embeddings else []
    in_float = ", ".join(dict.fromkeys([*(request.float_linears or ()), *last])) or "none"
    acts = {rule: act for act, rule in ACT_METHOD_NAMES.items()}
    return {
        "case": setting.name,
        "kind": f"{linear.label}{groups}{'' if linear.symmetric else ', affine'}{inputs}{embeddings}",
        "anti_method": request.anti_method,
        "act_method": acts[linear.act_method] if linear.is_static else "",
        "w_method": linear.w_method,
        "cache": load_scheme(request.scheme).name,
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
            OctavoError: the conversion failed.
        """
        reference = self.reference
        with tempfile.TemporaryDirectory() as directory:
            target = Path(directory, "quantized")
            began = time.perf_counter()
            where = {"architecture": self.architecture, "calibration": self.texts}
            report = convert_quietly(ConvertRequest(self.source, target, **where, **setting.asked))
            seconds = time.perf_counter() - began
            nbytes = sum(file.stat().st_size for file in target.glob("*.safetensors"))
            model = self.architecture.model_class.from_pretrained(target).eval()
            bits = "" if report.bits_per_weight is None else f"{report.bits_per_weight:.3f}"
            facts = {"megabytes": f"{nbytes / 1e6:.1f}", "seconds": f"{seconds:.1f}", "bits": bits}
            scores = reference.score(setting.name, lambda ids: model(ids).logits)
            return self.common | described(setting) | facts | scores


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
