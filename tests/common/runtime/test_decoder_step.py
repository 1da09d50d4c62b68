"""Passes through all layers in one call against the same model module by module, for every kind of architecture."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from octavo import ops
from octavo.common.runtime import decoder_step
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.decoder_step import IS_ZOO, NotFused, fused_decoder, fused_pass
from octavo.common.stock_model import prepare
from octavo.ops.decoder.cpu import DECODER_KERNEL

from ...support import with_cache
from ...tolerances import TOLERANCES

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(DECODER_KERNEL.supports() is not None, reason="there is no C compiler"),
]

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama3": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "mistral, sliding": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 8}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {}),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {}),
    "granite": ("GraniteConfig", "GraniteForCausalLM",
                {"residual_multiplier": 0.5, "embedding_multiplier": 3.0, "attention_multiplier": 0.2}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"sliding_window": 8}),
    "dynamic RoPE": ("LlamaConfig", "LlamaForCausalLM", {
        "max_position_embeddings": 8, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
}  # fmt: skip
CUTS = (5, 1, 1, 7, 1, 8)


def model_of(kind: str) -> transformers.PreTrainedModel:
    """A tiny random model, ready for a quantized cache, whose norms and biases differ from their defaults."""
    torch.manual_seed(0)
    config, model, changes = KINDS[kind]
    model = getattr(transformers, model)(getattr(transformers, config)(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight) * (1.0 if name.endswith("bias") else 0.2))
            else:
                weight.mul_(3)
    return prepare(model)


@pytest.fixture
def many_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of any number of tokens are served where weights are in float."""
    monkeypatch.setattr(decoder_step, "FLOAT_TOKENS", 1 << 20)


def states(model: torch.nn.Module, cache: QuantizedCache, is_fused: bool, batch: int, **more: Any) -> torch.Tensor:
    """Last hidden states over passes of several lengths."""
    base, parts = model.base_model, []
    setattr(base, IS_ZOO, is_fused)
    ids = torch.randint(0, 64, (batch, sum(CUTS)), generator=torch.Generator().manual_seed(1))
    stop = 0
    for part in ids.split(CUTS, dim=1):
        stop += part.shape[1]
        arguments = {name: value[:, :stop] for name, value in more.items()}
        with torch.no_grad():
            parts.append(base(input_ids=part, use_cache=True, **with_cache(cache), **arguments).last_hidden_state)
    setattr(base, IS_ZOO, True)
    return torch.cat(parts, dim=1)


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found - wanted).norm() < TOLERANCES["decoder layer"] * wanted.norm()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("scheme", ["float", "int8-token", "octavo-4", "fp8-token"])
@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_of_the_modules(kind: str, scheme: str, batch: int, many_floats: None) -> None:
    model = model_of(kind)
    wanted = states(model, QuantizedCache(model.config, scheme), False, batch)
    with ops.strict():
        found = states(model, QuantizedCache(model.config, scheme), True, batch)
    assert isinstance(fused_decoder(model.base_model), decoder_step.FusedDecoder)
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
    decoder_step._FUSED.pop(model.base_model)
    assert torch.equal(found, output()) and (found - before).abs().max() > 0.1


def test_a_model_that_nobody_states_goes_by_modules() -> None:
    model = model_of("llama3")
    setattr(model.base_model, IS_ZOO, False)
    with pytest.raises(NotFused, match="states no anatomy"):
        fused_decoder(model.base_model)
