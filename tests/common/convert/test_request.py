"""What a conversion is asked for: checked before any file is touched, and in terms of its own fields."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from octavo import ConvertRequest, OctavoError
from octavo.common.convert.request import LINEAR_NAMES, linear_scheme_of
from octavo.common.convert.spelling import FLAG_OF, named, naming_fields
from octavo.common.runtime.schemes.linear_scheme import LinearScheme


def request(**changes: Any) -> ConvertRequest:
    return ConvertRequest("in", "out", **changes)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("w8a8", LinearScheme()),
        ("W8A8_DYNAMIC", LinearScheme("W8A8_DYNAMIC")),
        ("w4a16", LinearScheme("W4A16", group_size=64)),
        ("w8a16", LinearScheme("W8A16")),
        ("fp8", LinearScheme("WFP8AFP8_DYNAMIC")),
        ("float", None),
    ],
)
def test_linears_by_name(name: str, expected: LinearScheme | None) -> None:
    assert linear_scheme_of(name) == request(linear=name, scheme="int8-token").linear == expected


def test_every_name_of_linears_stands_for_something() -> None:
    assert all((linear_scheme_of(name) is None) == (name == "float") for name in LINEAR_NAMES)


def test_what_is_written_in_several_ways_is_equal() -> None:
    written = request(linear="w8a8", float_linears=["*.down_proj"], calibration=["a", "b"], save_statistics="file")
    other = ConvertRequest(
        Path("in"),
        Path("out"),
        linear=LinearScheme(),
        float_linears=("*.down_proj",),
        calibration=("a", "b"),
        save_statistics=Path("file"),
    )
    assert written == other
    assert request(calibration="texts.txt") == request(calibration=Path("texts.txt")) != request(calibration=["a"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear": "w5a5"}, "linear w5a5: is none of float, w8a8"),
        ({"anti_method": "m7"}, 'anti_method m7: is none of "", m1'),
        ({"anti_method": "m5"}, "anti_method: m5 is CBQ"),
        ({"kv_scales": "best"}, "kv_scales best: is none of data"),
        ({"device": "tpu"}, "device tpu: is none of cpu"),
        ({"max_kl": 0}, "max_kl 0: is no positive number"),
        ({"max_kl": float("nan")}, "max_kl nan: is no positive number"),
        ({"mean_bits": 5}, "mean_bits 5: is of linears in int4 (W4A16, W4A16_DOUBLE), not W8A8"),
        ({"mean_bits": -1, "linear": "w4a16"}, "mean_bits -1: is no positive number"),
        ({"mean_bits": 5, "linear": "w4a16", "format": "awq"}, "mean_bits 5: awq does not read linears of 4 and of 8"),
        ({"max_shard_gb": -1}, "max_shard_gb -1: is no positive number"),
        ({"max_shard_gb": float("inf")}, "max_shard_gb inf: is no size; give None"),
        ({"trust_remote_code": "False"}, "trust_remote_code 'False': is neither True nor False"),
        ({"linear": 8}, "linear 8: is no LinearScheme and none of float, w8a8"),
        ({"float_outliers": -1}, "float_outliers -1: is no number of layers"),
        ({"float_costliest": 1.5}, "float_costliest 1.5: is no number of layers"),
        ({"calibration": []}, "calibration: holds no text"),
        ({"linear": None, "anti_method": "m1"}, "anti_method: linear=None leaves every linear in float"),
        ({"linear": None, "float_head": False}, "float_head: linear=None leaves every linear in float"),
        ({"linear": LinearScheme("W8A8_DYNAMIC", act_method="mse")}, "W8A8_DYNAMIC has no static ranges of inputs"),
    ],
)
def test_what_is_no_request_is_refused_by_its_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OctavoError) as refused:
        request(**changes)
    assert message in str(refused.value) and "--" not in str(refused.value)


def test_a_job_is_told_by_what_its_bytes_follow_from() -> None:
    """Where it is written, whether it is resumed and how large the limit is do not matter; all else does."""
    plain = request(scheme="int8-token").decisive_fields()
    same = ConvertRequest("elsewhere", "there", scheme="int8-token", linear="w8a8", resume=True, calibration=["a"])
    assert same.decisive_fields() == plain
    limits = [request(max_kl=limit).decisive_fields() for limit in (0.1, 0.2)]
    assert limits[0] == limits[1] != plain, "costs are measured"
    others = {
        "linear": "w8a8_dynamic", "anti_method": "m1", "kv_scales": "none", "float_linears": ["a"], "float_head": False,
        "float_outliers": 1, "float_costliest": 1, "device": "cuda", "tokenizer_arguments": {"padding_side": "left"},
        "input_ids_name": "ids", "attention_mask_name": "mask", "trust_remote_code": True, "max_shard_gb": 1,
        "save_statistics": "file", "embeddings": "int8", "target": "mindie", "requantize": True, "pdmix": True,
    }  # fmt: skip
    assert all(request(**{name: value}).decisive_fields() != plain for name, value in others.items())
    assert request(linear="w4a16", mean_bits=5).decisive_fields() != request(linear="w4a16").decisive_fields()
    floats, integers = (request(linear="w8a16", cpu_activations=part).decisive_fields() for part in ("float", "int8"))
    assert floats != integers
    told = {
        "cpu_activations", "mean_bits", "scheme", "calibration", "max_kl", "model", "output", "architecture", "resume",
        "format",
    }  # fmt: skip
    assert {*others, *told} == {field.name for field in dataclasses.fields(ConvertRequest)}, "a new field is told, too"


def test_messages_name_flags_or_fields() -> None:
    assert named("max_kl") == "--max_kl"
    with naming_fields():
        assert named("max_kl") == "max_kl"
    assert named("max_kl") == "--max_kl"
    fields = {field.name for field in dataclasses.fields(ConvertRequest)}
    assert fields - {"architecture"} <= FLAG_OF.keys()
