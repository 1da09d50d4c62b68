"""The cache that counts its tokens on the device: equal to the growing one, in one graph for every step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from octavo.common.errors import OctavoError
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.schemes.kv_scheme import PRESETS, Scheme, load_scheme
from octavo.common.runtime.static_scales import LayerScales
from octavo.models.llama3.modeling_llama_fa3 import LlamaForCausalLM

from ....support import random_ids, tiny_config, tiny_llama, with_cache
from ....tolerances import TOLERANCES
from .tiny import tiny_mistral, tiny_qwen2

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 5


@pytest.fixture(scope="module", params=["float", "int8-token", "int4-token", "fp8-token"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    config = tiny_config()
    config.octavo = {"scheme": request.param}
    made = LlamaForCausalLM(config)
    made.load_state_dict(tiny_llama().state_dict())
    return made.eval()


def steps(forward: Callable, ids: torch.Tensor, cache: QuantizedCache) -> torch.Tensor:
    """Logits of single tokens behind a prompt, `[B, STEPS, vocabulary]`."""
    return torch.cat([forward(token, **with_cache(cache)).logits for token in ids.split(1, dim=1)], dim=1)


@torch.inference_mode()
def test_every_step_equals_that_of_the_growing_cache(model: LlamaForCausalLM) -> None:
    ids = random_ids(2, 12 + STEPS)
    growing, static = model.new_cache(), model.new_cache(max_length=40, compileable=True)
    for cache in (growing, static):
        model(ids[:, :12], **with_cache(cache))
    expected = steps(model, ids[:, 12:], growing)
    torch.testing.assert_close(steps(model, ids[:, 12:], static), expected, atol=TOLERANCES["logits"], rtol=0)
    assert static.get_seq_length() == 12 + STEPS


@torch.inference_mode()
def test_one_graph_serves_every_step(model: LlamaForCausalLM) -> None:
    ids = random_ids(1, 12 + STEPS)
    cache, expected_cache = (model.new_cache(max_length=40, compileable=True) for _ in range(2))
    for one in (cache, expected_cache):
        model(ids[:, :12], **with_cache(one))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    found = steps(compiled, ids[:, 12:], cache)
    torch.testing.assert_close(found, steps(model, ids[:, 12:], expected_cache), atol=TOLERANCES["logits"], rtol=0)
    assert counter.frame_count == 1


def test_generation_takes_it(model: LlamaForCausalLM) -> None:
    ids = random_ids(2, 9)
    arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cache = model.new_cache(max_length=32, compileable=True)
    assert torch.equal(model.generate(ids, **with_cache(cache), **arguments), model.generate(ids, **arguments))
    assert cache.is_compileable and not model.new_cache(max_length=32).is_compileable


@torch.inference_mode()
def test_crop_and_reset(model: LlamaForCausalLM) -> None:
    ids = random_ids(1, 20)
    cache = model.new_cache(max_length=40, compileable=True)
    expected = model(ids, **with_cache(cache)).logits
    cache.crop(-8)
    assert cache.get_seq_length() == 12
    again = model(ids[:, 12:], **with_cache(cache)).logits
    torch.testing.assert_close(again, expected[:, 12:], atol=TOLERANCES["logits"], rtol=0)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(model(ids, **with_cache(cache)).logits, expected, atol=TOLERANCES["logits"], rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("is_early", [False, True])
def test_a_first_pass_in_float_is_the_first_wherever_storage_was_allocated(is_early: bool) -> None:
    model, ids = tiny_llama(), random_ids(1, 20)
    model.set_attn_implementation("octavo")
    scheme = Scheme.from_dict({**load_scheme("int8-token").to_dict(), "prefill": "float"})
    growing, static = (QuantizedCache(model.config, scheme, max_length=40, compileable=flag) for flag in (False, True))
    if is_early:
        static.early_initialization(1, 2, 16, torch.float32, ids.device)
    for part in (ids, ids[:, :3]):
        found, expected = (model(part, **with_cache(cache)).logits for cache in (static, growing))
        torch.testing.assert_close(found, expected, atol=TOLERANCES["logits"], rtol=0)
    static.reset(), growing.reset()
    found, expected = (model(ids, **with_cache(cache)).logits for cache in (static, growing))
    torch.testing.assert_close(found, expected, atol=TOLERANCES["logits"], rtol=0)


@pytest.mark.parametrize("build", [tiny_mistral, tiny_qwen2])
@pytest.mark.parametrize("padding", [0, 9])
@pytest.mark.parametrize("way", [{}, {"prefill_chunk_size": 7}, {"num_beams": 3}], ids=str)
def test_models_with_sliding_windows_generate_with_it(
    build: Callable[[], torch.nn.Module], padding: int, way: dict[str, Any]
) -> None:
    model = build()
    model.set_attn_implementation("octavo")
    ids = random_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None, **way}
    growing, static = (
        QuantizedCache(model.config, "int8-token", max_length=32, compileable=flag) for flag in (False, True)
    )
    expected = model.generate(ids, **with_cache(growing), **arguments)
    assert torch.equal(model.generate(ids, **with_cache(static), **arguments), expected)


@torch.inference_mode()
@pytest.mark.parametrize("build", [tiny_llama, tiny_mistral])
@pytest.mark.parametrize("has_mask", [False, True])
def test_a_prompt_is_one_graph(build: Callable[[], torch.nn.Module], has_mask: bool) -> None:
    model, ids = build(), random_ids(2, 20)
    model.set_attn_implementation("octavo")
    mask = torch.ones_like(ids) if has_mask else None
    eager, compiled = (QuantizedCache(model.config, "int8-token", max_length=24, compileable=True) for _ in range(2))
    compiled.early_initialization(2, 2, 16, torch.float32, ids.device)
    expected = model(ids, attention_mask=mask, **with_cache(eager)).logits
    torch._dynamo.reset()
    forward = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = forward(ids, attention_mask=mask, **with_cache(compiled)).logits
    torch.testing.assert_close(found, expected, atol=TOLERANCES["logits"], rtol=0)


def test_a_length_has_to_be_given() -> None:
    with pytest.raises(OctavoError, match="needs max_length"):
        QuantizedCache(tiny_config(), "int8-token", compileable=True)


@pytest.mark.parametrize("name", PRESETS)
def test_schemes_that_no_single_op_writes_and_reads_are_refused(name: str) -> None:
    """llama.cpp's rule among them, which the op would replace by its own in silence."""
    scheme, config = load_scheme(name).counted(5), tiny_config(head_dim=32, num_hidden_layers=5)
    if scheme.is_compileable:
        scales = [LayerScales()] * 5 if scheme.is_static else None
        assert QuantizedCache(config, scheme, scales=scales, max_length=40, compileable=True).is_compileable
        return
    others = ("kivi", "kvquant", "octavo", "llamacpp", "k4v2", "kitty", "kvarn", "turboquant", "mxfp", "nvfp", "oscar")
    assert name.startswith(others)
    with pytest.raises(OctavoError, match="compileable"):
        QuantizedCache(config, scheme, scales=[LayerScales()] * 5, max_length=40, compileable=True)
