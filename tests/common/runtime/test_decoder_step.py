"""Passes through all layers in one call against the same model module by module, for every kind of architecture."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from octavo import ops
from octavo.common.runtime import decoder_step
from octavo.common.runtime import fused_decoder as fused_decoder_module
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.decoder_step import fused_pass
from octavo.common.runtime.fused_decoder import IS_ZOO, FusedDecoder, fused_decoder
from octavo.common.runtime.fused_layers import NotFused
from octavo.ops.decoder.cpu import DECODER_KERNEL

from ...support import with_cache
from .fused_models import CUTS, KINDS, assert_close, model_of, states

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(DECODER_KERNEL.supports() is not None, reason="there is no C compiler"),
]


@pytest.fixture
def many_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of any number of tokens are served where weights are in float."""
    monkeypatch.setattr(decoder_step, "FLOAT_TOKENS", 1 << 20)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("scheme", ["float", "int8-token", "octavo-4", "fp8-token"])
@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_of_the_modules(kind: str, scheme: str, batch: int, many_floats: None) -> None:
    model = model_of(kind)
    wanted = states(model, QuantizedCache(model.config, scheme), False, batch)
    with ops.strict():
        found = states(model, QuantizedCache(model.config, scheme), True, batch)
    assert isinstance(fused_decoder(model.base_model), FusedDecoder)
    assert_close(found, wanted)


@pytest.mark.parametrize("kind", ["llama3", "mistral, sliding", "gemma3"])
def test_padding_at_the_left_is_hidden(kind: str, many_floats: None) -> None:
    model = model_of(kind)
    mask = torch.ones((2, sum(CUTS)), dtype=torch.long)
    mask[1, :3] = 0
    wanted, found = (
        states(model, QuantizedCache(model.config), is_fused, 2, attention_mask=mask) for is_fused in (False, True)
    )
    assert_close(found[:, 3:], wanted[:, 3:])


def test_generation_is_the_same_text() -> None:
    model = model_of("llama3")
    ids = torch.randint(0, 64, (1, 9), generator=torch.Generator().manual_seed(2))
    texts = []
    for is_fused in (False, True):
        setattr(model.base_model, IS_ZOO, is_fused)
        cache = with_cache(QuantizedCache(model.config))
        texts.append(model.generate(ids, max_new_tokens=20, do_sample=False, **cache))
    assert torch.equal(*texts)


def _hook(model: torch.nn.Module) -> None:
    model.base_model.layers[1].mlp.register_forward_hook(lambda *_: None)


def _wrap(model: torch.nn.Module) -> None:
    model.base_model.layers[0].mlp.forward = model.base_model.layers[0].mlp.forward


def _double(model: torch.nn.Module) -> None:
    model.base_model.layers[1].mlp.down_proj = torch.nn.Linear(96, 64, bias=False).double()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hook, "has a hook"),
        (_wrap, "its own forward"),
        (_double, "float64"),
        (lambda model: model.train(), "training"),
    ],
)
def test_what_is_not_served_is_named(reason: str, change: Callable[[torch.nn.Module], None]) -> None:
    model = model_of("llama3")
    arguments = {"input_ids": torch.tensor([[1]]), **with_cache(QuantizedCache(model.config))}
    assert fused_pass(model.base_model, arguments) is not None
    assert fused_pass(model.base_model, {**arguments, "tokenizer": object()}) is not None, "of generate alone"
    change(model)
    assert fused_pass(model.base_model, arguments) is None
    assert reason in ops.report()


def test_a_model_that_is_moved_is_packed_anew() -> None:
    model = model_of("llama3")
    before = fused_decoder(model.base_model)
    assert fused_decoder(model.base_model) is before
    model.to(torch.bfloat16)
    assert fused_decoder(model.base_model) is not before
    model.base_model.layers[0].self_attn.q_proj = torch.nn.Linear(64, 64)
    assert fused_decoder(model.base_model) is not before


def _in_place(linear: torch.nn.Linear) -> None:
    linear.weight.data.mul_(-1)
    with torch.no_grad():
        linear.bias.add_(3)


def _replaced(linear: torch.nn.Linear) -> None:
    linear.weight, linear.bias = (torch.nn.Parameter(part.detach() - 1) for part in (linear.weight, linear.bias))


def _swapped(linear: torch.nn.Linear) -> None:
    linear.weight.data, linear.bias.data = linear.weight.data - 1, linear.bias.data - 1


@pytest.mark.parametrize("change", [_in_place, _replaced, _swapped])
def test_weights_that_are_changed_between_passes_count(change: Callable[[torch.nn.Linear], None]) -> None:
    """A bias in 16 bits is copied, and the address of a weight is kept."""
    model, ids = model_of("qwen2").to(torch.bfloat16), torch.tensor([[1, 2, 3]])
    setattr(model.base_model, IS_ZOO, True)

    def output() -> torch.Tensor:
        with torch.no_grad():
            return model.base_model(ids, **with_cache(QuantizedCache(model.config))).last_hidden_state.float()

    before = output()
    for layer in model.base_model.layers:
        change(layer.self_attn.q_proj)
    found = output()
    fused_decoder_module._FUSED.pop(model.base_model)
    assert torch.equal(found, output()) and (found - before).abs().max() > 0.1


def test_a_model_that_nobody_states_goes_by_modules() -> None:
    model = model_of("llama3")
    setattr(model.base_model, IS_ZOO, False)
    with pytest.raises(NotFused, match="states no anatomy"):
        fused_decoder(model.base_model)


POSITIONS: dict[str, torch.Tensor] = {
    "int32": torch.arange(5, dtype=torch.int32)[None],
    "of one sequence for all": torch.arange(5)[None],
    "below 0": torch.tensor([[-2, -1, 0, 1, 2], [0, 1, 2, 3, 4]]),
    "far": torch.tensor([[0, 1, 2, 3, 1 << 26], [0, 1, 2, 3, 4]]),
    "fewer than tokens": torch.arange(3)[None],
    "more than tokens": torch.arange(9)[None],
    "of three axes": torch.arange(5)[None, None].expand(3, 2, -1),
}


def outcome(call: Callable[[], torch.Tensor]) -> torch.Tensor | str:
    """What a call returns, or the kind of error that it raises."""
    try:
        return call()
    except Exception as error:
        return type(error).__name__


@pytest.mark.parametrize("name", POSITIONS)
@pytest.mark.parametrize("kind", ["llama3", "dynamic RoPE"])
def test_positions_of_any_form(kind: str, name: str, many_floats: None) -> None:
    model, found = model_of(kind), []
    for is_zoo in (True, False):
        setattr(model.base_model, IS_ZOO, is_zoo)
        arguments = {"position_ids": POSITIONS[name], **with_cache(QuantizedCache(model.config))}
        with torch.no_grad():
            given = torch.arange(10).view(2, 5)
            found.append(outcome(lambda: model.base_model(input_ids=given, **arguments).last_hidden_state))  # noqa: B023
    if isinstance(found[1], str):
        assert found[0] == found[1]
    else:
        assert_close(found[0], found[1])


@pytest.mark.parametrize("shape", [(1, 2, 32), (1, 2, 96), (0, 2, 64), (64,)])
def test_embeddings_of_another_shape_are_left_to_the_modules(shape: tuple[int, ...]) -> None:
    model = model_of("llama3")
    arguments = {"inputs_embeds": torch.randn(shape), **with_cache(QuantizedCache(model.config))}
    assert fused_pass(model.base_model, arguments) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scheme", ["int8-token", "octavo-4"])
def test_the_default_dtype_is_of_no_account(scheme: str, dtype: torch.dtype, many_floats: None) -> None:
    model = model_of("llama3")
    wanted = states(model, QuantizedCache(model.config, scheme), True, 1)
    torch.set_default_dtype(dtype)
    try:
        found = states(model, QuantizedCache(model.config, scheme), True, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(found, wanted)


def test_threads_have_passes_of_their_own(many_floats: None) -> None:
    model = model_of("qwen2")
    wanted = states(model, QuantizedCache(model.config), True, 2)
    torch.set_num_threads(2)
    caches = [QuantizedCache(model.config) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda cache: states(model, cache, True, 2), caches):
            assert_close(found, wanted)
