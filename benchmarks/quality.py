"""Measure how far each scheme is from the float model, and append the rows to `results/quality.csv`.

Every query reads the stored codes, and floats where the scheme keeps some. Biases of k and v are folded, as `prepare`
does, where the scheme allows and a row does not say otherwise. Static scales and codebooks come from one calibration of
the float model on `--calib_file`; quantized checkpoints are scored as they load.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rows import RESULTS, Row, append_rows, read_rows
from scoring import Reference, add_scoring_flags, load_float, read_windows
from transformers import AutoModelForCausalLM

from octavo.common.convert.calibration.texts import read_calibration_file, tokenize
from octavo.common.convert.calibration.whole import calibrate_whole
from octavo.common.convert.output.bundle import commit
from octavo.common.errors import OctavoError, did_you_mean
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.cache.sizes import kv_bits_per_element
from octavo.common.runtime.compatibility import cache_argument
from octavo.common.runtime.schemes.kv_scheme import PRESETS, Scheme, load_scheme
from octavo.common.runtime.static_scales import Statistics, load_statistics, scales_of
from octavo.common.stock_model import prepare
from octavo.ops.shared.registry import NAMESPACE

FILE = RESULTS / "quality.csv"
COLUMNS = ("commit", "model", "what", "bits", "windows", "length", "kl", "perplexity", "float_perplexity", "top1",
           "text")  # fmt: skip
PROSE = "wikipedia-eval"
"""The text of rows that name none."""
FLOAT_WEIGHTS = "float weights + "
UNFOLDED = ", biases in the cache"
UNFOLDED_SCHEMES = ("int8-token", "fp8-token", "int4-token", "octavo-4", "turboquant-4")


def changed_codec(part: str, **fields: Any) -> Callable[[Scheme], Scheme]:
    """A change of some fields of one codec of a scheme."""
    return lambda scheme: dataclasses.replace(scheme, **{part: dataclasses.replace(getattr(scheme, part), **fields)})


VARIANTS: dict[str, Callable[[Scheme], Scheme]] = {
    "no window": lambda scheme: dataclasses.replace(scheme, window=0),
    "no sinks": lambda scheme: dataclasses.replace(scheme, sinks=0),
    "V not rotated": lambda scheme: dataclasses.replace(scheme, rotate_value=False),
    "K not rotated": lambda scheme: dataclasses.replace(scheme, rotate_key=False),
    "K rotated too": lambda scheme: dataclasses.replace(scheme, rotate_key=True),
    "V in uniform levels": changed_codec("value", levels="uniform"),
    "V in uniform levels, affine": changed_codec("value", levels="uniform", symmetric=False),
    "K by range": changed_codec("key", rule="range"),
    "K by least error": changed_codec("key", rule="mse"),
    "K before RoPE": changed_codec("key", before_rope=True),
    "K in groups of 32": changed_codec("key", group_size=32),
    "K in groups of 128": changed_codec("key", group_size=128),
    "K per token, rotated": lambda scheme: dataclasses.replace(
        scheme, rotate_key=True, key=dataclasses.replace(scheme.key, granularity="token", group_size=0, rule="range")
    ),
    "in all layers": lambda scheme: dataclasses.replace(scheme, float_layers=()),
    "a window of 32": lambda scheme: dataclasses.replace(scheme, window=32),
    "V in 3 bits": changed_codec("value", dtype="int3"),
    "V in 2 bits": changed_codec("value", dtype="int2"),
    "affine": lambda scheme: dataclasses.replace(
        scheme,
        **{
            part: dataclasses.replace(getattr(scheme, part), levels="uniform", symmetric=False)
            for part in ("key", "value")
        },
    ),
    "K less its mean": lambda scheme: dataclasses.replace(scheme, smooth_key=True),
    "K alone": lambda scheme: dataclasses.replace(scheme, value=None, rotate_value=False),
    "V alone": lambda scheme: dataclasses.replace(scheme, key=None, rotate_key=False, smooth_key=False),
    "4 sinks and 8 newest": lambda scheme: dataclasses.replace(scheme, sinks=4, window=8),
}
"""What `--variants` changes in a scheme, one at a time, to tell what each option contributes."""


def scheme_of(what: str) -> Scheme:
    """The scheme of the name of a preset, of a file, or of `NAME, VARIANT`.

    Raises:
        OctavoError: there is no such preset or variant.
    """
    name, _, variant = what.partition(", ")
    if variant and variant not in VARIANTS:
        raise OctavoError(f"--scheme {what}: no variant {variant!r}{did_you_mean(variant, VARIANTS)}")
    return VARIANTS[variant](load_scheme(name)) if variant else load_scheme(name)


class Measured:
    """A float model, the text it is scored on, and its calibration."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self.version = commit()  # before the results make the tree dirty
        self.name, self.text = Path(flags.model_path).name, flags.eval_file.stem
        self.model, tokenizer = load_float(flags.model_path)
        self.texts = tokenize(tokenizer, read_calibration_file(flags.calib_file), 2048, "input_ids", "attention_mask")
        self.reference = Reference(self.model, read_windows(flags, tokenizer))
        self.statistics = (
            load_statistics(flags.statistics)
            if flags.statistics
            else self._calibrated([scheme_of(what) for what in (*flags.scheme, *flags.variants)])
        )

    def _calibrated(self, schemes: list[Scheme]) -> Statistics | None:
        """What the static ones among some schemes need, of the model as it is."""
        if not any(scheme.is_static for scheme in schemes):
            return None
        return calibrate_whole(self.model, self.texts, schemes)

    def row(self, what: str, logits_of: Callable[[torch.Tensor], torch.Tensor], bits: float) -> Row:
        """Score a model against the float one."""
        facts = {"commit": self.version, "model": self.name, "what": what, "bits": f"{bits:.3f}", "text": self.text}
        return facts | self.reference.score(what, logits_of)

    def scheme_row(self, what: str, scheme: Scheme) -> Row:
        """Score the stock model with a cache of a scheme."""
        scales = scales_of(scheme, self.statistics) if scheme.is_static else None

        def logits_of(ids: torch.Tensor) -> torch.Tensor:
            cache = QuantizedCache(self.model.config, scheme, scales=scales)
            return self.model(ids, **{cache_argument(self.model): cache}).logits

        return self.row(FLOAT_WEIGHTS + what, logits_of, kv_bits_per_element(self.model.config, scheme))


def has_row(flags: argparse.Namespace, what: str) -> bool:
    """Whether a scheme was measured on as many windows of the text."""
    asked = (Path(flags.model_path).name, what, str(flags.windows), flags.eval_file.stem)
    rows = read_rows(FILE)
    return any((row["model"], row["what"], row["windows"], row["text"] or PROSE) == asked for row in rows)


def measure(flags: argparse.Namespace) -> Iterator[Row]:
    """A row for each scheme and variant on the stock model, and for each quantized checkpoint."""
    if flags.missing:
        flags.scheme = [what for what in flags.scheme if not has_row(flags, FLOAT_WEIGHTS + what)]
    measured = Measured(flags)
    schemes = {what: scheme_of(what) for what in flags.scheme}
    measured.model.set_attn_implementation(NAMESPACE)
    for name, scheme in schemes.items():
        if not scheme.fold_bias:
            yield measured.scheme_row(name, scheme)
        elif name in UNFOLDED_SCHEMES and measured.model.model.layers[0].self_attn.k_proj.bias is not None:
            yield measured.scheme_row(name + UNFOLDED, scheme)
    prepare(measured.model)
    for name, scheme in schemes.items():
        if scheme.fold_bias:
            yield measured.scheme_row(name, scheme)
    for name in flags.variants:
        for change, variant in VARIANTS.items():
            try:
                scheme = variant(load_scheme(name))
            except OctavoError as error:
                print(f"skipped: {name}, {change}: {error}", file=sys.stderr)
                continue
            if scheme != load_scheme(name):
                yield measured.scheme_row(f"{name}, {change}", scheme)
    for directory in flags.checkpoint:
        quantized = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
        bits = kv_bits_per_element(quantized.config, quantized.scheme)
        yield measured.row(directory.name, lambda ids, model=quantized: model(ids).logits, bits)


def main() -> int:
    """Measure, print and append."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_scoring_flags(parser)
    parser.add_argument("--calib_file", required=True, type=Path, help="calibration texts")
    parser.add_argument("--statistics", type=Path, help="a calibration that was saved, instead of another one")
    parser.add_argument(
        "--scheme", nargs="*", default=PRESETS, help="presets, or 'NAME, VARIANT'; all presets if not given"
    )
    parser.add_argument("--missing", action="store_true", help="only schemes that have no row of so many windows")
    parser.add_argument("--variants", nargs="*", default=[], help="presets whose options are taken away one by one")
    parser.add_argument(
        "--checkpoint", nargs="*", type=Path, default=[], help="quantized directories, named for the table"
    )
    flags = parser.parse_args()
    append_rows(FILE, COLUMNS, measure(flags))
    return 0


if __name__ == "__main__":
    sys.exit(main())
