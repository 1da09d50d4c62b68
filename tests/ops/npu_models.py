"""Models of the ops of torch_npu that Octavo calls: what their documents say, on CPU tensors, in float32.

They refuse, by assertions, what the documents forbid, and what Octavo does not use. Documents: docs/zh/custom_APIs of
github.com/Ascend/op-plugin at 517f2e7d, and where they are short the aclnn documents of github.com/hicann/ops-nn at
e5c3fa93 and ops-transformer at c29bc106; for the ATB op, its test/test_custom_ops/test_atb_paged_attention_quant.py,
and include/atb/infer_op_params.h of github.com/hicann/ascend-transformer-boost at ddcc8b62.
"""

import functools
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
        assert x.dtype in (torch.float32, scales.dtype), "aclnnQuantize: scales as x, unless x is float32"
        assert zero_points is None or zero_points.dtype in (torch.int8, torch.uint8, torch.int32, torch.bfloat16)
        scaled = x.float() / scales.float().view(shape)
    else:
        assert scales.dtype == x.dtype and (zero_points is None or zero_points.dtype == x.dtype)
        scaled = x.float() * scales.float().view(shape)
    if zero_points is not None:
        assert zero_points.shape == scales.shape
        scaled = scaled + zero_points.float().view(shape)
    return to_codes(scaled)


def is_default(arguments: dict[str, Any]) -> bool:
    return all(argument in (None, "pertoken", 0, 0.0) for argument in arguments.values())


def dynamic_quant(x: torch.Tensor, **unused: Any) -> tuple[torch.Tensor, torch.Tensor]:
    assert x.dtype in (torch.float16, torch.bfloat16) and x.dim() > 1 and is_default(unused)
    scale = x.float().abs().amax(dim=-1) / HIGHEST
    codes = to_codes(x.float() / scale.unsqueeze(-1).clamp_min(1e-30))
    codes[scale == 0] = LOWEST  # what the op does here is not documented: the worst
    return codes, scale


def dynamic_quant_asymmetric(x: torch.Tensor, **unused: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    assert x.dtype in (torch.float16, torch.bfloat16) and x.dim() > 1 and is_default(unused)
    largest = x.float().amax(dim=-1)
    scale = (largest - x.float().amin(dim=-1)) / (HIGHEST - LOWEST)
    offset = HIGHEST - largest / scale  # infinite or NaN for equal values, which is not documented
    codes = to_codes((x.float() / scale.unsqueeze(-1) + offset.unsqueeze(-1)).nan_to_num(HIGHEST))
    return codes, scale, offset


def scatter_update_(data: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor, axis: int) -> torch.Tensor:
    """`data[i][j][indices[i] + k][l] = updates[i][j][k][l]` (aclnnInplaceScatterUpdate)."""
    assert data.dtype in (torch.int8, torch.float16, torch.float32, torch.bfloat16, torch.int32)
    assert updates.dtype == data.dtype and updates.dim() == data.dim() == 4 and axis == -2
    assert indices.dtype in (torch.int32, torch.int64) and indices.shape == data.shape[:1] == updates.shape[:1]
    tokens = updates.shape[2]
    for row, start in enumerate(indices.tolist()):
        assert 0 <= start <= data.shape[2] - tokens
        data[row, :, start : start + tokens] = updates[row]
    return data


def truncated(scale: torch.Tensor) -> torch.Tensor:
    """npu_trans_quant_param: a float32 scale without its 13 lowest bits."""
    return (scale.view(torch.int32) & ~0x1FFF).view(torch.float32)


def quant_matmul(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    *,
    pertoken_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    output_dtype: int | None = None,
    **unused: Any,
) -> torch.Tensor:
    assert x1.dtype == x2.dtype == torch.int8 and max(x1.shape[-1], x2.shape[-1]) <= 65535
    assert bias is None or bias.shape == x2.shape[-1:]
    assert scale.dtype == torch.float32 and scale.shape in ((1,), x2.shape[-1:])
    assert all(argument is None for argument in unused.values())
    dtype = {DTYPE_CODES[dtype]: dtype for dtype in (torch.float16, torch.bfloat16)}[output_dtype]
    total = x1.long() @ x2.long()
    assert total.abs().max() < 2**31
    if pertoken_scale is not None:
        assert pertoken_scale.dtype == torch.float32 and pertoken_scale.shape == x1.shape[:1]
        assert bias is None or bias.dtype == torch.float32, "of three, the one dtype that both outputs take"
        product = total.float() * scale * pertoken_scale[:, None]
        return (product if bias is None else product + bias).to(dtype)
    assert bias is None or bias.dtype == torch.int32
    total = total if bias is None else total + bias.long()
    return (total.float() * (truncated(scale) if dtype == torch.float16 else scale)).to(dtype)


def convert_weight_to_int4pack(weight: torch.Tensor, inner_k_tiles: int = 0) -> torch.Tensor:
    """Eight int4 in an int32, the first in the lowest bits (op-plugin: ConvertWeightToINT4PackKernelNpuOpApi.cpp)."""
    assert weight.dtype == torch.int32 and weight.is_contiguous() and weight.dim() == 2 and inner_k_tiles == 0
    assert weight.shape[1] % 8 == 0 and weight.min() >= -8 and weight.max() <= 7
    nibbles = (weight.long() & 15).unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)
    words = nibbles.sum(dim=-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def int4_unpacked(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `convert_weight_to_int4pack`."""
    nibbles = (packed.long().unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15
    return torch.where(nibbles >= 8, nibbles - 16, nibbles).flatten(1)


def is_transposed_view(matrix: torch.Tensor) -> bool:
    return matrix.stride() == (1, matrix.shape[0])


def weight_quant_batchmatmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    antiquant_scale: torch.Tensor,
    antiquant_offset: torch.Tensor | None = None,
    quant_scale: torch.Tensor | None = None,
    quant_offset: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: int | None = None,
) -> torch.Tensor:
    """`x @ ((weight + offset) * scale) + bias`."""
    assert x.dtype in (torch.float16, torch.bfloat16) and x.dim() == 2 and x.is_contiguous() and x.numel() > 0
    assert (quant_scale, quant_offset, weight_dtype, inner_precise) == (None, None, None, 0)
    is_transposed = is_transposed_view(weight)
    assert is_transposed or weight.is_contiguous()
    if weight.dtype == torch.int32:
        weight = int4_unpacked(weight.t()).t() if is_transposed else int4_unpacked(weight)
    else:
        assert weight.dtype == torch.int8
    depth, columns = weight.shape
    assert x.shape[1] == depth and max(depth, columns) <= 65535
    groups = 1
    if antiquant_group_size:
        assert 32 <= antiquant_group_size < depth and antiquant_group_size % 32 == 0
        groups = math.ceil(depth / antiquant_group_size)
    for part in (antiquant_scale,) if antiquant_offset is None else (antiquant_scale, antiquant_offset):
        assert part.shape == (groups, columns) and part.dtype == x.dtype
        assert is_transposed_view(part) if is_transposed else part.is_contiguous()
    rows = torch.arange(depth) // (antiquant_group_size or depth)
    values = weight.float() if antiquant_offset is None else weight.float() + antiquant_offset.float()[rows]
    output = x.float() @ (values * antiquant_scale.float()[rows])
    if bias is not None:
        assert bias.dtype == (torch.float32 if x.dtype == torch.bfloat16 else torch.float16)
        assert bias.shape == (columns,) and bias.is_contiguous()
        output = output + bias.float()
    return output.to(x.dtype)


def anti_quantized(
    codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, mode: int, dtype: torch.dtype
) -> torch.Tensor:
    """`(code + offset) * scale` of K or V `[B, G, S, D]` by one of the antiquant modes."""
    batch, groups, keys, width = codes.shape
    shapes = {
        0: [(1, groups, 1, width), (1, groups, width), (groups, 1, width), (groups, width)],
        1: [(batch, keys)],
        2: [(groups,)],
        3: [(batch, groups, keys)],
    }
    views = {
        0: (1, groups, 1, width),
        1: (batch, 1, keys, 1),
        2: (1, groups, 1, 1),
        3: (batch, groups, keys, 1),
    }
    assert codes.dtype == torch.int8 and codes.shape[-1] % 32 == 0
    for part in (scale,) if offset is None else (scale, offset):
        assert part.shape in shapes[mode], f"mode {mode}: {tuple(part.shape)}"
        assert part.dtype == (torch.float32 if mode in (1, 3) else dtype), f"mode {mode}: {part.dtype}"
    values = codes.float() if offset is None else codes.float() + offset.float().view(views[mode])
    return values * scale.float().view(views[mode])


@functools.cache
def compressed_mask() -> torch.Tensor:
    return torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def hidden_keys(
    query_shape: torch.Size,
    capacity: int,
    lengths: list[int],
    sparse_mode: int,
    atten_mask: torch.Tensor | None,
    pre_tokens: int,
    next_tokens: int,
) -> torch.Tensor:
    """True where a query does not see a key, `[B, 1, Q, capacity]`."""
    batch, _, queries, _ = query_shape
    keys = torch.arange(capacity)
    ends = torch.tensor(lengths).view(batch, 1, 1, 1)
    hidden = (keys >= ends).expand(batch, 1, queries, capacity)
    if atten_mask is None:
        assert sparse_mode == 0
        return hidden
    assert atten_mask.is_contiguous() and atten_mask.dtype in (torch.bool, torch.int8, torch.uint8)
    if sparse_mode in (3, 4):
        assert torch.equal(atten_mask.bool(), compressed_mask())
        last = ends - queries + torch.arange(queries)[:, None]
        if sparse_mode == 3:
            return hidden | (keys > last)
        assert pre_tokens >= 0 and next_tokens >= 0
        return hidden | (keys > last + next_tokens) | (keys < last - pre_tokens)
    assert sparse_mode == 1 and atten_mask.shape in ((1, 1, queries, capacity), (batch, 1, queries, capacity))
    return hidden | atten_mask.bool()


def check_several_queries_over_codes(
    query: torch.Tensor, layout: str, is_combined: bool, modes: tuple[int, int]
) -> None:
    """What aclnnFusedInferAttentionScoreV3 says of Q_S above 1 and int8 K and V."""
    assert layout == "BNSD"
    if is_combined:
        assert query.dtype == torch.float16
    else:
        assert query.dtype == torch.bfloat16 and query.shape[2] <= 16 and modes in ((0, 0), (1, 1))


def fused_infer_attention_score(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    atten_mask: torch.Tensor | None = None,
    actual_seq_lengths_kv: list[int] | None = None,
    antiquant_scale: torch.Tensor | None = None,
    antiquant_offset: torch.Tensor | None = None,
    key_antiquant_scale: torch.Tensor | None = None,
    key_antiquant_offset: torch.Tensor | None = None,
    value_antiquant_scale: torch.Tensor | None = None,
    value_antiquant_offset: torch.Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    pre_tokens: int = 2147483647,
    next_tokens: int = 2147483647,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    inner_precise: int = 0,
    key_antiquant_mode: int = 0,
    value_antiquant_mode: int = 0,
    **unused: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    assert all(argument in (None, 0, False) for argument in unused.values()), "not modelled"
    batch, heads, queries, width = query.shape
    groups, capacity = key.shape[1:3]
    assert query.is_contiguous() and key.is_contiguous() and value.is_contiguous(), "contiguous tensors only"
    assert query.dtype in (torch.float16, torch.bfloat16) and key.shape == value.shape and key.dtype == value.dtype
    assert (input_layout == "BNSD" or (input_layout == "BNSD_BSND" and queries > 1)) and heads <= 256 and width <= 512
    assert num_heads == heads and num_key_value_heads == groups and heads % groups == 0 and heads // groups <= 64
    assert actual_seq_lengths_kv is not None and len(actual_seq_lengths_kv) == batch
    assert all(0 < length <= capacity for length in actual_seq_lengths_kv)
    if queries == 1:
        assert capacity <= 262144 and atten_mask is None and sparse_mode == 0 and inner_precise in (0, 1)
    if key.dtype == torch.int8:
        modes = key_antiquant_mode, value_antiquant_mode
        if queries > 1:
            check_several_queries_over_codes(query, input_layout, antiquant_scale is not None, modes)
        if antiquant_scale is not None:
            assert queries > 1 and key_antiquant_scale is None and antiquant_scale.shape == (2, groups, 1, width)
            key_antiquant_scale, value_antiquant_scale = antiquant_scale
            if antiquant_offset is not None:
                key_antiquant_offset, value_antiquant_offset = antiquant_offset
        assert modes[0] == modes[1] and (key_antiquant_offset is None) == (value_antiquant_offset is None)
        key = anti_quantized(key, key_antiquant_scale, key_antiquant_offset, modes[0], query.dtype)
        value = anti_quantized(value, value_antiquant_scale, value_antiquant_offset, modes[1], query.dtype)
    else:
        assert key.dtype == query.dtype and width % 16 == 0 and key_antiquant_scale is None
    hidden = hidden_keys(query.shape, capacity, actual_seq_lengths_kv, sparse_mode, atten_mask, pre_tokens, next_tokens)
    valid = torch.arange(capacity)[:, None] < torch.tensor(actual_seq_lengths_kv).view(-1, 1, 1, 1)
    share = heads // groups
    key = torch.where(valid, key.float(), UNKNOWN).repeat_interleave(share, dim=1)
    value = torch.where(valid, value.float(), UNKNOWN).repeat_interleave(share, dim=1)
    scores = (query.float() @ key.mT * scale).masked_fill(hidden, -1e30)
    weights = torch.softmax(scores, dim=-1)  # uniform where a query sees nothing, as on the device
    if inner_precise in (2, 3):
        weights = weights.masked_fill(hidden.all(dim=-1, keepdim=True), 0)
    output = (weights @ value).to(query.dtype)
    return output.transpose(1, 2).contiguous() if input_layout == "BNSD_BSND" else output, torch.empty(0)


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
    "npu_dynamic_quant_asymmetric": dynamic_quant_asymmetric,
    "scatter_update_": scatter_update_,
    "npu_quant_matmul": quant_matmul,
    "npu_weight_quant_batchmatmul": weight_quant_batchmatmul,
    "npu_convert_weight_to_int4pack": convert_weight_to_int4pack,
    "npu_fused_infer_attention_score": fused_infer_attention_score,
    "_npu_paged_attention_quant": paged_attention_quant,
}
