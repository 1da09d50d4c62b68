"""Damage of converted directories: config.json, the description, the weight files and their index."""

import functools
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from ..bases import OUTPUTS, architecture_of, compute, difference, expected_logits, logits_of
from ..files import linked_copy, rewrite
from ..json_damage import JsonDamage, damage_json
from ..safetensors_file import damage_header, file_of, read_stored
from ..tensor_damage import damage_tensors
from ..trial import Accepted, Attempt, Expect, Room, Script

FREE_NUMBERS = ("rope_theta", "rms_norm_eps", "factor", "sliding_window", "max_window_layers")
"""Fields of a config of which any positive number makes another model, and the user's own choice."""
PROMPT = ("--prompt", "The harbour", "--max_new_tokens", "3")


def expected_of_config(damage: JsonDamage) -> Expect:
    """What acceptance of a damaged config must come with."""
    key = damage.path[-1] if damage.path else None
    value = damage.value
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    is_meant = (
        (key in FREE_NUMBERS and is_number and 0 < value < float("inf"))
        or (key == "use_sliding_window" and value in (True, False))
        or (key == "prefill" and value == "float")
    )
    return Expect.ANYTHING if is_meant else Expect.EQUAL


def _by_own_class(directory: Path, output: str, expected: Any) -> Accepted:
    differs = difference(logits_of(directory, architecture_of(output)), expected)
    return Accepted(not differs, differs)


def _by_remote_code(directory: Path, output: str, expected: Any) -> Accepted:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    if not type(model).__module__.startswith("transformers_modules."):
        return Accepted(False, f"{type(model).__module__} loaded it, which is not what lies beside the weights")
    differs = difference(compute(model), expected)
    return Accepted(not differs, differs)


def _by_script(directory: Path, output: str, expected: Any) -> Script:
    import sys

    from octavo.generate import main

    code = main(architecture_of(output), ["--model_path", str(directory), *PROMPT])
    accepted = _by_own_class(directory, output, expected) if code == 0 else None
    return Script(code, sys.stderr.getvalue(), accepted)


ROUTES = {"own class": _by_own_class, "remote code": _by_remote_code, "run.py": _by_script}


def _copy(rng: Random, room: Room, names: list[str]) -> tuple[str, Path]:
    """An output to damage, under a path of this worker's own: remote code of two processes does not meet."""
    output = rng.choice(names)
    target = room.scratch / f"damaged {room.scratch.parent.name}"
    return output, linked_copy(room.bases / "outputs" / output, target)


def _attempt(rng: Random, room: Room, output: str, directory: Path, what: str, expect: Expect) -> Attempt:
    route = rng.choices(list(ROUTES), (70, 18, 12))[0]
    run: Callable[[], Any] = functools.partial(ROUTES[route], directory, output, expected_logits(room.bases, output))
    return Attempt(f"{output} by {route}: {what}", run, expect, may_be_foreign=route == "remote code")


def _json(rng: Random, room: Room, file: str, names: list[str], root: tuple[Any, ...] = ()) -> Attempt:
    output, directory = _copy(rng, room, names)
    damaged = damage_json(rng, (directory / file).read_bytes(), root)
    rewrite(directory / file, damaged.text)
    return _attempt(rng, room, output, directory, f"{file}: {damaged.what}", expected_of_config(damaged))


def config(rng: Random, room: Room) -> Attempt:
    """config.json."""
    return _json(rng, room, "config.json", list(OUTPUTS))


def octavo_entry(rng: Random, room: Room) -> Attempt:
    """What config.json says of the scheme."""
    return _json(rng, room, "config.json", list(OUTPUTS), ("octavo",))


def description(rng: Random, room: Room) -> Attempt:
    """quant_model_description.json."""
    return _json(rng, room, "quant_model_description.json", list(OUTPUTS))


def _weight_file(rng: Random, directory: Path) -> Path:
    return rng.choice(sorted(directory.glob("*.safetensors")))


def header(rng: Random, room: Room) -> Attempt:
    """What a weight file says of itself, and its length."""
    output, directory = _copy(rng, room, list(OUTPUTS))
    file = _weight_file(rng, directory)
    data, what, swapped = damage_header(rng, file)
    rewrite(file, data)
    return _attempt(rng, room, output, directory, what, Expect.ANYTHING if swapped else Expect.EQUAL)


def tensors(rng: Random, room: Room) -> Attempt:
    """The tensors of a weight file."""
    output, directory = _copy(rng, room, list(OUTPUTS))
    file = _weight_file(rng, directory)
    stored, metadata = read_stored(file)
    damaged = damage_tensors(rng, stored)
    rewrite(file, file_of(damaged.tensors, metadata))
    return _attempt(rng, room, output, directory, damaged.what, damaged.expect)


def index(rng: Random, room: Room) -> Attempt:
    """The index of a directory with several weight files, and the files that it names."""
    output, directory = _copy(rng, room, [name for name, output in OUTPUTS.items() if output.is_sharded])
    file = next(directory.glob("*.index.json"))
    if rng.random() < 0.7:
        damaged = damage_json(rng, file.read_bytes())
        rewrite(file, damaged.text)
        return _attempt(rng, room, output, directory, f"the index: {damaged.what}", Expect.EQUAL)
    what = damage_shards(rng, directory, file)
    return _attempt(rng, room, output, directory, what, Expect.EQUAL)


def damage_shards(rng: Random, directory: Path, index_file: Path) -> str:
    """Damage the set of weight files of a directory; what was done."""
    one, other = rng.sample(sorted(directory.glob("*.safetensors")), 2)
    way = rng.choice(("missing", "swapped", "copied", "no index", "empty", "a directory", "beside"))
    if way == "swapped":
        first, second = one.read_bytes(), other.read_bytes()
        rewrite(one, second)
        rewrite(other, first)
        return f"{one.name} and {other.name} are swapped"
    if way == "copied":
        rewrite(one, other.read_bytes())
        return f"{one.name} holds what {other.name} does"
    if way == "no index":
        index_file.unlink()
        return "the index is missing"
    if way == "beside":
        rewrite(directory / index_file.name.removesuffix(".index.json"), one.read_bytes())
        return f"what {one.name} holds is also there under the name of a file that holds all"
    one.unlink()
    if way == "empty":
        one.write_bytes(b"")
    elif way == "a directory":
        one.mkdir()
    return f"{one.name} is {way}"
