"""Damage of what is converted: the config, the weights and their index, the files of the tokenizer."""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

from octavo.common.convert.output.writer import stage_path

from ...support import convert_flags
from ..bases import ARCHITECTURES, OUTPUTS, convert_quietly, difference, expected_logits, logits_of
from ..files import linked_copy, rewrite
from ..json_damage import damage_json
from ..safetensors_file import damage_header, file_of, read_stored
from ..tensor_damage import damage_tensors
from ..trial import Accepted, Attempt, Expect, Room, Script, does_not_load
from .outputs import damage_shards, expected_of_config

MADE_OF = {"llama": ("w8a8-c8", "float-int8-sharded"), "qwen2": ("qwen2-sharded",),
           "gptq": ("gptq-int8",), "fp8": ("fp8-own-scales",)}  # fmt: skip
"""Outputs to make of a damaged source, by its name."""
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def _convert(source: Path, target: Path, output: str, bases: Path) -> Script:
    kind = OUTPUTS[output]
    architecture = ARCHITECTURES[kind.source]
    code = convert_quietly(architecture, convert_flags(source, target, *kind.flags))
    if code:
        return Script(code, sys.stderr.getvalue())
    try:
        differs = difference(logits_of(target, architecture), expected_logits(bases, output))
    except Exception as error:
        return Script(0, "", does_not_load(error))
    return Script(0, "", Accepted(not differs, differs))


def _attempt(rng: Random, room: Room, names: list[str], damage: Callable[[Path], tuple[str, Expect]]) -> Attempt:
    name = rng.choice(names)
    source = linked_copy(room.bases / "sources" / name, room.scratch / "source")
    what, expect = damage(source)
    output, target = rng.choice(MADE_OF[name]), room.scratch / "out"
    run = functools.partial(_convert, source, target, output, room.bases)
    return Attempt(f"{name} to {output}: {what}", run, expect, absent=(target, stage_path(target)))


def config(rng: Random, room: Room) -> Attempt:
    """config.json of a source."""

    def damage(source: Path) -> tuple[str, Expect]:
        damaged = damage_json(rng, (source / "config.json").read_bytes())
        rewrite(source / "config.json", damaged.text)
        return f"config.json: {damaged.what}", expected_of_config(damaged)

    return _attempt(rng, room, list(MADE_OF), damage)


def tensors(rng: Random, room: Room) -> Attempt:
    """A weight file of a source: its header, or its tensors."""

    def damage(source: Path) -> tuple[str, Expect]:
        file = rng.choice(sorted(source.glob("*.safetensors")))
        if rng.random() < 0.4:
            data, what, swapped = damage_header(rng, file)
            rewrite(file, data)
            return what, Expect.ANYTHING if swapped else Expect.EQUAL
        stored, metadata = read_stored(file)
        damaged = damage_tensors(rng, stored)
        rewrite(file, file_of(damaged.tensors, metadata))
        return damaged.what, damaged.expect

    return _attempt(rng, room, list(MADE_OF), damage)


def files(rng: Random, room: Room) -> Attempt:
    """The index and the files that it names, those of the tokenizer, and files that do not belong there."""
    ways = (_index, _shards, _tokenizer, _tokenizer, _stray, _not_files)
    way = rng.choice(ways)
    names = ["qwen2"] if way in (_index, _shards) else list(MADE_OF)
    return _attempt(rng, room, names, functools.partial(way, rng))


def _index(rng: Random, source: Path) -> tuple[str, Expect]:
    file = source / "model.safetensors.index.json"
    damaged = damage_json(rng, file.read_bytes())
    rewrite(file, damaged.text)
    return f"the index: {damaged.what}", Expect.EQUAL


def _shards(rng: Random, source: Path) -> tuple[str, Expect]:
    return damage_shards(rng, source, source / "model.safetensors.index.json"), Expect.EQUAL


def _tokenizer(rng: Random, source: Path) -> tuple[str, Expect]:
    """Where a damaged tokenizer loads, its tokens are its own."""
    name = rng.choice(TOKENIZER)
    damaged = damage_json(rng, (source / name).read_bytes())
    rewrite(source / name, damaged.text)
    return f"{name}: {damaged.what}", Expect.ANYTHING


def _stray(rng: Random, source: Path) -> tuple[str, Expect]:
    """Files that transformers takes no notice of, or that shadow the right ones."""
    weights = sorted(source.glob("*.safetensors"))[0]
    stored, metadata = read_stored(weights)
    other = file_of([t.holding(t.tensor() * 1.7) for t in stored], metadata)
    name = rng.choice(["model_old.safetensors", "model.bak.safetensors", "model-00009-of-00009.safetensors",
                       "consolidated.safetensors", "adapter_model.safetensors", "pytorch_model.bin",
                       "model.safetensors.index.json.bak"])  # fmt: skip
    rewrite(source / name, other)
    return f"{name} lies beside the weights", Expect.EQUAL


def _not_files(rng: Random, source: Path) -> tuple[str, Expect]:
    """Names of files that are missing, directories, links to nowhere, or cannot be read."""
    file = rng.choice(sorted(path for path in source.iterdir() if path.is_file()))
    way = rng.choice(("missing", "a directory", "a link to nowhere", "a link to itself", "empty"))
    file.unlink()
    if way == "a directory":
        file.mkdir()
    elif way != "missing":
        file.write_bytes(b"") if way == "empty" else os.symlink(file if "itself" in way else "/nowhere", file)
    optional = file.name in (*TOKENIZER, "generation_config.json", "chat_template.jinja")
    return f"{file.name} is {way}", Expect.ANYTHING if optional else Expect.EQUAL
