"""Damage of the file of calibration statistics, from which scales are derived."""

import functools
import shutil
from pathlib import Path
from random import Random

import torch

from octavo.common.runtime.schemes.kv_scheme import load_scheme
from octavo.common.runtime.static_scales import LayerScales, load_statistics, scales_of

from ..bases import load_config
from ..safetensors_file import damage_header, file_of, read_stored
from ..tensor_damage import damage_tensors
from ..trial import Accepted, Attempt, Expect, Room

SCHEMES = ("ascend-c8", "ascend-fa", "lmdeploy-int8-ptq", "vllm-fp8-head")
METADATA = ({"format": "pt"}, {}, {"num_hidden_layers": "3"}, {"num_hidden_layers": "-1"}, {"num_hidden_layers": "x"},
            {"num_hidden_layers": "10" * 2000}, {"model_type": "gpt2"}, {"tokens": "many"})  # fmt: skip


def _tensors_of(layer: LayerScales) -> list[torch.Tensor]:
    pairs = [part for pair in (layer.key, layer.value) if pair is not None for part in pair]
    return [part for part in (*pairs, layer.query, layer.key_levels, layer.value_levels) if part is not None]


def _scales(file: Path, scheme: str, config_folder: Path) -> list[torch.Tensor]:
    """The scales of a scheme that a statistics file gives for the model of a config."""
    statistics = load_statistics(file)
    check = getattr(statistics, "check_model", None)
    if check is not None:
        check(load_config(config_folder))
    return [part for layer in scales_of(load_scheme(scheme), statistics) for part in _tensors_of(layer)]


def _try(file: Path, whole: Path, scheme: str, config_folder: Path) -> Accepted:
    found, expected = _scales(file, scheme, config_folder), _scales(whole, scheme, config_folder)
    if len(found) != len(expected) or any(a.shape != b.shape for a, b in zip(found, expected, strict=False)):
        return Accepted(False, f"{len(found)} scales, of which some have other shapes; {len(expected)} are right")
    same = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return Accepted(same, "" if same else "scales of the same shapes, and other values")


def statistics(rng: Random, room: Room) -> Attempt:
    """The statistics file: its header, its tensors, its metadata."""
    whole, file = room.bases / "statistics.safetensors", room.scratch / "statistics.safetensors"
    scheme, config_folder = rng.choice(SCHEMES), room.bases / "sources" / "llama"
    shutil.copyfile(whole, file)
    stored, metadata = read_stored(file)
    expect = Expect.EQUAL
    way = rng.choice(("header", "tensors", "tensors", "tensors", "metadata"))
    if way == "header":
        data, what, _ = damage_header(rng, file)
    elif way == "tensors":
        damaged = damage_tensors(rng, stored)
        data, what, expect = file_of(damaged.tensors, metadata), damaged.what, damaged.expect
    else:
        change = rng.choice(METADATA)
        what, data = f"metadata: {str(change)[:60]}", file_of(stored, {**metadata, **change} if change else {})
    file.write_bytes(data)
    return Attempt(f"{scheme}: {what}", functools.partial(_try, file, whole, scheme, config_folder), expect)
