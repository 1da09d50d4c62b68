"""Schemes and their codecs as plain data."""

from pathlib import Path
from typing import Any

import pytest

from octavo.common.errors import OctavoError
from octavo.common.runtime.schemes.kv_scheme import PRESETS, Codec, Scheme, load_scheme

from ....support import REPOSITORY


@pytest.mark.parametrize("name", PRESETS)
def test_presets_say_what_they_are_and_where_they_come_from(name: str) -> None:
    scheme = load_scheme(name)
    assert scheme.name == name and scheme.origin
    assert Scheme.from_dict(scheme.to_dict()) == scheme == load_scheme(scheme) == load_scheme(scheme.to_dict())


def test_every_preset_file_is_listed() -> None:
    assert sorted(PRESETS) == sorted(
        Path(file).stem for file in (REPOSITORY / "common" / "runtime" / "schemes" / "presets").glob("*.json")
    )


@pytest.mark.parametrize(
    ("name", "static", "codecs"),
    [
        ("float", False, (None, None, None)),
        ("int8-token", False, ("token", "token", None)),
        ("int4-token", False, ("token", "token", None)),
        ("fp8-token", False, ("token", "token", None)),
        ("ascend-c8", True, ("channel", "channel", None)),
        ("ascend-fa", True, ("head", "head", "head")),
    ],
)
def test_codecs_of_the_presets(name: str, static: bool, codecs: tuple[str | None, ...]) -> None:
    scheme = load_scheme(name)
    assert scheme.is_static == static
    found = tuple(codec and codec.granularity for codec in (scheme.key, scheme.value, scheme.query))
    assert found == codecs and scheme.prefill == "codes"


def test_float_layers() -> None:
    scheme = Scheme.from_dict({**load_scheme("ascend-c8").to_dict(), "float_layers": [0, 2]})
    assert scheme.of_layer(1) == load_scheme("ascend-c8") != scheme
    assert scheme.of_layer(2).key is None and not scheme.of_layer(2).is_static
    assert Scheme.from_dict(scheme.to_dict()).float_layers == (0, 2)


def test_layers_that_are_counted_from_the_end_are_those_of_a_model() -> None:
    scheme = load_scheme("turboquant-3")
    assert scheme.float_layers == (0, 1, -2, -1) and scheme.layers_named == 2
    assert scheme.of_model(30).float_layers == (0, 1, 28, 29) and scheme.of_model(2).float_layers == (0, 1)
    floats = [index for index in range(30) if not scheme.of_model(30).of_layer(index).is_quantized]
    assert floats == [0, 1, 28, 29] and load_scheme("turboquant_3bit_nc") == scheme
    with pytest.raises(OctavoError, match="model of 2 or more has; this one has 1"):
        scheme.of_model(1)
    with pytest.raises(ValueError, match="those of no model yet"):
        scheme.of_layer(0)


TOKEN = {"granularity": "token", "dynamic": True}
CHANNEL = {"dtype": "int2", "granularity": "channel", "dynamic": True, "group_size": 32}
BAD: list[tuple[Any, str]] = [
    ("int7", ", ".join(PRESETS)),
    ({}, "name"),
    ({"name": "x", "keys": None}, "'keys'"),
    ({"name": "x", "key": {"dtype": "int5"}}, "int5"),
    ({"name": "x", "key": {"dtype": "fp8_e4m3", "symmetric": False}}, "zero points"),
    ({"name": "x", "key": {"group_size": 32}}, "group_size"),
    ({"name": "x", "query": {"granularity": "head"}, "key": {"dtype": "fp8_e4m3"}}, "fp8 type of K"),
    ({"name": "x", "query": {"granularity": "head", "dtype": "fp8_e4m3"}, "key": {}}, "int8"),
    ({"name": "x", "key": {"granularity": "row"}}, "row"),
    ({"name": "x", "key": {"granularity": "token", "dynamic": True, "dtype": "int4", "rule": "norm"}}, "gaussian"),
    ({"name": "x", "key": {"granularity": "token"}}, "dynamic"),
    ({"name": "x", "key": {"granularity": "head", "dynamic": True}}, "static"),
    ({"name": "x", "key": {"bits": 8}}, "bits"),
    ({"name": "x", "key": {"scale_dtype": "e8m0"}}, "e8m0 is of dynamic symmetric"),
    ({"name": "x", "key": {**TOKEN, "symmetric": False, "scale_dtype": "e8m0"}}, "e8m0 is of dynamic symmetric"),
    ({"name": "x", "key": {"scale_dtype": "fp8_e4m3"}}, "fp8_e4m3 is of dynamic"),
    ({"name": "x", "key": {**TOKEN, "symmetric": False, "scale_dtype": "fp8_e4m3"}}, "zeros for codes of 4 bits"),
    ({"name": "x", "key": {**TOKEN, "rule": "ocp"}}, "scales in e8m0"),
    ({"name": "x", "key": {**TOKEN, "symmetric": False, "rule": "full_range"}}, "symmetric uniform"),
    ({"name": "x", "key": {"rule": "mse"}}, "dynamic scales"),
    ({"name": "x", "key": {**TOKEN, "dtype": "fp8_e4m3", "rule": "mse"}}, "of integers"),
    ({"name": "x", "key": {"dtype": "int4", "levels": "e2m1"}}, "e2m1 are of int4"),
    ({"name": "x", "key": {**TOKEN, "dtype": "int3", "levels": "e2m1"}}, "e2m1 are of int4"),
    ({"name": "x", "key": {"residual_sign": True}}, "'residual_sign' is of scales per token"),
    ({"name": "x", "key": {**TOKEN, "fixed_scale": 1.0}}, "'fixed_scale'"),
    ({"name": "x", "query": {"granularity": "channel"}}, "per head"),
    ({"name": "x", "prefill": "both"}, "both"),
    ({"name": "x", "sinks": "4"}, "sinks '4' is no int"),
    ({"name": "x", "window": -1}, "window"),
    ({"name": "x", "rotate_key": "no"}, "rotate_key"),
    ({"name": "x", "key": {"outliers": 1.5}}, "outliers"),
    ({"name": "x", "prefill": "float", "sinks": 1, "key": {}}, "excludes"),
    ({"name": "x", "value": {"before_rope": True}}, "RoPE"),
    ({"name": "x", "key": {"before_rope": True}, "rotate_key": True}, "exclude"),
    ({"name": "x", "layers": {"2-": "float"}}, "2-"),
    (None, "no scheme None"),
    (["float"], "no scheme"),
    ({"name": 5}, "name 5"),
    ({"name": "a\nb"}, "name"),
    ({"name": "x", "layers": []}, "'layers'"),
    ({"name": "x", "layers": {"0": 5}}, "layers 0"),
    ({"name": "x", "layers": {"0": "mine.json"}}, "no scheme"),
    ({"name": "x", "layers": {"0": {"layers": {"0": "float"}}}}, "layers of its own"),
    ({"name": "x", "layers": {"0-9999999999": "float"}}, "no layer number"),
    ({"name": "x", "float_layers": 5}, "'float_layers'"),
    ({"name": "x", "float_layers": "12"}, "'float_layers'"),
    ({"name": "x", "float_layers": [-9999]}, "float_layers -9999"),
    ({"name": "x", "float_layers": [True]}, "float_layers True"),
    ({"name": "x", "key": ["int8"]}, "key"),
    ({"name": "x", "sinks": 10**18}, "sinks"),
    ({"name": "x", "key": {"fixed_scale": float("nan")}}, "fixed_scale"),
    ({"name": "x", "key": {"granularity": "token", "dynamic": True, "group_size": 2**40}}, "group_size"),
    ({"name": "x", "key": {"tile": 128}}, "'tile' is a number of tokens that have dynamic scales"),
    ({"name": "x", "key": {**TOKEN, "tile": 1}}, "'tile' is a number"),
    ({"name": "x", "key": {**CHANNEL, "tile": 64}}, "set 'group_size' to it"),
    ({"name": "x", "key": {**TOKEN, "tile": 64, "outliers": 1}}, "'outliers' is a number per token"),
    ({"name": "x", "key": {**TOKEN, "tile": 64, "group_size": 32, "rule": "llamacpp"}}, "leave 'tile' out"),
    ({"name": "x", "key": {**TOKEN, "wide_share": 0.5}}, "'wide_share' is a part of the channels"),
    ({"name": "x", "key": {**CHANNEL, "wide_share": 1.0}}, "'wide_share' is a part"),
    ({"name": "x", "key": {**CHANNEL, "wide_share": float("nan")}}, "wide_share"),
    ({"name": "x", "key": {**CHANNEL, "wide_share": 0.5, "wide_dtype": "int5"}}, "wide_dtype 'int5' is none of"),
    ({"name": "x", "key": {**CHANNEL, "wide_share": 0.5, "wide_dtype": "fp8_e4m3"}}, "int8 beside int4"),
    ({"name": "x", "key": {**CHANNEL, "wide_share": 0.5, "dtype": "int3"}}, "2 or 4 bits more"),
    ({"name": "x", "key": {**CHANNEL, "wide_share": 0.5, "group_size": 34}}, "multiple of 4 tokens"),
    ({"name": "x", "key": {**CHANNEL, "wide_share": 0.5, "scale_dtype": "e8m0"}}, "float16 and float32"),
    ({"name": "x", "key": {**TOKEN, "tile": 32, "scale_dtype": "fp8_e4m3"}}, "float16 and float32"),
    ({"name": "x", "key": {**CHANNEL, "wide_share": 0.5, "scale_dtype": "fp8_e4m3"}}, "float16 and float32"),
    ({"name": "x", "value": {**TOKEN, "tile": 48}, "key": {**CHANNEL, "dtype": "int4"}}, "32 and 48 tokens do not fit"),
]


@pytest.mark.parametrize(("data", "part"), BAD, ids=str)
def test_what_is_no_scheme(data: Any, part: str) -> None:
    with pytest.raises(OctavoError, match=part):
        load_scheme(data)


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({}, 64),
        ({"dtype": "int4"}, 32),
        ({"dtype": "fp8_e5m2"}, 64),
        ({"granularity": "token", "dynamic": True}, 64 + 4),
        ({"dtype": "int4", "granularity": "token", "dynamic": True, "symmetric": False}, 32 + 8),
        ({"dtype": "int4", "granularity": "token", "dynamic": True, "group_size": 32}, 32 + 8),
        ({"dtype": "int3"}, 24),
        ({"dtype": "int2", "granularity": "token", "dynamic": True, "scale_dtype": "float16"}, 16 + 2),
        ({"dtype": "int2", "dynamic": True, "symmetric": False, "group_size": 32}, 16 + 64 * 8 / 32),
        ({"dtype": "int4", "outliers": 2}, 32 + 2 * 3),
        ({**TOKEN, "dtype": "int4", "tile": 128}, 32 + 4 + 4 * 64 / 128),
        ({**CHANNEL, "tile": 32, "scale_dtype": "float16"}, 16 + 2 * 64 / 32 + 2),
        ({**CHANNEL, "wide_share": 0.125}, 16 + 4 * 64 / 32 + 8 * (2 / 8 + 1 / 32)),
        ({**CHANNEL, "dtype": "int4", "wide_dtype": "int8", "wide_share": 0.01}, 32 + 4 * 64 / 32 + 4 / 8 + 1 / 32),
        ({**TOKEN, "group_size": 32, "scale_dtype": "e8m0"}, 64 + 2),
        ({**TOKEN, "dtype": "int4", "levels": "e2m1", "group_size": 16, "scale_dtype": "fp8_e4m3"}, 32 + 4),
        ({**TOKEN, "dtype": "int3", "scale_dtype": "float16", "residual_sign": True}, 24 + 2 + 8 + 2),
        ({**CHANNEL, "symmetric": False, "group_size": 64, "scale_dtype": "fp8_e4m3"}, 16 + 2 * 64 / 64),
    ],
)
def test_bits_of_a_token_count_its_scales(fields: dict[str, Any], size: float) -> None:
    assert Codec(**fields).token_bits(64) == 8 * size


def test_groups_divide_a_head() -> None:
    with pytest.raises(OctavoError, match="head of 80"):
        Codec(granularity="token", dynamic=True, group_size=32).channel_groups(80)


def test_numbers_of_wider_channels_have_8_bits() -> None:
    codec = Codec(**CHANNEL, wide_share=0.125)
    assert (codec.wide_channels(256), codec.wide_channels(4)) == (32, 1)
    with pytest.raises(OctavoError, match="up to 256 channels, not 264"):
        codec.wide_channels(264)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[]", "'name'"),
        ('{"name": "x", "name": "y"}', "twice"),
        ('{"name": "x", "key": {"fixed_scale": NaN}}', "NaN"),
        ('{"a":' * 10_000 + "1" + "}" * 10_000, "nested"),
        ('{"name": "x", "origin": ' + "[" * 100 + "]" * 100 + "}", "nested"),
    ],
    ids=["a list", "a name twice", "NaN", "10,000 levels", "100 levels"],
)
def test_a_file_that_holds_no_scheme(text: str, part: str, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(OctavoError, match=part):
        load_scheme(tmp_path / "mine.json")


def test_a_codec_of_ones_own() -> None:
    mixed = Scheme("mine", key=Codec(granularity="channel"), value=Codec(granularity="token", dynamic=True))
    assert mixed.is_static and Scheme.from_dict(mixed.to_dict()) == mixed


def test_layers_of_other_schemes() -> None:
    data = {**load_scheme("octavo-4").to_dict(), "layers": {"0": "ascend-c8", "1-2": {"window": 32, "sinks": 0}}}
    scheme = Scheme.from_dict({**data, "float_layers": [5]})
    assert Scheme.from_dict(scheme.to_dict()) == scheme and scheme.is_static and not scheme.has_codebooks
    assert scheme.of_layer(0) == load_scheme("ascend-c8") and scheme.of_layer(5).key is None
    for layer in (1, 2):
        assert (scheme.of_layer(layer).window, scheme.of_layer(layer).sinks) == (32, 0)
        assert scheme.of_layer(layer).key == load_scheme("octavo-4").key
    assert scheme.of_layer(3) == load_scheme("octavo-4")


def test_scales_of_one() -> None:
    ones = load_scheme("vllm-fp8-head").with_scales_of_one()
    assert not ones.is_static and {c.granularity for c in (ones.key, ones.value, ones.query)} == {"tensor"}
    with pytest.raises(OctavoError, match="int8"):
        load_scheme("ascend-c8").with_scales_of_one()
    mixed = Scheme.from_dict({**load_scheme("vllm-fp8").to_dict(), "layers": {"0": "ascend-c8"}})
    with pytest.raises(OctavoError, match="layers"):
        mixed.with_scales_of_one()


@pytest.mark.parametrize("width", [16, 257])
def test_outliers_have_room(width: int) -> None:
    with pytest.raises(OctavoError, match="16 outliers"):
        Codec(granularity="token", dynamic=True, outliers=16).stored_width(width)
    assert Codec(granularity="token", dynamic=True, outliers=16).stored_width(17) == 17
