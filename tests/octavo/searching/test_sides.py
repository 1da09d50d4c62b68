"""Sides of schemes, the pairs of them that a layer can store, and the one scheme of many layers."""

import json

import pytest

from octavo.common.errors import OctavoError
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.schemes.kv_scheme import Scheme, load_scheme
from octavo.searching.sides import fields_of, layered, options_of, sides_of

from ...support import tiny_config

OCTAVO = [load_scheme("octavo-2"), load_scheme("octavo-3")]


def test_k_and_v_of_each_scheme_are_apart_with_each_window() -> None:
    sides = sides_of(OCTAVO, [64])
    assert [(side.part, side.scheme.name, side.scheme.window) for side in sides] == [
        (part, name, window) for part in ("key", "value") for name in ("octavo-2", "octavo-3") for window in (8, 64)
    ]
    key, value = sides[0].scheme, sides[-1].scheme
    assert key.value is None and key.key == OCTAVO[0].key and not key.rotate_value
    assert value.key is None and value.value == OCTAVO[1].value and value.rotate_value
    assert len(sides_of([OCTAVO[0], OCTAVO[0]])) == 2


def test_a_pair_shares_its_window_and_is_the_preset_where_both_come_from_it() -> None:
    options = options_of(sides_of(OCTAVO, [64]))
    assert len(options) == 8
    plain = next(option.scheme for option in options if option.scheme.name == "octavo-3, window 8")
    assert fields_of(plain) == fields_of(OCTAVO[1])
    mixed = next(option.scheme for option in options if option.scheme.name == "K octavo-3, V octavo-2, window 64")
    assert (mixed.key, mixed.value, mixed.window) == (OCTAVO[1].key, OCTAVO[0].value, 64)


def test_groups_that_do_not_fit_into_one_another_make_no_pair() -> None:
    odd = Scheme.from_dict({**load_scheme("octavo-8").to_dict(), "name": "odd", "key": {
        "dtype": "int8", "granularity": "channel", "dynamic": True, "symmetric": False, "group_size": 24}})  # fmt: skip
    even = Scheme.from_dict({**load_scheme("octavo-8").to_dict(), "name": "even", "value": {
        "dtype": "int8", "granularity": "channel", "dynamic": True, "symmetric": False, "group_size": 64}})  # fmt: skip
    wrong = Scheme.from_dict({**even.to_dict(), "name": "wrong", "key": None, "value": None})
    names = [option.scheme.name for option in options_of(sides_of([odd, even]))]
    assert any(name.startswith("odd") for name in names) and not any("K odd, V even" in name for name in names)
    with pytest.raises(OctavoError, match="--schemes wrong: leaves K or V in float"):
        sides_of([wrong])


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        (load_scheme("ascend-c8"), "--schemes ascend-c8: needs calibration"),
        (load_scheme("float"), "--schemes float: leaves K or V in float"),
        (Scheme.from_dict({**OCTAVO[0].to_dict(), "layers": {"0": "int8-token"}}), "octavo-2: has layers of its own"),
    ],
)
def test_a_scheme_whose_sides_fit_no_layer_is_refused(scheme: Scheme, said: str) -> None:
    with pytest.raises(OctavoError, match=said):
        sides_of([scheme])


def test_layers_become_runs_beside_the_commonest_and_come_back_from_json() -> None:
    two, three = OCTAVO
    eight = load_scheme("int8-token")
    layers = [three, two, two, two, eight, eight, three]
    found = layered("mine", "a test", layers)
    assert [text for text, _ in found.layers] == ["0", "4-5", "6"]
    again = Scheme.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found
    for index, layer in enumerate(layers):
        assert fields_of(again.of_layer(index)) == fields_of(layer)
    cache = QuantizedCache(tiny_config(num_hidden_layers=7), again)
    assert [layer.scheme.window for layer in cache.layers] == [8, 8, 8, 8, 0, 0, 8]
