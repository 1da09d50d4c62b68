"""Axes: every value lies on them, and their ticks are few and round."""

import pytest

from octavo.comparing.axes import linear, logarithmic


@pytest.mark.parametrize("values", [[0.3], [2.4, 8.5], [32.0], [0.0], [99.9, 3.0], [1e-3]])
def test_a_linear_axis_begins_at_zero_and_ends_at_a_round_number(values: list[float]) -> None:
    axis = linear("x", values)
    assert axis.low == 0 and axis.high >= max(values) and axis.share(axis.high) == 1
    assert 2 <= len(axis.ticks) <= 8 and axis.ticks[0] == (0, "0")


def test_a_share_ends_at_one() -> None:
    assert [text for _, text in linear("share", [0.4], 1.0).ticks] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]


@pytest.mark.parametrize("values", [[0.01], [1e-8, 3.0], [0.002, 0.004], [5.0, 80.0]])
def test_a_logarithmic_axis_has_room_at_both_ends(values: list[float]) -> None:
    axis = logarithmic("x", values)
    assert 0 < axis.share(min(values)) <= axis.share(max(values)) < 1
    assert 1 <= len(axis.ticks) <= 9 and all(0 <= axis.share(value) <= 1 for value, _ in axis.ticks)
    assert axis.share((min(values) * max(values)) ** 0.5) == pytest.approx(0.5)


def test_ticks_of_tokens_are_those_asked_for() -> None:
    tokens = [256, 512, 1024, 2048]
    assert [text for _, text in logarithmic("tokens", tokens, tokens).ticks] == ["256", "512", "1k", "2k"]
