"""What the commands share."""

from octavo.common.command import aligned


def test_texts_begin_and_figures_end_below_each_other() -> None:
    rows = [("case", "ms", ""), ("a", "1.5", ""), ("bc", "10.5", "best")]
    assert aligned(rows) == ["case  ms", "a     1.5", "bc    10.5  best"]
    assert aligned(rows, texts=1) == ["case    ms", "a      1.5", "bc    10.5  best"]
