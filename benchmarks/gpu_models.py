"""The whole models of `gpu.py`: decode steps of random weights, eager, as a CUDA graph and compiled.

Beside each stands the same model in bfloat16 over the static cache of transformers. Linears are quantized where they
are, with random codes, on which no time depends; nothing is converted and nothing is written.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_cases import GpuCase, Measured
from shapes import FLOAT
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache

from models import LLAMA_8B_LAYERS, weight_bytes
from octavo import QuantizedCache, prepare
from octavo.common.runtime.cache.sizes import kv_bits_per_element
from octavo.common.runtime.compatibility import cache_argument
from octavo.common.runtime.linear_kinds import empty_linear
from octavo.common.runtime.model_sizes import head_dim_of
from octavo.common.runtime.schemes.linear_scheme import W4A16, W8A8_DYNAMIC

LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
LLAMA_8B = {**LLAMA_8B_LAYERS, "num_hidden_layers": 32}
TINY = {**LLAMA_1B, "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
ROOM = 1024
"""Tokens that the steps of a measurement may add."""
GROUP = 128
"""Input channels that share a scale of 4-bit weights."""
GROWING = "bf16 + dynamic cache"
"""What `generate` does if nothing is said, eagerly."""
KINDS: dict[str, tuple[str | None, str | None]] = {
    GROWING: (None, None),
    "bf16 + static cache": (None, None),
    "bf16 + int8-token": (None, "int8-token"),
    "W8A8 dynamic + int8-token": (W8A8_DYNAMIC, "int8-token"),
    "W4A16 + int8-token": (W4A16, "int8-token"),
}
"""Kind of the linears and scheme of the cache, by name; in the order in which one model can become the next."""


@dataclass
class Subject:
    """One model that takes one kind after the other, as the memory of a device has room for one."""

    config: LlamaConfig
    device: torch.device
    model: torch.nn.Module | None = None
    kind: str = ""

    def of(self, kind: str) -> torch.nn.Module:
        """The model in a kind."""
        if self.kind == kind:
            return self.model
        self.model = None  # before the next is made
        torch.manual_seed(0)
        with torch.device(self.device):  # of a config of its own, which says how it attends
            model = AutoModelForCausalLM.from_config(deepcopy(self.config), dtype=FLOAT[self.device.type]).eval()
        label, scheme = KINDS[kind]
        if scheme is not None:
            prepare(model)
        if label is not None:
            quantize_in_place(model, label, self.device)
        self.model, self.kind = model, kind
        return model


def quantize_in_place(model: torch.nn.Module, label: str, device: torch.device) -> None:
    """Random codes of a kind in the place of every linear, but for the head."""
    places = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for name, module in places:
        if name == "lm_head":
            continue
        rows, columns = module.weight.shape
        groups = columns // GROUP if label == W4A16 and columns % GROUP == 0 else 1
        options = {"num_groups": groups} if label == W4A16 else {}
        with torch.device(device):
            linear = empty_linear(label, columns, rows, has_bias=False, **options)
        for part, tensor in linear.named_buffers():
            if tensor.dtype.is_floating_point:
                tensor.fill_(0.0 if "offset" in part else 1e-3)
            else:
                limits = torch.iinfo(tensor.dtype)
                tensor.random_(limits.min, limits.max + 1)
        model.set_submodule(name, linear)


def filled_cache(model: torch.nn.Module, kind: str, context: int, batch: int) -> Any:
    """The cache of a kind, of a fixed length but for one, that holds `context` random tokens."""
    config, length, scheme = model.config, context + ROOM, KINDS[kind][1]
    if kind == GROWING:
        cache = DynamicCache(config=config)
    elif scheme is None:
        cache = StaticCache(config=config, max_cache_len=length)
    else:
        cache = QuantizedCache(config, scheme, max_length=length, compileable=True)
    shape = (batch, config.num_key_value_heads, context, head_dim_of(config))
    for layer in range(config.num_hidden_layers):
        key, value = (torch.randn(shape, device=model.device).to(model.dtype) for _ in range(2))
        cache.update(key, value, layer)
    return cache


def _cache_bytes(config: LlamaConfig, scheme: str | None, context: int, batch: int, itemsize: int) -> int:
    """Bytes of the tokens in use."""
    elements = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim_of(config) * context * batch
    if scheme is None:
        return elements * itemsize
    return round(elements * kv_bits_per_element(config, QuantizedCache(config, scheme).scheme, context) / 8)


def graphed(step: Callable[[], object]) -> Callable[[], object]:
    """The replay of a step that was captured as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _step(subject: Subject, kind: str, mode: str, context: int, batch: int) -> tuple[Callable, int]:
    model, scheme = subject.of(kind), KINDS[kind][1]
    cache = filled_cache(model, kind, context, batch)
    forward = model
    if mode == "compiled":
        torch._dynamo.reset()  # or it takes the model for another of the one before, and gives up after some
        # a graph of its own making, since one of torch's copies what the cache holds into memory of the graph
        forward = torch.compile(model, backend="inductor" if model.device.type == "cuda" else "eager", dynamic=False)
    token = torch.ones((batch, 1), dtype=torch.long, device=model.device)
    position = torch.full((batch, 1), context, dtype=torch.long, device=model.device)
    arguments = {cache_argument(model): cache, "use_cache": True, "position_ids": position}
    with torch.no_grad():
        logits = forward(token, **arguments).logits
    if not logits.isfinite().all():
        raise AssertionError(f"{kind}, {mode}: logits are not finite")

    @torch.no_grad()
    def step() -> object:
        return forward(token, **arguments).logits

    nbytes = weight_bytes(model) + _cache_bytes(model.config, scheme, context, batch, model.dtype.itemsize)
    if mode != "eager" and model.device.type == "cuda":
        return graphed(step), nbytes
    return step, nbytes


def _steps(shape: dict[str, Any], context: int, batch: int, device: torch.device) -> Iterator[Measured]:
    subject = Subject(LlamaConfig(**shape, max_position_embeddings=1 << 17), device)
    modes = ("eager", "graph") if device.type == "cuda" else ("eager",)
    for kind in KINDS:
        for mode in modes[:1] if kind == GROWING else modes:
            yield Measured(f"{kind}, {mode}", partial(_step, subject, kind, mode, context, batch))
    for kind in reversed(list(KINDS)[1:]):  # which take longest to make, and begin where the others end
        yield Measured(f"{kind}, compiled", partial(_step, subject, kind, "compiled", context, batch))


def model_case(name: str, shape: dict[str, Any], context: int, batch: int) -> GpuCase:
    """Decode steps of a model of random weights behind `context` tokens."""
    variants = partial(_steps, shape, context, batch)
    return GpuCase("model", f"{name}, batch {batch}, decode at {context:,} tokens", variants, wall=True)


SMALL = [model_case("Llama 1B shape", LLAMA_1B, 2048, 1), model_case("Llama 1B shape", LLAMA_1B, 16384, 8)]
LARGE = [model_case("Llama 8B shape", LLAMA_8B, 8192, 1)]
