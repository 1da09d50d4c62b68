"""Random sequences of all that can be done to a cache, against a cache built anew from the tokens that are left.

make stateful STEPS=10000

runs so many steps on every scheme instead of the few that CI does, and says how much memory they took.
"""

import gc
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as some
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from octavo.common.convert.calibration.whole import calibrate_whole
from octavo.common.errors import OctavoError
from octavo.common.runtime.attention import SlidingWindow, quantized_attention
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.schemes.kv_scheme import PRESETS, Scheme, load_scheme
from octavo.common.runtime.static_scales import Scales, scales_of

from ....support import random_ids, shortened, tiny_config, tiny_llama
from ....tolerances import TOLERANCES

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = int(os.environ.get("OCTAVO_STATEFUL_STEPS", "25"))
STEPS_AT_A_TIME = 50
EXAMPLES_AT_A_TIME = 20
LAYERS, HEADS, GROUPS, WIDTH = 2, 4, 2, 64
SIZES = {"num_hidden_layers": LAYERS, "hidden_size": 64, "head_dim": WIDTH}
MOST_TOKENS, MOST_ROWS = 330, 4
WINDOW = 20
CONFIG = tiny_config(**SIZES)
SLIDING = tiny_config(**SIZES, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])
Pair = tuple[torch.Tensor, torch.Tensor]


def changed(preset: str, **fields: Any) -> Scheme:
    """A preset with other fields."""
    return Scheme.from_dict({**load_scheme(preset).to_dict(), **fields})


SCHEMES = {
    **{name: shortened(load_scheme(name)) for name in PRESETS},
    "smoothed": changed("int8-token", smooth_key=True),
    "smoothed in groups": changed("octavo-4", smooth_key=True),
    "first pass in float": changed("ascend-c8", prefill="float"),
    "layers that differ": changed("octavo-2", layers={"1": "int8-token"}),
    "zeros in a byte": changed("octavo-2", key={**load_scheme("octavo-2").key.to_dict(), "scale_dtype": "fp8_e4m3"}),
}

SCHEMES_THAT_SLIDE = (
    "float",
    "int8-token",
    "ascend-c8",
    "kitty-2",
    "kivi-2",
    "kvarn-2",
    "kvquant-4",
    "octavo-4",
    "smoothed",
)
"""Of a model whose first layer slides."""


def scales_for(scheme: Scheme) -> Scales | None:
    """Of a calibration of a tiny Llama."""
    if not scheme.is_static:
        return None
    model, samples = tiny_llama(**SIZES), [{"input_ids": random_ids(1, 250)}]
    return scales_of(scheme, calibrate_whole(model, samples, map(load_scheme, PRESETS)))


class CacheMachine(RuleBasedStateMachine):
    """A cache of one scheme, and K and V of the tokens it should hold, `[B, G, S, D]` per layer.

    Values are multiples of 1/64 and D is 64, so that sums of a rotation by Hadamard matrices are exact however many
    tokens are rotated at a time.
    """

    scheme: Scheme
    scales: Scales | None
    is_sliding = False
    steps = 0

    @initialize(
        room=some.sampled_from([0, 5, 64]),
        is_fixed=some.booleans(),
        compileable=some.booleans(),
        prompt=some.integers(1, 250),
        rows=some.integers(1, MOST_ROWS),
    )
    def start(self, room: int, is_fixed: bool, compileable: bool, prompt: int, rows: int) -> None:
        compileable = compileable and self.scheme.is_compileable
        self.room = room
        self.arguments = {"scales": self.scales, "crop_room": room, "compileable": compileable}
        self.max_length = MOST_TOKENS if is_fixed or compileable else None
        self.used = self.new_cache()
        self.generator = torch.Generator().manual_seed(room)
        self.forget(rows=None)
        self.update(prompt, rows, [])

    def new_cache(self, is_sliding: bool | None = None) -> QuantizedCache:
        config = SLIDING if (self.is_sliding if is_sliding is None else is_sliding) else CONFIG
        return QuantizedCache(config, self.scheme, max_length=self.max_length, **self.arguments)

    def forget(self, rows: int | None) -> None:
        """There are no tokens; storage is of so many rows, or there is none."""
        self.rows = rows
        self.tokens: list[Pair] = []
        self.first = self.newest = self.longest = 0

    @property
    def length(self) -> int:
        return self.tokens[0][0].shape[2] if self.tokens else 0

    def random(self, heads: int, tokens: int) -> torch.Tensor:
        values = torch.randn((self.rows, heads, tokens, WIDTH), generator=self.generator)
        return (values * 64).round() / 64

    def check_length(self) -> None:
        type(self).steps += 1
        assert int(self.used.get_seq_length()) == self.length

    def check_memory(self) -> None:
        """No more is allocated than a new cache would that had held as many tokens."""
        other = self.new_cache()
        for layer in range(LAYERS):
            zeros = torch.zeros((self.rows, GROUPS, self.longest, WIDTH))
            other.update(zeros, zeros, layer)
        assert self.used.nbytes() <= other.nbytes()

    def replayed(self, cuts: list[int]) -> QuantizedCache:
        """A new cache of the tokens that are left, given in passes of other sizes; it forgets nothing."""
        other, sizes, left = (
            self.new_cache(is_sliding=False),
            [self.first] if self.scheme.smooth_key else [],
            self.length,
        )
        left -= sum(sizes)
        for cut in cuts:
            sizes.append(min(cut, left))
            left -= sizes[-1]
        for layer, (keys, values) in enumerate(self.tokens):
            for key, value in zip(keys.split([*sizes, left], 2), values.split([*sizes, left], 2), strict=True):
                if key.shape[2]:
                    other.update(key, value, layer)
        return other

    @precondition(lambda self: self.length < MOST_TOKENS)
    @rule(
        tokens=some.one_of(some.integers(1, 4), some.integers(1, 90)),
        rows=some.integers(1, MOST_ROWS),
        cuts=some.lists(some.integers(1, 120), max_size=3),
    )
    def update(self, tokens: int, rows: int, cuts: list[int]) -> None:
        """What attention reads is what it would from a cache that is built anew."""
        tokens = min(tokens, MOST_TOKENS - self.length)
        other = self.replayed(cuts) if self.length else self.new_cache(is_sliding=False)
        self.rows = self.rows or rows
        new = [(self.random(GROUPS, tokens), self.random(GROUPS, tokens)) for _ in range(LAYERS)]
        query = self.random(HEADS, tokens)
        for layer, pair in enumerate(new):
            mask = SlidingWindow(WINDOW) if self.is_sliding and layer == 0 else None
            found, wanted = (
                quantized_attention(torch.nn.Module().eval(), query, *each.update(*pair, layer), mask)[0]
                for each in (self.used, other)
            )
            torch.testing.assert_close(found, wanted, atol=TOLERANCES["attention"], rtol=0)
        if self.length:
            self.tokens = [
                (torch.cat((k, key), 2), torch.cat((v, value), 2))
                for (k, v), (key, value) in zip(self.tokens, new, strict=True)
            ]
        else:
            self.tokens, self.first = new, tokens
        self.newest = max(self.newest, self.length)
        self.longest = max(self.longest, self.length)
        self.check_length()
        self.check_memory()

    @precondition(lambda self: self.length)
    @rule(amount=some.one_of(*(some.integers(0, most) for most in (5, 64, 64, 64, 100, MOST_TOKENS + 9))))
    def crop(self, amount: int) -> None:
        """As if the tokens had never come, or refused, and nothing is changed."""
        left = max(0, self.length - amount)
        before = [part.clone() for part in self.parts()]
        try:
            self.used.crop(-amount)
        except OctavoError as error:
            assert "\n" not in str(error)
            is_smoothed = self.scheme.smooth_key and left < self.first
            has_room = self.scheme.is_segmented or self.is_sliding
            assert left > 0 and (is_smoothed or (has_room and left < self.newest - self.room))
            assert all(self.same(now, then) for now, then in zip(self.parts(), before, strict=True))
        else:
            if left == 0:
                longest = self.longest
                self.forget(self.rows)
                self.longest = longest
            self.tokens = [(key[:, :, :left], value[:, :, :left]) for key, value in self.tokens]
        self.check_length()

    def parts(self) -> list[torch.Tensor]:
        stores = [store for layer in self.used.layers for store in (layer.key_store, layer.value_store)]
        return [part for store in stores for part in store.parts()]

    @staticmethod
    def same(one: torch.Tensor, other: torch.Tensor) -> bool:
        return one.shape == other.shape and torch.equal(one.view(torch.uint8), other.view(torch.uint8))

    def choose(self, indices: torch.Tensor) -> None:
        """Rows of the tokens and of the storage."""
        self.tokens = [(key[indices], value[indices]) for key, value in self.tokens]
        self.rows = len(indices)
        self.check_length()

    @precondition(lambda self: self.rows)
    @rule(data=some.data())
    def reorder(self, data: Any) -> None:
        indices = data.draw(some.lists(some.integers(0, self.rows - 1), min_size=self.rows, max_size=self.rows))
        self.used.reorder_cache(torch.tensor(indices))
        self.choose(torch.tensor(indices))

    @precondition(lambda self: self.rows and 2 * self.rows <= MOST_ROWS)
    @rule()
    def repeat(self) -> None:
        self.used.batch_repeat_interleave(2)
        self.choose(torch.arange(self.rows).repeat_interleave(2))

    @precondition(lambda self: self.rows)
    @rule(data=some.data())
    def select(self, data: Any) -> None:
        indices = data.draw(some.lists(some.integers(0, self.rows - 1), min_size=1, max_size=self.rows))
        self.used.batch_select_indices(torch.tensor(indices))
        self.choose(torch.tensor(indices))

    @rule(number=some.integers(0, 9))
    def offload_or_reset(self, number: int) -> None:
        """A reset now and then, so that caches grow long between."""
        if number == 0:
            self.used.reset()
            self.forget(self.rows if self.max_length else None)
        else:
            for layer in self.used.layers:
                layer.offload()
                layer.prefetch()
        self.check_length()


def resident_megabytes() -> float:
    """Memory of this process; 0 where Linux does not tell."""
    file = Path("/proc/self/statm")
    return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6 if file.exists() else 0.0


@pytest.mark.parametrize(
    ("name", "is_sliding"), [*((name, False) for name in SCHEMES), *((name, True) for name in SCHEMES_THAT_SLIDE)]
)
def test_a_cache_is_what_the_tokens_that_are_left_make_of_a_new_one(name: str, is_sliding: bool) -> None:
    scheme = SCHEMES[name]

    class Machine(CacheMachine):
        pass

    Machine.scheme, Machine.scales, Machine.steps, Machine.is_sliding = scheme, scales_for(scheme), 0, is_sliding
    resident = []
    while Machine.steps < STEPS:
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=min(EXAMPLES_AT_A_TIME, math.ceil((STEPS - Machine.steps) / STEPS_AT_A_TIME)),
                stateful_step_count=min(STEPS, STEPS_AT_A_TIME),
                derandomize=STEPS <= STEPS_AT_A_TIME,  # few are the same each time
                deadline=None,
                suppress_health_check=list(HealthCheck),
                print_blob=True,
                database=None,
            ),
        )
        gc.collect()
        resident.append(resident_megabytes())
    print(f"{name}: {Machine.steps} steps, resident memory {resident[0]:.0f} MB, in the end {resident[-1]:.0f} MB")
    assert resident[-1] <= 1.2 * resident[0]
