"""The page as Chromium shows it: plots drawn, the table sorted by a click, narrow screens and dark ones."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .fabricated import some_records
from .test_page import made

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None, reason="no chromium and chromedriver here: apt install chromium-driver"
    ),
]
LENGTHS = (512, 2048)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium that reaches nothing."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER)) as found:
        yield found


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Any:
    """The browser, with the page of fabricated results."""
    file = tmp_path / "index.html"
    file.write_text(made(LENGTHS), encoding="utf-8")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.get(file.as_uri())
    return browser


def _narrow(browser: Any) -> None:
    screen = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)


def _lightness(browser: Any, selector: str, part: str) -> float:
    """The mean of red, green and blue, 0 to 255, of a computed colour."""
    script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    numbers = browser.execute_script(script, selector, part).partition("(")[2].rstrip(")").split(",")
    return sum(map(float, numbers[:3])) / 3


@pytest.mark.parametrize("narrow", [False, True])
def test_plots_are_drawn(opened: Any, narrow: bool) -> None:
    if narrow:
        _narrow(opened)
    script = """return [...document.querySelectorAll("svg")].map((svg) => {
        const frame = svg.getBoundingClientRect();
        const marks = [...svg.querySelectorAll("circle, rect, path.line")].map((mark) => mark.getBoundingClientRect());
        const inside = (box) => box.left >= frame.left - 1 && box.right <= frame.right + 1;
        return {width: frame.width, height: frame.height, marks: marks.length, drawn: marks.filter(
            (box) => box.width > 0 && box.height > 0 && inside(box)).length};
    })"""
    found = opened.execute_script(script)
    assert len(found) == 5
    for plot in found:
        assert plot["width"] > 250 and plot["height"] > 180
        assert plot["marks"] == plot["drawn"] >= len(some_records()) - 1


def test_a_click_sorts_the_table_and_another_turns_it_round(opened: Any) -> None:
    button = next(each for each in opened.find_elements("css selector", "thead button") if each.text == "bits")

    def bits() -> list[float]:
        cells = opened.find_elements("css selector", "tbody td:nth-child(2)")
        return [float(cell.text) for cell in cells]

    before = bits()
    button.click()
    assert bits() == sorted(before) != before
    button.click()
    assert bits() == sorted(before, reverse=True)
    assert opened.find_element("css selector", "th[aria-sort]").get_attribute("aria-sort") == "descending"


def test_what_has_no_figure_comes_last_either_way(opened: Any) -> None:
    button = next(each for each in opened.find_elements("css selector", "thead button") if each.text == "KL")
    for _ in range(2):
        button.click()
        names = [each.text for each in opened.find_elements("css selector", "tbody th")]
        assert names[-1] == "float"


def test_a_narrow_screen_scrolls_nothing_but_the_table(opened: Any) -> None:
    _narrow(opened)
    wide = opened.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide == [400, 400]
    box, table = opened.execute_script(
        "const box = document.querySelector('.scroll'); return [box.clientWidth, box.scrollWidth]"
    )
    assert box < 400 < table
    smallest = opened.execute_script(
        """return Math.min(...[...document.querySelectorAll("svg text")].map(
            (text) => text.getBoundingClientRect().height).filter((height) => height > 0))"""
    )
    assert smallest > 8


@pytest.mark.parametrize(("scheme", "is_dark"), [("light", False), ("dark", True)])
def test_text_stands_out_in_the_light_and_in_the_dark(opened: Any, scheme: str, is_dark: bool) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    paper = _lightness(opened, "body", "backgroundColor")
    for selector, part in (("body", "color"), ("svg text", "fill"), ("svg text.name", "fill"), ("td", "color")):
        ink = _lightness(opened, selector, part)
        assert (ink > paper) is is_dark and abs(ink - paper) > 90


def test_the_page_reports_no_error(opened: Any) -> None:
    assert [entry for entry in opened.get_log("browser") if entry["level"] == "SEVERE"] == []
