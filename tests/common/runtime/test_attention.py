"""The attention function that transformers calls: what it serves, and what it refuses by name."""

from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from octavo.common.errors import OctavoError
from octavo.common.runtime import attention
from octavo.common.runtime.attention import Codes, SlidingWindow, causal_or_explicit_mask, quantized_attention
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.stock_model import prepare
from octavo.models.llama3.modeling_llama_fa3 import LlamaForCausalLM

from ...support import CACHE_NAME, random_ids, tiny_config, tiny_llama, with_cache

pytestmark = pytest.mark.usefixtures("one_thread")

GENERATOR = torch.Generator().manual_seed(0)
QUERY = torch.randn((2, 4, 6, 16), generator=GENERATOR)
KEY, VALUE = (torch.randn((2, 2, 11, 16), generator=GENERATOR) for _ in range(2))


def attend(**changes: Any) -> torch.Tensor:
    arguments = {"query": QUERY, "key": Codes(KEY), "value": Codes(VALUE), "attention_mask": None, **changes}
    return quantized_attention(torch.nn.Module().eval(), arguments.pop("query"), **arguments)[0]


def sdpa(mask: torch.Tensor | None, **arguments: Any) -> torch.Tensor:
    key, value = (part.repeat_interleave(2, dim=1) for part in (KEY, VALUE))
    return functional.scaled_dot_product_attention(QUERY, key, value, mask, **arguments).transpose(1, 2)


CAUSAL = torch.ones(6, 11, dtype=torch.bool).tril(5)


class Called(TorchDispatchMode):
    """Names of what PyTorch is called for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("queries", [1, 70])
def test_attention_by_pieces_copies_nothing_from_the_host(monkeypatch: pytest.MonkeyPatch, queries: int) -> None:
    monkeypatch.setattr(attention, "_is_one_call", lambda *_: False)
    model, ids = prepare(tiny_llama()), random_ids(1, 100 + queries)
    cache = QuantizedCache(model.config, "octavo-4")
    with torch.no_grad():
        model(ids[:, :100], **with_cache(cache))
        with Called() as called:
            model(ids[:, 100:], **with_cache(cache))
    assert any("octavo.attention_lse" in name for name in called.names)
    assert "aten.lift_fresh.default" not in called.names, "a tensor made of a number on the host"


def test_values_that_are_stored_in_float_are_attended_to_as_they_are() -> None:
    torch.testing.assert_close(attend(), sdpa(CAUSAL))
    torch.testing.assert_close(attend(is_causal=False), sdpa(None))
    torch.testing.assert_close(attend(scaling=0.5), sdpa(CAUSAL, scale=0.5))


def test_causal_attention_over_what_is_no_cache_of_codes_is_refused() -> None:
    with pytest.raises(OctavoError, match="not the codes of a QuantizedCache: pass cache="):
        attend(key=KEY, value=VALUE)
    torch.testing.assert_close(attend(key=KEY, value=VALUE, is_causal=False), sdpa(None))  # of an encoder


def test_masks_may_be_longer_than_the_keys_as_static_caches_make_them() -> None:
    mask = torch.rand((2, 1, 6, 11), generator=torch.Generator().manual_seed(1)) > 0.3
    mask[..., 0] = True
    longer = functional.pad(mask, (0, 9), value=True)
    torch.testing.assert_close(attend(attention_mask=longer), sdpa(mask))
    additive = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    torch.testing.assert_close(attend(attention_mask=additive), sdpa(mask))


def test_codes_stand_for_code_less_zero_times_scale() -> None:
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(-128, 128, (2, 2, 11, 16), generator=generator, dtype=torch.int8)
    scale, zero = torch.rand((2, 1, 16), generator=generator) / 50, torch.randint(-9, 9, (2, 1, 16)).float()
    decoded = (codes.float() - zero) * scale
    handle = Codes(codes, scale, zero)
    torch.testing.assert_close(attend(key=handle), attend(key=Codes(decoded)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attend(value=handle), attend(value=Codes(decoded)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attend(key=handle), attend(key=Codes(codes, scale)), atol=1e-4, rtol=0)  # softmax
    assert (attend(value=handle) - attend(value=Codes(codes, scale))).abs().max() > 1e-3


def test_an_attention_that_cannot_read_codes_is_told_what_is_missing() -> None:
    model = tiny_llama()
    with pytest.raises(AttributeError, match="set_attn_implementation\\('octavo'\\)"):
        model(random_ids(1, 5), **with_cache(QuantizedCache(model.config, "int8-token")))


def test_training_is_refused() -> None:
    with pytest.raises(OctavoError, match="no gradients"):
        quantized_attention(torch.nn.Module().train(), *torch.randn(3, 1, 2, 4, 16).unbind(), None)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"dropout": 0.1}, "inference"),
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.ones(4)}, "s_aux"),
        ({"position_bias": torch.ones(1)}, "position_bias"),
        ({"output_attentions": True}, "output_attentions"),
    ],
)
def test_what_is_not_served_is_refused_by_name(arguments: dict[str, Any], part: str) -> None:
    with pytest.raises(OctavoError, match=part):
        attend(**arguments)


def test_no_mask_is_made_where_causality_says_it_all() -> None:
    arguments = {"batch_size": 2, "q_length": 3, "kv_length": 8, "q_offset": 5, "device": torch.device("cpu")}
    assert causal_or_explicit_mask(**arguments) is None
    assert causal_or_explicit_mask(**arguments, attention_mask=torch.ones((2, 8), dtype=torch.bool)) is None
    padded = torch.ones((2, 8), dtype=torch.bool)
    padded[1, :2] = False
    mask = causal_or_explicit_mask(**arguments, attention_mask=padded)
    wanted = torch.ones(3, 8, dtype=torch.bool).tril(5) & padded[:, None, None, :]
    assert torch.equal(mask.expand(2, 1, 3, 8), wanted)


MASK_ARGUMENTS = {"batch_size": 1, "q_length": 3, "kv_length": 8, "q_offset": 5, "device": torch.device("cpu")}


def test_no_mask_is_made_where_a_window_says_it_all() -> None:
    window = sliding_window_causal_mask_function(4)
    assert causal_or_explicit_mask(**MASK_ARGUMENTS, mask_function=window, local_size=4) == SlidingWindow(4)
    wanted = torch.ones(3, 8, dtype=torch.bool).tril(5).triu(2)
    asked = causal_or_explicit_mask(**MASK_ARGUMENTS, mask_function=window, local_size=4, allow_is_causal_skip=False)
    assert torch.equal(asked[0, 0], wanted)
    padded = torch.ones((1, 8), dtype=torch.bool)
    padded[0, 3] = False
    mask = causal_or_explicit_mask(**MASK_ARGUMENTS, mask_function=window, attention_mask=padded)
    assert torch.equal(mask[0, 0], wanted & padded)


def test_a_window_that_is_made_ahead_passes_for_a_mask() -> None:
    window = SlidingWindow(4)
    assert window.ndim == 4 and window.contiguous() is window
    given = sliding_window_causal_mask_function(4)
    assert causal_or_explicit_mask(**MASK_ARGUMENTS, mask_function=given, attention_mask=window) is window


def test_a_window_hides_the_keys_that_its_mask_hides() -> None:
    mask = CAUSAL.triu(3)
    assert mask.sum(dim=-1).tolist() == [3] * 6
    torch.testing.assert_close(attend(attention_mask=SlidingWindow(3)), sdpa(mask))


@pytest.mark.parametrize(
    "mask_function",
    [
        or_masks(sliding_window_overlay(4), causal_mask_function),
        and_masks(sliding_window_overlay(4), causal_mask_function, causal_mask_function),
        and_masks(causal_mask_function, sliding_window_overlay(4)),
        and_masks(lambda b, h, q, k: k > q - 4, causal_mask_function),
    ],
)
def test_every_other_rule_is_written_out_as_a_mask(mask_function: Any) -> None:
    mask = causal_or_explicit_mask(**MASK_ARGUMENTS, mask_function=mask_function, local_size=4)
    assert isinstance(mask, torch.Tensor)
    assert causal_or_explicit_mask(**MASK_ARGUMENTS, local_size=4) is not None
    assert causal_or_explicit_mask(**MASK_ARGUMENTS, allow_is_causal_skip=False) is not None


# The model class around it.


def quantized_llama() -> LlamaForCausalLM:
    config = tiny_config()
    config.octavo = {"scheme": "int8-token"}
    model = LlamaForCausalLM(config)
    model.load_state_dict(tiny_llama().state_dict())
    return model.eval()


def test_another_attention_implementation_is_refused() -> None:
    config = tiny_config()
    config._attn_implementation = "eager"
    with pytest.raises(OctavoError, match="eager"):
        LlamaForCausalLM(config)


def test_a_cache_without_codes_is_refused() -> None:
    from transformers import DynamicCache

    model = quantized_llama()
    with pytest.raises(OctavoError, match="DynamicCache"):
        model(random_ids(1, 3), **with_cache(DynamicCache(config=model.config)))
    with pytest.raises(OctavoError, match="quantized already"):
        model.generate(random_ids(1, 3), max_new_tokens=2, cache_implementation="quantized")


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_cache_is_handed_out_if_it_is_wanted(use_cache: bool, return_dict: bool) -> None:
    model = quantized_llama()
    with torch.inference_mode():
        output = model(random_ids(1, 3), use_cache=use_cache, return_dict=return_dict)
    if return_dict:
        assert (getattr(output, CACHE_NAME) is not None) == use_cache
    else:
        assert len(output) == (2 if use_cache else 1)


def test_training_is_refused_where_there_is_dropout() -> None:
    config = tiny_config(attention_dropout=0.1)
    config.octavo = {"scheme": "int8-token"}
    model = LlamaForCausalLM(config).train()
    with pytest.raises(OctavoError, match="eval"):
        model(random_ids(1, 3))


def test_a_quantized_model_is_copied_not_saved(tmp_path: Any) -> None:
    with pytest.raises(OctavoError, match="copy the directory"):
        quantized_llama().save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
