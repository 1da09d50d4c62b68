"""Plots as SVG that stands in a page, whose style sheet colours it, in the light and in the dark."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from .axes import Axis, linear

WIDTH, HEIGHT = 400, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 40
COLOURS = 8
"""Classes `c0`, `c1`, ... of the style sheet; behind the last the first comes again, with a broken line."""
CHARACTER, LINE = 5.6, 11.0
"""Width and height of a character, about."""
ROW, MOST_ROW, NAME = 18.0, 60.0, 18
"""Height of a bar with what is around it, at least and at most, and characters of its name, at most."""


@dataclass(frozen=True)
class Point:
    """A point of a plot.

    Attributes:
        name: written beside it where there is room.
        about: shown when it is pointed at.
        spread: an interval of y.
        colour: its class.
    """

    x: float
    y: float
    name: str
    about: str
    colour: int
    spread: tuple[float, float] | None = None


def colour_class(index: int) -> str:
    """The classes of a series."""
    return f"c{index % COLOURS}" + (" broken" if index // COLOURS % 2 else "")


def _across(axis: Axis, value: float) -> float:
    return LEFT + axis.share(value) * (WIDTH - LEFT - RIGHT)


def _up(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.share(value) * (HEIGHT - TOP - BOTTOM)


def _framed(title: str, x: Axis, y: Axis, inside: Sequence[str]) -> str:
    bottom = HEIGHT - BOTTOM
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">', "<g class='grid'>"]
    for value, text in x.ticks:
        at = _across(x, value)
        parts.append(f'<path d="M{at:.1f} {TOP}V{bottom}"/><text x="{at:.1f}" y="{bottom + 14}">{escape(text)}</text>')
    for value, text in y.ticks:
        at = _up(y, value)
        parts.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="end" x="{LEFT - 5}" y="{at + 3.5:.1f}">{escape(text)}</text>')
    middle = (TOP + bottom) / 2
    parts += [
        f'</g><text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}">{escape(x.label)}</text>',
        f'<text class="label" x="0" y="0" transform="translate(11 {middle}) rotate(-90)">{escape(y.label)}</text>',
        *inside,
        "</svg>",
    ]
    return "\n".join(parts)


def scatter(title: str, x: Axis, y: Axis, points: Sequence[Point], joined: Sequence[tuple[float, float]] = ()) -> str:
    """Points with their names.

    Args:
        joined: places between which a line goes, in order.
    """
    inside = []
    if len(joined) > 1:
        path = "L".join(f"{_across(x, a):.1f} {_up(y, b):.1f}" for a, b in joined)
        inside.append(f'<path class="front" d="M{path}"/>')
    places = [(_across(x, point.x), _up(y, point.y)) for point in points]
    names: list[str] = []
    taken = [(across - 5, up - 5, across + 5, up + 5) for across, up in places]
    for point, (across, up) in zip(points, places, strict=True):
        if point.spread is not None:
            low, high = (_up(y, value) for value in point.spread)
            inside.append(f'<path class="spread" d="M{across:.1f} {low:.1f}V{high:.1f}"/>')
        inside.append(
            f'<circle class="{colour_class(point.colour)}" cx="{across:.1f}" cy="{up:.1f}" r="4.5">'
            f"<title>{escape(point.about)}</title></circle>"
        )
        names += _named(point.name, across, up, taken)
    return _framed(title, x, y, [*inside, *names])


def _named(name: str, across: float, up: float, taken: list[tuple[float, float, float, float]]) -> list[str]:
    """A name beside a point where it covers nothing, if there is such a place."""
    width = CHARACTER * len(name)
    for left, top in (
        (across + 8, up - LINE / 2),
        (across - 8 - width, up - LINE / 2),
        (across - width / 2, up - 9 - LINE),
        (across - width / 2, up + 8),
        (across + 7, up - 6 - LINE),
        (across + 7, up + 6),
        (across - 7 - width, up - 6 - LINE),
        (across - 7 - width, up + 6),
    ):
        box = (left, top, left + width, top + LINE)
        fits = left >= LEFT and box[2] <= WIDTH - 2 and top >= 0 and box[3] <= HEIGHT - BOTTOM
        if fits and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            return [f'<text class="name" x="{left:.1f}" y="{top + LINE - 2:.1f}">{escape(name)}</text>']
    return []


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def lines(title: str, x: Axis, y: Axis, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """A line for each series, the colours in their order."""
    inside = []
    for index, (name, values) in enumerate(series.items()):
        path = "L".join(f"{_across(x, a):.1f} {_up(y, b):.1f}" for a, b in values)
        inside.append(f'<path class="line {colour_class(index)}" d="M{path}"><title>{escape(name)}</title></path>')
    return _framed(title, x, y, inside)


def bars(title: str, label: str, values: Mapping[str, float]) -> str:
    """A bar for each value, its name before it and the value behind it; as high as they need."""
    spans = {name: (0.0, value, f"{value:,.3g}") for name, value in values.items()}
    return _spans(title, label, spans, [colour_class(index) for index in range(len(values))])


def waterfall(title: str, label: str, totals: Mapping[str, float]) -> str:
    """A bar for each step from one total to the next, the first from 0; its colour says whether it goes up or down."""
    spans, before = {}, 0.0
    for name, total in totals.items():
        spans[name] = (before, total, f"{total - before:+,.2g}")
        before = total
    return _spans(title, label, spans, ["less" if end < start else "more" for start, end, _ in spans.values()])


def _spans(title: str, label: str, spans: Mapping[str, tuple[float, float, str]], colours: Sequence[str]) -> str:
    """A bar from one value to another for each name, and a text behind it."""
    axis = linear(label, [1.2 * value for start, end, _ in spans.values() for value in (start, end)])
    row = max(ROW, min((HEIGHT - TOP - BOTTOM) / len(spans), MOST_ROW))
    height, thick = TOP + len(spans) * row + BOTTOM, min(row * 0.6, 14.0)
    inside = []
    for index, (name, (start, end, text)) in enumerate(spans.items()):
        top = TOP + index * row + (row - thick) / 2
        left, right = (110 + axis.share(value) * (WIDTH - 110 - RIGHT) for value in sorted((start, end)))
        short = name if len(name) <= NAME else f"{name[: NAME - 1]}\N{HORIZONTAL ELLIPSIS}"
        inside += [
            f'<text class="name end" x="104" y="{top + thick / 2 + 3.5:.1f}">{escape(short)}</text>',
            f'<rect class="{colours[index]}" x="{left:.1f}" y="{top:.1f}" width="{max(right - left, 1):.1f}" '
            f'height="{thick:.1f}"><title>{escape(name)}: {text}</title></rect>',
            f'<text class="name" x="{right + 4:.1f}" y="{top + thick / 2 + 3.5:.1f}">{text}</text>',
        ]
    return "\n".join(
        [
            f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">',
            *inside,
            f'<text class="label" x="{(110 + WIDTH) / 2}" y="{height - 16:.0f}">{escape(label)}</text>',
            "</svg>",
        ]
    )
