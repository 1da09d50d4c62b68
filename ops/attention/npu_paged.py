"""Attention on an Ascend NPU by the ATB op _npu_paged_attention_quant: one int8 query over static codes (FAQuant)."""

import torch

from ..shared.npu_helpers import quantize_static, torch_npu_module
from .call import AttentionCall
from .npu_fused import PER_HEAD, antiquant_mode, stored_npu

ONLINE, ACL_TYPES = 3, {torch.float16: 1, torch.bfloat16: 27}
"""Of _npu_paged_attention_quant: quant_type that quantizes the weights in the kernel, and outdata_type by dtype."""
PAGE_ALIGNMENT, LARGEST_PAGE, LARGEST_PAGE_BYTES = 32, 128, 128 * 128
"""Tokens of a page are a multiple of the int8 tile; block_size * head_size is limited (ATB: infer_op_params.h)."""
USUAL_PAGE, SMALL_STORAGE = 64, 256
"""The op is tuned for pages of 64 and 128; storage up to 256 tokens is copied rather than cut into pages of 32."""


def paged_declines(call: AttentionCall) -> str | None:
    """None, or why the ATB op has no mode for a call with a quantized query."""
    sides, scale = (call.key, call.value), call.query_scale
    are_per_head = all(antiquant_mode(side) == PER_HEAD and side.zero is None for side in sides)
    is_for_all = scale.dim() < 4 or scale.shape[0] == 1
    if are_per_head and is_for_all and call.query.shape[2] == 1 and call.visibility.mask is None:
        return None
    return (
        "_npu_paged_attention_quant takes one query, without a mask, over symmetric codes in int8 with a scale per "
        "head alone; take a scheme that leaves the queries in float"
    )


def attend_paged(call: AttentionCall, lengths: list[int]) -> torch.Tensor:
    """FAQuant decode: int8 q, K and V; the weights are quantized in the kernel, per head and block of keys.

    The op reads pages `[pages, page, KV heads, D]`. Our storage `[B, G, capacity, D]` is that for one KV head: page i
    of head g of sequence b is page `(b * G + g) * capacity / page + i`. Since the op's scales are per head and not per
    sequence, it is called once per KV head, each time over the same view of the storage with another block table.
    """
    query, query_scale = call.query, call.query_scale
    (key, key_scale, *_), (value, value_scale, *_) = call.key, call.value
    batch, heads, _, width = query.shape
    groups = key.shape[1]
    share = heads // groups
    key_pages, value_pages = _pages(key), _pages(value)
    if key_pages.shape != value_pages.shape:
        raise ValueError(f"K and V are stored differently: pages {tuple(key_pages.shape)}, {tuple(value_pages.shape)}")
    page, pages = key_pages.shape[1], key_pages.shape[0] // (batch * groups)
    numbers = torch.arange(batch * groups * pages, dtype=torch.int32, device=query.device).view(batch, groups, pages)
    tables = numbers[:, :, : -(-max(lengths) // page)].transpose(0, 1).contiguous()
    context = torch.tensor([max(1, tokens) for tokens in lengths], dtype=torch.int32)  # on the host: it plans there
    codes = quantize_static(query, query_scale, None).reshape(batch, groups, share, width).transpose(0, 1).contiguous()
    value_descale = value_scale.float().expand(1, groups, 1, 1).reshape(groups, 1).repeat(1, share)
    score_descale = query_scale.float().expand(1, heads, 1, 1).reshape(groups, share)
    score_descale = score_descale * key_scale.float().expand(1, groups, 1, 1).reshape(groups, 1)
    output = query.new_empty((groups, batch, share, width))
    npu = torch_npu_module()
    for group in range(groups):
        npu._npu_paged_attention_quant(
            codes[group], key_pages, value_pages, 1, share, call.scaling, tables[group], context, ONLINE,
            ACL_TYPES[query.dtype], score_descale[group], value_descale[group], output[group],
        )  # fmt: skip
    return output.transpose(0, 1).reshape(batch, 1, heads, width)


def _pages(codes: torch.Tensor) -> torch.Tensor:
    """Codes `[B, G, S, D]` as pages `[B * G * capacity / page, page, 1, D]`: a view, unless the storage is small.

    Storage of at most 256 tokens, whose capacity may not divide into usual pages, is copied to the next that does.
    """
    storage = stored_npu(codes)
    batch, groups, capacity, width = storage.shape
    if width % PAGE_ALIGNMENT or width > 256:
        raise ValueError(f"_npu_paged_attention_quant takes a head_dim up to 256 that 32 divides, not {width}")
    if capacity % USUAL_PAGE and capacity <= SMALL_STORAGE:
        storage = torch.nn.functional.pad(storage, (0, 0, 0, -capacity % USUAL_PAGE))
        capacity = storage.shape[2]
    page = LARGEST_PAGE
    while page >= PAGE_ALIGNMENT and (capacity % page or page * width > LARGEST_PAGE_BYTES):
        page //= 2
    if page < PAGE_ALIGNMENT:
        raise ValueError(
            f"_npu_paged_attention_quant takes pages of {PAGE_ALIGNMENT} tokens, and the cache holds {capacity}; "
            f"make max_length a multiple of {PAGE_ALIGNMENT}"
        )
    return storage.view(batch * groups * capacity // page, page, 1, width)
