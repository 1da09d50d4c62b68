"""What every preset does to the logits of tiny models, padded, in beams, and with folded biases."""

from typing import Any

import pytest
import torch

from octavo.common.errors import OctavoError
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.schemes.kv_scheme import load_scheme

from ....metrics import rmse_in_std
from ....support import random_ids, with_cache
from ....tolerances import TOLERANCES
from .models import CHUNKS, COARSE, KINDS, SMALL_STEPS, TOKENS, Make, build, presets

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.inference_mode()
def logits(model: torch.nn.Module, ids: torch.Tensor, used: QuantizedCache, *sizes: int, **more: Any) -> torch.Tensor:
    """Of all tokens, which come in chunks."""
    parts = ids.split(sizes or (ids.shape[1],), dim=1)
    return torch.cat([model(part, **with_cache(used), **more).logits for part in parts], dim=1)


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    """Logits of the float models."""
    with torch.inference_mode():
        return {kind: build(kind)(random_ids(1, TOKENS)).logits for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", presets())
def test_logits_are_close_to_float_and_do_not_depend_on_chunks(
    preset: str, kind: str, cache: Make, readers: dict[str, torch.nn.Module], expected: dict[str, torch.Tensor]
) -> None:
    ids = random_ids(1, TOKENS)
    whole = logits(readers[kind], ids, cache(preset, kind))
    cut = logits(readers[kind], ids, cache(preset, kind), *CHUNKS)
    assert rmse_in_std(cut, whole) <= 20 * TOLERANCES["logits rmse with codes tipped over"]
    error = rmse_in_std(whole, expected[kind])
    if kind != "qwen2":
        assert error < (0.08 if preset in SMALL_STEPS else 1.2 if preset in COARSE else 0.7)
    assert (error < 1e-4) == (preset == "float")


@pytest.mark.parametrize("kind", ["llama", "qwen2 folded"])
@pytest.mark.parametrize("preset", presets())
def test_a_left_padded_row_is_as_good_as_the_row_alone(
    preset: str, kind: str, cache: Make, readers: dict[str, torch.nn.Module], expected: dict[str, torch.Tensor]
) -> None:
    """Equal to it where each token has a scale of its own; groups, sinks and slots of tokens are others otherwise."""
    model, ids, pad = readers[kind], random_ids(1, TOKENS), 21
    other = random_ids(1, TOKENS + pad, seed=9)
    both = torch.cat((other, torch.cat((torch.full((1, pad), 2), ids), dim=1)))
    mask = torch.ones_like(both)
    mask[1, :pad] = 0
    positions, scheme = (mask.cumsum(1) - 1).clamp_min(0), load_scheme(preset)
    padded = {"attention_mask": mask, "position_ids": positions, **with_cache(cache(preset, kind))}
    if scheme.key is not None and scheme.key.before_rope:
        with pytest.raises(OctavoError, match="padding at the left"):
            model(both, **padded)
        return
    with torch.inference_mode():
        together = model(both, **padded).logits
    alone = logits(model, ids, cache(preset, kind))
    if not (scheme.is_segmented or scheme.has_codebooks):
        assert rmse_in_std(together[1:, pad:], alone) <= 10 * TOLERANCES["logits rmse with codes tipped over"]
    else:
        own, beside = (rmse_in_std(found, expected[kind]) for found in (alone, together[1:, pad:]))
        assert beside < 1.7 * own + 0.02


def score(model: torch.nn.Module, ids: torch.Tensor, prompt: int, used: QuantizedCache) -> torch.Tensor:
    """Log-probabilities of what was generated, in one pass over everything, `[B, S - prompt]`."""
    found = logits(model, ids, used)[:, prompt - 1 : -1].float().log_softmax(dim=-1)
    return found.gather(-1, ids[:, prompt:, None])[..., 0], found.amax(dim=-1)


@pytest.mark.parametrize("kind", ["llama", "qwen2 folded"])
@pytest.mark.parametrize("preset", presets())
def test_generation_and_beams_give_what_one_pass_says(
    preset: str, kind: str, cache: Make, readers: dict[str, torch.nn.Module]
) -> None:
    model, ids = readers[kind], random_ids(2, 150)
    arguments = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    greedy = model.generate(ids, **with_cache(cache(preset, kind)), **arguments).sequences
    chosen, best = score(model, greedy, 150, cache(preset, kind))
    # Float noise tips a code over now and then, which at 2 bits is a third of the range of its group.
    assert ((best - chosen) < 2e-2).float().mean() > (0.85 if preset in COARSE else 0.999)
    fixed = model.generate(ids, **with_cache(cache(preset, kind, max_length=170)), **arguments).sequences
    assert torch.equal(fixed, greedy)
    beams = {**arguments, "num_beams": 3, "length_penalty": 0.0, "output_scores": True}
    result = model.generate(ids, **with_cache(cache(preset, kind)), **beams)
    found = score(model, result.sequences, 150, cache(preset, kind))[0].sum(dim=1)
    tolerance = 1.0 if preset in COARSE else 5e-2
    torch.testing.assert_close(result.sequences_scores, found, atol=tolerance, rtol=0)


@pytest.mark.parametrize("preset", presets("float"))
def test_folded_biases_leave_less_to_lose(
    preset: str, cache: Make, readers: dict[str, torch.nn.Module], expected: dict[str, torch.Tensor]
) -> None:
    ids = random_ids(1, TOKENS)
    with_bias, folded = (
        rmse_in_std(logits(readers[kind], ids, cache(preset, kind)), expected[kind])
        for kind in ("qwen2", "qwen2 folded")
    )
    scheme = load_scheme(preset)
    bears_bias = scheme.key.granularity == "channel" or scheme.center_key  # its own constants, or its mean, take it in
    assert folded < (1.3 * with_bias if bears_bias else with_bias)
