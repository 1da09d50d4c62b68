"""Attention of CUDA GPUs translated for them, and on one."""

from typing import Any

import pytest
import torch

from octavo.ops import attention, attention_lse
from octavo.ops.attention.call import ATTENTION_CALL
from octavo.ops.attention.cuda import attention_cuda, attention_lse_cuda

from .cuda_attention_calls import GROUPS, assert_both_close, assert_close, attend, attend_lse, call, with_positions
from .cuda_double import SHARED_MEMORY, compiled, needs_gpu, needs_triton, opcheck_on_gpu

PRESETS = {
    "int8 per channel": ("int8", "int8", ("channel", "channel", "channel", "channel"), (1, 1), False),
    "int8 per token": ("int8", "int8", ("token", "none", "token", "none"), (1, 1), False),
    "int8 queries": ("int8", "int8", ("head", "none", "head", "none"), (1, 1), True),
    "int8 and int4 in groups": ("int8", "int4", ("token", "none") + ("token and channels",) * 2, (1, 1), False),
    "int4 as KIVI": ("int4", "int4", ("tokens and channel",) * 2 + ("token and few channels",) * 2, (32, 1), False),
    "e4m3": ("e4m3", "e4m3", ("head", "none", "head", "none"), (1, 1), False),
    "e4m3 queries": ("e4m3", "e4m3", ("head", "none", "head", "none"), (1, 1), True),
    "own": ("own", "own", ("none",) * 4, (1, 1), False),
}


def preset_call(name: str, queries: int, tokens: int, dtype: torch.dtype, unused: int = 0) -> dict[str, Any]:
    """A preset at the shape of a model with head_dim 128 and 4 query heads per KV head."""
    key, value, forms, token_groups, quantizes = PRESETS[name]
    arguments = call(key, value, forms, dtype, queries, tokens, 128, 4, token_groups, unused)
    if quantizes:
        arguments["query_scale"] = torch.full((GROUPS * 4, 1, 1), 4 / {"int8": 127, "e4m3": 448}[key])
    return arguments


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile(capability: int) -> None:
    """Every preset at decode and prefill; types that do not fit and tiles that do not, show here."""
    with compiled(capability) as kernels:
        for name in PRESETS:
            for queries in (1, 64):
                arguments = preset_call(name, queries, 128, torch.bfloat16, unused=512)
                attend(arguments)
    assert len(kernels) >= 2 * len(PRESETS)
    assert max(kernel.metadata.shared for kernel in kernels) <= SHARED_MEMORY[capability] * 1024


@needs_triton
@pytest.mark.slow
def test_a_cache_that_grows_compiles_nothing_anew() -> None:
    """From two parts of the keys on: other numbers of parts, 2 to 32, are the same kernel."""
    arguments = preset_call("int8 per token", 1, 4096, torch.bfloat16)
    of_tokens = ("key", "value", "key_scale", "value_scale")
    with compiled(90, 132) as kernels:
        for tokens in (130, 300, 700, 4096):
            attention_cuda(
                ATTENTION_CALL.of(**{**arguments, **{name: arguments[name][:, :, :tokens] for name in of_tokens}})
            )
    assert len(kernels) == 8 and len({kernel.hash for kernel in kernels[::2]}) == 1
    assert len({kernel.hash for kernel in kernels[1::2]}) == 4  # those that merge up to 2, 4, 8 and 32


@needs_triton
@pytest.mark.slow
def test_other_widths_masks_and_types_compile() -> None:
    """For the GPUs with the least shared memory."""
    with compiled(89) as kernels:
        masked = call("e5m2", "int8", ("token", "channel", "tokens and channel", "none"), torch.float16, 1, 300, 80)
        attend({**masked, "mask": torch.ones(1, 300, dtype=torch.bool), "length": None})
        wide = call("own", "own", ("none",) * 4, torch.bfloat16, 64, 300, 256, 1)
        attend({**wide, "window": 100})
        attention_cuda(
            ATTENTION_CALL.of(**call("int8", "float32", ("channel", "token", "none", "none"), torch.float32, 64))
        )
    assert max(kernel.metadata.shared for kernel in kernels) <= SHARED_MEMORY[89] * 1024


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_scores_by_position_compile(capability: int) -> None:
    """Beside the largest tiles of K and V, with log-sum-exp, split and whole."""
    with compiled(capability) as kernels:
        for name, width in (("int8 per token", 64), ("int4 as KIVI", 16), ("own", 128), ("e4m3 queries", 256)):
            for queries in (1, 64):
                arguments = with_positions(preset_call(name, queries, 512, torch.bfloat16, unused=512), width)
                attend_lse(arguments)
        wide = call("own", "own", ("none",) * 4, torch.bfloat16, 64, 300, 256, 1)
        attend_lse(with_positions(wide, 256))
        attention_lse_cuda(
            ATTENTION_CALL.of(**with_positions(call("float32", "float32", ("none",) * 4, queries=64), 128))
        )
    assert max(kernel.metadata.shared for kernel in kernels) <= SHARED_MEMORY[capability] * 1024


def ragged_call(name: str, queries: int, dtype: torch.dtype) -> dict[str, Any]:
    """A preset over sequences of 3000 and 2500 tokens."""
    torch.manual_seed(0)
    arguments = preset_call(name, queries, 3000, dtype, unused=1096)
    return {**arguments, "length": torch.tensor([3000, 2500], dtype=torch.int32)}


def to_gpu(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


@needs_gpu
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(
    ("queries", "dtype"),
    [(1, torch.bfloat16), (1, torch.float16), (7, torch.float32), (64, torch.float16), (1000, torch.bfloat16)],
)
def test_on_a_gpu(name: str, queries: int, dtype: torch.dtype) -> None:
    """The shapes of a model, with memory behind the last token that is NaN, beside the reference on the GPU."""
    arguments = to_gpu(ragged_call(name, queries, dtype))
    for _ in range(2):  # as it is launched the first time, and from then on
        assert_close(attention(**arguments), arguments)


@needs_gpu
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("queries", [1, 64])
def test_positions_on_a_gpu(name: str, queries: int) -> None:
    arguments = to_gpu(with_positions(ragged_call(name, queries, torch.bfloat16), 64, rows=4096))
    assert_both_close(attention_lse(**arguments), arguments)


@needs_gpu
@pytest.mark.parametrize("name", PRESETS)
def test_opcheck_and_compile_on_a_gpu(name: str) -> None:
    arguments = to_gpu(preset_call(name, 1, 200, torch.bfloat16, unused=56))
    opcheck_on_gpu(torch.ops.octavo.attention.default, (), arguments)
    positions = to_gpu(with_positions(arguments, 32))
    opcheck_on_gpu(torch.ops.octavo.attention_lse.default, (), positions)

    def step(query: torch.Tensor) -> torch.Tensor:
        return attention(**{**arguments, "query": query * 1}) * 1

    compiled_step = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled_step(arguments["query"]), step(arguments["query"]))


@needs_gpu
@pytest.mark.parametrize("name", PRESETS)
def test_a_graph_replays_as_the_cache_grows(name: str) -> None:
    arguments = preset_call(name, 1, 2000, torch.bfloat16, unused=48)
    on_gpu = to_gpu(arguments)
    graph = torch.cuda.CUDAGraph()
    attention(**on_gpu)  # compiles
    with torch.cuda.graph(graph):
        output = attention(**on_gpu)
    for length in (1, 130, 1999, 2000):
        on_gpu["length"].fill_(length)
        graph.replay()
        assert_close(output.cpu(), {**arguments, "length": torch.tensor([length])})
