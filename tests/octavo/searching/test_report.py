"""How what was found is told beside uniform schemes."""

from octavo.common.convert.measure.fidelity import Fidelity
from octavo.searching.held_out import FOUND, Row
from octavo.searching.report import sentence


def row(name: str, bits: float, kl: float, is_uniform: bool = True, is_preset: bool = False) -> Row:
    """A row of figures that nobody measured."""
    return Row(name, bits, None, Fidelity(100, kl, 21.0, 20.0, 0.9), is_preset, is_uniform)


def test_what_differs_by_layer_beats_what_is_alike() -> None:
    said = sentence([row(FOUND, 3.0, 0.02, is_uniform=False), row("octavo-2", 2.6, 0.04, is_preset=True)], "3 bits")
    assert said == (
        "searched: 3.000 bits, KL 0.0200 on held-out text. The best uniform scheme scored, of at most 3 bits, is "
        "octavo-2: 2.600 bits, KL 0.0400; what was found has 50% less."
    )
    assert sentence([row(FOUND, 3.0, 0.02, is_uniform=False)], "3 bits").endswith(
        "No uniform scheme takes at most 3 bits."
    )


def test_what_is_alike_in_all_layers_is_said_to_be() -> None:
    found = row(FOUND, 3.8, 0.02)
    assert sentence([found], "6 ms").endswith(" All layers store the same. No other uniform scheme takes at most 6 ms.")
    assert "All layers store the same. The best other uniform scheme scored" in sentence(
        [found, row("octavo-2", 2.6, 0.04)], "6 ms"
    )
