"""Which layers of a checkpoint break which schemes, and why; what to choose instead.

    python -m octavo.common.doctor --model_path MODEL [--statistics FILE] [--json]

Reads biases, norms and one projection of K at a time (`diagnosis.py` has the formulas), so that it judges a checkpoint
that is larger than memory.
"""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig

from ..command import OneLineParser, run_script
from ..convert.source.checkpoint import find_source
from ..convert.weights.embedding import through_codes
from ..errors import OctavoError, first_line
from ..progress import progress
from ..runtime.cache.sizes import kv_bytes_per_token
from ..runtime.checkpoint.ascend import DESCRIPTION_FILE
from ..runtime.checkpoint.files import read_json
from ..runtime.model_sizes import head_dim_of
from ..runtime.rotary import rope_type
from ..runtime.schemes.kv_scheme import PRESETS, load_scheme
from ..runtime.schemes.linear_scheme import SMALLEST_GROUP
from ..runtime.schemes.tensor_codec import Codec
from ..runtime.static_scales import Statistics, load_statistics
from .diagnosis import (
    ATTENTIONS,
    TINY,
    KeyWeights,
    LayerDiagnosis,
    diagnose_layers,
    is_broken,
    layer_types,
)
from .text import render

EMBEDDING_ROWS = 4096
"""Rows of the embedding by which the error of int8 is told."""
BYTES = {"F32": 4, "F16": 2, "BF16": 2}
SIZES = {"float16": "float", "int8": "int8-token", "int4": "int4-token"}
"""Presets by which the size of a cache is told."""


def kind_of(codec: Codec) -> str:
    """Which of `KINDS` a codec of K is."""
    if codec.granularity == "channel":
        return "channel"
    if codec.dtype.startswith("fp8"):
        return "fp8"
    if codec.granularity == "tensor":
        return "tensor"
    return "block" if codec.group_size else "token"


def read_config(directory: Path) -> Any:
    """The config of a float checkpoint.

    Raises:
        OctavoError: there is none, it is of a kind that transformers does not know, or the checkpoint is quantized.
    """
    if not (directory / "config.json").is_file():
        raise OctavoError(f"--model_path {directory}: holds no config.json, so it is no Hugging Face checkpoint")
    stated = read_json(directory / "config.json")
    if stated.get("quantization_config") is not None or (directory / DESCRIPTION_FILE).exists():
        raise OctavoError(f"--model_path {directory}: is quantized already; give the float checkpoint")
    if stated.get("model_type") not in CONFIG_MAPPING:
        raise OctavoError(
            f"{directory}/config.json: model_type is {stated.get('model_type')!r}, which transformers does not know; "
            "code that comes with a checkpoint is not run"
        )
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a damaged config can make transformers raise anything
        raise OctavoError(f"{directory}/config.json: cannot be read ({first_line(error)})") from None


def _passes_at(weight_bytes: int, layer_bytes: float, full: int, sliding: int, window: int) -> int | None:
    """Tokens at which a cache is as large as the weights; None if sliding layers keep it smaller for ever."""
    tokens = weight_bytes / (layer_bytes * (full + sliding))
    if sliding and tokens > window:
        if not full:
            return None
        tokens = (weight_bytes / layer_bytes - sliding * window) / full
    return math.ceil(tokens)


def _embedding_error(weights: KeyWeights) -> float | None:
    """How far an embedding in int8 is from the float one, relative; None if its rows make no groups."""
    rows = weights.embedding_rows(EMBEDDING_ROWS)
    if rows.shape[1] % SMALLEST_GROUP:
        return None
    return float((through_codes(rows) - rows).norm() / rows.norm().clamp_min(TINY))


def facts_of(weights: KeyWeights, config: Any, layers: list[LayerDiagnosis]) -> dict[str, Any]:
    """What else decides about schemes, as plain data."""
    kinds = layer_types(config)
    full, sliding = (kinds.count(kind) for kind in ATTENTIONS)
    total = sum(BYTES[header.dtype] * math.prod(header.shape) for header in weights.headers.values())
    each = {
        name: kv_bytes_per_token(config, load_scheme(preset), 2) / config.num_hidden_layers
        for name, preset in SIZES.items()
    }
    window = getattr(config, "sliding_window", None) or 0
    first = kinds.index("full_attention") if full else kinds.index("sliding_attention")
    rope = rope_type(config, first)
    return {
        "model_type": config.model_type,
        "dtype": weights.headers[weights.key_name(first)].dtype,
        "layers": config.num_hidden_layers,
        "layer_types": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        "sliding_window": window if sliding else None,
        "head_dim": head_dim_of(config),
        "query_heads_per_kv_head": config.num_attention_heads // config.num_key_value_heads,
        "kv_heads": config.num_key_value_heads,
        "rope_type": rope,
        "key_is_normalized": weights.key_is_normalized,
        "key_bias": max(layer.key_bias for layer in layers),
        "value_bias": max(layer.value_bias for layer in layers),
        "bias_can_be_folded": weights.folds_key_bias,
        "tied_embeddings": bool(getattr(config, "tie_word_embeddings", False)),
        "embedding_error": _embedding_error(weights),
        "weight_bytes": total,
        "cache_bytes_per_token": {name: round(size * (full + sliding)) for name, size in each.items()},
        "cache_passes_weights_at": {
            name: _passes_at(total, size, full, sliding, window) for name, size in each.items()
        },
    }


def judge_schemes(layers: list[LayerDiagnosis], can_fold: bool) -> dict[str, dict[str, Any]]:
    """For each preset: its kind of scale, the layers that break it with the bias in the key, and in Octavo.

    Octavo folds biases out of the cache where the scheme and the rotary embedding allow.
    """
    verdicts = {}
    for name in PRESETS:
        scheme = load_scheme(name)
        if scheme.key is None:
            continue
        kind, folds = kind_of(scheme.key), can_fold and scheme.fold_bias
        verdicts[name] = {
            "kind": kind,
            "folds_bias": folds,
            "broken_by": [part.layer for part in layers if is_broken(kind, part.lost)],
            "broken_in_octavo_by": [
                part.layer for part in layers if is_broken(kind, part.lost_folded if folds else part.lost)
            ],
            "bits_lost_in_octavo": max((part.lost_folded if folds else part.lost)[kind] for part in layers),
        }
    return verdicts


def recommend(facts: dict[str, Any], verdicts: dict[str, dict[str, Any]]) -> dict[str, dict[str, str | None]]:
    """A preset for 8 bits and one for about 4, each with its reason."""
    others = [kind for kind in facts["layer_types"] if kind not in ATTENTIONS]
    if others:
        refused = {"preset": None, "reason": f"the cache refuses layers of {', '.join(others)}"}
        return {"8 bits": refused, "4 bits": refused}
    token = verdicts["int8-token"]
    lost = f"no layer loses more than {token['bits_lost_in_octavo']:.1f} bits"
    per_channel = (
        "its scales of K are per channel, which neither biases nor outlier channels spoil, and it needs no calibration"
    )
    if token["broken_in_octavo_by"]:
        eight = ("octavo-8", per_channel)
    elif token["broken_by"]:
        eight = ("int8-token", f"Octavo keeps the bias of K out of the cache (fold_bias), and {lost} then; where K is "
                 "stored with its bias, take octavo-8 (for Ascend ascend-c8): its scales are per channel")  # fmt: skip
    else:
        eight = ("int8-token", f"{lost}, and it needs no calibration")
    small = ("octavo-4", per_channel)
    return {
        bits: dict(zip(("preset", "reason"), choice, strict=True))
        for bits, choice in (("8 bits", eight), ("4 bits", small))
    }


def diagnose(model_path: str, statistics: Statistics | None = None) -> dict[str, Any]:
    """Everything the doctor has to say of a checkpoint, as plain data.

    Args:
        model_path: directory or hub id of a float checkpoint.
        statistics: of a calibration of that model; its ranges of K replace those predicted from weights.

    Raises:
        OctavoError: it cannot be judged; the message says why.
    """
    directory = find_source(model_path)
    config = read_config(directory)
    weights = KeyWeights(directory, config)
    weights.check()
    if statistics is not None and statistics.layers != config.num_hidden_layers:
        raise OctavoError(
            f"--statistics: is of {statistics.layers} layers, and the model has {config.num_hidden_layers}"
        )
    count = sum(kind in ATTENTIONS for kind in layer_types(config))
    found = diagnose_layers(weights, config, statistics)
    layers = list(progress(found, "layer", count))
    facts = facts_of(weights, config, layers)
    verdicts = judge_schemes(layers, facts["bias_can_be_folded"])
    return {
        "model_path": model_path,
        "from_statistics": statistics is not None,
        "layers": [dataclasses.asdict(layer) for layer in layers],
        "schemes": verdicts,
        "facts": facts,
        "recommendation": recommend(facts, verdicts),
    }


def add_flags(parser: OneLineParser) -> None:
    """Let a parser take what the doctor is asked."""
    parser.add_place("MODEL", "directory of the float checkpoint (safetensors), or hub id")
    parser.add_argument("--statistics", type=Path, help="calibration statistics, as --save_statistics writes them")
    parser.add_argument("--json", action="store_true", help="print data instead of a table")


def report_of(flags: argparse.Namespace) -> dict[str, Any]:
    """What `diagnose` says of the checkpoint that the flags name."""
    return diagnose(flags.model_path, load_statistics(flags.statistics) if flags.statistics else None)


def run(flags: argparse.Namespace) -> None:
    """Print what the doctor has to say of a checkpoint.

    Raises:
        OctavoError: see `diagnose`.
    """
    report = report_of(flags)
    print(json.dumps(report, indent=2) if flags.json else render(report))


def _work(argv: list[str] | None) -> None:
    parser = OneLineParser(
        prog="python -m octavo.common.doctor",
        description="Say which layers of a checkpoint break which schemes, and recommend one.",
        allow_abbrev=False,
    )
    add_flags(parser)
    run(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    """Run the doctor; returns the exit code."""
    return run_script(_work, argv)
