"""Times of decode steps: what is run, how many such times become one, and what they are kept for."""

import itertools
from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM

from octavo.common.errors import OctavoError
from octavo.common.runtime.attention import SlidingWindow
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.schemes.kv_scheme import load_scheme
from octavo.common.stock_model import prepare
from octavo.generate import Speaker
from octavo.searching import latency
from octavo.searching.latency import REPEATS, DecodeStep, Stopwatch, Times, check_milliseconds, in_turns, period_of
from octavo.searching.sides import options_of, sides_of
from octavo.searching.store import Store
from octavo.searching.targets import Costs, within_milliseconds

from ...support import random_ids, randomized, tiny_config, tiny_llama, with_cache

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = options_of(sides_of([load_scheme("octavo-2"), load_scheme("octavo-4")]))
"""Four pairs of K and V."""


def sliding_llama() -> torch.nn.Module:
    """Qwen2, whose biases are folded, with one layer of three that slides."""
    torch.manual_seed(0)
    settings = {name: value for name, value in tiny_config().to_dict().items() if name != "model_type"}
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    settings |= {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1, "layer_types": kinds}
    return prepare(randomized(Qwen2ForCausalLM(Qwen2ForCausalLM.config_class(**settings))))


def speaker_of(model: torch.nn.Module) -> Speaker:
    return Speaker(model, None, load_scheme("float"), lambda: None)


def test_a_time_is_the_mean_over_a_group_of_what_is_usual_at_each_place_in_it() -> None:
    """Every fourth token makes codes, which takes 5 s and not 1 s; twice something else holds a step up."""
    counts = itertools.count()
    held_up = {10, 17}
    taken = in_turns([lambda: 100.0 if (at := next(counts)) in held_up else 5.0 if at % 4 == 0 else 1.0], period=4)
    assert taken == [pytest.approx((5 + 1 + 1 + 1) / 4)]
    assert next(counts) == 2 + REPEATS * 4


def test_callables_take_turns() -> None:
    order: list[str] = []
    steps = [lambda name=name: order.append(name) or 1.0 for name in "ab"]
    assert in_turns(steps, period=1) == [1.0, 1.0]
    assert "".join(order) == "ab" * (2 + REPEATS)


def test_groups_of_all_schemes_fit_into_a_period() -> None:
    schemes = [load_scheme(name) for name in ("float", "int8-token", "octavo-2")]
    assert period_of(schemes[:2]) == 1
    assert all(period_of(schemes) % schemes[2].step(codec) == 0 for codec in (schemes[2].key, schemes[2].value))
    assert period_of(schemes) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_appends_a_token_to_its_layers_and_reads_them_as_the_model_does(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = sliding_llama(), []
    attend = latency.quantized_attention

    def watched(*arguments: object, **others: object) -> object:
        asked.append((arguments[0].layer_idx, arguments[4], int(others["position_ids"])))
        output = attend(*arguments, **others)
        assert output[0].shape == (1, 1, 4, 16) and output[0].dtype == dtype and output[0].isfinite().all()
        return output

    monkeypatch.setattr(latency, "quantized_attention", watched)
    step = DecodeStep(model, OPTIONS[1].scheme, [1, 2], tokens=50, room=3, dtype=dtype)
    assert step.seconds() > 0 and step.seconds() > 0
    assert [layer.get_seq_length() for layer in step.cache.layers] == [0, 52, 52]
    assert asked == [(layer, mask, at) for at in (50, 51) for layer, mask in ((1, SlidingWindow(20)), (2, None))]


def test_a_model_is_as_before() -> None:
    model, ids = prepare(tiny_llama()), random_ids(1, 30)
    with torch.inference_mode():
        before = model(ids, **with_cache(QuantizedCache(model.config, "float"))).logits
        DecodeStep(model, OPTIONS[0].scheme, [0], tokens=40, room=2, dtype=torch.float32).seconds()
        assert torch.equal(model(ids, **with_cache(QuantizedCache(model.config, "float"))).logits, before)


def test_one_layer_of_each_window_is_timed_and_what_was_timed_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[tuple[int, str]] = []
    made = DecodeStep.__init__

    def watched(self: DecodeStep, model: object, scheme: object, layers: list[int], *others: object) -> None:
        timed.append((list(layers), scheme.name))
        made(self, model, scheme, layers, *others)

    monkeypatch.setattr(DecodeStep, "__init__", watched)
    stopwatch = [
        Stopwatch(speaker_of(sliding_llama()), torch.float32, 60, Store(tmp_path, {"tokens": 60})) for _ in range(2)
    ]
    found = stopwatch[0].of_options(OPTIONS[:2])
    assert timed == [([layer], option.scheme.name) for layer in (0, 1) for option in OPTIONS[:2]]
    assert found[0] == found[2] != found[1] and min(map(min, found)) > 0
    timed.clear()
    again = stopwatch[1].of_options(OPTIONS)
    assert len(timed) == 4 and [row[:2] for row in again] == found
    timed.clear()
    whole = stopwatch[1].of_whole(OPTIONS[0].scheme)
    assert timed == [([0, 1, 2], OPTIONS[0].scheme.name), ([0, 1, 2], "float")] and min(whole) > 0
    assert stopwatch[1].of_whole(OPTIONS[0].scheme) == whole and len(timed) == 2


def costs_of(seed: int) -> Costs:
    """Three layers whose times depend on the pair: no sum of one of K and one of V."""
    generator = torch.Generator().manual_seed(seed)
    seconds = (torch.randint(1, 30, (3, len(OPTIONS)), generator=generator).double() * 1e-4).tolist()
    losses = torch.rand((3, len(OPTIONS)), generator=generator, dtype=torch.float64).tolist()
    return Costs(tiny_config(), torch.float32, OPTIONS, losses, 2048, seconds)


@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_the_best_of_all_that_take_no_longer(seed: int) -> None:
    costs = costs_of(seed)
    every = list(itertools.product(range(len(OPTIONS)), repeat=3))
    least, most = (sum(map(end, costs.seconds)) for end in (min, max))
    for share in (0.0, 0.2, 0.5, 0.8, 1.0, 1.5):
        budget = least + share * (most - least) + 0.5e-4  # between the sums there are
        chosen = within_milliseconds(costs, budget * 1e3)
        assert costs.predicted_seconds(chosen) <= budget
        best = min(costs.predicted(each) for each in every if costs.predicted_seconds(each) <= budget)
        assert costs.predicted(chosen) == pytest.approx(best, abs=1e-12)


def test_less_than_the_fastest_takes_is_one_line_that_names_it() -> None:
    costs = costs_of(0)
    seconds = [[4e-3, 1e-3, 3e-3, 2e-3]] * 3
    check_milliseconds(3.0000001, OPTIONS, seconds, 2048)
    with pytest.raises(OctavoError) as caught:
        check_milliseconds(2.9, OPTIONS, seconds, 2048)
    assert str(caught.value) == (
        f"--milliseconds 2.9: on this machine the fastest of these schemes ({OPTIONS[1].scheme.name}) takes 3 ms at "
        "2,048 tokens; give more, other --schemes, or a smaller --context"
    )
    with pytest.raises(OctavoError, match="--milliseconds 1e-05: on this machine the fastest"):
        within_milliseconds(costs, 1e-5)


def test_a_whole_above_its_budget_is_said() -> None:
    times = Times(2.0, 1.9, 1.95, 3.0, 4096, "a machine")
    said = times.sentence()
    assert "at 4,096 tokens on a machine: 1.9 ms as the sum over layers, 1.95 ms measured as a whole; 3 ms with" in said
    assert "above" not in said
    above = Times(2.0, 1.9, 2.1, 3.0, 4096, "a machine").sentence()
    assert above.count("As a whole that is above the budget of 2 ms: give less; or, if the machine had other work") == 1
