"""The registry of whole-model benchmarks of `run.py`: a decode step and the first token of a prompt.

Models have the shapes of released ones and random weights, on which no time depends, so that nothing has to be fetched.
Quantized models are directories that the conversion wrote, loaded. Caches of a decode step are filled with random keys
and values.
"""

import functools
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import Case, Prepared, Variant, check_close
from conversions import convert_quietly
from shapes import FLOAT
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as token_models
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from octavo import ConvertRequest, QuantizedCache
from octavo.common.convert.flags import recipe_fields
from octavo.common.runtime.cache.sizes import kv_bits_per_element
from octavo.common.runtime.compatibility import cache_argument
from octavo.common.runtime.model_sizes import head_dim_of
from octavo.common.runtime.schemes.linear_scheme import LinearScheme
from octavo.models.llama3 import ARCHITECTURE
from octavo.ops.shared.registry import NAMESPACE

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
LARGEST_ERROR_OF_4_BITS = 0.6
"""The same where weights have 4 bits, which take 0.43 off random weights of 30 layers."""
CHECKED_TOKENS, CALIBRATION_TOKENS = 64, 512
WORDS = 1000
"""Token ids in use, and words of the tokenizer, each of which is its id."""
W4A16 = LinearScheme("W4A16", group_size=128)
CONVERTED: dict[str, dict[str, Any]] = {
    "W8A8 dynamic + C8": {"scheme": "ascend-c8", "linear": "w8a8_dynamic", "float_head": False},
    "W8A8 + C8": {"scheme": "ascend-c8", "linear": "w8a8"},
    "eight-bit": recipe_fields("eight-bit"),
    "W4A16 + int8-token": {"scheme": "int8-token", "linear": W4A16},
    "W4A16 + octavo-4": {"scheme": "octavo-4", "linear": W4A16},
}
"""What is asked of the conversion, by variant."""


def _ids(tokens: int, device: torch.device) -> torch.Tensor:
    """Token ids `[1, tokens]`, of which more begin with fewer."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(WORDS, (1, tokens), generator=generator).to(device)


def _float_model(name: str, device: torch.device) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[name], max_position_embeddings=1 << 17)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=FLOAT[device.type]).eval()


def _save_tokenizer(directory: Path) -> None:
    """A tokenizer for texts of numbers, each a token of that id."""
    tokenizer = Tokenizer(token_models.WordLevel({str(word): word for word in range(WORDS)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)


def _converted(model: LlamaForCausalLM) -> dict[str, LlamaForCausalLM]:
    """The models that loads of its converted directories give, by variant; static scales from random tokens."""
    text = " ".join(map(str, _ids(CALIBRATION_TOKENS, torch.device("cpu"))[0].tolist()))
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "float")
        model.save_pretrained(source)
        _save_tokenizer(source)
        for number, (what, asked) in enumerate(CONVERTED.items()):
            target = Path(directory, str(number))
            convert_quietly(ConvertRequest(source, target, calibration=[text], device=model.device.type, **asked))
            found[what] = ARCHITECTURE.model_class.from_pretrained(target).to(model.device).eval()
    return found


@functools.lru_cache(maxsize=1)
def _variants(name: str, device: torch.device) -> dict[str, tuple[torch.nn.Module, Any]]:
    """Model, and what makes an empty cache for it, by name; ours first. Made once for all cases of a shape."""
    disable_progress_bar()
    model = _float_model(name, device)
    stock = _float_model(name, device)
    stock.load_state_dict(model.state_dict())
    stock.set_attn_implementation(NAMESPACE)
    return {
        **{what: (converted, converted.new_cache) for what, converted in _converted(model).items()},
        "float weights + int8-token": (stock, partial(QuantizedCache, stock.config, "int8-token")),
        FLOAT_VARIANT: (model, partial(DynamicCache, config=model.config)),
    }


def _check(variants: dict[str, tuple[torch.nn.Module, Any]], device: torch.device) -> None:
    ids = _ids(CHECKED_TOKENS, device)
    expected = variants[FLOAT_VARIANT][0](ids).logits
    for what, (model, new_cache) in variants.items():
        limit = LARGEST_ERROR_OF_4_BITS if what.startswith("W4A16") else LARGEST_ERROR
        check_close(what, model(ids, **{cache_argument(model): new_cache()}).logits, expected, limit)


def _filled(cache: Any, config: LlamaConfig, context: int, device: torch.device) -> Any:
    """The cache with `context` random tokens in every layer, `[1, G, context, D]`."""
    shape = (1, config.num_key_value_heads, context, head_dim_of(config))
    for layer in range(config.num_hidden_layers):
        key, value = (torch.randn(shape, device=device).to(FLOAT[device.type]) for _ in range(2))
        cache.update(key, value, layer)
    return cache


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all weights that a step reads: embeddings are looked up, not read, unless lm_head is the same tensor."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    head, table = model.get_output_embeddings(), model.get_input_embeddings().weight
    unread = 0 if head is not None and head.weight.data_ptr() == table.data_ptr() else table.nbytes
    return sum(tensor.nbytes for tensor in tensors.values()) - unread


def _cache_bytes(cache: Any, config: LlamaConfig) -> int:
    """Bytes of the tokens in use."""
    if isinstance(cache, DynamicCache):
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    tokens = cache.get_seq_length()
    elements = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim_of(config) * tokens
    return round(elements * kv_bits_per_element(config, cache.scheme, tokens) / 8)


def _decode(context: int, name: str, device: torch.device) -> Prepared:
    """One decode step at batch 1 behind `context` tokens; every step adds one."""
    variants = _variants(name, device)
    token = torch.ones((1, 1), dtype=torch.long, device=device)
    prepared = []
    for what, (model, new_cache) in variants.items():
        cache = _filled(new_cache(), model.config, context, device)
        step = partial(model, token, **{cache_argument(model): cache})
        prepared.append(Variant(what, step, weight_bytes(model) + _cache_bytes(cache, model.config)))
    return prepared, partial(_check, variants, device)


def _prefill(tokens: int, name: str, device: torch.device) -> Prepared:
    """The first token behind a prompt of `tokens` tokens."""
    variants = _variants(name, device)
    ids = _ids(tokens, device)
    prepared = [
        Variant(
            what,
            lambda model=model, new_cache=new_cache: model(
                ids, **{cache_argument(model): new_cache()}, logits_to_keep=1
            ),
            weight_bytes(model),
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
