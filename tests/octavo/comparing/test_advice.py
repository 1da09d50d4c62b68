"""The advice: computed from the figures, in each case that there is."""

import pytest

from octavo.comparing.advice import advise, front, recalls_as_float
from octavo.comparing.rows import row_of

from .fabricated import float_record, record, some_records


def test_the_fewest_bytes_within_both_bounds_are_chosen() -> None:
    advice = advise([row_of(found) for found in some_records()], 0.01)
    assert advice.choice == "octavo-4" and advice.command == "octavo run model --scheme octavo-4"
    assert (
        "its weights and cache take the fewest bytes, 10.2 MB instead of 11.6 MB, at a KL of 0.006. "
        in advice.sentences
    )
    assert "weights of 10 MB as in float, and at 512 tokens a cache of 0.236 MB instead" in advice.sentences
    assert "an element of K and V takes 4.60 bits instead of 32 at 2,048 tokens" in advice.sentences
    assert "It recalls 9 of 10, float 10" in advice.sentences


def test_the_weights_of_a_conversion_count_beside_the_cache() -> None:
    """Half the weights are more than a few bits of a cache of 512 tokens, and less than those of one without end."""
    small = {**record("preset eight-bit", 8.5, 0.004, kind="preset"), "weight_bytes": 5_000_000}
    found = [float_record(), record("octavo-4", 4.6, 0.002), small]
    advice = advise([row_of(each) for each in found], 0.01)
    assert advice.choice == "preset eight-bit"
    assert "weights of 5 MB instead of 10 MB" in advice.sentences
    assert "5.44 MB instead of 11.6 MB, at a KL of 0.004" in advice.sentences
    found = [{**each, "lengths": {}, "planned_cache_bytes": {"90000": each["bits"] * 9_000_000}} for each in found]
    advice = advise([row_of(each) for each in found], 0.01)
    assert advice.choice == "octavo-4" and "at 90,000 tokens a cache of 41.4 MB" in advice.sentences
    assert advise([row_of(each) for each in found], 0.001).choice is None


@pytest.mark.parametrize(
    ("max_kl", "choice"),
    [(0.0001, None), (0.001, "int8-token"), (0.01, "octavo-4"), (0.1, "octavo-4"), (1.0, "octavo-4")],
)
def test_the_bound_of_kl_counts_and_so_does_recall(max_kl: float, choice: str | None) -> None:
    """10 of 10 have an interval from 0.72, below which 7 of 10 lie."""
    assert advise([row_of(found) for found in some_records()], max_kl).choice == choice


def test_of_as_many_bytes_the_smaller_kl_is_chosen() -> None:
    rows = [row_of(found) for found in (float_record(), record("a", 4.0, 0.005), record("b", 4.0, 0.002))]
    assert advise(rows, 0.01).choice == "b"


def test_where_nothing_is_near_enough_the_nearest_is_named() -> None:
    advice = advise([row_of(found) for found in some_records()], 1e-5)
    assert "Nothing here has a KL of 1e-05 at most; the nearest is int8-token, with 0.0004" in advice.sentences


def test_where_all_recall_less_float_stays() -> None:
    rows = [row_of(found) for found in (float_record(), record("octavo-2", 2.5, 0.001, 5))]
    advice = advise(rows, 0.01)
    assert (
        advice.choice is None and "Stay with float" in advice.sentences and "octavo-2 recall less" in advice.sentences
    )


def test_recall_that_float_has_not_decides_nothing_and_that_is_said() -> None:
    rows = [row_of(found) for found in (float_record(right=0), record("octavo-2", 2.5, 0.001, 0))]
    advice = advise(rows, 0.01)
    assert advice.choice == "octavo-2" and "Float itself recalls 0 of 10, so recall decides nothing" in advice.sentences


def test_without_a_text_recall_alone_decides() -> None:
    rows = [row_of(found) for found in (float_record(), record("a", 4.0), record("b", 2.0, None, 3))]
    advice = advise(rows, 0.01)
    assert advice.choice == "a" and "KL" not in advice.sentences


def test_without_figures_there_is_no_choice() -> None:
    bare = [row_of(found) for found in (float_record(lengths=()), record("a", 4.0, lengths=()))]
    assert advise(bare, 0.01).choice is None and "nothing says what to choose" in advise(bare, 0.01).sentences
    assert "nothing beside float" in advise(bare[:1], 0.01).sentences


def test_the_front_holds_those_that_none_beats_in_both() -> None:
    rows = [row_of(found) for found in [*some_records(), record("worse", 8.6, 0.02)]]
    assert [row.bits for row in front(rows)] == [2.4, 4.5, 4.6, 8.5]
    assert [row.name for row in front(rows)][-1] == "int8-token"
    assert recalls_as_float(rows[2], rows[0]) and not recalls_as_float(rows[3], rows[0])
