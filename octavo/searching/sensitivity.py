"""What each coding of K and of V costs in each layer, and what a whole scheme costs on the same text."""

from collections.abc import Callable, Sequence
from functools import cache

from tqdm import tqdm

from ..common.runtime.schemes.kv_scheme import Scheme
from .probe import Probe
from .sides import Side, identity_of
from .store import Store


class Sensitivity:
    """Costs, as KL to the float model, on the text that the choice is made by.

    Args:
        make_probe: makes what measures; called only if something is missing in the store.
        layers: of the model.
        store: of what was measured before.
    """

    def __init__(self, make_probe: Callable[[], Probe], layers: int, store: Store) -> None:
        self._probe, self._layers, self._store = cache(make_probe), layers, store

    def of_sides(self, sides: Sequence[Side]) -> list[list[float]]:
        """KL of each side (column) alone in each layer (row).

        Raises:
            OctavoError: something cannot be measured or written; what was measured before stays.
        """
        rows = []
        with tqdm(total=self._layers * len(sides), desc="search", unit="measurement") as progress:
            for layer in range(self._layers):
                rows.append([])
                for side in sides:
                    progress.set_postfix_str(f"layer {layer}, {side.part} {side.scheme.name}")
                    rows[layer].append(self._of_side(layer, side))
                    progress.update()
        return rows

    def _of_side(self, layer: int, side: Side) -> float:
        return self._store.figure(
            f"layer {layer}", side.identity, lambda: self._probe().kl_of_layer(layer, side.scheme)
        )

    def of_whole(self, scheme: Scheme) -> float:
        """KL of a scheme for all layers."""
        return self._store.figure("whole", identity_of(scheme), lambda: self._probe().kl(scheme))
