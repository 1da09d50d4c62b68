"""Steps: a preset or scheme with its options put in one by one, the last of them itself."""

from itertools import pairwise
from pathlib import Path

import pytest

from octavo.common.convert.flags import parse_flags, request_of
from octavo.common.convert.presets import RECIPES
from octavo.common.errors import OctavoError
from octavo.common.runtime.schemes.kv_scheme import PRESETS, load_scheme
from octavo.comparing.options import preset_steps, scheme_steps, steps_of


@pytest.mark.parametrize("preset", RECIPES)
def test_every_step_of_every_preset_is_a_conversion(preset: str, tmp_path: Path) -> None:
    steps = preset_steps(preset)
    place = ["--model_path", "m", "--save_directory", str(tmp_path / "o"), "--preset", preset]
    requests = [request_of(parse_flags("llama3", [*place, *step.away])) for step in steps]
    assert [step.option for step in steps][:2] == ["cache", "linears"] and steps[-1].away == ()
    assert requests[0].linear is None and requests[0].anti_method == "" and requests[0].embeddings == "float"
    assert len({request.scheme for request in requests}) == 1, "the cache is in from the first on"
    assert all(one.decisive_fields() != other.decisive_fields() for one, other in pairwise(requests))
    assert requests[-1] == request_of(parse_flags("llama3", place))


def test_flags_that_state_an_option_are_told() -> None:
    told = {step.option: step.about for step in preset_steps("four-bit")}
    assert told == {
        "cache": "--scheme int8-token",
        "linears": "--w_bit 4 --a_bit 16 --group_size 32 --w_sym False --scale_bits 8",
        "rounding": "--w_method GPTQ",
        "embeddings": "--embeddings int8",
    }
    assert preset_steps("ascend")[1].about == "static W8A8"


def test_a_scheme_begins_with_its_codes_and_ends_as_itself() -> None:
    steps = scheme_steps(load_scheme("octavo-2"))
    assert [step.option for step in steps] == ["codes", "rotation", "sinks", "window"]
    assert [(step.scheme.rotate_value, step.scheme.sinks, step.scheme.window) for step in steps] == [
        (False, 0, 0),
        (True, 0, 0),
        (True, 4, 0),
        (True, 4, 8),
    ]
    whole = steps[-1].scheme.to_dict() | {"name": "octavo-2"}
    assert whole == load_scheme("octavo-2").to_dict() and steps[1].name == "octavo-2 up to rotation"


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "float"])
def test_every_scheme_has_its_steps(name: str) -> None:
    assert scheme_steps(load_scheme(name))[0].option == "codes"


def test_what_codes_nothing_or_differs_by_layer_has_no_steps() -> None:
    with pytest.raises(OctavoError, match="--options float: it codes nothing"):
        steps_of("float")
    by_layer = load_scheme({**load_scheme("octavo-2").to_dict(), "name": "found", "layers": {"0": "octavo-3"}})
    with pytest.raises(OctavoError, match="--options found: its layers differ"):
        scheme_steps(by_layer)


def test_an_old_name_of_a_preset_is_taken_and_what_is_neither_is_refused() -> None:
    assert steps_of("memory-first") == preset_steps("four-bit")
    with pytest.raises(OctavoError, match=r"--options octavo-22: is neither a preset nor a scheme.*octavo-2"):
        steps_of("octavo-22")
