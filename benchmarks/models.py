"""The registry of whole-model benchmarks of `run.py`: a decode step and the first token of a prompt.

Models have the shapes of released ones and random weights, on which no time depends, so that nothing has to be fetched.
Quantized models come out of the conversion itself. Caches of a decode step are filled with random keys and values.
"""

import functools
from functools import partial
from typing import Any

import torch
from cases import Case, Prepared, Variant, check_close
from shapes import FLOAT
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from octavo.common.cache import QuantizedCache, head_dim_of
from octavo.common.checkpoints.ascend import TensorHeader
from octavo.common.convert import build_quantized, quantize_model
from octavo.common.observe import calibrate
from octavo.common.scheme import load_scheme
from octavo.models.llama3 import ARCHITECTURE
from octavo.ops.library import NAMESPACE

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
LLAMA_8B_LAYERS = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
SHAPES = {"SmolLM2-135M": SMOLLM2, "8 layers of Llama 3.1 8B": LLAMA_8B_LAYERS}
FLOAT_VARIANT = "float"
LARGEST_ERROR = 0.2
"""Relative error of the logits of a quantized random model from those of the float one, at most. Random weights are no
easy ones: what it catches is a kernel that computes something else, which is off by 1 and more."""
CHECKED_TOKENS, CALIBRATION_TOKENS = 64, 512
_HEADERS = {torch.float32: {"": TensorHeader("F32", ())}, torch.bfloat16: {"": TensorHeader("BF16", ())}}


def _ids(tokens: int, device: torch.device) -> torch.Tensor:
    """Token ids `[1, tokens]`, of which more begin with fewer."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1000, (1, tokens), generator=generator).to(device)


def _float_model(name: str, device: torch.device) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[name], max_position_embeddings=1 << 17)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=FLOAT[device.type]).eval()


def _converted(model: LlamaForCausalLM, scheme: str, is_dynamic: bool) -> torch.nn.Module:
    """The model that a load of its converted directory gives; static scales from random tokens."""
    patterns = () if is_dynamic else ("down_proj", "lm_head")
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith(patterns)
    ]
    ids = _ids(CALIBRATION_TOKENS, model.device)
    statistics = calibrate(model, linears, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    headers = _HEADERS[model.dtype]
    quantized = quantize_model(model, statistics, linears, load_scheme(scheme), 1, is_dynamic, headers)
    return build_quantized(ARCHITECTURE, model, quantized)


@functools.lru_cache(maxsize=1)
def _variants(name: str, device: torch.device) -> dict[str, tuple[torch.nn.Module, Any]]:
    """Model, and what makes an empty cache for it, by name; ours first. Made once for all cases of a shape."""
    model = _float_model(name, device)
    stock = _float_model(name, device)
    stock.load_state_dict(model.state_dict())
    stock.set_attn_implementation(NAMESPACE)
    dynamic = _converted(model, "ascend-c8", True)
    static = _converted(model, "ascend-c8", False)
    return {
        "W8A8 dynamic + C8": (dynamic, dynamic.new_cache),
        "W8A8 + C8": (static, static.new_cache),
        "float weights + int8-token": (stock, partial(QuantizedCache, stock.config, "int8-token")),
        FLOAT_VARIANT: (model, partial(DynamicCache, config=model.config)),
    }


def _check(variants: dict[str, tuple[torch.nn.Module, Any]], device: torch.device) -> None:
    ids = _ids(CHECKED_TOKENS, device)
    expected = variants[FLOAT_VARIANT][0](ids).logits
    for what, (model, new_cache) in variants.items():
        check_close(what, model(ids, past_key_values=new_cache()).logits, expected, LARGEST_ERROR)


def _filled(cache: Any, config: LlamaConfig, context: int, device: torch.device) -> Any:
    """The cache with `context` random tokens in every layer, `[1, G, context, D]`."""
    shape = (1, config.num_key_value_heads, context, head_dim_of(config))
    for layer in range(config.num_hidden_layers):
        key, value = (torch.randn(shape, device=device).to(FLOAT[device.type]) for _ in range(2))
        cache.update(key, value, layer)
    return cache


def _weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all weights that a step reads: embeddings are looked up, not read, unless lm_head is the same tensor."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    head, table = model.get_output_embeddings(), model.get_input_embeddings().weight
    unread = 0 if head is not None and head.weight.data_ptr() == table.data_ptr() else table.nbytes
    return sum(tensor.nbytes for tensor in tensors.values()) - unread


def _cache_bytes(cache: Any) -> int:
    """Bytes of the tokens in use."""
    if isinstance(cache, DynamicCache):
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    stores = [store for layer in cache.layers for store in (layer.key_store, layer.value_store)]
    return sum(part[:, :, : store.length].nbytes for store in stores for part in store.parts())


def _decode(context: int, name: str, device: torch.device) -> Prepared:
    """One decode step at batch 1 behind `context` tokens; every step adds one."""
    variants = _variants(name, device)
    token = torch.ones((1, 1), dtype=torch.long, device=device)
    prepared = []
    for what, (model, new_cache) in variants.items():
        cache = _filled(new_cache(), model.config, context, device)
        step = partial(model, token, past_key_values=cache)
        prepared.append(Variant(what, step, _weight_bytes(model) + _cache_bytes(cache)))
    return prepared, partial(_check, variants, device)


def _prefill(tokens: int, name: str, device: torch.device) -> Prepared:
    """The first token behind a prompt of `tokens` tokens."""
    variants = _variants(name, device)
    ids = _ids(tokens, device)
    prepared = [
        Variant(
            what,
            lambda model=model, new_cache=new_cache: model(ids, past_key_values=new_cache(), logits_to_keep=1),
            _weight_bytes(model),
        )
        for what, (model, new_cache) in variants.items()
    ]
    return prepared, partial(_check, variants, device)


def _cases(*names: str) -> list[Case]:
    work = {
        "decode at 8,192 tokens": partial(_decode, 8192),
        "decode at 2,048 tokens": partial(_decode, 2048),
        "first token of 2,048": partial(_prefill, 2048),
    }
    return [
        Case("model", f"{name}, {what}", partial(prepare, name), wall=True)
        for name in names
        for what, prepare in work.items()
    ]


MODEL_CASES = {"cpu": _cases("SmolLM2-135M"), "cuda": _cases("SmolLM2-135M", "8 layers of Llama 3.1 8B")}
"""Cases by kind of device."""
