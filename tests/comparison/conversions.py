"""What is converted: every kind of linear, every scheme, and each flag that changes what is written."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .sources import SOURCES

FLOAT_LINEARS = ("--w_bit", "16", "--a_bit", "16")
C8, FA = ("--use_kvcache_quant", "True"), ("--use_fa_quant", "True")
W8A16, W4A16 = ("--w_bit", "8", "--a_bit", "16"), ("--w_bit", "4", "--a_bit", "16")
WITH_HEAD = ("--disable_last_linear", "False")
QUANTIZATIONS = ("w8a8", "w8a8_dynamic", "w8a16", "w4a16", "wfp8afp8", "wfp8afp8_dynamic", "w8a8_mixed", "fp8")
ANTI_METHODS = ("m1", "m2", "m3", "m4", "m6")
RECIPES = ("memory-first", "speed-first", "balanced", "ascend", "ascend-fa")
KEY_BIAS_SCHEMES = ("int8-token", "octavo-8", "octavo-4", "kvquant-2", "kivi-2", "vllm-fp8-head")
ARCHITECTURES = ("mistral", "mistral bf16", "qwen2", "qwen2 bf16 tied", "qwen3", "qwen3 bf16")


FOLDER = "FOLDER"
"""In flags, and in what was said: the folder of the whole work."""
INPUTS = {
    "texts.txt": "A text of the file.\nAnother one, a little longer than the first.\nThe third is held back.\n",
    "texts.jsonl": "".join(f'{{"inputs_pretokenized": "Text {index} of the file, as JSON."}}\n' for index in range(4)),
    "scheme.json": json.dumps(
        {
            "name": "mine",
            "key": {"dtype": "int8", "granularity": "channel"},
            "value": {"dtype": "int4", "granularity": "token", "dynamic": True, "symmetric": False},
            "layers": {"0": "ascend-c8", "1": {"window": 16, "rotate_value": True}},
        }
    ),
}
"""Files in the folder that flags name."""


@dataclass(frozen=True)
class Conversion:
    """A run of a conversion script.

    Attributes:
        name: of it in a record.
        source: one of `SOURCES`.
        flags: of the script, beside source, target and texts.
        scheme: the preset that the two lines on the stock source are recorded with, too; it takes its statistics.
        has_texts: whether the texts of all tests are given to it.
    """

    name: str
    source: str
    flags: tuple[str, ...]
    scheme: str | None = None
    has_texts: bool = True

    def to_dict(self) -> dict[str, Any]:
        """For the processes that do the work."""
        return {**asdict(self), "folder": SOURCES[self.source].folder}


def _of_flags() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Source and flags by name, for what is no family."""
    llama, half, odd = "llama", "llama bf16 tied biased", "llama fp16 odd"
    return {
        "c8, head in int8": (half, (*C8, *WITH_HEAD)),
        "fa, head in int8": (half, (*FA, *WITH_HEAD)),
        "dynamic, head in int8": (half, (*C8, "--is_dynamic", "True", *WITH_HEAD)),
        "w4a16, head in int4, per channel": (half, (*W4A16, *WITH_HEAD, "--group_size", "0")),
        "w8a16 in groups of 32": (half, (*W8A16, "--group_size", "32")),
        "w8a16 with zeros": (llama, (*W8A16, "--w_sym", "False")),
        "w4a16 in groups of 128": (odd, (*W4A16, "--group_size", "128")),
        "w4a16 in groups of 256 with zeros": (llama, (*W4A16, "--group_size", "256", "--w_sym", "False")),
        "w4a16 by GPTQ": (llama, (*W4A16, "--w_method", "GPTQ", *C8)),
        "w4a16 by GPTQ and AWQ": (half, (*W4A16, "--w_method", "GPTQ", "--anti_method", "m3")),
        "w8a8 by GPTQ": (llama, ("--w_method", "GPTQ", *C8)),
        "w4a16 by MSE": (llama, (*W4A16, "--w_method", "MSE")),
        **{f"act_method {how}": (llama, ("--act_method", how)) for how in ("2", "3", "percentile", "mse")},
        "two layers' worth of outliers in float": (llama, ("--disable_level", "L2", *C8)),
        "the two costliest in float": (llama, ("--fa_amp", "2", *FA)),
        "named linears in float": (llama, ("--disable_names", "*.q_proj", "*.layers.1.*", *C8)),
        "max_kl that holds": (llama, ("--max_kl", "100", *C8)),
        "max_kl that does not": (llama, ("--max_kl", "1e-9", *C8)),
        "several files": (half, ("--part_file_size", "1", *C8)),
        "fp8 scales from random tokens": (llama, ("--kv_cache_dtype", "fp8", "--kv_scales", "random", *FLOAT_LINEARS)),
        "fp8 scales of one": (llama, ("--kv_cache_dtype", "fp8", "--kv_scales", "none", *FLOAT_LINEARS)),
        "c8 of fp16": (odd, C8),
        "a scheme of one's own": (llama, ("--scheme", f"{FOLDER}/scheme.json", *FLOAT_LINEARS)),
        "nothing to resume": (llama, ("--resume", *C8)),
        "help": (llama, ("--help",)),
        "refused: no such scheme": (llama, ("--scheme", "int7")),
        "refused: two schemes": (llama, (*C8, *FA)),
        "refused: nothing to quantize": (llama, FLOAT_LINEARS),
        "refused: a flag of sparse weights": (llama, ("--co_sparse", "True")),
        "refused: groups of int8": (llama, ("--group_size", "64")),
        "refused: names that match nothing": (llama, ("--disable_names", "*.nowhere")),
    }


def all_conversions(presets: list[str]) -> list[Conversion]:
    """Everything to convert, of a tree that has these presets; names say what is in them."""
    found = [Conversion(name, source, flags) for name, (source, flags) in _of_flags().items()]
    found += [
        Conversion("texts that come with Octavo", "llama", ("--is_dynamic", "True", *C8), has_texts=False),
        Conversion("texts of a file", "llama", ("--calib_file", f"{FOLDER}/texts.txt", *C8), has_texts=False),
        Conversion("texts in JSON", "llama", ("--calib_file", f"{FOLDER}/texts.jsonl", *C8), has_texts=False),
    ]
    found += [
        Conversion(f"{kind} of {source}", source, ("--quantization", kind))
        for source in ("llama", "llama bf16 tied biased")
        for kind in QUANTIZATIONS
    ]
    found += [Conversion(f"anti_method {how}", "llama", ("--anti_method", how, *C8)) for how in ANTI_METHODS]
    found += [Conversion(f"anti_method {how}, qwen2", "qwen2", ("--anti_method", how)) for how in ("m2", "m4", "m6")]
    found += [Conversion(f"recipe {name}", "llama", ("--preset", name)) for name in RECIPES]
    found += [Conversion(f"recipe {name}, qwen2", "qwen2 bf16 tied", ("--preset", name)) for name in RECIPES[:2]]
    for source in ARCHITECTURES:
        found += [Conversion(f"c8 of {source}", source, C8), Conversion(f"fa of {source}", source, FA)]
    found += [_of_scheme(name, "llama") for name in presets]
    found += [_of_scheme(name, source) for source in ("qwen2",) for name in KEY_BIAS_SCHEMES if name in presets]
    return found


def _of_scheme(preset: str, source: str) -> Conversion:
    """A preset with float linears; the float one with quantized linears, or nothing would be quantized."""
    linears = () if preset == "float" else FLOAT_LINEARS
    return Conversion(f"scheme {preset} of {source}", source, ("--scheme", preset, *linears), preset)


def presets_of(tree: Path) -> list[str]:
    """Names of the presets that a tree has, wherever in `common` it keeps them."""
    return sorted(file.stem for file in tree.glob("common/**/presets/*.json"))
