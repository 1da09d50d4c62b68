"""The page, of fabricated results: whole, escaped, and in need of nothing from elsewhere."""

import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from octavo.comparing.advice import advise
from octavo.comparing.candidates import STEP
from octavo.comparing.contributions import contributions_of
from octavo.comparing.page import page
from octavo.comparing.plots import plots_of
from octavo.comparing.rows import row_of
from octavo.comparing.table import markdown, table_of

from .fabricated import HOSTILE, float_record, record, some_records, step_records

VOID = {"meta"}


class Outline(HTMLParser):
    """What tags are open and closed, and the text between them; raw text of style and script apart."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.cells: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("th", "td"):
            self.cells.append(data)
        self.text += data


def made(records: list[dict[str, Any]], model: str = "tiny") -> str:
    measured = [row_of(found) for found in records]
    rows = [row for row in measured if row.kind != STEP]
    contributions = contributions_of(rows[0], [row for row in measured if row.of])
    return page(model, rows, advise(rows, 0.01), ["text: <b>one</b>"], contributions)


def test_tags_close_in_order_and_every_candidate_has_its_row() -> None:
    outline = Outline()
    outline.feed(made(some_records(), f"a {HOSTILE}"))
    outline.close()
    assert outline.open == []
    names = [found["name"] for found in some_records()]
    assert [cell for cell in outline.cells if cell in names] == names
    assert f"a {HOSTILE}: schemes compared" in outline.text and "Choose octavo-4" in outline.text


def test_names_are_escaped_wherever_they_stand() -> None:
    text = made(some_records(), HOSTILE)
    assert HOSTILE not in text and "<b>one" not in text and text.count("<script>") == 1


@pytest.mark.parametrize("lengths", [(512,), (512, 2048)])
def test_nothing_is_fetched(lengths: tuple[int, ...]) -> None:
    outline, text = Outline(), made(some_records(lengths))
    outline.feed(text)
    assert outline.links == [] and not re.search(r"https?:|url\(|@import|<link|<img|fetch\(", text)


def test_what_options_add_has_a_section_of_its_own() -> None:
    text = made([*some_records(), *step_records()])
    outline = Outline()
    outline.feed(text)
    assert outline.open == [] and "What each option of four adds" in outline.text and "<b>" not in text
    assert "four up to linears" not in outline.text, "steps are in no other plot and table"
    assert "What each option of" not in made(some_records())


def test_plots_are_drawn_within_their_frames() -> None:
    rows = [row_of(found) for found in some_records((512, 2048))]
    plots = plots_of(rows)
    assert [plot.title for plot in plots] == [
        "What bits buy",
        "Recall (key-value) at 512 tokens",
        "Recall (key-value) at 2,048 tokens",
        "Time of a written token against context",
        "Memory of the cache against context",
    ]
    for plot in plots:
        drawing = ElementTree.fromstring(plot.svg)
        marks = [*drawing.iter("circle"), *(p for p in drawing.iter("path") if "line" in p.get("class", ""))]
        assert len(marks) == len(rows) - (plot.title == "What bits buy")
        for numbers in re.findall(r"M[\d. L]+", plot.svg):
            assert all(0 <= float(number) <= 400 for number in re.findall(r"[\d.]+", numbers))


def test_one_length_makes_bars_and_no_text_no_plot_of_kl() -> None:
    rows = [row_of(found) for found in (float_record(), record("a", 4.0))]
    assert [plot.title for plot in plots_of(rows)][1] == "Time of a written token at 512 tokens"
    bare = [row_of(found) for found in (float_record(lengths=()), record("a", 4.0, lengths=()))]
    assert [plot.title for plot in plots_of(bare)] == ["Memory of the cache against context"]
    assert "KL" not in table_of(bare).heads


def test_as_many_schemes_as_there_are_stay_within_a_plot() -> None:
    """Names that would cover others are left to the table and to what is shown when a point is pointed at."""
    rows = [row_of(found) for found in [float_record(), *(record(f"s{i}", 4 + i / 99, 0.01) for i in range(30))]]
    svg = plots_of(rows)[0].svg
    assert svg.count("<circle") == 30 and 1 <= svg.count('class="name"') < 30
    assert svg.count("<title>") == 30
    times = plots_of(rows)[2].svg
    assert times.count("<rect") == 31 and 'viewBox="0 0 400 608"' in times


def test_a_long_name_is_cut_where_it_stands_before_a_bar() -> None:
    rows = [row_of(found) for found in [float_record(), record("a-scheme-with-a-long-name", 4.0, 0.01)]]
    times = plots_of(rows)[2].svg
    assert ">a-scheme-with-a-l\N{HORIZONTAL ELLIPSIS}<" in times and ">a-scheme-with-a-long-name: " in times


def test_the_table_is_the_same_in_markdown() -> None:
    rows = [row_of(found) for found in [float_record(), record("a|b", 4.0, 0.01)]]
    lines = markdown(table_of(rows)).splitlines()
    assert lines[0].startswith(
        "| name | bits | KL | perplexity | top-1 | key-value 512 | as float for | cache at 512, MB"
    )
    assert lines[1].startswith("| --- | ---: | ---: |") and lines[3].startswith(r"| a\|b | 4.00 | 0.01000 | +0.05 % |")
    assert "| 6 of 8 |" in lines[3] and len(lines) == 4
