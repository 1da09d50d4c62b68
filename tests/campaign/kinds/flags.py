"""Command lines of the conversion script: random flags with good and bad values, and damage of the line itself."""

import functools
import sys
from pathlib import Path
from random import Random

import torch

from octavo.common.convert.output.writer import stage_path
from octavo.common.runtime.schemes.kv_scheme import PRESETS
from octavo.models.llama3 import ARCHITECTURE

from ...metrics import relative_rmse
from ...support import TEXTS
from ..bases import convert_quietly, logits_of
from ..trial import Accepted, Attempt, Room, Script, does_not_load

BAD = ("", " ", "-1", "0", "1.5", "nan", "inf", "1e999", "9" * 30, "None", "true", "é", "\u2028", "x" * 300, "{}", "[]",
       "../..", "\x1b[31m")  # fmt: skip
GOOD: dict[str, tuple[str, ...]] = {
    "--w_bit": ("4", "8", "16"),
    "--a_bit": ("8", "16"),
    "--quantization": ("float", "w8a8", "w8a8_dynamic", "w8a16", "w4a16", "fp8", "w8a8_mixed"),
    "--w_sym": ("True", "False"),
    "--group_size": ("0", "32", "64", "128"),
    "--w_method": ("MinMax", "MSE", "GPTQ"),
    "--anti_method": ("m1", "m2", "m3", "m4", "m5", "none", ""),
    "--use_kvcache_quant": ("True", "False"),
    "--use_fa_quant": ("True", "False"),
    "--scheme": PRESETS,
    "--kv_cache_dtype": ("auto", "fp8", "fp8_e4m3", "fp8_e5m2"),
    "--kv_scales": ("data", "random", "none", "source"),
    "--act_method": ("1", "2", "3", "percentile", "mse"),
    "--is_dynamic": ("True", "False"),
    "--disable_level": ("L0", "L1", "L2", "L9999"),
    "--fa_amp": ("0", "1", "99"),
    "--target": ("mindie", "vllm-ascend-0.23", "vllm-ascend"),
    "--max_kl": ("1e-9", "100"),
    "--disable_names": ("lm_head", "*.q_proj", "*", "nothing"),
    "--disable_last_linear": ("True", "False"),
    "--preset": ("four-bit", "w8a8-fp8", "w8a8-c8", "smallest", "ascend", "ascend-fa"),
    "--part_file_size": ("1", "100"),
    "--tokenizer_args": ("{}", '{"padding_side": "left"}', '{"model_max_length": 3}'),
    "--input_ids_name": ("input_ids", "ids"),
    "--attention_mask_name": ("attention_mask", "mask"),
    "--device_type": ("cpu", "cuda", "npu"),
    "--save_statistics": ("{scratch}/statistics", "{scratch}/no/statistics", "{target}/statistics"),
    "--calib_file": ("{scratch}/none", "/dev/null"),
    "--co_sparse": ("True", "False"),
    "--tp_size": ("1", "2"),
}
SWITCHES = ("--resume", "--requantize", "--trust_remote_code")
MOST_ERROR = 1.5
"""Relative rmse of logits from those of the float model above which an output is worth nothing. 2 bits of a random
model are 0.5 off."""


def _random_flags(rng: Random) -> list[str]:
    line: list[str] = []
    for flag in rng.sample(list(GOOD), rng.choices((0, 1, 2, 3, 4), (1, 4, 4, 2, 1))[0]):
        value = rng.choice(BAD) if rng.random() < 0.12 else rng.choice(GOOD[flag])
        line += [f"{flag}={value}"] if rng.random() < 0.1 else [flag, value]
    return line + rng.choices(([], [rng.choice(SWITCHES)]), (8, 1))[0]


def _damaged_line(rng: Random, line: list[str]) -> list[str]:
    """A command line with a word missing, twice, misspelled, or too many."""
    line, place = list(line), rng.randrange(len(line))
    way = rng.choice(("missing", "twice", "misspelled", "added", "unknown", "cut"))
    if way == "missing":
        del line[place]
    elif way == "twice":
        line.insert(place, line[place])
    elif way == "misspelled":
        line[place] = line[place][:-1]
    elif way == "cut":
        line = line[:place]
    else:
        line.insert(place, rng.choice(BAD) if way == "added" else rng.choice(("--unknown", "--w-bit", "-h", "--", "-")))
    return line


def _paths(rng: Random, room: Room) -> tuple[str, str]:
    """What is converted, and where to; now and then what cannot be."""
    source, target = str(room.bases / "sources" / "llama"), str(room.scratch / "out")
    if rng.random() < 0.12:
        source = rng.choice([*BAD, str(room.scratch), "org/model", "a/b/c", f"{source}/config.json"])
    elif rng.random() < 0.12:
        (room.scratch / "full").mkdir()
        (room.scratch / "full" / "file").touch()
        target = str(room.scratch / rng.choice(["full", "full/file", "full/file/out", "no/such/parent", "x" * 300]))
    return source, target


def _convert(line: list[str], target: Path, expected: Path) -> Script:
    try:
        code = convert_quietly(ARCHITECTURE, line)
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 1
    if code or not target.is_dir():
        return Script(code, sys.stderr.getvalue())
    try:
        found = logits_of(target, ARCHITECTURE)
    except Exception as error:
        return Script(0, "", does_not_load(error))
    plain = _float_logits(expected)
    error = relative_rmse(found, plain)
    good = bool(torch.isfinite(found).all()) and error < MOST_ERROR
    return Script(0, "", Accepted(good, f"logits are off from float by a relative rmse of {error:.3g}"))


@functools.cache
def _float_logits(source: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    from ..bases import compute

    return compute(AutoModelForCausalLM.from_pretrained(source, local_files_only=True))


def flags(rng: Random, room: Room) -> Attempt:
    """A command line: refused, or what it writes loads and is near the float model."""
    source, target = _paths(rng, room)
    texts = rng.choice(
        [["--calib_texts", *TEXTS[: rng.randint(1, 8)]], [], ["--calib_texts", rng.choice(["", "a", "é"])]]
    )
    line = ["--model_path", source, "--save_directory", target, *texts, *_random_flags(rng)]
    if rng.random() < 0.3:
        line = _damaged_line(rng, line)
    names = {"{scratch}": str(room.scratch), "{target}": target}
    for name, path in names.items():
        line = [word.replace(name, path) for word in line]
    output = Path(target)
    absent = () if "full" in target or not target.startswith(str(room.scratch)) else (output, stage_path(output))
    run = functools.partial(_convert, line, output, room.bases / "sources" / "llama")
    shown = " ".join(word if len(word) < 60 else f"{word[:50]}..." for word in line if word not in TEXTS)
    return Attempt(shown.replace(str(room.scratch), ".").replace(str(room.bases), "."), run, absent=absent)
