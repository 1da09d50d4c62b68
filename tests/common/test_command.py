"""What the commands share."""

import os

import pytest

from octavo.common.command import PIPE_CLOSED, aligned, run_script


def test_texts_begin_and_figures_end_below_each_other() -> None:
    rows = [("case", "ms", ""), ("a", "1.5", ""), ("bc", "10.5", "best")]
    assert aligned(rows) == ["case  ms", "a     1.5", "bc    10.5  best"]
    assert aligned(rows, texts=1) == ["case    ms", "a      1.5", "bc    10.5  best"]


@pytest.mark.parametrize("is_buffered", [True, False])
def test_a_script_ends_quietly_where_nobody_reads(
    is_buffered: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether the pipe breaks as something is printed, or behind it."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed, monkeypatch.context() as unread:
        unread.setattr("sys.stdout", closed)
        assert run_script(lambda _: print("more than anybody reads", flush=not is_buffered), []) == PIPE_CLOSED
    assert capsys.readouterr().err == ""
