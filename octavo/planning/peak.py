"""The most memory that a run holds at once: a sum of parts, each as the code of the pass makes it.

B batch, R tokens of a pass over all sequences, S tokens of a prompt, C hidden size, I width of the MLP, V vocabulary,
H query heads, G KV heads, D head_dim.
"""

import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from ..common.runtime.cache.quantized_cache import QuantizedCache
from ..common.runtime.compatibility import cache_argument
from ..common.runtime.model_sizes import attention_sizes
from ..common.runtime.passes import tokens_of_chunk
from ..common.runtime.schemes.linear_scheme import INT4_LABELS, W4A16_DOUBLE, LinearScheme
from ..common.stock_model import prepare
from .weights import Weights, header_bytes

TOKENIZER_BYTES = 930
"""Of the process for a token of the vocabulary: 980 and 880 with those of SmolLM2 (49,152) and Qwen2.5 (151,936)."""
BLOCK_ROWS = 128
"""Rows that a thread of the decoder's kernel has in work (`ops/decoder/work.h`)."""
_HALF = 2
_FLOAT = 4


@dataclass(frozen=True)
class Peak:
    """Bytes of a run at its peak, by what they are for.

    Attributes:
        process: of Python, PyTorch and transformers on this machine, and the tokenizer; 0 of an accelerator.
        weights: of the model as the device holds them.
        cache: allocated for keys and values, with their constants.
        pass_: what a chunk of a prompt needs on its way through the layers.
        states: last states of a whole prompt, which its chunks fill.
        logits: of the newest token of each sequence.
        growth: what is there twice while a tensor of the cache moves to larger storage.
    """

    process: int
    weights: int
    cache: int
    pass_: int
    states: int
    logits: int
    growth: int

    @property
    def total(self) -> int:
        """At the worst moment: within the layers, at the last linear, or as the cache grows."""
        beside = max(self.states + self.pass_, self.states + self.logits, self.growth)
        return self.process + self.weights + self.cache + beside

    def parts(self) -> dict[str, int]:
        """The parts by name, and the total."""
        named = {name.removesuffix("_"): value for name, value in dataclasses.asdict(self).items()}
        return {**named, "total": self.total}


def resident_bytes() -> int:
    """Bytes of this process in memory; where the system does not say what is, the most that ever were."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def process_bytes(config: PreTrainedConfig) -> int:
    """Bytes of a run's process before it has any weights, and of its tokenizer.

    Those of this process, once a Llama as small as they come has generated in it: what is imported, compiled and set
    up on the way is what a run needs, too.

    Args:
        config: of the model, whose vocabulary counts.
    """
    tiny = LlamaConfig(
        vocab_size=8,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = prepare(LlamaForCausalLM(tiny).eval())
    given: dict[str, Any] = {cache_argument(model): QuantizedCache(tiny, "int8-token")}
    model.generate(torch.ones((1, 4), dtype=torch.int64), **given, max_new_tokens=2, do_sample=False, pad_token_id=0)
    return resident_bytes() + TOKENIZER_BYTES * config.get_text_config(decoder=True).vocab_size


def held_bytes(weights: Weights, linear: LinearScheme | None, device: str) -> int:
    """Bytes of weights as a device holds them: beside scales and zero points of 8 bits, the floats that they become.

    The CPU leaves out zeros that are 0 throughout, and holds scales of groups, and zeros, in float16 where all are
    numbers of it. Those of 8 bits often are too small, and count as they are stored. Files of floats are mapped, of
    which a pass reads all.
    """
    if linear is None:
        return weights.nbytes
    if device != "cpu":
        return weights.nbytes + _decoded_scales(weights, linear)
    total = 0
    for name, header in weights.headers.items():
        size, has_groups = header_bytes(header), len(header.shape) == 2 and header.shape[1] > 1
        if name.endswith(".weight_offset") and linear.symmetric:
            size = 0
        elif linear.label in INT4_LABELS and name.endswith((".weight_scale", ".weight_offset")) and has_groups:
            size = math.prod(header.shape) * _HALF
        total += size
    return total


def _decoded_scales(weights: Weights, linear: LinearScheme) -> int:
    """Bytes of the floats that scales and zero points of 8 bits become where a kernel reads them."""
    if linear.label != W4A16_DOUBLE:
        return 0
    ends = (".weight_scale", ".weight_offset")
    is_code = {name: len(header.shape) == 2 and header.shape[1] > 1 for name, header in weights.headers.items()}
    return sum(4 * math.prod(weights.headers[name].shape) for name in is_code if name.endswith(ends) and is_code[name])


def _mlp_width(config: PreTrainedConfig) -> int:
    """Elements of the widest state of the MLP of a token: four times C where a config has no word for it.

    With experts, those of all that a token goes to.
    """
    plain = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    of_experts = getattr(config, "moe_intermediate_size", None) or 0
    return max(plain, of_experts * (getattr(config, "num_experts_per_tok", None) or 1))


def pass_bytes(config: PreTrainedConfig, rows: int, itemsize: int, is_fused: bool) -> int:
    """Bytes that R = `rows` tokens need in the layers.

    Module by module: an MLP holds gate, up and their product, with states, residual and norm; attention q, k and v, the
    same turned, and its output. What the one frees the allocator keeps, so that both count. In the kernel of the
    decoder: states twice, q, k, v and what is attended to of all rows, and the MLP of a block of them (`decoder.c`).
    """
    heads, kv_heads, head_dim = attention_sizes(config)
    hidden, width, projected = config.hidden_size, _mlp_width(config), (heads + 2 * kv_heads) * head_dim
    if is_fused:
        block = min(rows, BLOCK_ROWS) * (3 * width + 2 * hidden) * _FLOAT
        return rows * (hidden * (itemsize + _FLOAT) + (projected + heads * head_dim) * _FLOAT) + block
    mlp = 3 * width + 3 * hidden
    attention = 2 * projected + 2 * heads * head_dim
    return rows * itemsize * (mlp + attention)


def peak_of(
    config: PreTrainedConfig,
    held: int,
    cache: int,
    tokens: int,
    batch: int,
    dtype: torch.dtype,
    process: int = 0,
    is_fused: bool = False,
    is_whole: bool = False,
) -> Peak:
    """The peak of a run over a prompt.

    Args:
        config: of the model.
        held: bytes of weights, as `held_bytes` finds them.
        cache: bytes allocated.
        tokens: S, of each sequence.
        batch: B.
        dtype: of the states.
        process: bytes, as `process_bytes` finds them; 0 for an accelerator, whose context no formula knows.
        is_fused: whether the decoder's kernel takes all layers: linears in codes, on the CPU.
        is_whole: whether the prompt goes in one pass, as with transformers' own cache.
    """
    config = config.get_text_config(decoder=True)
    itemsize = dtype.itemsize
    rows = batch * (tokens if is_whole else min(tokens, tokens_of_chunk(batch)))
    states = 0 if is_whole else batch * tokens * config.hidden_size * itemsize
    logits = batch * config.vocab_size * (itemsize + _FLOAT)
    growth = cache // (2 * config.num_hidden_layers)
    return Peak(process, held, cache, pass_bytes(config, rows, itemsize, is_fused), states, logits, growth)
