"""Models of the ops of torch_npu that Octavo calls: what their documents say, on CPU tensors, in float32.

They refuse, by assertions, what the documents forbid, and what Octavo does not use. Documents: docs/zh/custom_APIs of
github.com/Ascend/op-plugin at 517f2e7d; for the ATB op, its test/test_custom_ops/test_atb_paged_attention_quant.py, and
include/atb/infer_op_params.h of github.com/hicann/ascend-transformer-boost at ddcc8b62.
"""

import math
from typing import Any

import torch

LOWEST, HIGHEST = -128, 127
DTYPE_CODES = {torch.qint8: 12, torch.float16: 5, torch.bfloat16: 15}
"""What torch hands to an op that declares `int` when it is given a dtype."""
UNKNOWN = 300.0
"""What the models read where the documents promise nothing, such as tokens beyond the valid length."""


def to_codes(values: torch.Tensor) -> torch.Tensor:
    return values.round().clamp(LOWEST, HIGHEST).to(torch.int8)


def quantize(
    x: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    dtype: int,
    axis: int = 1,
    div_mode: bool = True,
) -> torch.Tensor:
    assert dtype == DTYPE_CODES[torch.qint8], "the model knows int8 only"
    assert x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    assert scales.dim() == 1 and scales.numel() in (1, x.shape[axis])
    shape = [1] * x.dim()
    shape[axis] = -1
    if div_mode:
        assert scales.dtype in (torch.float32, torch.bfloat16), "div_mode=True takes no float16 scales"
        assert zero_points is None or zero_points.dtype in (torch.int8, torch.uint8, torch.int32, torch.bfloat16)
        scaled = x.float() / scales.float().view(shape)
    else:
        assert scales.dtype == x.dtype and (zero_points is None or zero_points.dtype == x.dtype)
        scaled = x.float() * scales.float().view(shape)
    if zero_points is not None:
        assert zero_points.shape == scales.shape
        scaled = scaled + zero_points.float().view(shape)
    return to_codes(scaled)


def dynamic_quant(x: torch.Tensor, *, dst_type: int | None = None, **unused: Any) -> tuple[torch.Tensor, torch.Tensor]:
    assert x.dtype in (torch.float16, torch.bfloat16) and x.dim() > 1 and dst_type is None
    scale = x.float().abs().amax(dim=-1) / HIGHEST
    codes = to_codes(x.float() / scale.unsqueeze(-1).clamp_min(1e-30))
    codes[scale == 0] = LOWEST  # what the op does here is not documented: the worst
    return codes, scale


def truncated(scale: torch.Tensor) -> torch.Tensor:
    """npu_trans_quant_param: a float32 scale without its 13 lowest bits."""
    return (scale.view(torch.int32) & ~0x1FFF).view(torch.float32)


def quant_matmul(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    output_dtype: int | None = None,
    **unused: Any,
) -> torch.Tensor:
    assert x1.dtype == x2.dtype == torch.int8 and max(x1.shape[-1], x2.shape[-1]) <= 65535
    assert bias is None or (bias.dtype == torch.int32 and bias.shape == x2.shape[-1:])
    assert scale.dtype == torch.float32 and scale.shape in ((1,), x2.shape[-1:])
    assert all(argument is None for argument in unused.values())
    total = (x1.long() @ x2.long()) + (0 if bias is None else bias.long())
    assert total.abs().max() < 2**31
    if output_dtype == DTYPE_CODES[torch.float16]:
        return (total.float() * truncated(scale)).half()
    assert output_dtype == DTYPE_CODES[torch.bfloat16], "without pertoken_scale: int8, float16, bfloat16 or int32"
    return (total.float() * scale).bfloat16()


def anti_quantized(
    codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, mode: int, dtype: torch.dtype
) -> torch.Tensor:
    """`(code + offset) * scale` of K or V `[B, G, S, D]` by one of the antiquant modes."""
    batch, groups, keys, width = codes.shape
    shapes = {
        0: [(1, groups, 1, width), (1, groups, width), (groups, 1, width), (groups, width)],
        2: [(groups,)],
        3: [(batch, groups, keys)],
    }
    views = {0: (1, groups, 1, width), 2: (1, groups, 1, 1), 3: (batch, groups, keys, 1)}
    assert codes.dtype == torch.int8 and codes.shape[-1] % 32 == 0
    for part in (scale,) if offset is None else (scale, offset):
        assert part.shape in shapes[mode], f"mode {mode}: {tuple(part.shape)}"
        assert part.dtype == (torch.float32 if mode == 3 else dtype), f"mode {mode}: {part.dtype}"
    values = codes.float() if offset is None else codes.float() + offset.float().view(views[mode])
    return values * scale.float().view(views[mode])


def hidden_keys(
    query_shape: torch.Size, capacity: int, keys: int, sparse_mode: int, atten_mask: torch.Tensor | None
) -> torch.Tensor:
    """True where a query does not see a key, `[B or 1, 1, Q, capacity]`."""
    batch, _, queries, _ = query_shape
    hidden = (torch.arange(capacity) >= keys).expand(1, 1, queries, capacity)
    if atten_mask is None:
        assert sparse_mode == 0
        return hidden
    assert atten_mask.is_contiguous() and atten_mask.dtype in (torch.bool, torch.int8, torch.uint8)
    if sparse_mode == 3:
        assert torch.equal(atten_mask.bool(), torch.ones(2048, 2048, dtype=torch.bool).triu(1))
        last = torch.arange(keys - queries, keys)[:, None]
        return hidden | (torch.arange(capacity) > last)
    assert sparse_mode == 1 and atten_mask.shape in ((1, 1, queries, capacity), (batch, 1, queries, capacity))
    return hidden | atten_mask.bool()


def fused_infer_attention_score(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    atten_mask: torch.Tensor | None = None,
    actual_seq_lengths_kv: list[int] | None = None,
    key_antiquant_scale: torch.Tensor | None = None,
    key_antiquant_offset: torch.Tensor | None = None,
    value_antiquant_scale: torch.Tensor | None = None,
    value_antiquant_offset: torch.Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    inner_precise: int = 0,
    key_antiquant_mode: int = 0,
    value_antiquant_mode: int = 0,
    **unused: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    assert all(argument in (None, 0, False, 2147483647) for argument in unused.values()), "not modelled"
    batch, heads, queries, width = query.shape
    groups, capacity = key.shape[1:3]
    assert query.is_contiguous() and key.is_contiguous() and value.is_contiguous(), "contiguous tensors only"
    assert query.dtype in (torch.float16, torch.bfloat16) and key.shape == value.shape and key.dtype == value.dtype
    assert input_layout == ("BNSD" if queries == 1 else "BNSD_BSND") and heads <= 256 and width <= 512
    assert num_heads == heads and num_key_value_heads == groups and heads % groups == 0 and heads // groups <= 64
    assert actual_seq_lengths_kv is not None and len(actual_seq_lengths_kv) in (1, batch)
    assert len(set(actual_seq_lengths_kv)) == 1 and 0 < actual_seq_lengths_kv[0] <= capacity
    if queries == 1:
        assert capacity <= 262144 and atten_mask is None and sparse_mode == 0 and inner_precise in (0, 1)
    if key.dtype == torch.int8:
        assert queries == 1 and key_antiquant_mode == value_antiquant_mode
        assert (key_antiquant_offset is None) == (value_antiquant_offset is None)
        key = anti_quantized(key, key_antiquant_scale, key_antiquant_offset, key_antiquant_mode, query.dtype)
        value = anti_quantized(value, value_antiquant_scale, value_antiquant_offset, value_antiquant_mode, query.dtype)
    else:
        assert key.dtype == query.dtype and width % 16 == 0 and key_antiquant_scale is None
    keys = actual_seq_lengths_kv[0]
    hidden = hidden_keys(query.shape, capacity, keys, sparse_mode, atten_mask)
    valid = torch.arange(capacity)[:, None] < keys
    share = heads // groups
    key = torch.where(valid, key.float(), UNKNOWN).repeat_interleave(share, dim=1)
    value = torch.where(valid, value.float(), UNKNOWN).repeat_interleave(share, dim=1)
    scores = (query.float() @ key.mT * scale).masked_fill(hidden, -1e30)
    weights = torch.softmax(scores, dim=-1)  # uniform where a query sees nothing, as on the device
    if inner_precise in (2, 3):
        weights = weights.masked_fill(hidden.all(dim=-1, keepdim=True), 0)
    output = (weights @ value).to(query.dtype)
    return output if queries == 1 else output.transpose(1, 2).contiguous(), torch.empty(0)


def online_quantized(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, score_scale: torch.Tensor, value_scale: torch.Tensor
) -> torch.Tensor:
    """The golden of quant_type 3 for one sequence: int8 q `[H, D]`, K and V `[S, H, D]`, a block of 128 keys at a time.

    The weights of a block are quantized by their largest, per head, after rounding to float16; their sum is not.
    """
    scores = torch.einsum("hd,shd->hs", query.float(), key.float()) * score_scale[:, None]
    best = torch.full((query.shape[0], 1), -math.inf)
    total, output = torch.zeros_like(best), torch.zeros(query.shape)
    for start in range(0, key.shape[0], 128):
        block = scores[:, start : start + 128]
        new_best = torch.maximum(best, block.amax(dim=1, keepdim=True))
        weights = torch.exp(block - new_best)
        largest = weights.amax(dim=1, keepdim=True)
        codes = (weights / (largest / 127)).half().float().round()
        product = torch.einsum("hs,shd->hd", codes, value[start : start + 128].float())
        fade = torch.exp(best - new_best)
        total = total * fade + weights.sum(dim=1, keepdim=True)
        output = output * fade + product * (value_scale[:, None] * largest / 127)
        best = new_best
    return output / total


def paged_attention_quant(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    quant_type: int,
    outdata_type: int,
    k_descale: torch.Tensor,
    v_descale: torch.Tensor,
    out: torch.Tensor,
) -> None:
    tokens, heads, width = query.shape
    _, page, groups, _ = key_cache.shape
    assert query.dtype == key_cache.dtype == value_cache.dtype == torch.int8 and key_cache.shape == value_cache.shape
    assert key_cache.shape[3] == width <= 256 and page * width <= 128 * 128 and page % 32 == 0 and width % 32 == 0
    assert (num_heads, num_kv_heads) == (heads, groups) and quant_type == 3
    assert {1: torch.float16, 27: torch.bfloat16}[outdata_type] == out.dtype and out.shape == query.shape
    for tensor in (query, key_cache, value_cache, block_table, context_lens, k_descale, v_descale, out):
        assert tensor.is_contiguous()
    assert k_descale.dtype == v_descale.dtype == torch.float32 and k_descale.shape == v_descale.shape == (heads,)
    assert block_table.dtype == context_lens.dtype == torch.int32 and context_lens.device.type == "cpu"
    assert context_lens.shape == (tokens,) and block_table.shape[0] == tokens
    for token in range(tokens):
        length = int(context_lens[token])
        pages = block_table[token, : -(-length // page)].long()
        keys, values = (
            cache[pages].flatten(0, 1)[:length].repeat_interleave(heads // groups, dim=1)
            for cache in (key_cache, value_cache)
        )
        out[token] = online_quantized(query[token], keys, values, k_descale * scale_value, v_descale).to(out.dtype)


MODELS = {
    "npu_quantize": quantize,
    "npu_dynamic_quant": dynamic_quant,
    "npu_quant_matmul": quant_matmul,
    "npu_fused_infer_attention_score": fused_infer_attention_score,
    "_npu_paged_attention_quant": paged_attention_quant,
}
