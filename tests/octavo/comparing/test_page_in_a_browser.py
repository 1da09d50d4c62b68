"""The page as Chromium shows it: plots drawn, the table sorted, narrow screens and dark ones, and nothing fetched."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .fabricated import many_records, some_records, step_records
from .test_page import made

webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium here: it is in requirements-test.txt")
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None, reason="no chromium and chromedriver here: apt install chromium-driver"
    ),
]
LENGTHS = (512, 2048)
CONTRAST, MARK_CONTRAST = 4.5, 3.0
"""What WCAG 2.2 asks of text (1.4.3), and of what else has a meaning (1.4.11)."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium that writes down what it asks for."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER)) as found:
        yield found


@pytest.fixture
def shown(browser: Any, tmp_path: Path) -> Callable[[list[dict[str, Any]]], Any]:
    """Shows the page of some results in the browser."""

    def show(records: list[dict[str, Any]]) -> Any:
        file = tmp_path / "index.html"
        file.write_text(made(records), encoding="utf-8")
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        for kind in ("browser", "performance"):
            browser.get_log(kind)  # so that what pages before this one did is gone
        browser.get(file.as_uri())
        return browser

    return show


@pytest.fixture
def opened(shown: Callable[[list[dict[str, Any]]], Any]) -> Any:
    """The browser, with the page of a few results, and of the options of one."""
    return shown([*some_records(LENGTHS), *step_records(LENGTHS)])


@pytest.fixture(params=["few", "many"])
def page_of(request: pytest.FixtureRequest, shown: Callable[[list[dict[str, Any]]], Any]) -> Any:
    """The browser, with the page of a few results, and with one of as many as there are schemes, and of options."""
    return shown(some_records(LENGTHS) if request.param == "few" else [*many_records(LENGTHS), *step_records(LENGTHS)])


def _narrow(browser: Any) -> None:
    screen = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)


@pytest.mark.parametrize("narrow", [False, True])
def test_plots_are_drawn_within_their_frames(page_of: Any, narrow: bool) -> None:
    if narrow:
        _narrow(page_of)
    found = page_of.execute_script(
        """return [...document.querySelectorAll("svg")].map((svg) => {
            const frame = svg.getBoundingClientRect();
            const inside = ({left, right, top, bottom}) => left >= frame.left - 1 && right <= frame.right + 1
                && top >= frame.top - 1 && bottom <= frame.bottom + 1;
            const marks = [...svg.querySelectorAll("circle, rect, path.line")].map((it) => it.getBoundingClientRect());
            return {title: svg.getAttribute("aria-label"), width: frame.width, height: frame.height,
                marks: marks.length,
                drawn: marks.filter((box) => box.width > 0 && box.height > 0 && inside(box)).length};
        })"""
    )
    rows = len(_table(page_of).find_elements("css selector", "tbody tr"))
    plots = [plot for plot in found if "option" not in plot["title"]]
    assert len(plots) == 5
    for plot in plots:
        assert plot["marks"] == plot["drawn"] >= rows - 1, plot
    for plot in found:
        assert plot["width"] > 250 and plot["height"] > 180 and plot["marks"] == plot["drawn"] >= 4, plot


@pytest.mark.parametrize("narrow", [False, True])
def test_texts_of_plots_cover_neither_each_other_nor_the_frame(page_of: Any, narrow: bool) -> None:
    if narrow:
        _narrow(page_of)
    found = page_of.execute_script(
        """const less = ({left, right, top, bottom}) => [left + 1, top + 2, right - 1, bottom - 2];
        return [...document.querySelectorAll("svg")].map((svg) => ({
            frame: svg.getBoundingClientRect().toJSON(), lines: [...svg.querySelectorAll(".grid path")].map((it) =>
                it.getBoundingClientRect().toJSON()),
            texts: [...svg.querySelectorAll("text")].map((it) => [it.textContent, it.classList.contains("name"),
                less(it.getBoundingClientRect())])}))"""
    )
    for plot in found:
        frame, texts = plot["frame"], plot["texts"]
        assert texts
        for index, (text, is_name, box) in enumerate(texts):
            assert frame["left"] <= box[0] < box[2] <= frame["right"], text
            assert frame["top"] - 2 <= box[1] < box[3] <= frame["bottom"] + 2, text
            assert not [other for other, _, place in texts[:index] if _overlap(box, place)], text
            for line in () if is_name else plot["lines"]:  # what stands at an axis keeps out of the plot
                assert not _overlap(box, [line[side] for side in ("left", "top", "right", "bottom")]), text


def _overlap(one: list[float], other: list[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _table(browser: Any, heading: str = "All figures") -> Any:
    """The table behind a heading."""
    return browser.find_element("xpath", f"//h2[.='{heading}']/following::table[1]")


def _head(table: Any, name: str) -> Any:
    return next(each for each in table.find_elements("css selector", "thead button") if each.text == name)


def _numbers(table: Any, column: int) -> list[float]:
    return [float(cell.text) for cell in table.find_elements("css selector", f"tbody td:nth-child({column})")]


def test_a_click_sorts_the_table_and_another_turns_it_round(opened: Any) -> None:
    table = _table(opened)
    button, before = _head(table, "bits"), _numbers(table, 2)
    button.click()
    assert _numbers(table, 2) == sorted(before) != before
    button.click()
    assert _numbers(table, 2) == sorted(before, reverse=True)
    assert table.find_element("css selector", "th[aria-sort]").get_attribute("aria-sort") == "descending"


def test_tables_are_sorted_apart(opened: Any) -> None:
    figures, options = _table(opened), _table(opened, "What each option of four adds")
    before = _numbers(figures, 2)
    assert _numbers(options, 2) == [0.001, 0.3, -0.2, 0.01], "what each adds to those before it"
    _head(options, "KL it adds").click()
    assert _numbers(options, 2) == [-0.2, 0.001, 0.01, 0.3] and _numbers(figures, 2) == before


def test_the_keyboard_sorts_it_too(opened: Any) -> None:
    table, body = _table(opened), opened.find_element("css selector", "body")
    before = _numbers(table, 2)
    body.send_keys(Keys.TAB)
    assert opened.switch_to.active_element.text == "name"
    opened.switch_to.active_element.send_keys(Keys.TAB)
    head = opened.switch_to.active_element
    assert head.text == "bits" and head.value_of_css_property("outline-style") == "solid"
    head.send_keys(Keys.ENTER)
    assert _numbers(table, 2) == sorted(before) != before
    head.send_keys(Keys.SPACE)
    assert _numbers(table, 2) == sorted(before, reverse=True)


def test_what_has_no_figure_comes_last_either_way(opened: Any) -> None:
    table = _table(opened)
    for _ in range(2):
        _head(table, "KL").click()
        names = [each.text for each in table.find_elements("css selector", "tbody th")]
        assert names[-1] == "float"


def test_a_narrow_screen_scrolls_nothing_but_tables(page_of: Any) -> None:
    _narrow(page_of)
    assert page_of.execute_script("return [document.documentElement.scrollWidth, innerWidth]") == [400, 400]
    box, table = page_of.execute_script(
        "const box = document.querySelector('.scroll'); return [box.clientWidth, box.scrollWidth]"
    )
    assert box < 400 < table
    outside = page_of.execute_script(
        """return [...document.querySelectorAll("body *")].filter((it) => !it.closest(".scroll")
            && it.getBoundingClientRect().right > 401).map((it) => it.outerHTML.slice(0, 200))"""
    )
    assert outside == []
    smallest = page_of.execute_script(
        """return Math.min(...[...document.querySelectorAll("svg text")].map(
            (text) => text.getBoundingClientRect().height).filter((height) => height > 0))"""
    )
    assert smallest > 8


def _luminance(colour: list[float]) -> float:
    """Of red, green and blue from 0 to 255, as WCAG 2.2 defines it."""
    shares = [value / 255 for value in colour]
    red, green, blue = (share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _contrast(one: list[float], other: list[float]) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("scheme", "is_dark"), [("light", False), ("dark", True)])
def test_texts_and_marks_stand_out_in_the_light_and_in_the_dark(opened: Any, scheme: str, is_dark: bool) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    found = opened.execute_script(
        """const rgb = (text) => text.match(/[0-9.]+/g).map(Number);
        const behind = (it) => { for (; it; it = it.parentElement) {
            const colour = rgb(getComputedStyle(it).backgroundColor);
            if (colour.length === 3 || colour[3] === 1) return colour.slice(0, 3);
        } };
        const texts = [...document.querySelectorAll("body *:not(script, title)")].filter((it) =>
            [...it.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
        const ink = (it) => rgb(getComputedStyle(it)[it.closest("svg") ? "fill" : "color"]);
        const marks = [...document.querySelectorAll("circle, rect, path.line")];
        const paint = (it) => rgb(getComputedStyle(it)[it.matches("path") ? "stroke" : "fill"]);
        return {paper: behind(document.body), texts: texts.map((it) => [it.textContent, ink(it), behind(it)]),
            marks: marks.map((it) => [it.textContent, paint(it), behind(it.closest("figure"))])}"""
    )
    assert (_luminance(found["paper"]) < 0.1) is is_dark
    assert len(found["texts"]) > 100 and len(found["marks"]) > 20
    for kind, least in (("texts", CONTRAST), ("marks", MARK_CONTRAST)):
        assert [what for what, ink, paper in found[kind] if _contrast(ink, paper) < least] == []


def test_the_page_asks_for_nothing_and_reports_no_error(page_of: Any) -> None:
    _head(_table(page_of), "KL").click()
    events = [json.loads(entry["message"])["message"] for entry in page_of.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert asked == [page_of.current_url] and asked[0].startswith("file:")
    assert page_of.get_log("browser") == []
