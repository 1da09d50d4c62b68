"""Contract tests of attention on an NPU, over storage with room for more tokens than are used, as in the cache."""

from typing import Any

import pytest
import torch

from octavo.common.runtime.attention import register_attention
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.static_scales import LayerScales
from octavo.ops import attention, attention_lse
from octavo.ops.attention.call import ATTENTION_CALL
from octavo.ops.attention.reference import attention_lse_reference
from octavo.ops.codec.reference import encode_reference
from octavo.ops.shared.codes import pack_int4

from ..metrics import relative_rmse
from ..support import random_ids, tiny_llama, with_cache
from ..tolerances import TOLERANCES
from .npu_attention_calls import (
    BATCH,
    FLOATS,
    GROUPS,
    HEADS,
    WIDTH,
    both,
    int8_problem,
    padding_mask,
    problem,
    tolerance,
    with_queries,
)
from .npu_double import EverythingOnNpu, TorchNpu, on_npu


def test_decode_over_codes_reads_the_storage_where_it_is(npu: TorchNpu) -> None:
    arguments = problem("channel", False, torch.float16, 70, 80)
    both(arguments)
    (op, call), = npu.calls  # fmt: skip
    assert op == "npu_fused_infer_attention_score" and call["actual_seq_lengths_kv"] == [70, 70]
    for name in ("key", "value"):
        assert call[name].data_ptr() == arguments[name].data_ptr() and call[name].shape[2] == 80
    assert call["scale"] == WIDTH**-0.5  # the op's default is 1


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("granularity", "mode"), [("channel", 0), ("head", 2), ("token", 3)])
@pytest.mark.parametrize(("tokens", "capacity"), [(1, 64), (70, 80), (64, 64)])
def test_decode_over_codes(
    npu: TorchNpu, dtype: torch.dtype, affine: bool, granularity: str, mode: int, tokens: int, capacity: int
) -> None:
    result, expected = both(problem(granularity, affine, dtype, tokens, capacity))
    call = npu.calls[0][1]
    assert (call["key_antiquant_mode"], call["value_antiquant_mode"]) == (mode, mode)
    assert result.shape == (BATCH, 1, HEADS, WIDTH) and result.dtype == dtype
    assert relative_rmse(result, expected) <= tolerance(dtype)


@pytest.mark.parametrize("granularity", ["channel", "head", "token"])
def test_zeros_of_the_wrong_sign_fail(npu: TorchNpu, granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = problem(granularity, True, torch.float16, 70, 80)
    right = npu.npu_fused_infer_attention_score

    def wrong(*args: Any, **kwargs: Any) -> Any:
        return right(*args, **{name: -x if name.endswith("offset") else x for name, x in kwargs.items()})

    monkeypatch.setattr(npu, "npu_fused_infer_attention_score", wrong)
    result, expected = both(arguments)
    assert relative_rmse(result, expected) > 100 * tolerance(torch.float16)


def test_one_of_k_and_v_affine_and_the_other_not(npu: TorchNpu) -> None:
    arguments = {**problem("channel", True, torch.float16, 70, 80), "key_zero": None}
    result, expected = both(arguments)
    assert relative_rmse(result, expected) <= tolerance(torch.float16)


def test_a_scale_per_head_beside_one_per_channel(npu: TorchNpu) -> None:
    channel, head = (problem(name, False, torch.float16, 70, 80) for name in ("channel", "head"))
    result, expected = both({**channel, "value": head["value"], "value_scale": head["value_scale"]})
    assert npu.calls[0][1]["key_antiquant_mode"] == 0
    assert relative_rmse(result, expected) <= tolerance(torch.float16)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("queries", [1, 5, 70])
@pytest.mark.parametrize("causal", [False, True])
def test_float_keys_and_values(npu: TorchNpu, dtype: torch.dtype, queries: int, causal: bool) -> None:
    query = torch.randn((BATCH, queries, HEADS, WIDTH), generator=torch.Generator().manual_seed(0)).to(dtype)
    arguments = {**problem(None, False, dtype, 70, 80), "query": query.transpose(1, 2), "causal": causal}
    result, expected = both(arguments)
    assert npu.ops() == ["npu_fused_infer_attention_score"]
    assert relative_rmse(result, expected) <= tolerance(dtype)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("queries", [2, 16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lengths", [None, [70, 9]])
def test_some_queries_over_codes_per_token_are_sequences_of_one_head(
    npu: TorchNpu, affine: bool, queries: int, masked: bool, lengths: list[int] | None
) -> None:
    arguments = with_queries(problem("token", affine, torch.bfloat16, 70, 96), queries)
    arguments["mask"] = padding_mask(queries, 70) if masked else None
    result, expected = both({**arguments, "length": None if lengths is None else torch.tensor(lengths)})
    (_, call), = npu.calls  # fmt: skip
    assert call["key_antiquant_mode"] == 1 and call["key"].shape == (BATCH * GROUPS, 1, 96, WIDTH)
    assert call["key"].data_ptr() == arguments["key"].data_ptr()
    assert relative_rmse(result, expected) <= tolerance(torch.bfloat16)


def test_float_states_of_a_padded_prompt_in_the_layout_of_a_model(npu: TorchNpu) -> None:
    arguments = problem(None, False, torch.float16, 9, 9)
    for name in ("key", "value"):
        arguments[name] = arguments[name].transpose(1, 2).contiguous().transpose(1, 2)
    arguments["query"] = torch.randn((BATCH, HEADS, 9, WIDTH)).half()
    result, expected = both({**arguments, "mask": padding_mask(9, 9)})
    assert npu.ops() == ["npu_fused_infer_attention_score"] and not result[1, :3].any()
    assert relative_rmse(result, expected) <= tolerance(torch.float16)


@pytest.mark.parametrize("granularity", ["channel", "head"])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(
    ("dtype", "queries"), [(torch.float16, 2), (torch.float16, 70), (torch.bfloat16, 2), (torch.bfloat16, 16)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_several_queries_over_static_codes(
    npu: TorchNpu, granularity: str, affine: bool, dtype: torch.dtype, queries: int, masked: bool
) -> None:
    arguments = with_queries(problem(granularity, affine, dtype, 70, 96), queries)
    result, expected = both({**arguments, "mask": padding_mask(queries, 70) if masked else None})
    (op, call), = npu.calls  # fmt: skip
    assert op == "npu_fused_infer_attention_score"
    assert ("antiquant_scale" in call) == (dtype == torch.float16)
    assert result.shape == expected.shape and result.dtype == dtype
    assert relative_rmse(result, expected) <= tolerance(dtype)


@pytest.mark.parametrize(
    ("dtype", "granularity"),
    [*((dtype, name) for dtype in FLOATS for name in (None, "channel", "head")), (torch.bfloat16, "token")],
)
@pytest.mark.parametrize("length", [None, 60])
def test_a_mask_at_decode_makes_two_queries_of_one(
    npu: TorchNpu, dtype: torch.dtype, granularity: str | None, length: int | None
) -> None:
    mask = padding_mask(1, 70)
    mask[1] = False  # sees nothing
    arguments = {**problem(granularity, False, dtype, 70, 96), "mask": mask, "window": 5}
    result, expected = both({**arguments, "length": None if length is None else torch.tensor([length])})
    (_, call), = npu.calls  # fmt: skip
    assert call["query"].shape[2] == 2 and result.shape == expected.shape and not result[1].any()
    assert relative_rmse(result, expected) <= tolerance(dtype)


def served_by_the_reference() -> dict[str, dict[str, Any]]:
    half = torch.float16
    channel, head, token = (problem(name, True, half, 70, 96) for name in ("channel", "head", "token"))
    static, int8 = problem("head", False, half, 70, 96), int8_problem(half, 70, 96)
    floats = problem(None, False, half, 70, 96)
    packed = {name: pack_int4(channel[name].clamp(-8, 7), WIDTH) for name in ("key", "value")}
    per_both = torch.rand((BATCH, GROUPS, 70, 4)) * 0.02
    per_tokens = torch.rand((BATCH, GROUPS, 9, WIDTH)) * 0.02
    per_sequence = torch.rand((BATCH, HEADS, 1, 1)) * 0.02 + 0.01
    by_position = {
        "position_query": torch.randn(BATCH, HEADS, 1, 16),
        "position_table": torch.randn(80, 16),
        "position_start": torch.tensor([0, 4]),
    }
    longer = torch.tensor([90, 75])
    return {
        "scores by position": {**token, **by_position},
        "causal queries at a segment": {**with_queries(floats, 5), "length": longer},
        "a window over a segment": {**token, "length": longer, "window": 33},
        "masked": {**token, "mask": padding_mask(1, 70)},
        "masked int8 query": {**int8, "mask": padding_mask(1, 70)},
        "queries over tokens": with_queries(token, 5),
        "queries in bfloat16": with_queries(problem("channel", True, torch.bfloat16, 70, 96), 17),
        "int4": {**channel, **packed},
        "token and channel": {**static, "key_scale": per_both},
        "groups of tokens": {**static, "key_scale": per_tokens, "key_group": 8},
        "scales per sequence": {**static, "value_scale": torch.rand((BATCH, GROUPS, 1, 1)) * 0.02},
        "token beside head": {**static, "key_scale": token["key_scale"]},
        "K in codes only": {**static, "value": floats["value"], "value_scale": None},
        "int8 queries": with_queries(int8, 5),
        "int8 with zeros": {**int8, "key_zero": head["key_zero"]},
        "int8 per token": {**token, "key_zero": None, "value_zero": None, "query_scale": int8["query_scale"]},
        "int8 over floats": {**floats, "query_scale": int8["query_scale"]},
        "int8 per sequence": {**int8, "query_scale": per_sequence},
        "additive mask": {**with_queries(floats, 5), "mask": torch.zeros(BATCH, 1, 5, 70)},
    }


@pytest.mark.parametrize("name", served_by_the_reference())
def test_what_the_ops_have_no_mode_for_takes_the_reference(npu: TorchNpu, name: str) -> None:
    result, expected = both(served_by_the_reference()[name])
    assert npu.calls == [] and torch.equal(result, expected) and not expected.isnan().any()


@pytest.mark.parametrize("name", ["token", None])
def test_log_sum_exp_takes_the_reference(npu: TorchNpu, name: str | None) -> None:
    arguments = {**problem(name, False, torch.float16, 70, 96), "length": torch.tensor([90, 0])}
    results, expected = on_npu(attention_lse, **arguments), attention_lse_reference(ATTENTION_CALL.of(**arguments))
    assert npu.calls == [] and all(torch.equal(*both_of) for both_of in zip(results, expected, strict=True))
    with pytest.raises(NotImplementedError, match="float8_e4m3fn"):
        on_npu(attention_lse, **{**arguments, "key": arguments["key"].to(torch.float8_e4m3fn)})


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("tokens", "capacity"), [(1, 64), (70, 80), (97, 112), (150, 160), (300, 320), (256, 256)])
def test_int8_queries(npu: TorchNpu, dtype: torch.dtype, tokens: int, capacity: int) -> None:
    arguments = int8_problem(dtype, tokens, capacity)
    result, expected = both(arguments)
    assert npu.ops() == ["npu_quantize"] + ["_npu_paged_attention_quant"] * GROUPS
    for _, call in npu.calls[1:]:
        is_copied = call["key_cache"].data_ptr() != arguments["key"].data_ptr()
        assert is_copied == (capacity in (80, 112, 160))  # small storage that does not divide into pages of 64
        assert call["key_cache"].shape[1] >= 64
    assert result.shape == (BATCH, 1, HEADS, WIDTH) and result.dtype == dtype
    assert relative_rmse(result, expected) <= TOLERANCES["npu int8 attention rmse"]


def test_a_call_per_head_over_our_storage_is_one_call_over_pages(npu: TorchNpu) -> None:
    """What MindIE calls, once for all heads, on its own pages `[pages, 128, G, D]` in shuffled order."""
    arguments = int8_problem(torch.float16, 300, 320)
    result = on_npu(attention, **arguments)
    order = torch.randperm(3 * BATCH, generator=torch.Generator().manual_seed(0))
    caches = []
    for name in ("key", "value"):
        padded = torch.nn.functional.pad(arguments[name], (0, 0, 0, 84)).transpose(1, 2)
        pages = padded.reshape(3 * BATCH, 128, GROUPS, WIDTH)
        caches.append(torch.empty_like(pages).index_copy_(0, order, pages))
    codes = torch.empty((BATCH, HEADS, 1, WIDTH), dtype=torch.int8)
    encode_reference(arguments["query"], arguments["query_scale"], None, codes)
    descales = [arguments[name].repeat_interleave(HEADS // GROUPS, 0) for name in ("key_scale", "value_scale")]
    expected = torch.empty((BATCH, HEADS, WIDTH), dtype=torch.float16)
    npu._npu_paged_attention_quant(
        codes[:, :, 0].contiguous(), *caches, GROUPS, HEADS, WIDTH**-0.5, order.int().view(BATCH, 3),
        torch.full((BATCH,), 300, dtype=torch.int32), 3, 1,
        (arguments["query_scale"] * descales[0]).flatten(), descales[1].flatten(), expected,
    )  # fmt: skip
    assert torch.equal(result[:, 0], expected)


def strided(arguments: dict[str, Any]) -> dict[str, Any]:
    return {**arguments, "key": arguments["key"].transpose(1, 2).contiguous().transpose(1, 2)}


def of_width(arguments: dict[str, Any], width: int) -> dict[str, Any]:
    cut = {name: arguments[name][..., :width].contiguous() for name in ("query", "key", "value")}
    return {**arguments, **cut}


def limits() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    half = torch.float16
    head, floats, int8 = (
        problem("head", False, half, 9, 64),
        problem(None, False, half, 9, 64),
        int8_problem(half, 9, 64),
    )
    long = {name: torch.empty((1, GROUPS, 262145, WIDTH), dtype=torch.int8) for name in ("key", "value")}
    odd = {name: torch.zeros((BATCH, GROUPS, 1000, WIDTH), dtype=torch.int8) for name in ("key", "value")}
    many = torch.zeros((BATCH, GROUPS * 65, 1, WIDTH), dtype=half)
    return {
        "float32": ({**floats, "query": floats["query"].float()}, ValueError, "not torch.float32"),
        "dtype of K": ({**floats, "query": floats["query"].bfloat16()}, ValueError, "the dtype of q"),
        "dtypes": ({**floats, "value": floats["value"].bfloat16()}, NotImplementedError, "one shape and dtype"),
        "strides": (strided(head), ValueError, "contiguous"),
        "width of codes": (of_width(head, 16), ValueError, "32 divides"),
        "width of floats": (of_width(floats, 8), ValueError, "16 divides"),
        "heads": ({**head, "query": many}, ValueError, "64 per KV head"),
        "keys": ({**head, **long, "query": head["query"][:1]}, ValueError, "262144"),
        "int8 width": (of_width(int8, 16), ValueError, "32 divides"),
        "int8 capacity": ({**int8, **odd}, ValueError, "multiple of 32"),
    }  # fmt: skip


@pytest.mark.parametrize("name", limits())
def test_limits_raise_with_the_reason(npu: TorchNpu, name: str) -> None:
    arguments, error, reason = limits()[name]
    with pytest.raises(error, match=reason) as caught:
        on_npu(attention, **arguments)
    assert "\n" not in str(caught.value) and "_npu_paged_attention_quant" not in npu.ops()


def static_scales(layers: int) -> list[LayerScales]:
    """Scales for the tiny model: per head, which the codec per channel takes as well, and exact in float16."""
    scale = torch.full((2, 1, 1), 0.0625)
    return [LayerScales(key=(scale, None), value=(scale, None), query=torch.full((4, 1, 1), 0.0625))] * layers


@pytest.mark.parametrize("scheme", ["float", "int8-token", "ascend-c8", "ascend-fa"])
def test_a_model_decodes_as_on_the_cpu(npu: TorchNpu, scheme: str) -> None:
    register_attention()
    """A whole model: a prompt of 60 tokens, then 8 one at a time, over a storage that grows meanwhile."""
    model = tiny_llama(head_dim=WIDTH).half()
    model.set_attn_implementation("octavo")
    layers = model.config.num_hidden_layers
    ids = random_ids(BATCH, 68)

    def logits() -> torch.Tensor:
        scales = static_scales(layers) if scheme.startswith("ascend") else None
        cache = QuantizedCache(model.config, scheme, scales=scales)
        steps = [model(ids[:, :60], **with_cache(cache)).logits]
        steps += [model(ids[:, n : n + 1], **with_cache(cache)).logits for n in range(60, 68)]
        return torch.cat(steps, dim=1)

    with torch.no_grad():
        expected = logits()
        with EverythingOnNpu():
            result = logits()
    is_int8 = scheme == "ascend-fa"
    attends, calls_per_step = ("_npu_paged_attention_quant", 2) if is_int8 else ("npu_fused_infer_attention_score", 1)
    steps = 9 if scheme in ("float", "ascend-c8") else 8  # of other codes, the reference attends to the prompt
    assert npu.ops().count(attends) == layers * steps * calls_per_step
    tolerance = TOLERANCES["npu int8 attention rmse" if is_int8 else "npu rmse of a model"]
    assert relative_rmse(result, expected) <= tolerance
