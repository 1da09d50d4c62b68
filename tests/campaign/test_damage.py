"""Damage is what it says it is, follows from its seed, and leaves what it was made from alone."""

import json
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load, save_file

from .files import linked_copy, rewrite
from .json_damage import MISSING, damage_json, paths_of, value_at
from .safetensors_file import damage_header, file_of, read_stored
from .tensor_damage import damage_tensors, flipped_bit, no_code, no_number, no_scale
from .trial import Expect

CONFIG = {"hidden_size": 64, "rope": {"theta": 1e4, "types": ["a", "b"]}, "octavo": {"scheme": {"name": "float"}}}
TENSORS = {
    "q_proj.weight": torch.arange(32, dtype=torch.int8).reshape(4, 8),
    "q_proj.weight_scale": torch.rand(4, 1) + 0.1,
    "q_proj.input_offset": torch.zeros(1),
    "q_proj.deq_scale": torch.full((4,), 0x3F800000, dtype=torch.int64),  # float32 1.0 in the low halves
    "norm.weight": torch.rand(8).bfloat16() + 0.5,
    "fp8.weight": torch.ones(2, 4).to(torch.float8_e4m3fn),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def test_a_file_of_what_was_read_holds_the_same(file: Path) -> None:
    back = load(file_of(*read_stored(file)))
    assert back.keys() == TENSORS.keys()
    assert all(torch.equal(back[name].view(torch.uint8), TENSORS[name].view(torch.uint8)) for name in TENSORS)


def test_json_damage_says_what_stands_there_now() -> None:
    text = json.dumps(CONFIG).encode()
    for number in range(300):
        damaged = damage_json(Random(number), text)
        assert damaged.text == damage_json(Random(number), text).text
        if damaged.path and damaged.value is not MISSING and isinstance(damaged.value, (int, bool)):
            assert value_at(json.loads(damaged.text), damaged.path) == damaged.value


def test_json_damage_stays_below_its_root() -> None:
    text = json.dumps(CONFIG).encode()
    for number in range(200):
        path = damage_json(Random(number), text, ("octavo",)).path
        assert path[:1] == ("octavo",)


def test_paths_are_of_all_values() -> None:
    assert ("rope", "types", 1) in paths_of(CONFIG) and ("octavo", "scheme") in paths_of(CONFIG)
    assert len(paths_of(CONFIG)) == 9


def test_what_must_be_refused_is_told_from_what_no_check_can_know(file: Path) -> None:
    stored, metadata = read_stored(file)
    for number in range(200):
        damaged = flipped_bit(Random(number), stored)
        values = load(file_of(damaged.tensors, metadata))
        finite = all(torch.isfinite(t.float()).all() for t in values.values())
        whole = bool((values["q_proj.deq_scale"] >> 32 == 0).all())
        positive = bool((values["q_proj.weight_scale"] > 0).all())
        scales = values["q_proj.deq_scale"].to(torch.int32).view(torch.float32)
        good = finite and whole and positive and bool((torch.isfinite(scales) & (scales > 0)).all())
        assert damaged.expect is (Expect.ANYTHING if good else Expect.REFUSAL), damaged.what


@pytest.mark.parametrize("way", [no_number, no_scale, no_code])
def test_damage_of_numbers_is_one_that_must_be_refused(way: object, file: Path) -> None:
    stored, metadata = read_stored(file)
    for number in range(50):
        damaged = way(Random(number), stored)
        assert damaged.expect is Expect.REFUSAL
        values = load(file_of(damaged.tensors, metadata))
        changed = [n for n in TENSORS if not torch.equal(values[n].view(torch.uint8), TENSORS[n].view(torch.uint8))]
        assert len(changed) == 1 and changed[0] in damaged.what


def test_every_damage_changes_the_file(file: Path) -> None:
    stored, metadata = read_stored(file)
    for number in range(300):
        damaged = damage_tensors(Random(number), stored)
        assert file_of(damaged.tensors, metadata) != file.read_bytes(), damaged.what
        data, what, _ = damage_header(Random(number), file)
        assert data != file.read_bytes() or what.startswith("byte"), what


def test_what_was_copied_stays_as_it_is(file: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    copy = linked_copy(tmp_path / "base", tmp_path / "copy")
    rewrite(copy / "config.json", b"damaged")
    assert (tmp_path / "base" / "config.json").read_text() == "{}"
