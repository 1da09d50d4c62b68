"""What is said of schemes that were measured: the table, and one line of advice."""

import dataclasses

import pytest

from octavo.common.convert.measure.fidelity import Fidelity
from octavo.evaluation.recall import Score
from octavo.recommending.measuring import Limits, Measured
from octavo.recommending.report import advice, command, notes, table


def measured(scheme: str, bits: float, kl: float, fault: str = "", right: int | None = None) -> Measured:
    """A row of figures that nobody measured."""
    score = None if right is None else Score(right, 20)
    return Measured(scheme, bits, int(bits * 1000), Fidelity(511, kl, 20.0 * (1 + kl), 20.0, 0.97), score, fault)


PLAIN = Measured("float", 16.0, 16_000, None)
ROWS = [
    PLAIN,
    measured("octavo-2", 2.5, 0.08, "KL"),
    measured("octavo-4", 4.5, 0.006),
    measured("int8-token", 8.5, 0.0006),
]


def test_a_table_has_the_evidence_and_which_pass() -> None:
    lines = table(ROWS, [1024])
    assert lines[0].split() == ["bits", "bytes", "a", "token", "KL", "perplexity", "top-1"]
    assert lines[1].split() == ["float", "16.00", "16,000", "20.000"]
    assert lines[2].split() == ["octavo-2", "2.50", "2,500", "0.08000", "+8.00", "%", "97.0%", "too", "much", "KL"]
    assert lines[3].endswith("passes") and len({len(line) for line in lines[2:]}) == 1


def test_the_fewest_bits_that_pass_are_advised_with_a_command() -> None:
    assert advice(ROWS, Limits(0.01), "my model") == (
        "Choose octavo-4: of those measured the fewest bits, 4.50, with a KL of 0.01 at most; its KL is 0.006: "
        "octavo convert 'my model' --scheme octavo-4 --save_directory 'my model-octavo-4'"
    )


def test_recall_is_a_limit_of_its_own() -> None:
    rows = [
        dataclasses.replace(PLAIN, recall=Score(20, 20)),
        measured("octavo-2", 2.5, 0.08, "KL"),
        measured("octavo-3", 3.5, 0.009, "recall", 14),
        measured("octavo-4", 4.5, 0.006, "", 19),
    ]
    lines = table(rows, [1024])
    assert "recall 1,024" in lines[0] and lines[1].split()[-1] == "20/20" and lines[3].endswith("14/20  recalls less")
    assert advice(rows, Limits(0.01, 5.0), "m").startswith(
        "Choose octavo-4: of those measured the fewest bits, 4.50, with a KL of 0.01 at most and 5 points of recall "
        "lost at most; its KL is 0.006: "
    )
    said = advice(rows[:3], Limits(0.01, 5.0), "m")
    assert (
        "None of these has" in said and "the nearest is octavo-3, of 3.50 bits, which recalls 14 of 20. Raise" in said
    )


@pytest.mark.parametrize(("right", "said"), [(0, "none"), (9, "9")])
def test_recall_that_float_does_not_show_either_decides_nothing(right: int, said: str) -> None:
    rows = [dataclasses.replace(PLAIN, recall=Score(right, 20)), measured("octavo-4", 4.5, 0.006, "", 0)]
    assert notes(rows)[0].startswith(f"recall: float itself answers {said} of 20")
    assert len(notes(ROWS)) < len(notes(rows))


def test_where_none_passes_the_nearest_is_said() -> None:
    rows = [PLAIN, measured("octavo-2", 2.5, 0.08, "KL"), measured("octavo-3", 3.5, 0.02, "KL")]
    assert advice(rows, Limits(0.01), "m") == (
        "None of these has a KL of 0.01 at most; the nearest is octavo-3, with a KL of 0.02 at 3.50 bits. Raise the "
        "limit, or name others by --schemes"
    )


def test_a_file_of_a_scheme_is_no_part_of_the_output() -> None:
    assert command("../mine.json", "some/model").split()[-2:] == ["--save_directory", "model-octavo"]
