"""What errors say fits on a line, whatever a damaged file puts into it."""

from octavo.common.errors import MOST_CHARACTERS, OctavoError, did_you_mean


def test_a_message_is_one_line() -> None:
    assert str(OctavoError("config.json: name\n\u2028is odd; mend it")) == "config.json: name is odd; mend it"
    assert str(OctavoError("two  blanks stay")) == "two  blanks stay"


def test_what_is_quoted_at_length_is_cut_and_the_way_out_is_kept() -> None:
    message = str(OctavoError(f"config.json: {'x' * 10**6}; mend it"))
    assert len(message) < MOST_CHARACTERS + 10
    assert message.startswith("config.json: x") and message.endswith("x; mend it")


def test_the_nearest_name_is_told_if_there_is_one() -> None:
    assert did_you_mean("octavo4", ["octavo-4", "int8-token"]) == "; did you mean octavo-4?"
    assert did_you_mean("zzz", ["octavo-4"]) == did_you_mean("", []) == ""


def test_a_shortened_name_is_told_whole() -> None:
    assert did_you_mean("int8", ["int4-token", "int8-token"]) == "; did you mean int8-token?"
    assert did_you_mean("o", ["octavo-4"]) == did_you_mean("", ["octavo-4"]) == ""
