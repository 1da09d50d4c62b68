"""Attention on an Ascend NPU, behind the Python signature of the reference.

One query per sequence (decode), and float K and V: npu_fused_infer_attention_score (FIA), which decodes int8 codes
inside. One int8 query (FAQuant): the ATB op _npu_paged_attention_quant. What those ops do not take, several queries
over codes and masks of a decode step, goes through `attention_reference` on the device, a block of keys at a time;
`report` says so.
"""

import functools
from typing import Any

import torch

from ..npu import npu_description, quantize_static, require_npu_float, torch_npu_module, whole_storage
from .reference import attention_reference

ATTENTION_NPU = npu_description(
    "npu_fused_infer_attention_score; int8 queries by _npu_paged_attention_quant, a call per KV head; "
    "several queries over codes, and a mask at decode, by the reference (PyTorch)"
)
PER_CHANNEL, PER_HEAD, PER_TOKEN = 0, 2, 3
"""The antiquant modes of FIA that our scales are: perchannel, pertensor + perhead, pertoken + perhead."""
ONLINE, ACL_TYPES = 3, {torch.float16: 1, torch.bfloat16: 27}
"""Of _npu_paged_attention_quant: quant_type that quantizes the weights in the kernel, and outdata_type by dtype."""
PAGE_ALIGNMENT, LARGEST_PAGE, LARGEST_PAGE_BYTES = 32, 128, 128 * 128
"""Tokens of a page are a multiple of the int8 tile; block_size * head_size is limited (ATB: infer_op_params.h)."""
COMPRESSED_MASK = 2048
RIGHT_DOWN_CAUSAL, WHOLE_MASK, EMPTY_ROWS_ARE_ZERO = 3, 1, 2
"""Of FIA: two values of sparse_mode, and the inner_precise that gives zeros to queries which see nothing."""


def attention_npu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_scale: torch.Tensor | None,
    key_zero: torch.Tensor | None,
    value_scale: torch.Tensor | None,
    value_zero: torch.Tensor | None,
    query_scale: torch.Tensor | None,
    mask: torch.Tensor | None,
    scaling: float,
    causal: bool,
    length: torch.Tensor | None = None,
    window: int = 0,
    key_group: int = 1,
    value_group: int = 1,
) -> torch.Tensor:
    """`attention_reference` by ops of torch_npu; shapes as there, the query in float16 or bfloat16.

    A mask at decode is not given to FIA: with `[B, 1, 1, S]` it ignores all beyond key 512 without an error
    (github.com/vllm-project/vllm-ascend/issues/15503). Several queries over codes are outside of what its antiquant
    modes 2 and 3 and its float16 take.

    Raises:
        ValueError: a dtype, shape or layout beyond the limits of the op; the message names the limit.
        NotImplementedError: a combination of codecs that the op has no mode for.
        RuntimeError: torch_npu cannot be imported.
    """
    require_npu_float("q", query)
    queries = query.shape[2]
    in_codes = torch.int8 in (key.dtype, value.dtype) or query_scale is not None
    has_plain_mask = mask is None or (mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1] == 1)
    if key.shape[2] == 0 or (queries == 1 and mask is not None) or (queries > 1 and (in_codes or not has_plain_mask)):
        return attention_reference(
            query,
            key,
            value,
            key_scale,
            key_zero,
            value_scale,
            value_zero,
            query_scale,
            mask,
            scaling,
            causal,
            length,
            window,
            key_group,
            value_group,
        )
    if query_scale is not None:
        if key_zero is not None or value_zero is not None:
            raise NotImplementedError("_npu_paged_attention_quant has no zero points; use symmetric codecs of K and V")
        return _attend_int8(query, key, value, key_scale, value_scale, query_scale, scaling)
    if in_codes:
        options = _antiquant(query.dtype, key, value, (key_scale, value_scale), (key_zero, value_zero))
    else:
        options = {} if queries == 1 else _mask_options(query, key, mask, causal)
    return _attend_fused(query, key, value, scaling, options)


def _stored(view: torch.Tensor) -> torch.Tensor:
    """K or V as the ops take it: the whole storage; float states that no cache holds are copied if they have to be."""
    whole = whole_storage(view)
    if whole is None and view.dtype == torch.int8:
        raise ValueError(
            f"codes for the NPU must be the first tokens of contiguous [B, G, capacity, D] storage, not a view of "
            f"strides {view.stride()}"
        )
    return view.contiguous() if whole is None else whole


def _attend_fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, options: dict[str, Any]
) -> torch.Tensor:
    """FIA over the whole storage, of which it is told the valid length."""
    batch, heads, queries, width = query.shape
    groups, keys = key.shape[1:3]
    key, value = _stored(key), _stored(value)
    _check_fused(query, key, value)
    output, _ = torch_npu_module().npu_fused_infer_attention_score(
        query.contiguous(),
        key,
        value,
        actual_seq_lengths_kv=[keys] * batch,
        num_heads=heads,
        num_key_value_heads=groups,
        scale=scaling,
        input_layout="BNSD_BSND" if queries > 1 else "BNSD",
        **options,
    )
    return output.view(batch, queries, heads, width)


def _check_fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Limits of FIA on Atlas A2 and A3 (ascend-op-plugin docs: npu_fused_infer_attention_score)."""
    heads, queries, width = query.shape[1:]
    groups, capacity = key.shape[1:3]
    name = "npu_fused_infer_attention_score"
    if key.shape != value.shape or key.dtype != value.dtype:
        raise NotImplementedError(
            f"{name} takes K and V of one shape and dtype, not {key.dtype} {tuple(key.shape)} and "
            f"{value.dtype} {tuple(value.shape)}"
        )
    if key.dtype not in (query.dtype, torch.int8):
        raise ValueError(f"{name} takes K and V in int8 or in the dtype of q, {query.dtype}, not {key.dtype}")
    alignment = 32 if key.dtype == torch.int8 else 16
    if width % alignment or width > 512:
        raise ValueError(f"{name} takes a head_dim up to 512 that {alignment} divides with {key.dtype}, not {width}")
    if heads > 256 or heads % groups or heads // groups > 64:
        raise ValueError(f"{name} takes up to 256 heads, up to 64 per KV head, not {heads} on {groups}")
    if queries == 1 and capacity > 262144:
        raise ValueError(f"{name} takes up to 262144 keys per sequence at decode, not a cache of {capacity}")


def _mask_options(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, causal: bool) -> dict[str, Any]:
    """The arguments of FIA that hide keys from several queries; in its masks True hides."""
    if mask is not None:
        shape = (mask.shape[0], 1, query.shape[2], _stored(key).shape[2])
        hidden = torch.ones(shape, dtype=torch.bool, device=query.device)
        hidden[..., : key.shape[2]] = ~mask
        return {"atten_mask": hidden, "sparse_mode": WHOLE_MASK, "inner_precise": EMPTY_ROWS_ARE_ZERO}
    return {"atten_mask": _compressed_mask(query.device), "sparse_mode": RIGHT_DOWN_CAUSAL} if causal else {}


@functools.cache
def _compressed_mask(device: torch.device) -> torch.Tensor:
    """The `[2048, 2048]` mask from which FIA makes a causal mask of any size."""
    return torch.ones((COMPRESSED_MASK, COMPRESSED_MASK), dtype=torch.bool, device=device).triu_(1)


def _mode(scale: torch.Tensor | None, codes: torch.Tensor) -> int:
    """The antiquant mode of a scale `[G, 1, D]`, `[G, 1, 1]` or `[B, G, S, 1]`."""
    if scale is None or codes.dtype != torch.int8:
        raise NotImplementedError("the NPU attends to K and V both in int8 codes with scales, or both in float")
    rows, columns = scale.shape[-2:]
    per_token = rows != 1 or (codes.shape[2] == 1 and columns == 1 and scale.dim() == 4)
    if per_token and columns != 1:
        raise NotImplementedError(f"no antiquant mode has scales per token and channel, {tuple(scale.shape)}")
    return PER_TOKEN if per_token else PER_HEAD if columns == 1 else PER_CHANNEL


def _antiquant(
    dtype: torch.dtype,
    key: torch.Tensor,
    value: torch.Tensor,
    scales: tuple[torch.Tensor | None, torch.Tensor | None],
    zeros: tuple[torch.Tensor | None, torch.Tensor | None],
) -> dict[str, Any]:
    """The arguments of FIA that decode codes as `(code + offset) * scale`: its offsets are our zeros negated.

    Scales are `[G, 1, D]` or `[G]` in the dtype of q, or float32 `[B, G, capacity]` per token.
    """
    modes = [_mode(scale, codes) for scale, codes in zip(scales, (key, value), strict=True)]
    if modes[0] != modes[1] and PER_TOKEN in modes:
        raise NotImplementedError("npu_fused_infer_attention_score has no mode for K and V of which one is per token")
    mode = min(modes)  # a scale per head is also one per channel
    options: dict[str, Any] = {"key_antiquant_mode": mode, "value_antiquant_mode": mode}
    for name, codes, scale, zero in zip(("key", "value"), (key, value), scales, zeros, strict=True):
        options[f"{name}_antiquant_scale"] = _antiquant_part(scale, codes, mode, dtype)
        if zeros != (None, None):  # both or neither
            offset = torch.zeros_like(scale) if zero is None else -zero
            options[f"{name}_antiquant_offset"] = _antiquant_part(offset, codes, mode, dtype)
    return options


def _antiquant_part(part: torch.Tensor, codes: torch.Tensor, mode: int, dtype: torch.dtype) -> torch.Tensor:
    """A scale or offset in the shape and dtype of its mode."""
    groups, width = codes.shape[1], codes.shape[3]
    if mode == PER_TOKEN:
        whole, capacity = whole_storage(part), _stored(codes).shape[2]
        if whole is None or whole.shape[2] != capacity:
            padded = part.new_zeros((*part.shape[:2], capacity))
            padded[..., : part.shape[2]] = part[..., 0]
            return padded.float()
        return whole[..., 0].float()
    if mode == PER_HEAD:
        return part.expand(1, groups, 1, 1).reshape(groups).to(dtype)
    return part.expand(1, groups, 1, width).reshape(groups, 1, width).to(dtype)


def _attend_int8(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_scale: torch.Tensor | None,
    value_scale: torch.Tensor | None,
    query_scale: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """FAQuant decode: int8 q, K and V; the weights are quantized in the kernel, per head and block of keys.

    The op reads pages `[pages, page, KV heads, D]`. Our storage `[B, G, capacity, D]` is that for one KV head: page i
    of head g of sequence b is page `(b * G + g) * capacity / page + i`. Since the op's scales are per head and not per
    sequence, it is called once per KV head, each time over the same view of the storage with another block table.
    """
    if (_mode(key_scale, key), _mode(value_scale, value)) != (PER_HEAD, PER_HEAD):
        raise NotImplementedError("int8 queries on the NPU need K and V in int8 with static scales per head")
    batch, heads, _, width = query.shape
    groups, keys = key.shape[1:3]
    share = heads // groups
    key_pages, value_pages = _pages(key), _pages(value)
    if key_pages.shape != value_pages.shape:
        raise ValueError(f"K and V are stored differently: pages {tuple(key_pages.shape)}, {tuple(value_pages.shape)}")
    page, pages = key_pages.shape[1], key_pages.shape[0] // (batch * groups)
    numbers = torch.arange(batch * groups * pages, dtype=torch.int32, device=query.device).view(batch, groups, pages)
    tables = numbers[:, :, : -(-keys // page)].transpose(0, 1).contiguous()
    lengths = torch.full((batch,), keys, dtype=torch.int32)  # on the host, where the op plans its work
    codes = quantize_static(query, query_scale, None).view(batch, groups, share, width).transpose(0, 1).contiguous()
    value_descale = value_scale.float().expand(1, groups, 1, 1).reshape(groups, 1).repeat(1, share)
    score_descale = query_scale.float().expand(1, heads, 1, 1).reshape(groups, share) * key_scale.float().reshape(-1, 1)
    output = query.new_empty((groups, batch, share, width))
    npu = torch_npu_module()
    for group in range(groups):
        npu._npu_paged_attention_quant(
            codes[group], key_pages, value_pages, 1, share, scaling, tables[group], lengths, ONLINE,
            ACL_TYPES[query.dtype], score_descale[group], value_descale[group], output[group],
        )  # fmt: skip
    return output.transpose(0, 1).reshape(batch, 1, heads, width)


def _pages(codes: torch.Tensor) -> torch.Tensor:
    """Codes `[B, G, S, D]` as pages `[B * G * capacity / page, page, 1, D]`: a view, unless the storage is tiny.

    Storage of at most 128 tokens, whose capacity may not divide into pages, is copied to the next that does.
    """
    storage = _stored(codes)
    batch, groups, capacity, width = storage.shape
    if width % PAGE_ALIGNMENT or width > 256:
        raise ValueError(f"_npu_paged_attention_quant takes a head_dim up to 256 that 32 divides, not {width}")
    if capacity % PAGE_ALIGNMENT and capacity <= LARGEST_PAGE:
        storage = torch.nn.functional.pad(storage, (0, 0, 0, -capacity % PAGE_ALIGNMENT))
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
