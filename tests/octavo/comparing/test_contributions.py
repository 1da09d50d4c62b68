"""What options add: differences from step to step, whose sum is the whole."""

import pytest

from octavo.comparing.contributions import contribution_table, contributions_of
from octavo.comparing.plots import contribution_plot
from octavo.comparing.rows import row_of
from octavo.comparing.table import markdown

from .fabricated import float_record, record, step_records

FLOAT = row_of({**float_record(), "weight_bytes": 540_000_000})


def test_each_adds_what_it_adds_to_those_before_it() -> None:
    found = contributions_of(FLOAT, [row_of(each) for each in step_records()])["four"]
    assert [each.option for each in found] == ["cache", "linears", "rounding", "embeddings"]
    assert [each.adds_kl for each in found] == pytest.approx([0.001, 0.3, -0.2, 0.01])
    assert sum(each.adds_kl for each in found) == pytest.approx(found[-1].kl) == pytest.approx(0.111)
    assert [each.saves for each in found] == pytest.approx([1.2032, 340, 0, 100])
    assert found[0].megabytes == pytest.approx(540 + 8.5 * 512 * 100 / 1e6)
    assert found[0].saves_time == pytest.approx(1e3 * (32 - 8.5) * 512e-7) and found[1].saves_time == 0


def test_the_table_says_so_and_leaves_out_what_was_not_measured() -> None:
    found = contributions_of(FLOAT, [row_of(each) for each in step_records()])["four"]
    lines = markdown(contribution_table(found)).splitlines()
    assert lines[0].startswith("| option | KL it adds | KL with it | MB it saves | MB with it | ms a token it saves |")
    assert lines[4].startswith("| rounding | -0.20000 | 0.10100 | 0 | 200.4 | 0 |")
    bare = {**record("whole", 4.0, lengths=()), "step": {"of": "whole", "option": "codes", "stated": "codes"}}
    found = contributions_of(row_of(float_record(lengths=())), [row_of(bare)])["whole"]
    table = contribution_table(found)
    assert table.heads == ("option", "MB it saves", "MB with it", "what states it")
    assert contribution_plot("whole", found) is None


def test_the_plot_goes_from_one_total_to_the_next() -> None:
    found = contributions_of(FLOAT, [row_of(each) for each in step_records()])["four"]
    svg = contribution_plot("four", found).svg
    assert svg.count('class="more"') == 3 and svg.count('class="less"') == 1 and ">-0.2<" in svg
