"""Attention on an Ascend NPU, behind the Python signature of the reference.

npu_fused_infer_attention_score (FIA) serves float K and V, and int8 codes that it decodes inside, mostly at decode, for
one query per sequence. One int8 query (FAQuant): the ATB op _npu_paged_attention_quant. What those ops do not take goes
through `attention_reference` on the device, a block of keys at a time; `report` says so.
"""

import functools
from typing import Any, NamedTuple

import torch

from ..shared.npu_helpers import (
    npu_description,
    quantize_static,
    refuse_fp8,
    require_npu_float,
    torch_npu_module,
    whole_storage,
)
from .arguments import LARGEST_COUNT, check_attention
from .reference import attention_lse_reference, attention_reference

ATTENTION_NPU = npu_description(
    "npu_fused_infer_attention_score, which waits for `length` on the host and gets a copy of a window at decode; int8 "
    "queries by _npu_paged_attention_quant, a call per KV head; by the reference (PyTorch): int4, scales in groups, K "
    "and V of different granularity, several queries or a mask over codes except static ones in float16 or, up to 16 "
    "queries, any in bfloat16, int8 queries except one over static codes per head, scores by position, and segments of "
    "a sequence where causality or a window cuts them; fp8 raises"
)
PER_CHANNEL, PER_HEAD, PER_TOKEN, FLOAT = 0, 2, 3, -1
"""The antiquant modes of FIA that our scales are: perchannel, pertensor + perhead, pertoken + perhead; and none."""
PER_TOKEN_OF_ONE_HEAD = 1
"""The mode pertoken, whose scales are for all heads."""
STATIC_MODES = (PER_CHANNEL, PER_HEAD)
ONLINE, ACL_TYPES = 3, {torch.float16: 1, torch.bfloat16: 27}
"""Of _npu_paged_attention_quant: quant_type that quantizes the weights in the kernel, and outdata_type by dtype."""
PAGE_ALIGNMENT, LARGEST_PAGE, LARGEST_PAGE_BYTES = 32, 128, 128 * 128
"""Tokens of a page are a multiple of the int8 tile; block_size * head_size is limited (ATB: infer_op_params.h)."""
USUAL_PAGE, SMALL_STORAGE = 64, 256
"""The op is tuned for pages of 64 and 128; storage up to 256 tokens is copied rather than cut into pages of 32."""
COMPRESSED_MASK = 2048
WHOLE_MASK, RIGHT_DOWN_CAUSAL, BAND, EMPTY_ROWS_ARE_ZERO = 1, 3, 4, 2
"""Of FIA: three values of sparse_mode, and the inner_precise that gives zeros to queries which see nothing."""
MOST_BFLOAT16_QUERIES = 16
"""Queries over codes that FIA takes in bfloat16 (aclnnFusedInferAttentionScoreV3)."""


class _Operand(NamedTuple):
    """K or V: codes `[B, G, S, D]` with their scale and zero."""

    codes: torch.Tensor
    scale: torch.Tensor | None
    zero: torch.Tensor | None


def attention_npu(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any) -> torch.Tensor:
    """`attention_reference` by ops of torch_npu, of the same arguments; the query in float16 or bfloat16.

    Raises:
        ValueError: a dtype, shape or layout beyond the limits of the op; the message names the limit.
        NotImplementedError: codes in fp8.
        RuntimeError: torch_npu cannot be imported.
    """
    output = _attend_by_ops(query, key, value, *others)
    return attention_reference(query, key, value, *others) if output is None else output


def attention_lse_npu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention_lse_reference` on the device.

    Raises:
        NotImplementedError: codes in fp8.
    """
    refuse_fp8(key, value)
    return attention_lse_reference(query, key, value, *others)


def _attend_by_ops(
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
    position_query: torch.Tensor | None = None,
    position_table: torch.Tensor | None = None,
    position_start: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """`attention_reference` by ops of torch_npu; None where they have no mode for it.

    With one query and a mask `[B, 1, 1, S]` FIA ignores all beyond key 512 without an error
    (github.com/vllm-project/vllm-ascend/issues/15503). So a mask at decode makes two equal queries of the one, for
    which FIA has another kernel, that of prefill. int4 codes are not for FIA: it wants eight in an int32, in an order
    that no document tells.

    Both ops plan their work on the host, from lists of lengths: `length` is copied there, which waits for the device.
    Neither knows a window at decode: the codes in it, not the whole cache, are copied to storage of their own.
    """
    has_positions = check_attention(
        query, key, value, key_scale, key_zero, value_scale, value_zero, query_scale, mask, length, window, key_group,
        value_group, position_query, position_table, position_start,
    )  # fmt: skip
    require_npu_float("q", query)
    refuse_fp8(key, value)
    if has_positions or query.numel() == 0:
        return None
    operands = _Operand(key, key_scale, key_zero), _Operand(value, value_scale, value_zero)
    is_doubled = mask is not None and mask.dim() == 4 and query.shape[2] == 1
    if is_doubled and _is_served(query.expand(-1, -1, 2, -1), operands, query_scale, mask):
        query, mask = query.expand(-1, -1, 2, -1), mask.expand(-1, -1, 2, -1)
    elif not _is_served(query, operands, query_scale, mask):
        return None
    lengths = _lengths(key, length)
    cuts = causal and mask is None and (query.shape[2] > 1 or window > 0)
    if cuts and max(lengths) > key.shape[2]:
        return None
    lengths = [min(max(0, tokens), key.shape[2]) for tokens in lengths]
    window = window if causal and mask is None else 0
    if window and query.shape[2] == 1 and max(lengths) > window:
        operands = _newest(operands[0], lengths, window), _newest(operands[1], lengths, window)
        lengths = [min(tokens, window) for tokens in lengths]
    if query_scale is not None:
        output = _attend_int8(query, operands, query_scale, scaling, lengths)
    else:
        output = _attend_fused(query, operands, mask, scaling, causal, lengths, window)
    if 0 in lengths:
        is_empty = torch.tensor([tokens == 0 for tokens in lengths], device=output.device)
        output = output.masked_fill(is_empty.view(-1, 1, 1, 1), 0)
    return output[:, :1] if is_doubled else output


def _lengths(key: torch.Tensor, length: torch.Tensor | None) -> list[int]:
    """Tokens in use, per sequence, on the host, as the caller says: may exceed those stored."""
    batch, capacity = key.shape[0], key.shape[2]
    if length is None:
        return [capacity] * batch
    return [min(max(tokens, -LARGEST_COUNT), LARGEST_COUNT) for tokens in length.expand(batch).tolist()]


def _is_served(
    query: torch.Tensor,
    operands: tuple[_Operand, _Operand],
    query_scale: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> bool:
    """Whether FIA or the ATB op has a mode for these arguments; their limits are checked later, and raise."""
    queries = query.shape[2]
    if operands[0].codes.shape[2] == 0 or (queries == 1 and mask is not None):
        return False
    if mask is not None and (mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1):
        return False
    modes = _mode(operands[0]), _mode(operands[1])
    if query_scale is not None:
        has_zeros = any(operand.zero is not None for operand in operands)
        return modes == (PER_HEAD, PER_HEAD) and queries == 1 and not has_zeros and _is_per_head(query_scale)
    if modes == (FLOAT, FLOAT):
        return True
    are_few = queries == 1 or (queries <= MOST_BFLOAT16_QUERIES and query.dtype == torch.bfloat16)
    if modes == (PER_TOKEN, PER_TOKEN):
        return are_few
    return modes[0] in STATIC_MODES and modes[1] in STATIC_MODES and (are_few or query.dtype == torch.float16)


def _is_per_head(query_scale: torch.Tensor) -> bool:
    """Whether the scale of q is one for all sequences."""
    return query_scale.dim() < 4 or query_scale.shape[0] == 1


def _mode(operand: _Operand) -> int | None:
    """The antiquant mode of a scale `[G, 1, D]`, `[G, 1, 1]` or `[B, G, S, 1]`, FLOAT of none; None: there is no mode.

    With one token stored, `[B, G, 1, 1]` is taken to be per token.
    """
    codes, scale, zero = operand
    if scale is None and codes.is_floating_point():
        return FLOAT
    if scale is None or codes.dtype != torch.int8 or (zero is not None and zero.shape != scale.shape):
        return None
    batch, _, rows, columns = (1,) * (4 - scale.dim()) + scale.shape
    if rows == codes.shape[2] and columns == 1 and scale.shape[:-2] == codes.shape[:2]:
        return PER_TOKEN
    if rows > 1 or batch > 1 or columns not in (1, codes.shape[3]):
        return None
    return PER_HEAD if columns == 1 else PER_CHANNEL


def _newest(operand: _Operand, lengths: list[int], window: int) -> _Operand:
    """The newest `window` tokens of each sequence, copied to the start of storage of whole pages."""
    tokens = min(window, max(lengths))
    capacity = -(-tokens // LARGEST_PAGE) * LARGEST_PAGE
    starts = [max(0, length - window) for length in lengths]

    def copied(part: torch.Tensor) -> torch.Tensor:
        storage = part.new_zeros((*part.shape[:2], capacity, part.shape[3]))
        if len(set(starts)) == 1:
            storage[:, :, :tokens] = part[:, :, starts[0] : starts[0] + tokens]
        else:
            for row, start in enumerate(starts):
                storage[row, :, :tokens] = part[row, :, start : start + tokens]
        return storage[:, :, :tokens]

    codes, scale, zero = operand
    if _mode(operand) == PER_TOKEN:
        scale, zero = copied(scale), None if zero is None else copied(zero)
    return _Operand(copied(codes), scale, zero)


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
    query: torch.Tensor,
    operands: tuple[_Operand, _Operand],
    mask: torch.Tensor | None,
    scaling: float,
    causal: bool,
    lengths: list[int],
    window: int,
) -> torch.Tensor:
    """FIA over the whole storage, of which it is told the valid lengths; returns `[B, Q, H, D]`."""
    batch, heads, queries, width = query.shape
    key, value = (_stored(operand.codes) for operand in operands)
    _check_fused(query, key, value)
    options = {} if queries == 1 else _mask_options(query, key, mask, causal, lengths, window)
    is_float_prefill = queries > 1 and key.dtype != torch.int8  # codes want BNSD (prompt_flash_attention_tiling.cpp)
    if key.dtype == torch.int8:
        options |= _antiquant(query, operands)
        if queries > 1 and _mode(operands[0]) == PER_TOKEN:
            lengths = [tokens for tokens in lengths for _ in range(key.shape[1])]
            query, key, value, options = _one_head_each(query, key, value, options)
    output, _ = torch_npu_module().npu_fused_infer_attention_score(
        query.contiguous(),
        key,
        value,
        actual_seq_lengths_kv=[max(1, tokens) for tokens in lengths],
        num_heads=query.shape[1],
        num_key_value_heads=key.shape[1],
        scale=scaling,
        input_layout="BNSD_BSND" if is_float_prefill else "BNSD",
        **options,
    )
    return output if is_float_prefill else output.view(batch, heads, queries, width).transpose(1, 2).contiguous()


def _one_head_each(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
    """The same for B * G sequences of one KV head, for which scales per token and head are scales per token.

    Several queries have no mode for the former. Nothing but a mask is copied.
    """
    batch, groups, capacity, width = key.shape
    options = dict(options)
    for name, part in options.items():
        if name.endswith(("antiquant_scale", "antiquant_offset")):
            options[name] = part.reshape(batch * groups, capacity)
    options |= {"key_antiquant_mode": PER_TOKEN_OF_ONE_HEAD, "value_antiquant_mode": PER_TOKEN_OF_ONE_HEAD}
    if options.get("sparse_mode") == WHOLE_MASK and options["atten_mask"].shape[0] > 1:
        options["atten_mask"] = options["atten_mask"].repeat_interleave(groups, dim=0)
    key, value = (part.view(batch * groups, 1, capacity, width) for part in (key, value))
    return query.reshape(batch * groups, -1, query.shape[2], width), key, value, options


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


def _mask_options(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, causal: bool, lengths: list[int], window: int
) -> dict[str, Any]:
    """The arguments of FIA that hide keys from several queries; in its masks True hides.

    A causal mask and the band of a window end with the last query at the last valid key, of each sequence
    (ops-transformer: prompt_flash_attention_tiling.cpp, preTokensPerbatch).
    """
    queries = query.shape[2]
    if mask is not None:
        shape = (mask.shape[0], 1, queries, key.shape[2])
        hidden = torch.ones(shape, dtype=torch.bool, device=query.device)
        hidden[..., : max(lengths) if mask.shape[3] == 1 else mask.shape[3]] = ~mask
        return {"atten_mask": hidden, "sparse_mode": WHOLE_MASK, "inner_precise": EMPTY_ROWS_ARE_ZERO}
    if not causal:
        return {}
    options = {"atten_mask": _compressed_mask(query.device), "sparse_mode": RIGHT_DOWN_CAUSAL}
    if 0 < window < max(lengths):
        options |= {"sparse_mode": BAND, "pre_tokens": window - 1, "next_tokens": 0}
    if min(lengths) < queries:
        options["inner_precise"] = EMPTY_ROWS_ARE_ZERO
    return options


@functools.cache
def _compressed_mask(device: torch.device) -> torch.Tensor:
    """The `[2048, 2048]` mask from which FIA makes a causal mask or a band of any size."""
    return torch.ones((COMPRESSED_MASK, COMPRESSED_MASK), dtype=torch.bool, device=device).triu_(1)


def _antiquant(query: torch.Tensor, operands: tuple[_Operand, _Operand]) -> dict[str, Any]:
    """The arguments of FIA that decode codes as `(code + offset) * scale`: its offsets are our zeros negated.

    Scales are `[G, 1, D]` or `[G]` in the dtype of q, or float32 `[B, G, capacity]` per token. Several queries take
    no scales per head, and in float16 K's and V's in one tensor `[2, G, 1, D]`.
    """
    several = query.shape[2] > 1
    mode = min(_mode(operand) for operand in operands)  # a scale per head is also one per channel
    mode = PER_CHANNEL if several and mode == PER_HEAD else mode
    scales = [_antiquant_part(operand.scale, operand.codes, mode, query.dtype) for operand in operands]
    offsets = None
    if any(operand.zero is not None for operand in operands):  # both or neither
        zeros = [torch.zeros_like(scale) if zero is None else -zero for _, scale, zero in operands]
        offsets = [
            _antiquant_part(zero, operand.codes, mode, query.dtype)
            for zero, operand in zip(zeros, operands, strict=True)
        ]
    if several and query.dtype == torch.float16:
        combined = {"antiquant_scale": torch.stack(scales)}
        return combined if offsets is None else {**combined, "antiquant_offset": torch.stack(offsets)}
    options: dict[str, Any] = {"key_antiquant_mode": mode, "value_antiquant_mode": mode}
    options |= {"key_antiquant_scale": scales[0], "value_antiquant_scale": scales[1]}
    if offsets is not None:
        options |= {"key_antiquant_offset": offsets[0], "value_antiquant_offset": offsets[1]}
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
    operands: tuple[_Operand, _Operand],
    query_scale: torch.Tensor,
    scaling: float,
    lengths: list[int],
) -> torch.Tensor:
    """FAQuant decode: int8 q, K and V; the weights are quantized in the kernel, per head and block of keys.

    The op reads pages `[pages, page, KV heads, D]`. Our storage `[B, G, capacity, D]` is that for one KV head: page i
    of head g of sequence b is page `(b * G + g) * capacity / page + i`. Since the op's scales are per head and not per
    sequence, it is called once per KV head, each time over the same view of the storage with another block table.
    """
    (key, key_scale, _), (value, value_scale, _) = operands
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
            codes[group], key_pages, value_pages, 1, share, scaling, tables[group], context, ONLINE,
            ACL_TYPES[query.dtype], score_descale[group], value_descale[group], output[group],
        )  # fmt: skip
    return output.transpose(0, 1).reshape(batch, 1, heads, width)


def _pages(codes: torch.Tensor) -> torch.Tensor:
    """Codes `[B, G, S, D]` as pages `[B * G * capacity / page, page, 1, D]`: a view, unless the storage is small.

    Storage of at most 256 tokens, whose capacity may not divide into usual pages, is copied to the next that does.
    """
    storage = _stored(codes)
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
