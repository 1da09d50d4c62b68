"""The one line that a plan ends with."""

import dataclasses

from octavo.planning.advice import advise
from octavo.planning.cache import CacheSize
from octavo.planning.peak import Peak
from octavo.planning.sizes import Unit
from octavo.planning.table import TRANSFORMERS, Row

GB = 10**9


def row(scheme: str, bits: float, longest: int, context: int = 8192, batch: int = 1, is_static: bool = False) -> Row:
    """A row of figures that nobody planned."""
    return Row(
        scheme=scheme,
        context=context,
        batch=batch,
        bits=bits,
        stored=bits,
        token_bytes=int(bits * 100),
        cache=CacheSize(0, 0, 0),
        weights=None,
        peak=Peak(*[0] * 7),
        longest=longest,
        largest=None,
        is_static=is_static,
    )


def at(context: int, rows: list[Row]) -> list[Row]:
    return [dataclasses.replace(each, context=context) for each in rows]


ROWS = [
    row(TRANSFORMERS, 16, 4000),
    row("float", 16, 10_000),
    row("int8-token", 8.5, 20_000),
    row("ascend-c8", 8.0, 21_000, is_static=True),
    row("octavo-4", 4.4, 40_000),
    row("octavo-2", 2.4, 70_000),
]


def said(*plans: list[Row], weights: str = "float", model: str | None = "MODEL", made_for: int | None = None) -> str:
    return advise(plans, weights, model, 24 * GB, Unit("GB"), made_for)


def test_the_most_bits_that_serve_the_longest_context_that_is_served() -> None:
    assert said(at(8192, ROWS), at(32_768, ROWS), at(131_072, ROWS)) == (
        "With 24 GB: float weights + octavo-4 serve 32,768 tokens, and 40,000 at most; octavo doctor MODEL --measure "
        "says what schemes lose"
    )
    assert "int8-token serve 16,384 tokens, and 20,000 at most;" in said(at(16_384, ROWS))


def test_no_more_than_the_model_is_made_for() -> None:
    assert "octavo-4 serve 32,768 tokens; octavo doctor" in said(at(32_768, ROWS), made_for=32_768)
    assert "octavo-4 serve 32,768 tokens, and 36,000 at most;" in said(at(32_768, ROWS), made_for=36_000)


def test_schemes_that_need_calibration_only_where_no_other_is_left() -> None:
    assert "+ octavo-4 serve 20,500 tokens" in said(at(20_500, ROWS))
    assert "+ ascend-c8 serve 20,500 tokens" in said(at(20_500, ROWS[:4]))


def test_floats_that_fit_need_nothing() -> None:
    assert said(at(8192, ROWS), weights="eight-bit") == (
        "With 24 GB: eight-bit weights + a float cache serve 8,192 tokens, and 10,000 at most; no cache has to be "
        "quantized for that"
    )


def test_where_nothing_serves_what_was_asked() -> None:
    some = [dataclasses.replace(each, batch=4) for each in at(131_072, ROWS)]
    assert said(some, at(262_144, ROWS)) == (
        "With 24 GB no scheme serves 4 x 131,072 tokens; float weights + octavo-2 serve 70,000 at most"
    )
    none = [dataclasses.replace(each, longest=0) for each in ROWS]
    assert said(none).endswith("no scheme serves a single token: float weights do not fit; try --preset four-bit")
    assert said(none, weights="four-bit").endswith("four-bit weights do not fit; give more memory")


def test_a_model_without_weights_is_not_sent_to_be_measured() -> None:
    assert said(at(16_384, ROWS), model=None).endswith("serve 16,384 tokens, and 20,000 at most")
