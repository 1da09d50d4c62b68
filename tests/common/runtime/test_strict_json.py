"""JSON that came to harm: one line says what is wrong."""

import json

import pytest

from octavo.common.runtime.strict_json import MOST_NESTED, parse_json


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "Expecting value"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' stands there twice"),
        ('{"a": NaN}', "NaN is no number"),
        ("[" * 100_000, "nested too deeply"),
        ("[" * 900 + "]" * 900, "nested too deeply"),
        ('{"a":' * (MOST_NESTED + 1) + "1" + "}" * (MOST_NESTED + 1), "nested too deeply"),
    ],
    ids=["nothing", "a name twice", "NaN", "never closed", "900 levels", "one level too many"],
)
def test_what_is_refused(text: str, part: str) -> None:
    with pytest.raises(ValueError, match=part) as caught:
        parse_json(text)
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_read() -> None:
    data = {"a": [1, 2.5, None, {"b": "c"}], "d": {}}
    assert parse_json(json.dumps(data)) == data
    assert parse_json('{"a": 1, "a": Infinity}', is_strict=False) == {"a": float("inf")}
    deepest = "[" * (MOST_NESTED - 1) + "1" + "]" * (MOST_NESTED - 1)
    assert parse_json(deepest) == json.loads(deepest)
