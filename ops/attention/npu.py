"""Attention on an Ascend NPU, behind the Python signature of the reference.

npu_fused_infer_attention_score (FIA) serves float K and V, and int8 codes that it decodes inside, mostly at decode, for
one query per sequence. One int8 query (FAQuant): the ATB op _npu_paged_attention_quant. What those ops do not take goes
through `attention_reference` on the device, a block of keys at a time; `report` says so.
"""

import torch

from ..shared.npu_helpers import npu_description, refuse_fp8, require_npu_float
from .arguments import LARGEST_COUNT, check_attention, whole_codes_only
from .call import AttentionCall, Coded
from .npu_fused import PER_TOKEN, antiquant_mode, attend_fused, fused_declines
from .npu_paged import LARGEST_PAGE, attend_paged, paged_declines

ATTENTION_NPU = npu_description(
    "npu_fused_infer_attention_score, which waits for `length` on the host and gets a copy of a window at decode; int8 "
    "queries by _npu_paged_attention_quant, a call per KV head; by the reference (PyTorch): int4, scales in groups, K "
    "and V of different granularity, several queries or a mask over codes except static ones in float16 or, up to 16 "
    "queries, any in bfloat16, int8 queries except one over static codes per head, scores by position, and segments of "
    "a sequence where causality or a window cuts them; fp8 raises"
)
ATTENTION_LSE_NPU = "reference (PyTorch); fp8 raises"


def _is_empty(call: AttentionCall) -> bool:
    return call.query.numel() == 0 or call.keys == 0


def _is_cut(call: AttentionCall) -> bool:
    """Whether causality or a window hides tokens in use."""
    mask, causal, _, window = call.visibility
    return causal and mask is None and (call.query.shape[2] > 1 or window > 0)


def _doubled(call: AttentionCall) -> AttentionCall:
    """The call with its one query twice, if there is a mask.

    With one query and a mask `[B, 1, 1, S]` FIA ignores all beyond key 512 without an error
    (github.com/vllm-project/vllm-ascend/issues/15503). For two FIA has another kernel, that of prefill.
    """
    mask = call.visibility.mask
    if mask is None or mask.dim() != 4 or call.query.shape[2] != 1:
        return call
    visibility = call.visibility._replace(mask=mask.expand(-1, -1, 2, -1))
    return call._replace(query=call.query.expand(-1, -1, 2, -1), visibility=visibility)


def attention_npu_supports(call: AttentionCall) -> str | None:
    """None, or why no op of the NPU serves a call.

    int4 codes are not for FIA: it wants eight in an int32, in an order that no document tells.

    Raises:
        ValueError: what the reference refuses too; a query that is neither float16 nor bfloat16.
        NotImplementedError: codes in fp8.
    """
    check_attention(call)
    require_npu_float("q", call.query)
    refuse_fp8(call.key.codes, call.value.codes)
    if _is_empty(call):
        return None
    if reason := whole_codes_only(call):
        return reason
    if call.position.query is not None:
        return "no op of the NPU adds scores by position; take a scheme that counts biases of k in (fold_bias=False)"
    call = _doubled(call)
    reason = fused_declines(call) if call.query_scale is None else paged_declines(call)
    if reason is None and _is_cut(call) and max(_lengths(call)) > call.key.codes.shape[2]:
        return "no op of the NPU takes a segment of a sequence that causality or a window cuts"
    return reason


def attention_lse_npu_supports(call: AttentionCall) -> str | None:
    """Why no op of the NPU serves a call.

    Raises:
        NotImplementedError: codes in fp8.
    """
    refuse_fp8(call.key.codes, call.value.codes)
    return "no op of the NPU gives a log-sum-exp, by which segments are merged; take a scheme without tokens in float"


def attention_npu(call: AttentionCall) -> torch.Tensor:
    """`attention_reference` by ops of torch_npu, of calls that `attention_npu_supports` lets pass.

    Both ops plan their work on the host, from lists of lengths: `length` is copied there, which waits for the device.
    Neither knows a window at decode: the codes in it, not the whole cache, are copied to storage of their own.

    Raises:
        ValueError: a dtype, shape or layout beyond the limits of the op; the message names the limit.
        RuntimeError: torch_npu cannot be imported.
    """
    batch, heads, queries, width = call.query.shape
    if _is_empty(call):
        return call.query.new_zeros((batch, queries, heads, width))
    is_cut, window = _is_cut(call), call.visibility.window
    call = _doubled(call)
    lengths = [min(max(0, tokens), call.key.codes.shape[2]) for tokens in _lengths(call)]
    if not is_cut:
        call = call._replace(visibility=call.visibility._replace(window=0))
    elif window and queries == 1 and max(lengths) > window:
        call = call._replace(key=_newest(call.key, lengths, window), value=_newest(call.value, lengths, window))
        lengths = [min(tokens, window) for tokens in lengths]
    output = attend_fused(call, lengths) if call.query_scale is None else attend_paged(call, lengths)
    if 0 in lengths:
        is_empty = torch.tensor([tokens == 0 for tokens in lengths], device=output.device)
        output = output.masked_fill(is_empty.view(-1, 1, 1, 1), 0)
    return output[:, :queries]


def _lengths(call: AttentionCall) -> list[int]:
    """Tokens in use, per sequence, on the host, as the caller says: may exceed those stored."""
    batch, _, capacity = call.key.codes.shape[:3]
    length = call.visibility.length
    if length is None:
        return [capacity] * batch
    return [min(max(tokens, -LARGEST_COUNT), LARGEST_COUNT) for tokens in length.expand(batch).tolist()]


def _newest(side: Coded, lengths: list[int], window: int) -> Coded:
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

    codes, scale, zero, group, *_ = side
    if antiquant_mode(side) == PER_TOKEN:
        scale, zero = copied(scale), None if zero is None else copied(zero)
    return Coded(copied(codes), scale, zero, group)
