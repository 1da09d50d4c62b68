"""`octavo info MODEL`: what a directory or hub id holds, and what can be done with it."""

import argparse
import json
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import SAFE_WEIGHTS_NAME

from ..common.command import OneLineParser, aligned
from ..common.convert.dialects.directory import OctavoDirectory
from ..common.convert.dialects.form import Form
from ..common.convert.dialects.rewriting import fitting_caches, refusals
from ..common.convert.output.shards import SAFETENSORS_DTYPES
from ..common.convert.source.checkpoint import listed_files
from ..common.convert.source.config import chosen_architecture, load_source_config
from ..common.convert.source.quantized.files import READERS
from ..common.errors import OctavoError
from ..common.runtime.cache.sizes import kv_bytes_per_token
from ..common.runtime.checkpoint.loading import CONFIG_KEY
from ..common.runtime.model_sizes import attention_sizes
from ..common.runtime.schemes.kv_scheme import Scheme, load_scheme
from ..place import Place, find_place, rewrite_command
from ..wording import codec_words


def add_flags(parser: OneLineParser) -> None:
    """Let a parser take a model, converted or not."""
    parser.add_place("MODEL", "converted directory, or one of any model, or hub id")
    parser.add_argument("--json", action="store_true", help="print data instead of lines")


def _shape(config: Any) -> str:
    """Layers and heads in words."""
    heads, kv_heads, width = attention_sizes(config)
    return f"{config.num_hidden_layers} layers, {heads} query heads on {kv_heads} KV heads of {width} channels"


def _kind(form: Form, name: str) -> str:
    """How a linear is quantized, in words."""
    linear = form.linears[name]
    group = f" in groups of {linear.group_size}" if linear.group_size else ""
    return f"{linear.label}{group}{'' if linear.symmetric else ', affine'}"


def _linears(form: Form) -> dict[str, int]:
    """How many linears there are of each kind, those in float last."""
    found = Counter(_kind(form, name) for name in form.linears)
    return dict(found.most_common()) | ({"float": len(form.float_linears)} if form.float_linears else {})


def _side(config: Any, scheme: Scheme, side: str) -> str:
    """The codecs of K or V in words: that of most layers, and in which layers others."""
    layers: dict[str, list[int]] = {}
    for index in range(config.num_hidden_layers):
        layers.setdefault(codec_words(getattr(scheme.of_layer(index), side)), []).append(index)
    usual, *others = sorted(layers, key=lambda words: -len(layers[words]))
    return "; ".join((usual, *(f"in layers {', '.join(map(str, layers[words]))} {words}" for words in others)))


def _cache(config: Any, scheme: Scheme, itemsize: int) -> dict[str, Any]:
    """What a scheme stores of K and V, and its bytes."""
    return {
        "scheme": scheme.name,
        "key": _side(config, scheme, "key"),
        "value": _side(config, scheme, "value"),
        "kv_bytes_per_token": kv_bytes_per_token(config, scheme, itemsize),
        "float_kv_bytes_per_token": kv_bytes_per_token(config, load_scheme("float"), itemsize),
    }


def _bytes_on_disk(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def _missing(directory: Path) -> list[str]:
    """Names of the weight files of a checkpoint that are not on the disk, as of a hub id that nobody has loaded yet."""
    try:
        return [file.name for file in listed_files(directory) if not file.is_file()]
    except OctavoError:  # no index says which there are, so it is one
        return [SAFE_WEIGHTS_NAME]


def _fetched(model_path: str) -> str:
    """How missing files of a model are had."""
    if Path(model_path).is_dir():
        return "copy the checkpoint again, or save the model as safetensors"
    return f"hf download {shlex.quote(model_path)} fetches what is not in transformers' cache"


def _converted(place: Place) -> dict[str, Any]:
    """Of a directory that Octavo's own classes load."""
    directory = OctavoDirectory(place.directory)
    form = directory.form
    recipe = place.settings.get(CONFIG_KEY)
    if recipe is None:
        writer = "an Ascend tool, as its description says"
    else:
        writer = f"Octavo {recipe.get('version', 'of a version that gave no number')}"
    refused = refusals(form)
    bits, bits_of_ends = directory.bits_per_weight()
    return {
        "is": "converted",
        "written_by": writer,
        "architecture": form.architecture.name,
        "model_type": form.architecture.model_type,
        "shape": _shape(form.config),
        "float_dtype": str(SAFETENSORS_DTYPES[form.dtype]).removeprefix("torch."),
        "linears": _linears(form),
        "bits_per_weight": bits,
        "bits_per_weight_of_ends": bits_of_ends,
        "embedding": "int8" if form.has_coded_embedding else "float",
        **_cache(form.config, form.scheme, SAFETENSORS_DTYPES[form.dtype].itemsize),
        "bytes_on_disk": _bytes_on_disk(place.directory),
        "directory": str(place.directory),
        "formats": [name for name, reason in refused.items() if reason is None],
        "formats_with_another_cache": fitting_caches(form, [name for name, reason in refused.items() if reason]),
        "refused_formats": {name: reason for name, reason in refused.items() if reason is not None},
    }


def _coded(place: Place) -> str | None:
    """How another tool has quantized a checkpoint, in words; None if none has."""
    if place.coded_by is None:
        return None
    stated = place.settings["quantization_config"]
    bits, group = stated.get("bits", stated.get("w_bit")), stated.get("group_size", stated.get("q_group_size"))
    words = [place.coded_by, f"{bits} bits" if bits else "", f"groups of {group}" if group and group > 0 else ""]
    return ", ".join(filter(None, words))


def _unconverted(place: Place) -> dict[str, Any]:
    """Of any other checkpoint."""
    found: dict[str, Any] = {"is": "not converted", "model_type": place.settings.get("model_type")}
    coded, refusal = _coded(place), None
    if coded is not None:
        found["linears"] = f"in the codes of {coded}"
        if place.coded_by not in READERS:
            refusal = f"quantized by {place.coded_by}; Octavo reads {', '.join(READERS)}, and float"
    try:
        architecture = chosen_architecture(place.directory, None)
        config = load_source_config(place.directory)
    except OctavoError as error:
        return found | {"refusal": str(error), "bytes_on_disk": _bytes_on_disk(place.directory)}
    dtype = getattr(config, "dtype", None) or SAFETENSORS_DTYPES["F32"]
    return found | {
        "architecture": architecture.name,
        "shape": _shape(config),
        "float_dtype": str(dtype).removeprefix("torch."),
        **{name: value for name, value in _cache(config, load_scheme("float"), dtype.itemsize).items() if "kv" in name},
        "bytes_on_disk": _bytes_on_disk(place.directory),
        "refusal": refusal,
    }


def facts_of(model_path: str) -> dict[str, Any]:
    """Everything there is to say of a model, as plain data.

    Raises:
        OctavoError: there is no such model, or what was converted is damaged.
    """
    place = find_place(model_path, with_weights=False)
    if not place.is_converted:
        return {"model": model_path, **_unconverted(place), "missing_files": _missing(place.directory)}
    if not (Path(model_path).is_dir() or any(place.directory.glob("*.safetensors"))):
        raise OctavoError(f"{model_path}: is converted, and info reads its weights, too; {_fetched(model_path)}")
    return {"model": model_path, **_converted(place)}


def _some(names: Sequence[str]) -> str:
    others = len(names) - 1
    return names[0] + (f" (with {others} other{'s' * (others > 1)})" if others else "")


def _times(facts: dict[str, Any]) -> str:
    own, plain = facts["kv_bytes_per_token"], facts["float_kv_bytes_per_token"]
    return f"{own:,} bytes" + (f", {plain:,} in {facts['float_dtype']}" if own != plain else "")


def lines_of(facts: dict[str, Any]) -> list[str]:
    """What there is to say of a model, in lines."""
    quoted, served = shlex.quote(facts["model"]), facts.get("architecture")
    rows = [("it is", "converted by " + facts["written_by"] if "written_by" in facts else "not converted")]
    rows.append(("model_type", f"{facts['model_type']}" + (f" (models/{served})" if served else "")))
    if served:
        rows.append(("shape", facts["shape"]))
    linears = facts.get("linears")
    if isinstance(linears, dict):
        linears = "; ".join(f"{count} in {kind}" for kind, count in linears.items())
    rows.append(("linears", linears or "float"))
    counted = [
        f"{facts[name]:.2f} in {where}"
        for name, where in (("bits_per_weight", "layers"), ("bits_per_weight_of_ends", "embedding and last linear"))
        if facts.get(name) is not None
    ]
    if counted:
        rows.append(("bits a weight", "; ".join(counted)))
    if "scheme" in facts:
        rows.append(("embedding", facts["embedding"]))
        rows.append(("KV cache", facts["scheme"]))
        rows += [("K", facts["key"]), ("V", facts["value"])]
    if served:
        rows.append(("KV cache, per token", _times(facts)))
    where = "on the disk" if Path(facts["model"]).is_dir() else "in the cache"  # of transformers, of a hub id
    rows.append((where, f"{facts['bytes_on_disk'] / 1e6:,.1f} MB"))
    if facts.get("missing_files"):
        rows.append((f"not {where}", f"{_some(facts['missing_files'])}; {_fetched(facts['model'])}"))
    if "formats" in facts:
        rows.append(("formats it fits", ", ".join(facts["formats"]) or "its own alone"))
        others = [f"{name} ({flags})" for name, flags in facts["formats_with_another_cache"].items()]
        rows += [("with another cache", "; ".join(others))] if others else []
        ways = [f'octavo run {quoted} "The capital of France is"']
        ways += [rewrite_command(facts["model"], facts["directory"], name, f"-{name}") for name in facts["formats"][:1]]
    elif facts["refusal"]:
        rows.append(("not served", facts["refusal"]))
        ways = []
    else:
        ways = [f"octavo convert {quoted}", f"octavo doctor {quoted}"] if "linears" not in facts else []
        ways = ways or [f"octavo convert {quoted}"]
    return [*aligned(rows), *(["", "to go on:", *(f"  {way}" for way in ways)] if ways else [])]


def run(flags: argparse.Namespace) -> None:
    """Print what a model is.

    Raises:
        OctavoError: see `facts_of`.
    """
    facts = facts_of(flags.model_path)
    print(json.dumps(facts, indent=2) if flags.json else "\n".join(lines_of(facts)))
